"""Images on disk through a vision model: found, preprocessed as published, run in batches of one shape."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Float
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ..data.files import printable, read_file, walk
from ..data.images.decode import Alpha, CorruptExample, decode_image
from ..data.preprocess import build
from ..data.sources import IMAGE_SUFFIXES
from ..hub import Bundle
from ..storage.paths import as_path


def find_images(paths: Sequence[str]) -> list[Path]:
    """Files as they are given, and every image below the folders given; ValueError for a path that does not exist."""
    found: list[Path] = []
    for path in map(as_path, paths):
        if path.is_dir():
            found += map(as_path, walk(path, IMAGE_SUFFIXES))
        elif path.is_file():
            found.append(path)
        else:
            raise ValueError(f"no such image or folder: {str(path)!r}")
    if not found:
        raise ValueError(f"no images in {[printable(path) for path in paths[:4]]}, expected {sorted(IMAGE_SUFFIXES)}")
    return found


def read_pixels(path: str | Path, channels: int, alpha: Alpha) -> np.ndarray:
    """uint8 [X, Y, channels] of an image file; CorruptExample, naming the file, for what cannot be read or is none.

    `alpha` is the processor's: the rule of the library that the weights come from for what is transparent.
    """
    try:
        data = read_file(path)
    except OSError as error:
        raise CorruptExample(str(path), f"cannot be read ({error.strerror})") from error
    return decode_image(data, channels, str(path), alpha=alpha)


def read_image(path: Path, bundle: Bundle) -> tuple[np.ndarray, Float[np.ndarray, "X Y C"]]:
    """The image as it is (uint8) and as the model takes it; CorruptExample, naming the file, for what is no image."""
    pixels = read_pixels(path, bundle.config.num_channels, bundle.processor.alpha)
    prepared = build(bundle.processor.steps)({"image": pixels}, np.random.default_rng(0))
    return pixels, prepared["image"]


def apply_in_batches(
    bundle: Bundle, paths: Sequence[Path], batch_size: int, select: Callable[[dict[str, Array]], Any]
) -> Iterator[tuple[Path, np.ndarray, Any]]:
    """(path, pixels, what `select` takes from the model's output for it), image by image, with a progress bar.

    Images that cannot be read are named on the screen and left out; ValueError where all are. The last batch is filled
    with copies so that the model compiles once.
    """

    @jax.jit
    def run(params: Any, images: Float[Array, "B X Y C"]) -> Any:
        return select(bundle.model.apply({"params": params}, images))  # type: ignore[arg-type]

    batch_size, skipped = min(batch_size, len(paths)), list[str]()
    columns = TextColumn("images"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, transient=True) as progress:
        task = progress.add_task("images", total=len(paths))
        for first in range(0, len(paths), batch_size):
            chunk = paths[first : first + batch_size]
            read = []
            for path in chunk:
                try:
                    read.append((path, *read_image(path, bundle)))
                except CorruptExample as error:
                    skipped.append(skipped_line(error.name, error.reason))
                    progress.console.print(skipped[-1], soft_wrap=True, markup=False, highlight=False)
            if read:
                images = [image for _, _, image in read]
                filled = np.stack([*images, *[images[-1]] * (batch_size - len(images))])
                out = jax.tree.map(np.asarray, run(bundle.params, filled))
                for i, (path, pixels, _) in enumerate(read):
                    own = jax.tree.map(lambda leaf, i=i: leaf[i], out)
                    check_finite(str(path), *jax.tree.leaves(own))
                    yield path, pixels, own
            progress.advance(task, len(chunk))
    if len(skipped) == len(paths):
        raise ValueError(f"none of the {len(paths)} images could be read; {skipped[0]}")


def check_finite(name: str, *outputs: np.ndarray) -> None:
    """ValueError for an input of which the model makes NaN or infinity: nothing may be ranked or kept by these."""
    if not all(np.isfinite(output).all() for output in outputs):
        raise ValueError(f"{printable(name)}: what the model makes of it is not finite (damaged weights?)")


def skipped_line(name: str, reason: str) -> str:
    """What every command says of an input that it leaves out."""
    return f"skipped {printable(name)}: {printable(reason)}"
