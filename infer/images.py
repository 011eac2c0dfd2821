"""Images on disk through a vision model: found, preprocessed as published, run in batches of one shape."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Float
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ..data.images.decode import decode_image
from ..data.preprocess import build
from ..data.sources import IMAGE_SUFFIXES
from ..hub import Bundle


def find_images(paths: Sequence[str]) -> list[Path]:
    """Files as they are given, and every image below the folders given; ValueError for a path that does not exist."""
    found: list[Path] = []
    for path in map(Path, paths):
        if path.is_dir():
            found += sorted(file for file in path.rglob("*") if file.suffix.lower() in IMAGE_SUFFIXES)
        elif path.is_file():
            found.append(path)
        else:
            raise ValueError(f"no such image or folder: {str(path)!r}")
    if not found:
        raise ValueError(f"no images in {[str(path) for path in paths]}, expected {sorted(IMAGE_SUFFIXES)}")
    return found


def read_image(path: Path, bundle: Bundle) -> tuple[np.ndarray, Float[np.ndarray, "X Y C"]]:
    """The image as it is (uint8) and as the model takes it; ValueError, naming the file, for what is no image."""
    pixels = decode_image(path.read_bytes(), bundle.config.num_channels, str(path))
    prepared = build(bundle.processor.steps)({"image": pixels}, np.random.default_rng(0))
    return pixels, prepared["image"]


def apply_in_batches(
    bundle: Bundle, paths: Sequence[Path], batch_size: int, select: Callable[[dict[str, Array]], Any]
) -> Iterator[tuple[Path, np.ndarray, Any]]:
    """(path, pixels, what `select` takes from the model's output for it), image by image, with a progress bar.

    The last batch is filled with copies so that the model compiles once.
    """

    @jax.jit
    def run(params: Any, images: Float[Array, "B X Y C"]) -> Any:
        return select(bundle.model.apply({"params": params}, images))  # type: ignore[arg-type]

    batch_size = min(batch_size, len(paths))
    columns = TextColumn("images"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, transient=True) as progress:
        task = progress.add_task("images", total=len(paths))
        for first in range(0, len(paths), batch_size):
            chunk = paths[first : first + batch_size]
            pixels, images = zip(*(read_image(path, bundle) for path in chunk), strict=True)
            filled = np.stack([*images, *[images[-1]] * (batch_size - len(images))])
            out = jax.tree.map(np.asarray, run(bundle.params, filled))
            for i, path in enumerate(chunk):
                yield path, pixels[i], jax.tree.map(lambda leaf, i=i: leaf[i], out)
            progress.advance(task, len(chunk))
