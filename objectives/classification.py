"""Classification losses: softmax and sigmoid cross-entropy, with label smoothing, a mask and an explicit reduction."""

from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

Reduction = Literal["mean", "sum", "none"]
Labels = Int[Array, "*B"] | Float[Array, "*B V"]  # class indices, or one target distribution per example


def softmax_cross_entropy(
    logits: Float[Array, "*B V"],
    labels: Labels,
    *,
    mask: Bool[Array, "*B"] | None = None,
    label_smoothing: float = 0.0,
    reduction: Reduction = "mean",
    axis_name: str | None = None,
) -> tuple[Array, dict[str, Array]]:
    """-Σ_v y_v log softmax(z)_v for classes that exclude each other.

    `mask` is False where an example does not count. `label_smoothing` a replaces y by (1 - a) y + a / V. The reduction
    "mean" divides by the number of unmasked examples; under `axis_name` sums and counts run over the devices of that
    axis, so every device returns the global value. Returns the total (float32; [*B] for "none") and the named terms.
    The loss of an index that is no class is NaN.
    """
    targets = _targets(logits, labels, label_smoothing)
    losses = _no_label_outside(-(targets * jax.nn.log_softmax(logits.astype(jnp.float32))).sum(-1), logits, labels)
    total = reduce_loss(losses, mask, reduction, axis_name)
    return total, {"softmax_cross_entropy": total}


def sigmoid_cross_entropy(
    logits: Float[Array, "*B V"],
    labels: Labels,
    *,
    mask: Bool[Array, "*B"] | None = None,
    label_smoothing: float = 0.0,
    reduction: Reduction = "mean",
    axis_name: str | None = None,
) -> tuple[Array, dict[str, Array]]:
    """-Σ_v [y_v log σ(z_v) + (1 - y_v) log σ(-z_v)]: one binary problem per class, summed over classes.

    The loss of ViT's pre-training (big_vision utils.py sigmoid_xent). Arguments and result as `softmax_cross_entropy`.
    """
    targets = _targets(logits, labels, label_smoothing)
    logits = logits.astype(jnp.float32)
    losses = -(targets * jax.nn.log_sigmoid(logits) + (1 - targets) * jax.nn.log_sigmoid(-logits)).sum(-1)
    losses = _no_label_outside(losses, logits, labels)
    total = reduce_loss(losses, mask, reduction, axis_name)
    return total, {"sigmoid_cross_entropy": total}


LOSSES = {"softmax": softmax_cross_entropy, "sigmoid": sigmoid_cross_entropy}


def reduce_loss(
    losses: Float[Array, "*B"], mask: Bool[Array, "*B"] | None, reduction: Reduction, axis_name: str | None = None
) -> Array:
    """Reduces per-example losses; masked examples neither add nor count, and a mean over none of them is 0."""
    mask = jnp.ones(losses.shape, bool) if mask is None else mask
    losses = jnp.where(mask, losses, 0.0)
    if reduction == "none":
        return losses
    total, count = losses.sum(), mask.sum()
    if axis_name is not None:
        total, count = jax.lax.psum((total, count), axis_name)
    return total / jnp.maximum(count, 1) if reduction == "mean" else total


def rank(scores: Float[Array, "*B V"], label: Int[Array, "*B"]) -> Int[Array, "*B"]:
    """How many other classes score no lower than the right one: 0 is a hit.

    Ties count against it, and so do scores that are NaN and labels that are no class.
    """
    own = jnp.take_along_axis(scores, label[..., None], axis=-1)
    valid = (label >= 0) & (label < scores.shape[-1])
    return jnp.where(valid, (~(scores < own)).sum(-1) - 1, scores.shape[-1])


def guess(scores: Float[Array, "*B V"], label: Int[Array, "*B"]) -> Int[Array, "*B"]:
    """The class of the highest score; where that of `label` only ties with others, the first of these."""
    others = jnp.where(jnp.arange(scores.shape[-1]) == label[..., None], -jnp.inf, scores)
    return jnp.where(rank(scores, label) == 0, label, others.argmax(-1))


def _no_label_outside(losses: Array, logits: Array, labels: Array) -> Array:
    """NaN where a class index is none of the classes: its one-hot row is empty, which would be a loss of 0."""
    if not jnp.issubdtype(labels.dtype, jnp.integer):
        return losses
    return jnp.where((labels >= 0) & (labels < logits.shape[-1]), losses, jnp.nan)


def _targets(logits: Array, labels: Array, smoothing: float) -> Array:
    """Target distributions [*B, V] in float32, smoothed towards the uniform one."""
    num_classes = logits.shape[-1]
    if jnp.issubdtype(labels.dtype, jnp.integer):
        labels = jax.nn.one_hot(labels, num_classes)
    return labels.astype(jnp.float32) * (1 - smoothing) + smoothing / num_classes
