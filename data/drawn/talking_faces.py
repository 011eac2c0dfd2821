"""Clips of talking faces: the windows Wav2Lip trains on, and drawn faces whose mouths follow synthesised sound.

A clip is a dict: "frames", a sequence of BGR pictures [X, Y, 3] uint8, 25 per second; "ids", their numbers in the video
(frames without a face are missing, so there may be gaps); "mel" [80, M]; "name". Sampling follows Rudrabha/Wav2Lip
wav2lip_train.py and color_syncnet_train.py.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..images.decode import CorruptExample, decode_image
from ..images.resize import RESIZE
from ..images.transforms import Example
from ..media import face_crops
from ..media.audio import MEL_RATE, SAMPLE_RATE, WINDOW, mel_spectrogram, mel_windows
from ..sources import Source

FPS = 25
MIN_FRAMES = 16  # shorter videos are left out, as published


def window_positions(ids: np.ndarray, length: int) -> np.ndarray:
    """Positions in `ids` (ascending) from which `length` consecutive frames all exist."""
    if len(ids) < length:
        return np.empty(0, np.int64)
    return np.flatnonzero(ids[length - 1 :] - ids[: len(ids) - length + 1] == length - 1)


def sample_window(clip: Example, rng: np.random.Generator, *, length: int = 5, mel_offset: int = -1) -> Example:
    """What the generator trains on: a window, another one of the same video as reference, and their sound.

    Gives "target" and "reference" [length, X, Y, 3] uint8, "mel" [80, S, 1] of the whole window (16 mel frames for 5
    frames), and "mels" [length, 80, 16, 1], whose windows begin `mel_offset` frames after their video frames: the
    published training uses -1, its inference 0.
    """
    ids, mel = clip["ids"], clip["mel"]
    positions = window_positions(ids, length)
    steps = round(length * MEL_RATE / FPS)
    starts = (MEL_RATE * (ids[positions, None] + np.arange(length) + mel_offset) / FPS).astype(np.int64)
    last = np.maximum(starts[:, -1] + WINDOW, _mel_start(ids[positions]) + steps)
    heard = np.flatnonzero((ids[positions] + mel_offset >= 0) & (last <= mel.shape[1]))
    if not len(heard) or len(positions) < 2:
        raise CorruptExample(clip["name"], f"has no two windows of {length} frames with sound")
    chosen = int(rng.choice(heard))
    others = np.delete(positions, chosen)
    start = _mel_start(ids[positions[chosen]])
    return {
        "target": _frames(clip, positions[chosen], length),
        "reference": _frames(clip, int(rng.choice(others)), length),
        "mel": mel[:, start : start + steps, None],
        "mels": mel_windows(mel, starts[chosen]),
    }


def sample_pair(clip: Example, rng: np.random.Generator, *, length: int = 5) -> Example:
    """What the expert trains on: a window's sound with its own frames (label 1) or other ones of the video (label 0).

    Gives "frames" [length, X, Y, 3] uint8, "mel" [80, S, 1] and "label" float32.
    """
    window = sample_window(clip, rng, length=length, mel_offset=0)
    in_sync = bool(rng.integers(2))
    frames = window["target"] if in_sync else window["reference"]
    return {"frames": frames, "mel": window["mel"], "label": np.float32(in_sync)}


def _mel_start(frame: Any) -> Any:
    return (MEL_RATE * (frame / FPS)).astype(np.int64)


def _frames(clip: Example, position: int, length: int) -> np.ndarray:
    return np.stack([clip["frames"][i] for i in range(position, position + length)])


class Resized(Sequence[np.ndarray]):
    """Frames resized to `size` x `size` as they are asked for; crop "mouth" takes the lower half of each."""

    def __init__(self, frames: Sequence[np.ndarray], size: int, crop: str = "face"):
        self._frames, self._size, self._crop = frames, size, crop

    def __len__(self) -> int:
        return len(self._frames)

    def __getitem__(self, index: Any) -> Any:
        frame = self._frames[index]
        frame = frame[len(frame) // 2 :] if self._crop == "mouth" else frame
        return RESIZE["cv2_bilinear"](frame, (self._size, self._size))


class Repeated:
    """Every clip `times` over, so that an evaluation sees several windows of it."""

    def __init__(self, clips: Source, times: int):
        self.class_names = clips.class_names
        self._clips, self._times = clips, times

    def __len__(self) -> int:
        return len(self._clips) * self._times

    def __getitem__(self, index: int) -> Example:
        return self._clips[index // self._times]


class FaceClips:
    """Clips of a TFDS data set of face crops (data/media/face_crops.py) in `folder`; pictures are decoded late."""

    def __init__(self, folder: Path, split: str):
        self._records = face_crops.open_split(folder, split)
        self.class_names: list[str] = []

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> Example:
        record = self._records[index]
        frames = _Encoded(record["data"], record["lengths"], name := record["name"].decode())
        return {"frames": frames, "ids": record["ids"], "mel": record["mel"].T, "name": name}


class _Encoded(Sequence[np.ndarray]):
    """BGR frames out of encoded ones that lie end to end."""

    def __init__(self, data: np.ndarray, lengths: np.ndarray, name: str):
        self._data, self._ends, self._lengths, self._name = data, np.cumsum(lengths), lengths, name

    def __len__(self) -> int:
        return len(self._lengths)

    def __getitem__(self, index: Any) -> Any:
        end = self._ends[index]
        return decode_image(self._data[end - self._lengths[index] : end].tobytes(), name=self._name)[..., ::-1]


class DrawnFaces:
    """Three-second clips of drawn faces, `source[i]` a pure function of (seed, i); see `draw_clip`.

    `identities` "many" gives every clip colours of its own; "one" fixes background and lips and varies the skin by 8 %.
    Clips hold besides "audio" [48000] and "envelope" [75], how far the mouth is open in each frame.
    """

    def __init__(self, count: int, *, seed: int = 0, identities: str = "many"):
        if identities not in ("many", "one"):
            raise ValueError(f"identities is {identities!r}, expected 'many' or 'one'")
        self.class_names: list[str] = []
        self._count, self._seed, self._identities = count, seed, identities
        self._drawn: dict[int, Example] = {}

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> Example:
        if index not in self._drawn:
            self._drawn[index] = self._draw(index)
        return self._drawn[index]

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_drawn": {}}  # data workers draw their own

    def _draw(self, index: int) -> Example:
        clip = draw_clip(np.random.default_rng((self._seed, index)), same_person=self._identities == "one")
        return {**clip, "name": f"drawn face {index} of seed {self._seed}"}


def draw_clip(rng: np.random.Generator, *, seconds: float = 3.0, same_person: bool = False) -> Example:
    """A drawn face, 96 x 96 at 25 frames per second, that opens its mouth as loud as its voice is."""
    loudness = _random_curve(rng, seconds)
    samples = np.arange(int(seconds * SAMPLE_RATE))
    audio = _voice(rng, loudness(samples / SAMPLE_RATE))
    times = (np.arange(int(seconds * FPS)) + 0.5) / FPS
    envelope = loudness(times)
    frames = _draw_frames(rng, envelope, same_person)
    ids = np.arange(len(frames))
    return {
        "frames": frames,
        "ids": ids,
        "mel": mel_spectrogram(audio),
        "audio": audio,
        "envelope": envelope.astype(np.float32),
    }


def _random_curve(rng: np.random.Generator, seconds: float) -> Any:
    """A smooth random function of time in (0, 1): sigmoid(3 x) of normal knots at 8 Hz, joined by half cosines."""
    knots = rng.standard_normal(int(8 * seconds) + 2)

    def curve(time: np.ndarray) -> np.ndarray:
        index = np.minimum((8 * time).astype(int), len(knots) - 2)
        weight = (1 - np.cos(np.pi * (8 * time - index))) / 2
        return 1 / (1 + np.exp(-3 * (knots[index] * (1 - weight) + knots[index + 1] * weight)))

    return curve


def _voice(rng: np.random.Generator, loudness: np.ndarray) -> np.ndarray:
    """Fourteen harmonics of a random pitch, and a little noise [samples] float32."""
    phase = 2 * np.pi * rng.uniform(100, 220) * np.arange(len(loudness)) / SAMPLE_RATE
    tone = sum(np.sin(h * phase + rng.uniform(0, 2 * np.pi)) / h for h in range(1, 15))
    return (0.2 * loudness * tone + 0.002 * rng.standard_normal(len(loudness))).astype(np.float32)


def _draw_frames(rng: np.random.Generator, envelope: np.ndarray, same_person: bool) -> np.ndarray:
    """[frames, 96, 96, 3] uint8, BGR."""
    background, skin, lips = rng.uniform(0.1, 0.9, 3), rng.uniform(0.35, 0.95, 3), rng.uniform(0.1, 0.8, 3)
    if same_person:
        background, lips = np.array([0.35, 0.4, 0.3]), np.array([0.25, 0.2, 0.65])
        skin = np.array([0.6, 0.7, 0.85]) * rng.uniform(0.92, 1.08)
    count = len(envelope)
    drift = 1.5 * np.sin(2 * np.pi * (np.arange(count)[:, None] / count * rng.uniform(0.5, 1.5, 2) + rng.random(2)))
    row, column = (np.array([48.0, 48.0]) + rng.uniform(-3, 3, 2) + drift).T
    picture = np.broadcast_to(background, (count, 96, 96, 3)).copy()

    def paint(color: Any, center: tuple[float, float], half_height: Any, half_width: float) -> None:
        height = np.broadcast_to(half_height, count)
        edge = np.minimum(height, half_width)  # a soft one, half a pixel to both sides where the ellipse is narrow
        y, rows = _near(row + center[0], height * (1 + 0.5 / edge))
        x, columns = _near(column + center[1], half_width * (1 + 0.5 / edge))
        dy, dx = y[:, :, None] / height[:, None, None], x[:, None, :] / half_width
        inside = np.clip((1 - np.hypot(dy, dx)) * edge[:, None, None] + 0.5, 0, 1)[..., None]
        picture[:, rows, columns] = picture[:, rows, columns] * (1 - inside) + np.asarray(color) * inside

    paint(skin, (0, 0), 44, 36)
    for side in (-13, 13):
        paint((0.95,) * 3, (-12, side), 4, 6)
        paint((0.1,) * 3, (-12, side), 2.5, 2.5)
    mouth = 2 + 9 * envelope
    paint(lips, (22, 0), mouth + 2.5, 14)
    paint((0.05,) * 3, (22, 0), mouth, 11)
    noisy = picture + 0.01 * rng.standard_normal(picture.shape)
    return np.rint(255 * np.clip(noisy, 0, 1)).astype(np.uint8)


def _near(center: np.ndarray, reach: np.ndarray) -> tuple[np.ndarray, slice]:
    """The part of an axis of 96 pixels within `reach` of `center` [frames] in any frame: distances, and which it is."""
    low, high = np.floor((center - reach).min()), np.ceil((center + reach).max())
    pixels = slice(max(int(low), 0), min(int(high) + 1, 96))
    return np.arange(pixels.start, pixels.stop) - center[:, None], pixels


def openness(frames: np.ndarray) -> np.ndarray:
    """How far drawn mouths are open [frames]: the darkness of the middle of the mouth; frames [frames, 96, 96, 3]."""
    mouth = np.asarray(frames, np.float64)[:, 60:86, 38:58] / (255 if frames.dtype == np.uint8 else 1)
    return 1 - mouth.mean((1, 2, 3))


def correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Pearson's r of two series; 0 where one of them is constant."""
    a, b = a - a.mean(), b - b.mean()
    norm = float(np.linalg.norm(a) * np.linalg.norm(b))
    return float(a @ b) / norm if norm > 1e-12 else 0.0
