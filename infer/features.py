"""Features of images to an .npz file, with a picture of what the patches hold."""

import argparse
from pathlib import Path

import numpy as np
from jaxtyping import Array, Float

from ..data.images.decode import to_pil
from ..hub import load
from ..storage.paths import as_path
from ..storage.writing import staged
from .images import apply_in_batches, find_images

FEATURES = ("pooled", "tokens", "patches", "pre_logits")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--weights", required=True, help="checkpoint: directory, file, or id of a hub repository")
    parser.add_argument("images", nargs="+", help="image files, or folders of them")
    parser.add_argument("--feature", choices=FEATURES, default="pooled", help="which output of the model is written")
    parser.add_argument("--out", type=as_path, default=Path("features.npz"), help="arrays `features` and `names`")
    parser.add_argument(
        "--picture", type=as_path, default=Path("features.png"), help="principal components of the patches"
    )
    parser.add_argument("--batch-size", type=int, default=8)


def run(arguments: argparse.Namespace) -> None:
    bundle = load(arguments.weights)
    paths = find_images(arguments.images)

    def outputs(out: dict[str, Array]) -> tuple[Array, Array]:
        if arguments.feature not in out:
            given = sorted(set(FEATURES) & set(out))
            raise ValueError(f"this model has no {arguments.feature!r}, expected one of {given}")
        return out[arguments.feature], out["patches"]

    features, names, shown = [], [], []
    for path, pixels, (feature, patches) in apply_in_batches(bundle, paths, arguments.batch_size, outputs):
        features.append(feature)
        names.append(str(path))
        if len(shown) < 8:
            shown.append((pixels, patches))
    with staged(arguments.out) as stage, stage.open("wb") as file:
        np.savez(file, features=np.stack(features), names=np.array(names))
    print(f"{len(features)} x {features[0].shape} {arguments.feature} features: {arguments.out}")
    draw_components(shown, arguments.picture)
    print(f"picture: {arguments.picture}")


def principal_components(patches: Float[np.ndarray, "B X Y D"], count: int = 3) -> Float[np.ndarray, "B X Y R"]:
    """Projections of all patches on their first principal directions, each scaled to [0, 1]."""
    flat = patches.reshape(-1, patches.shape[-1]).astype(np.float64)
    centred = flat - flat.mean(0)
    _, _, directions = np.linalg.svd(centred, full_matrices=False)
    projected = centred @ directions[:count].T
    low, high = projected.min(0), projected.max(0)
    return ((projected - low) / np.maximum(high - low, 1e-12)).reshape(*patches.shape[:-1], -1)


def draw_components(shown: list[tuple[np.ndarray, np.ndarray]], path: Path) -> None:
    """Each image above its patches, coloured by the three components that all images share."""
    from matplotlib.figure import Figure

    components = principal_components(np.stack([patches for _, patches in shown]))
    figure = Figure(figsize=(2 * len(shown), 4.2), layout="constrained")
    for axes, (pixels, _), colours in zip(
        figure.subplots(2, len(shown), squeeze=False).T, shown, components, strict=True
    ):
        axes[0].imshow(np.asarray(to_pil(pixels)), cmap="gray")
        axes[1].imshow(colours)
        for axis in axes:
            axis.axis("off")
    with staged(path) as file:
        figure.savefig(file, dpi=100)
