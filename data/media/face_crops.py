"""Folders of videos -> aligned face crops and mels -> a TFDS data set, for training Wav2Lip on real people.

Preparation is a job over videos: each is decoded, its faces are found and cut out, and one file with its crops and its
sound's mel appears when it is complete, so a job that is started again goes on where it was. The TFDS builder packs
these files. Sources: Rudrabha/Wav2Lip preprocess.py; LRS2's lists (first word of a line: folder/video).
"""

import io
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

from ...storage.paths import as_path, is_local
from ...storage.writing import staged
from ..files import text_lines, walk
from ..images.resize import RESIZE
from ..splits import held_out
from .audio import SAMPLE_RATE, load_audio, mel_spectrogram
from .video import open_video, sound_delay

VIDEO_SUFFIXES = {".avi", ".mkv", ".mov", ".mp4", ".mpg", ".webm"}
FPS = 25
SPLITS = ("train", "test")
MIN_FRAMES = 16  # shorter ones are left out, as published
# frames [T, X, Y, 3] RGB uint8 -> for each its face's box (top, bottom, left, right) in pixels, or None
Detect = Callable[[np.ndarray], Sequence[tuple[int, int, int, int] | None]]


def find_videos(folder: Path, lists: Path | None = None) -> dict[str, list[Path]]:
    """Video files by split: from `lists`/train.txt and test.txt (or val.txt) where given, else a twentieth is "test",
    drawn by folder.

    ValueError for a folder without videos and for a listed video that does not exist.
    """
    if lists is None:
        found = [as_path(path) for path in walk(folder, VIDEO_SUFFIXES)]
        if not found:
            raise ValueError(f"no videos in {folder}, expected files with {', '.join(sorted(VIDEO_SUFFIXES))}")
        if len(found) < 2:
            return {"train": found, "test": []}
        folders = np.unique([str(path.parent) for path in found], return_inverse=True)[1]  # one a speaker, usually
        chosen = held_out(folders, 0.05)
        parts = {"train": ~chosen, "test": chosen}
        return {split: [path for path, own in zip(found, mask, strict=True) if own] for split, mask in parts.items()}
    files = {"train": lists / "train.txt", "test": lists / ("test.txt" if (lists / "test.txt").exists() else "val.txt")}
    if not any(file.exists() for file in files.values()):
        raise ValueError(f"{lists} holds no lists, expected train.txt and test.txt or val.txt")
    return {split: _listed(folder, file) for split, file in files.items() if file.exists()}


def _listed(folder: Path, file: Path) -> list[Path]:
    names = [line.split()[0] for _, line in text_lines(file)]
    return [_video(folder, name, file) for name in names]


def _video(folder: Path, name: str, file: Path) -> Path:
    candidates = [folder / name, *(folder / f"{name}{suffix}" for suffix in sorted(VIDEO_SUFFIXES))]
    path = next((path for path in candidates if path.is_file()), None)
    if path is None:
        raise ValueError(f"{file} lists {name!r}, of which there is no video in {folder}")
    return path


def prepare(video: Path, target: Path, detect: Detect, *, batch_size: int = 16, max_side: int = 192) -> str:
    """Writes the crops and the mel of one video to `target` (.npz), atomically; returns "" or why it was left out.

    Frames without a face are missing from the clip ("ids" says which are there). Crops are the boxes as detected, made
    smaller where a side exceeds `max_side`. The video is read at 25 frames per second; its sound, from the first
    picture on. ValueError for a damaged video and for one without sound.
    """
    pictures, ids = [], []
    opened, mel = open_video(video), mel_spectrogram(_aligned_sound(video))
    for start, frames in _batches(opened.frames(FPS), batch_size):
        for i, (frame, box) in enumerate(zip(frames, detect(np.stack(frames)), strict=True), start):
            if box is not None:
                top, bottom, left, right = box
                pictures.append(_encode(frame[top:bottom, left:right], max_side))
                ids.append(i)
    if len(ids) < MIN_FRAMES:
        return f"a face in {len(ids)} frames only, expected {MIN_FRAMES} or more"
    lengths = np.array([len(picture) for picture in pictures])
    with staged(target) as stage:
        data = np.frombuffer(b"".join(pictures), np.uint8)
        np.savez(stage, data=data, lengths=lengths, ids=np.array(ids), mel=mel)
    return ""


