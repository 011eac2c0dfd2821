"""The most likely classes of images, with a picture of the scores."""

import argparse
import json
from pathlib import Path

import jax
import numpy as np
from jaxtyping import Array, Float

from ..hub import load
from ..storage.paths import as_path
from ..storage.writing import staged
from .images import apply_in_batches, find_images


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--weights", required=True, help="checkpoint: directory, file, or id of a hub repository")
    parser.add_argument("images", nargs="+", help="image files, or folders of them")
    parser.add_argument("--top", type=int, default=5, help="classes shown per image")
    parser.add_argument(
        "--scores",
        choices=("softmax", "sigmoid"),
        default="softmax",
        help="softmax: classes exclude each other; sigmoid: several may hold (ImageNet-21k)",
    )
    parser.add_argument("--picture", type=as_path, default=Path("classify.png"), help="where the picture goes")
    parser.add_argument("--json", type=as_path, help="also write the scores to this file, one JSON line per image")
    parser.add_argument("--batch-size", type=int, default=8)


def run(arguments: argparse.Namespace) -> None:
    bundle = load(arguments.weights)
    if not getattr(bundle.config, "num_classes", 0):
        raise ValueError(f"{arguments.weights} has no classification head; `features` gives its features")
    paths = find_images(arguments.images)
    labels = bundle.labels or tuple(f"class {i}" for i in range(bundle.config.num_classes))
    top = min(arguments.top, len(labels))

    def scores(out: dict[str, Array]) -> Float[Array, "B V"]:
        return jax.nn.softmax(out["logits"]) if arguments.scores == "softmax" else jax.nn.sigmoid(out["logits"])

    results = []
    for path, pixels, probabilities in apply_in_batches(bundle, paths, arguments.batch_size, scores):
        best = np.argsort(-probabilities, kind="stable")[:top]
        results.append((path, pixels, [(labels[i], float(probabilities[i])) for i in best]))
        print(path)
        for label, probability in results[-1][2]:
            print(f"  {probability:7.4f}  {label}")
    if arguments.json:
        lines = (json.dumps({"image": str(path), "top": dict(best)}) for path, _, best in results)
        arguments.json.write_text("".join(f"{line}\n" for line in lines))
    draw(results[:16], arguments.picture)
    print(f"picture: {arguments.picture}")


def draw(results: list[tuple[Path, np.ndarray, list[tuple[str, float]]]], path: Path) -> None:
    """Each image beside the bars of its best classes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 2.2 * len(results)), layout="constrained")
    for (name, pixels, best), (left, right) in zip(
        results, figure.subplots(len(results), 2, squeeze=False, width_ratios=(1, 2)), strict=True
    ):
        left.imshow(pixels.squeeze(), cmap="gray")
        left.set_title(name.name, fontsize=8)
        left.axis("off")
        labels, scores = zip(*reversed(best), strict=True)
        right.barh(range(len(best)), scores, color="tab:blue")
        right.set_yticks(range(len(best)), labels)
        right.set_xlim(0, 1)
    with staged(path) as file:
        figure.savefig(file, dpi=100)
