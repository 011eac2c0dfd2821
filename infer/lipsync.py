"""Make a face in a video or picture say any speech (Wav2Lip): video in, video out.

Two passes over the video, in chunks, so that memory does not grow with its length: find the faces, then cut them out,
generate, paste them back and write. Rules are those of Rudrabha/Wav2Lip inference.py where nothing else is said.
"""

import argparse
import dataclasses
import itertools
import resource
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from .. import hub
from ..data.images.decode import decode_image
from ..data.images.resize import RESIZE
from ..data.media.audio import SAMPLE_RATE, load_audio, mel_spectrogram, mel_windows, window_levels, window_starts
from ..data.media.video import open_video, write_video
from ..models.wav2lip import Generator
from ..storage.paths import as_path, is_local
from ..storage.writing import check_output
from .face_detection import Box, Detector, fill_gaps, make_detector, pad, smooth

IMAGE_SUFFIXES = {".bmp", ".jpeg", ".jpg", ".png", ".webp"}
MISSING = ("error", "keep_frame", "interpolate")
Generate = Callable[[np.ndarray, np.ndarray], np.ndarray]  # mels, BGR faces -> BGR faces, uint8
SIDES = ("TOP", "BOTTOM", "LEFT", "RIGHT")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--weights", required=True, help="generator: wav2lip.pth, wav2lip_gan.pth or an exported run")
    parser.add_argument("--face", required=True, type=as_path, help="video, or picture")
    parser.add_argument("--audio", required=True, type=as_path, help="speech: any media file with sound")
    parser.add_argument("--out", type=as_path, default=Path("result.mp4"), help="MP4 file to write")
    parser.add_argument("--box", type=int, nargs=4, metavar=SIDES, help="instead of finding")
    parser.add_argument("--pads", type=int, nargs=4, default=(0, 10, 0, 0), metavar=SIDES, help="widen found boxes")
    parser.add_argument("--no-smooth", action="store_true", help="take every box as it was found")
    parser.add_argument(
        "--missing-face", choices=MISSING, default="error", help="what to do with frames without a face"
    )
    parser.add_argument("--static", action="store_true", help="use the first frame only")
    parser.add_argument("--detector", default="", help="s3fd.pth; default: MTCNN with the weights of the package mtcnn")
    parser.add_argument("--min-face", type=int, default=40, help="smallest face MTCNN looks for, in pixels")
    parser.add_argument("--fps", type=_rate, default=Fraction(25), help="frames per second for a picture")
    parser.add_argument("--resize-factor", type=int, default=1, help="divides the size of the frames first")
    parser.add_argument("--rotate", action="store_true", help="turn the frames clockwise by a quarter")
    parser.add_argument("--crop", type=int, nargs=4, default=(0, -1, 0, -1), metavar=SIDES, help="-1: to the end")
    parser.add_argument("--feather", type=int, default=0, help="pixels over which a face blends into its frame")
    parser.add_argument("--quiet-below", type=float, metavar="DB", help="leave frames whose sound is below, as -50")
    parser.add_argument("--published-length", action="store_true", help="stop with the last whole mel window")
    parser.add_argument("--batch-size", type=int, default=128, help="faces generated at once")
    parser.add_argument("--detector-batch-size", type=int, default=16, help="frames searched for faces at once")
    parser.add_argument("--bfloat16", action="store_true", help="compute in bfloat16, but for the last layer")


