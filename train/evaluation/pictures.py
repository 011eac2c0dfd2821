"""Pictures of a run: curves from its metrics, and the confusion matrix of its last evaluation."""

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ...storage.writing import staged
from ..metrics import read_metrics


def draw_classification(workdir: Path, results: dict[str, Any]) -> list[Path]:
    """training.png: loss, accuracy and, where an evaluator gave one, the confusion matrix."""
    lines = read_metrics(workdir)
    confusion = next((result["confusion"] for result in results.values() if "confusion" in result), None)
    figure = Figure(figsize=(15 if confusion is not None else 10, 4.5), layout="constrained")
    axes = figure.subplots(1, 3 if confusion is not None else 2)
    draw_curves(axes[0], lines, "loss")
    draw_curves(axes[1], lines, "accuracy")
    if confusion is not None:
        draw_confusion(axes[2], confusion)
    path = workdir / "training.png"
    save(figure, path)
    return [path]


def draw_self_distillation(workdir: Path, results: dict[str, Any]) -> list[Path]:
    """training.png: terms of the loss, entropies of the targets, evaluations; pca.png: patch features as colours."""
    lines = read_metrics(workdir)
    figure = Figure(figsize=(15, 4.5), layout="constrained")
    axes = figure.subplots(1, 3)
    for name in ("loss", "dino", "ibot", "koleo"):
        draw_curves(axes[0], lines, name)
    axes[0].set(ylabel="terms of the loss")
    for name in ("usage_entropy", "target_entropy", "ibot_usage_entropy"):
        draw_curves(axes[1], lines, name)
    axes[1].set(ylabel="entropy (nats); usage near ln K: no collapse")
    draw_curves(axes[2], lines, "accuracy")
    paths = [workdir / "training.png"]
    save(figure, paths[0])
    if "pca" in results:
        paths.append(workdir / "pca.png")
        draw_pca(paths[1], results["pca"]["images"], results["pca"]["colors"])
    return paths


def draw_language(workdir: Path, results: dict[str, Any]) -> list[Path]:
    """training.png: loss and accuracy of the next tokens, and held-out answers beside those without the pixels."""
    lines = read_metrics(workdir)
    figure = Figure(figsize=(15, 4.5), layout="constrained")
    axes = figure.subplots(1, 3)
    draw_curves(axes[0], lines, "loss")
    draw_curves(axes[1], lines, "accuracy")
    for name in ("exact", "blind"):
        draw_curves(axes[2], lines, name)
    axes[2].set(ylabel="share of answers exactly right")
    path = workdir / "training.png"
    save(figure, path)
    return [path]


def save(figure: Figure, path: Path) -> None:
    """The figure as a file, wherever the run lives."""
    with staged(path) as file:
        figure.savefig(file, dpi=120)


def draw_pca(path: Path, images: np.ndarray, colors: np.ndarray) -> None:
    """Images (any value range) over their patches' colours [B, X, Y, 3]."""
    figure = Figure(figsize=(1.5 * len(images), 3.2), layout="constrained")
    for row, pictures in zip(figure.subplots(2, len(images), squeeze=False), (images, colors), strict=True):
        for axes, picture in zip(row, pictures, strict=True):
            low, high = picture.min(), picture.max()
            axes.imshow((picture - low) / max(high - low, 1e-6), interpolation="nearest")
            axes.set_axis_off()
    save(figure, path)


def draw_curves(axes: Axes, lines: list[dict[str, Any]], name: str) -> None:
    """One curve over steps for every metric `<something>/<name>`."""
    metrics = sorted({key for line in lines for key in line if key.endswith(f"/{name}")})
    for metric in metrics:
        points = [(line["step"], line[metric]) for line in lines if line.get(metric) is not None]
        steps, values = zip(*points, strict=True)
        marker = "o" if len(steps) < 50 else ""
        axes.plot(steps, values, marker=marker, markersize=3, label=f"{metric} (last {values[-1]:.4g})")
    axes.set(xlabel="step", ylabel=name)
    axes.grid(alpha=0.3)
    if metrics:
        axes.legend()


def draw_confusion(axes: Axes, confusion: np.ndarray) -> None:
    """Counts [true, predicted]; colours on the scale of the mistakes, since the diagonal dwarfs them."""
    mistakes = confusion - np.diag(np.diag(confusion))
    axes.imshow(mistakes, cmap="Reds", vmax=2 * max(mistakes.max(), 1))
    if len(confusion) <= 20:
        for (i, j), count in np.ndenumerate(confusion):
            if count:
                axes.text(j, i, str(count), ha="center", va="center", fontsize=8, weight="bold" if i == j else None)
        axes.set(xticks=range(len(confusion)), yticks=range(len(confusion)))
    accuracy = np.trace(confusion) / max(confusion.sum(), 1)
    axes.set(xlabel="predicted", ylabel="true", title=f"test accuracy {accuracy:.4f}")
