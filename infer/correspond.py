"""Finds the same things in two images by their patch features, and draws the matches.

A patch of the first image and one of the second match when each is the other's nearest in cosine similarity; the
matches most similar among the foreground patches are shown (DINOv2, arXiv 2304.07193, figure 10).
"""

import argparse
import dataclasses
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from ..hub import Bundle, load
from ..kernels.normalization import l2_normalize
from ..kernels.pca import pca_colors
from ..storage.paths import as_path
from ..storage.writing import staged
from .images import apply_in_batches, find_images, read_image


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--weights", required=True, help="checkpoint: directory, file, or id of a hub repository")
    parser.add_argument("images", nargs=2, help="two image files")
    parser.add_argument("--count", type=int, default=20, help="matches drawn")
    parser.add_argument("--image-size", type=int, help="side to which images are brought, a multiple of the patch size")
    parser.add_argument("--picture", type=as_path, default=Path("correspond.png"))


def run(arguments: argparse.Namespace) -> None:
    bundle = load(arguments.weights)
    if arguments.count < 1:
        raise ValueError(f"--count must be at least 1, got {arguments.count}")
    if arguments.image_size:
        bundle = resized(bundle, arguments.image_size)
    paths = find_images(arguments.images)
    if len(paths) != 2:
        raise ValueError(f"expected two images, got {len(paths)}")
    found = [patches for _, _, patches in apply_in_batches(bundle, paths, 2, lambda out: out["patches"])]
    if len(found) != 2:
        raise ValueError("one of the two images cannot be read")
    patches = jnp.stack(found)
    pairs, similarity = match(patches[0], patches[1], pca_colors(patches)[1][0])
    if not len(pairs):
        raise ValueError("no patch of the foreground of the first image is mutually nearest to one of the second")
    pairs, similarity = pairs[: arguments.count], similarity[: arguments.count]
    draw(arguments.picture, [as_seen(path, bundle) for path in paths], pairs, patches.shape[1])
    print(f"{len(pairs)} matches, cosine {similarity.min():.3f} to {similarity.max():.3f}: {arguments.picture}")


def resized(bundle: Bundle, side: int) -> Bundle:
    """The bundle with preprocessing for another image size; ValueError where the patches do not divide it."""
    if side < 1 or side % bundle.config.patch_size:
        raise ValueError(f"image size {side} is not divisible by the patch size {bundle.config.patch_size}")
    return dataclasses.replace(bundle, processor=bundle.processor.resized((side, side)))


def match(
    first: Float[Array, "X Y D"], second: Float[Array, "X Y D"], foreground: Bool[Array, "X Y"]
) -> tuple[np.ndarray, np.ndarray]:
    """Mutually nearest patches, as ((row, column), (row, column)), and their similarity, best first.

    Only matches that begin in the `foreground` of the first image: int [M, 2, 2] and float [M].
    """
    a, b = (l2_normalize(x.reshape(-1, x.shape[-1]), 1e-12) for x in (first, second))
    similarity = np.asarray(jnp.einsum("id,jd->ij", a, b, precision="highest"))
    there, back = similarity.argmax(1), similarity.argmax(0)
    kept = (back[there] == np.arange(len(a))) & np.asarray(foreground).reshape(-1)
    own = np.flatnonzero(kept)
    own = own[np.argsort(-similarity[own, there[own]], kind="stable")]
    places = np.stack([own, there[own]], axis=1)
    return np.stack(np.divmod(places, first.shape[1]), axis=-1), similarity[own, there[own]]


def as_seen(path: Path, bundle: Bundle) -> Float[np.ndarray, "X Y C"]:
    """The image as the model sees it, in colours again."""
    _, image = read_image(path, bundle)
    return np.clip(image * np.array(bundle.processor.std) + np.array(bundle.processor.mean), 0, 1)


def draw(path: Path, images: list[np.ndarray], pairs: np.ndarray, rows: int) -> None:
    """The images side by side, a line for each pair of patches."""
    from matplotlib.figure import Figure

    side, gap = images[0].shape[0] / rows, images[0].shape[1] // 20
    margin = np.ones((images[0].shape[0], gap, images[0].shape[2]))
    figure = Figure(figsize=(10, 5), layout="constrained")
    axes = figure.subplots()
    axes.imshow(np.concatenate([images[0], margin, images[1]], axis=1))
    axes.set_axis_off()
    centres = (pairs + 0.5) * side - 0.5
    centres[:, 1, 1] += images[0].shape[1] + gap
    for i, ((y, x), (y2, x2)) in enumerate(centres):
        axes.plot([x, x2], [y, y2], "o-", color=f"C{i % 10}", markersize=3, linewidth=1)
    with staged(path) as file:
        figure.savefig(file, dpi=100)