def _aligned_sound(video: Path) -> np.ndarray:
    """The sound from the video's first picture on: silence before a sound that begins later, less of an earlier one."""
    samples, late = load_audio(video), round(sound_delay(video) * SAMPLE_RATE)
    return np.pad(samples[max(0, -late) :], (max(0, late), 0))


def _batches(frames: Iterator[np.ndarray], size: int) -> Iterator[tuple[int, list[np.ndarray]]]:
    start, batch = 0, []
    for frame in frames:
        batch.append(frame)
        if len(batch) == size:
            yield start, batch
            start, batch = start + size, []
    if batch:
        yield start, batch


def _encode(crop: np.ndarray, max_side: int) -> bytes:
    side = max(crop.shape[:2])
    if side > max_side:
        rows, columns = (max(1, round(n * max_side / side)) for n in crop.shape[:2])
        crop = RESIZE["cv2_bilinear"](crop, (rows, columns))
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(crop)).save(buffer, "jpeg", quality=95)
    return buffer.getvalue()


class FaceCrops(tfds.core.GeneratorBasedBuilder):
    """TFDS builder over prepared files: `FaceCrops(folder)` packs `folder`/clips/<split>/*.npz into `folder`/tfds."""

    VERSION = tfds.core.Version("1.0.0")
    code_path = None  # there are no checksum files beside the code

    def __init__(self, folder: Path):
        if not is_local(folder):
            raise ValueError(f"clips are packed in and read from local folders, got {folder}")
        self._folder = folder
        super().__init__(data_dir=self._folder / "tfds", file_format="array_record")

    def _info(self) -> tfds.core.DatasetInfo:
        features = tfds.features.FeaturesDict(
            {
                # JPEG files end to end: TFDS would decode every picture of a clip, and training asks for ten.
                "data": tfds.features.Tensor(shape=(None,), dtype=np.uint8),
                "lengths": tfds.features.Tensor(shape=(None,), dtype=np.int64),
                "ids": tfds.features.Tensor(shape=(None,), dtype=np.int64),
                "mel": tfds.features.Tensor(shape=(None, 80), dtype=np.float32),
                "name": tfds.features.Text(),
            }
        )
        description = "Face crops of videos at 25 frames per second, with the log-mel of their sound."
        return tfds.core.DatasetInfo(builder=self, features=features, description=description, disable_shuffling=True)

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Iterator[Any]]:
        files = {split: prepared_clips(self._folder, split) for split in SPLITS}
        return {split: self._generate_examples(found) for split, found in files.items() if found}

    def _generate_examples(self, files: Sequence[Path]) -> Iterator[Any]:
        for i, file in enumerate(files):
            with np.load(file) as clip:
                yield i, {**clip, "mel": clip["mel"].T, "name": self._name(file)}

    def _name(self, file: Path) -> str:
        return file.relative_to(self._folder / "clips").with_suffix("").as_posix()


def prepared_clips(folder: Path, split: str) -> list[Path]:
    """The files that `prepare` wrote for a split, in the order of their paths."""
    clips = folder / "clips" / split
    return [as_path(path) for path in walk(clips, {".npz"})] if clips.is_dir() else []


def pack(folder: Path) -> None:
    """Packs the prepared clips of `folder` as a data set, unless the one that is there holds as many."""
    builder = FaceCrops(folder)
    packed = {name: split.num_examples for name, split in (builder.info.splits or {}).items()}
    ready = {split: len(prepared_clips(folder, split)) for split in SPLITS}
    if not builder.is_prepared() or packed != {split: count for split, count in ready.items() if count}:
        shutil.rmtree(folder / "tfds", ignore_errors=True)
        FaceCrops(folder).download_and_prepare()


def open_split(folder: Path, split: str) -> Sequence[dict[str, Any]]:
    """The packed clips of a split; ValueError where `folder` holds none."""
    builder = FaceCrops(folder)
    if not builder.is_prepared() or split not in (builder.info.splits or {}):
        raise ValueError(
            f"{folder} holds no prepared clips of split {split!r}; `python -m omnax.infer prepare-faces` makes them"
        )
    open_records: Any = builder.as_data_source
    return open_records(split)