def run(arguments: argparse.Namespace) -> None:
    begin = time.perf_counter()
    options = Options(**{f.name: getattr(arguments, f.name) for f in dataclasses.fields(Options)})
    check_video(arguments.out, (arguments.face, arguments.audio))
    generate, size, batch_size = load_generator(arguments.weights, options.batch_size, bfloat16=arguments.bfloat16)
    samples = load_audio(arguments.audio)
    mel = mel_spectrogram(samples)
    footage = open_footage(arguments.face, options)
    count = num_output_frames(footage, len(samples) / SAMPLE_RATE, mel, published=options.published_length)
    starts = window_starts(mel.shape[1], float(footage.fps), count)
    quiet = None if options.quiet_below is None else window_levels(samples, starts) < options.quiet_below
    with _progress() as progress:
        detect = None if options.box else make_detector(options.detector, min_face=options.min_face)
        boxes = find_boxes(footage, count, detect, options, progress)
        frames = sync_lips(
            footage, boxes, mel, starts, generate, size, batch_size, quiet=quiet, feather=options.feather
        )
        shown = progress.track(frames, total=count, description="generate")
        written = write_video(arguments.out, shown, footage.fps, audio=arguments.audio)
    seconds = time.perf_counter() - begin
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"{written} frames in {seconds:.1f} s ({written / seconds:.1f} frames/s), peak memory {peak:.0f} MiB")
    print(f"video: {arguments.out}")


@dataclasses.dataclass(frozen=True)
class Options:
    """The settings of `add_arguments` for finding, cutting and pasting faces; ValueError for senseless numbers."""

    box: Sequence[int] | None = None
    pads: Sequence[int] = (0, 10, 0, 0)
    no_smooth: bool = False
    missing_face: str = "error"
    static: bool = False
    detector: str = ""
    min_face: int = 40
    fps: Fraction = Fraction(25)
    resize_factor: int = 1
    rotate: bool = False
    crop: Sequence[int] = (0, -1, 0, -1)
    feather: int = 0
    quiet_below: float | None = None
    published_length: bool = False
    batch_size: int = 128
    detector_batch_size: int = 16

    def __post_init__(self) -> None:
        least = {"min_face": 1, "resize_factor": 1, "feather": 0, "batch_size": 1, "detector_batch_size": 1}
        for name, lowest in least.items():
            if getattr(self, name) < lowest:
                raise ValueError(f"{name} is {getattr(self, name)}, expected {lowest} or more")


def check_video(path: Path, inputs: Sequence[Path]) -> None:
    """ValueError, before any work is done, for a result that could not be written or would replace an input."""
    if path.suffix.lower() != ".mp4":
        raise ValueError(f"out is {path}, expected a name that ends in .mp4")
    check_output(path)
    local = [source for source in inputs if is_local(source) and is_local(path)]
    if path in inputs or any(path.exists() and source.exists() and path.samefile(source) for source in local):
        raise ValueError(f"out is {path}, which is an input; expected another file")


@dataclasses.dataclass(frozen=True)
class Footage:
    """The pictures to work on: RGB frames after resizing, turning and cropping, from the first one on at each call."""

    name: str
    fps: Fraction
    num_frames: int  # as declared; 0: unknown
    still: bool
    frames: Callable[[], Iterator[np.ndarray]]


def open_footage(path: Path, options: Options) -> Footage:
    """A video or a picture; ValueError for anything else and for a crop outside it."""

    def edited(frames: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
        return (edit_frame(frame, options) for frame in frames)

    if path.suffix.lower() in IMAGE_SUFFIXES:
        if not path.is_file():
            raise ValueError(f"there is no file {path}")
        picture = decode_image(path.read_bytes(), name=str(path))
        return Footage(str(path), options.fps, 1, True, lambda: edited([picture]))
    video = open_video(path)
    return Footage(str(path), video.fps, video.num_frames, options.static, lambda: edited(video.frames()))


def edit_frame(frame: np.ndarray, options: Options) -> np.ndarray:
    """Resized by the factor, turned, cropped; in this order."""
    if options.resize_factor > 1:
        rows, columns = (size // options.resize_factor for size in frame.shape[:2])
        if not rows or not columns:
            size = f"{frame.shape[0]} x {frame.shape[1]}"
            raise ValueError(f"resize_factor {options.resize_factor} leaves nothing of frames of {size} pixels")
        frame = RESIZE["cv2_bilinear"](frame, (rows, columns))
    if options.rotate:
        frame = np.rot90(frame, -1)
    top, bottom, left, right = options.crop
    rows, columns = frame.shape[:2]
    cropped = frame[top : rows if bottom == -1 else bottom, left : columns if right == -1 else right]
    if not cropped.size:
        raise ValueError(f"crop {tuple(options.crop)} leaves nothing of frames of {rows} x {columns} pixels")
    return np.ascontiguousarray(cropped)


def num_output_frames(footage: Footage, seconds: float, mel: np.ndarray, *, published: bool) -> int:
    """As many frames as the sound lasts; those of the video where the two differ by one only."""
    if published:
        return len(window_starts(mel.shape[1], float(footage.fps)))
    count = max(1, round(seconds * footage.fps))
    declared = 0 if footage.still else footage.num_frames
    return declared if declared and abs(declared - count) <= 1 else count


def find_boxes(
    footage: Footage, count: int, detect: Detector | None, options: Options, progress: Progress
) -> list[Box | None]:
    """A padded box per frame of the footage that is used, None where the frame is to stay as it is.

    ValueError, naming the frames, where a face is missing and `options.missing_face` is "error", and for a given box
    outside the frames.
    """
    frames = itertools.islice(footage.frames(), 1 if footage.still else count)
    first = next(frames, None)
    if first is None:
        raise ValueError(f"{footage.name} has no frames")
    size = first.shape[:2]
    if detect is None:
        assert options.box is not None
        return [checked_box(options.box, size)]
    boxes: list[Box | None] = []
    every, total = itertools.chain([first], frames), min(count, footage.num_frames or count)
    task = progress.add_task("find faces", total=1 if footage.still else total)
    for chunk in _chunks(every, options.detector_batch_size):
        boxes += detect(np.stack(chunk))
        progress.update(task, completed=len(boxes))
    missing = [i for i, box in enumerate(boxes) if box is None]
    if missing and (options.missing_face == "error" or len(missing) == len(boxes)):
        raise ValueError(
            f"{footage.name}: no face in {_ranges(missing)} of {len(boxes)} frames; give --box, or --missing-face "
            "keep_frame or interpolate"
        )
    padded = [pad(box, options.pads, size) for box in fill_gaps(boxes)]
    track = padded if options.no_smooth else smooth(padded)
    if options.missing_face == "interpolate":
        return list(track)
    return [None if boxes[i] is None else box for i, box in enumerate(track)]


def checked_box(box: Sequence[int], size: tuple[int, int]) -> Box:
    """The box if it lies in frames of `size`; else ValueError."""
    top, bottom, left, right = box
    if not (0 <= top < bottom <= size[0] and 0 <= left < right <= size[1]):
        raise ValueError(f"box {tuple(box)} (top, bottom, left, right) is not inside frames of {size} pixels")
    return top, bottom, left, right


def sync_lips(
    footage: Footage,
    boxes: Sequence[Box | None],
    mel: np.ndarray,
    starts: np.ndarray,
    generate: Generate,
    size: int,
    batch_size: int,
    *,
    quiet: np.ndarray | None = None,
    feather: int = 0,
) -> Iterator[np.ndarray]:
    """The frames of the result. Boxes are per frame, or one for all; short footage begins again at its first frame.

    Frames without a box, and those for which `quiet` [windows] is true, stay as they are.
    """
    kept = np.zeros(len(starts), bool) if quiet is None else quiet
    if footage.still:
        rounds = itertools.repeat((0, next(footage.frames())))
    else:
        rounds = itertools.chain.from_iterable(enumerate(footage.frames()) for _ in itertools.count())
    for chunk in _chunks(zip(starts, kept, rounds, strict=False), batch_size):
        windows, stays, numbered = zip(*chunk, strict=True)
        found = [boxes[i if len(boxes) > 1 else 0] for i, _ in numbered]
        places = [None if still else box for box, still in zip(found, stays, strict=True)]
        frames = [frame for _, frame in numbered]
        chosen = {i: box for i, box in enumerate(places) if box is not None}
        heard = mel_windows(mel, np.array(windows)[list(chosen)])
        crops = [RESIZE["cv2_bilinear"](_cut(frames[i], box), (size, size))[..., ::-1] for i, box in chosen.items()]
        generated = generate(_filled(heard, batch_size), _filled(np.stack(crops), batch_size)) if chosen else ()
        for face, (i, box) in zip(generated, chosen.items(), strict=False):  # the batch may be longer
            frames[i] = paste(frames[i], face[..., ::-1], box, feather)
        yield from frames


def paste(frame: np.ndarray, face: np.ndarray, box: Box, feather: int = 0) -> np.ndarray:
    """The frame with the whole box replaced; over `feather` pixels inside the box's edge the two blend linearly."""
    top, bottom, left, right = box
    face = RESIZE["cv2_bilinear"](np.ascontiguousarray(face), (bottom - top, right - left))
    if feather:
        rows, columns = (np.minimum(np.arange(1, n + 1), np.arange(n, 0, -1)) for n in face.shape[:2])
        weight = np.minimum(1, np.minimum(rows[:, None], columns) / (feather + 1))[..., None]
        face = np.rint(weight * face + (1 - weight) * frame[top:bottom, left:right]).astype(np.uint8)
    frame = frame.copy()
    frame[top:bottom, left:right] = face
    return frame


def load_generator(weights: str, batch_size: int, *, bfloat16: bool = False) -> tuple[Generate, int, int]:
    """(generate, face size, batch size): batches are split over all devices, so their number divides the size."""
    bundle = hub.load(weights, dtype=jnp.bfloat16 if bfloat16 else None)
    if not isinstance(bundle.model, Generator):
        raise ValueError(f"{weights} holds a {type(bundle.model).__name__}, expected the generator of Wav2Lip")
    model, variables = bundle.model, {"params": bundle.params} | bundle.variables
    mesh = jax.make_mesh((len(jax.devices()),), ("data",), axis_types=(AxisType.Auto,))
    rows = NamedSharding(mesh, PartitionSpec("data"))
    variables = jax.device_put(variables, NamedSharding(mesh, PartitionSpec()))

    @jax.jit
    def apply(variables: Any, mels: jax.Array, faces: jax.Array) -> tuple[jax.Array, jax.Array]:
        seen = faces.astype(jnp.float32) / 255.0
        masked = seen.at[:, seen.shape[1] // 2 :].set(0.0)
        generated = model.apply(variables, mels, jnp.concatenate([masked, seen], -1))
        assert isinstance(generated, jax.Array)
        return (generated * 255.0).astype(jnp.uint8), jnp.isfinite(generated).all()

    def generate(mels: np.ndarray, faces: np.ndarray) -> np.ndarray:
        pixels, finite = apply(variables, jax.device_put(mels, rows), jax.device_put(faces, rows))
        if not finite:
            raise ValueError(f"{weights} gives pixels that are not finite")
        return np.asarray(pixels)

    devices = len(jax.devices())
    return generate, bundle.config.image_size, -(-batch_size // devices) * devices


def _rate(text: str) -> Fraction:
    try:
        rate = Fraction(text)
    except (ValueError, ZeroDivisionError):
        rate = Fraction(0)
    if rate <= 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number")
    return rate


def _cut(frame: np.ndarray, box: Box) -> np.ndarray:
    return frame[box[0] : box[1], box[2] : box[3]]


def _filled(rows: np.ndarray, count: int) -> np.ndarray:
    """Zeros behind the rows, so that all batches have one size and the network compiles once."""
    return np.concatenate([rows, np.zeros((count - len(rows), *rows.shape[1:]), rows.dtype)])


def _chunks(items: Iterable[Any], size: int) -> Iterator[list[Any]]:
    iterator = iter(items)
    while chunk := list(itertools.islice(iterator, size)):
        yield chunk


def _ranges(numbers: Sequence[int]) -> str:
    """ "3, 7-12" of ascending numbers; the first ten runs."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1][1:] = [number]
        else:
            runs.append([number])
    words = ["-".join(map(str, run)) for run in runs[:10]]
    return ", ".join(words + ["..."] * (len(runs) > 10))


def _progress() -> Progress:
    return Progress(TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
