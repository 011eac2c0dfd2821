"""Self-distillation with a slowly moving teacher: the losses and targets of DINO, iBOT and DINOv2 as pure functions.

Papers: DINO arXiv 2104.14294, iBOT 2111.07832, DINOv2 2304.07193. Reference code: facebookresearch/dinov2:dinov2/loss,
dinov2/train/ssl_meta_arch.py; facebookresearch/dino:main_dino.py; bytedance/ibot:main_ibot.py.

Everything is computed in float32 whatever the dtype of the logits. Targets carry no gradient. Each mean and each
balancing runs over the devices of `axis_name` too where one is given (inside `jax.shard_map`); under plain `jax.jit`
with sharded arrays nothing need be said.
"""

from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float

from ..kernels.normalization import l2_normalize
from ..kernels.sinkhorn import sinkhorn_knopp

AxisName = str | tuple[str, ...] | None
Scalar = Float[Array, ""]
Terms = dict[str, Scalar]


def teacher_temperature(step: ArrayLike, start: float, end: float, warmup: int) -> Scalar:
    """The teacher's temperature at `step`: np.linspace(start, end, warmup), then `end`."""
    progress = jnp.asarray(step, jnp.float32) / max(warmup - 1, 1)
    return jnp.where(jnp.asarray(step) >= warmup, end, start + (end - start) * jnp.minimum(progress, 1.0))


def centred_targets(
    logits: Float[Array, "*B V"], center: Float[Array, " V"], temperature: ArrayLike
) -> Float[Array, "*B V"]:
    """softmax((z - c) / T): DINO's centring and sharpening; with c = 0 the plain softmax."""
    logits = jax.lax.stop_gradient(logits).astype(jnp.float32)
    return jax.nn.softmax((logits - center) / temperature)


def prior_targets(
    logits: Float[Array, "*B V"], prior: Float[Array, " V"], temperature: ArrayLike
) -> Float[Array, "*B V"]:
    """Softmax first, centring after it: q proportional to softmax(z / T) / prior, the notes' reading of DINOv2.

    `prior` is the running mean of softmax(z / T) over the batch (`update_center` on the plain softmax), so that
    prototypes in frequent use are damped. Not what the published code does: that centres the logits.
    """
    logits = jax.lax.stop_gradient(logits).astype(jnp.float32)
    return jax.nn.softmax(logits / temperature - jnp.log(prior))


def sinkhorn_targets(
    logits: Float[Array, "B V"],
    temperature: ArrayLike,
    *,
    iterations: int = 3,
    mask: Bool[Array, " B"] | None = None,
    start: str = "logits",
    axis_name: AxisName = None,
) -> Float[Array, "B V"]:
    """Targets that use all prototypes equally over the batch: Sinkhorn-Knopp on exp(z / T) (DINOv2, SwAV).

    Masked rows count for nothing and come out zero. `start="softmax"` balances softmax(z / T) instead, which differs at
    a finite number of rounds (the notes' wording; scenic's LOCA).
    """
    scores = jax.lax.stop_gradient(logits).astype(jnp.float32) / temperature
    if start == "softmax":
        scores = jax.nn.log_softmax(scores)
    elif start != "logits":
        raise ValueError(f"sinkhorn_targets: start is {start!r}, expected 'logits' or 'softmax'")
    targets = sinkhorn_knopp(scores, iterations=iterations, mask=mask, axis_name=axis_name)
    return jax.lax.stop_gradient(targets)


def update_center(
    center: Float[Array, " V"],
    logits: Float[Array, "*B V"],
    *,
    momentum: float = 0.9,
    mask: Bool[Array, "*B"] | None = None,
    count: Scalar | None = None,
    axis_name: AxisName = None,
) -> Float[Array, " V"]:
    """m c + (1 - m) mean(z) over the rows that are not masked; the published losses use the result one step later.

    Over no rows at all the center stays. `count` replaces the number of rows where the batch comes in parts.
    """
    logits = jax.lax.stop_gradient(logits).astype(jnp.float32)
    mask = jnp.ones(logits.shape[:-1], bool) if mask is None else mask
    axes = tuple(range(mask.ndim))
    total = jnp.where(mask[..., None], logits, 0).sum(axes)
    total, number = over_devices((total, mask.sum()), axis_name)
    divisor = number if count is None else count
    updated = momentum * center + (1 - momentum) * total / jnp.where(divisor > 0, divisor, 1)
    return jnp.where(divisor > 0, updated, center)


def cross_entropy(
    student: Float[Array, "*B V"], targets: Float[Array, "*B V"], temperature: ArrayLike = 0.1
) -> Float[Array, "*B"]:
    """-sum_k q_k log softmax(s / T)_k per row."""
    return -(targets * jax.nn.log_softmax(student.astype(jnp.float32) / temperature)).sum(-1)


def dino_loss(
    student: Float[Array, "B S V"],
    targets: Float[Array, "B G V"],
    *,
    temperature: ArrayLike = 0.1,
    mask: Bool[Array, " B"] | None = None,
    axis_name: AxisName = None,
) -> tuple[Scalar, Terms]:
    """Cross-entropy between all pairs of a teacher crop and another crop of the same image, averaged over the pairs.

    Args:
        student: logits of the S crops; the first G are the global ones, in the order of `targets`.
        targets: distributions of the G global crops.
        temperature: the student's.
        mask: False for images that do not count.
        axis_name: mesh axes over which the images are spread.

    Returns:
        The total and its terms "dino_global" and "dino_local" (pairs with a global and with a local crop), both divided
        by the number of all pairs, G (S - 1): dino:main_dino.py DINOLoss; dinov2 ssl_meta_arch.py (2 + 2 L).
    """
    losses_global, losses_local = pair_losses(student, targets, temperature)
    terms = {
        "dino_global": _mean(losses_global, mask, axis_name),
        "dino_local": _mean(losses_local, mask, axis_name),
    }
    return terms["dino_global"] + terms["dino_local"], terms


def pair_losses(
    student: Float[Array, "B S V"], targets: Float[Array, "B G V"], temperature: ArrayLike
) -> tuple[Float[Array, " B"], Float[Array, " B"]]:
    """The terms of `dino_loss`, global and local, of each image."""
    crops = targets.shape[1]
    pairs = crops * (student.shape[1] - 1)
    if pairs == 0:
        raise ValueError(f"dino_loss: {student.shape[1]} student and {crops} teacher crops form no pair")
    log_probs = jax.nn.log_softmax(student.astype(jnp.float32) / temperature)
    losses = -jnp.einsum("bgv,bsv->bgs", targets, log_probs, precision="highest")
    same_view = jnp.eye(crops, dtype=bool)
    losses_global = jnp.where(same_view, 0, losses[:, :, :crops]).sum((1, 2)) / pairs
    return losses_global, losses[:, :, crops:].sum((1, 2)) / pairs


def ibot_loss(
    student: Float[Array, "M V"],
    targets: Float[Array, "M V"],
    weights: Float[Array, " M"],
    num_crops: int,
    *,
    temperature: ArrayLike = 0.1,
    axis_name: AxisName = None,
) -> tuple[Scalar, Terms]:
    """Cross-entropy at masked patches: mean over the masked patches of a crop, then over all crops, masked or not.

    Args:
        student: logits of the student's tokens at masked places, rows in any order.
        targets: the teacher's distributions at the same places.
        weights: 1 / (number of masked patches of the row's crop), 0 for padding rows (`masked_weights`).
        num_crops: crops of this device's rows, including those without a mask.
        temperature: the student's.
        axis_name: mesh axes over which the rows are spread; each device may hold another number of masked patches.
    """
    total = (weights * cross_entropy(student, targets, temperature)).sum()
    total, count = over_devices((total, jnp.float32(num_crops)), axis_name)
    total = total / count
    return total, {"ibot": total}


def masked_weights(masked: Bool[Array, "*B P"]) -> Float[Array, "*B P"]:
    """The weight of each patch in `ibot_loss`: 1 / (masked patches of its crop) where masked, else 0."""
    counts = masked.sum(-1, keepdims=True)
    return masked / jnp.maximum(counts, 1).astype(jnp.float32)


def koleo_loss(
    features: Float[Array, "B D"],
    *,
    groups: int = 1,
    mask: Bool[Array, " B"] | None = None,
    axis_name: AxisName = None,
) -> tuple[Scalar, Terms]:
    """Kozachenko-Leonenko regulariser: -mean log distance to the nearest neighbour among the normalised features.

    Neighbours are searched within each of `groups` equal runs of rows (the published recipe: one device's images), and
    with `axis_name` among all devices' rows of a group. A row without any neighbour meets itself: a constant without
    gradient, as in the reference (dinov2:dinov2/loss/koleo_loss.py, with its two 1e-8).
    """
    if features.shape[0] % groups:
        raise ValueError(f"koleo_loss: {features.shape[0]} rows are not divisible into {groups} groups")
    normed = l2_normalize(features.astype(jnp.float32), 1e-8)
    x = rearrange(normed, "(g b) d -> g b d", g=groups)
    valid = jnp.ones(features.shape[0], bool) if mask is None else mask
    valid = rearrange(valid, "(g b) -> g b", g=groups)
    others, others_valid, first = x, valid, 0
    if axis_name is not None:
        others = jax.lax.all_gather(x, axis_name, axis=1, tiled=True)
        others_valid = jax.lax.all_gather(valid, axis_name, axis=1, tiled=True)
        first = jax.lax.axis_index(axis_name) * x.shape[1]
    similarity = jnp.einsum("gid,gjd->gij", x, others, precision="highest")
    itself = jnp.arange(x.shape[1])[:, None] + first == jnp.arange(others.shape[1])
    similarity = jnp.where(others_valid[:, None], similarity, -3.0)  # below the -2 of itself, the last resort
    nearest = jnp.where(itself, -2.0, similarity).argmax(-1)
    neighbour = jnp.take_along_axis(others, nearest[..., None], axis=1)
    distance = jnp.sqrt(jnp.square(x - neighbour + 1e-8).sum(-1))
    loss = _mean(-jnp.log(distance + 1e-8).reshape(-1), valid.reshape(-1), axis_name)
    return loss, {"koleo": loss}


def target_statistics(
    targets: Float[Array, "B V"], mask: Bool[Array, " B"] | None = None, axis_name: AxisName = None
) -> Terms:
    """What shows collapse: the entropy of the mean target ("usage_entropy", ln V when all prototypes are in use alike)
    and the mean entropy of the targets ("target_entropy", which falls as the teacher becomes certain)."""
    usage = _mean(targets, mask, axis_name)
    return {"usage_entropy": entropy(usage), "target_entropy": _mean(entropy(targets), mask, axis_name)}


def entropy(probabilities: Float[Array, "*B V"]) -> Float[Array, "*B"]:
    """In nats; 0 of a row of zeros."""
    return -jax.scipy.special.xlogy(probabilities, probabilities).sum(-1)


def _mean(losses: Float[Array, "B ..."], mask: Bool[Array, " B"] | None, axis_name: AxisName) -> Array:
    """Mean over the rows that are not masked; 0 over none."""
    mask = jnp.ones(losses.shape[0], bool) if mask is None else mask
    kept = jnp.where(mask.reshape(-1, *[1] * (losses.ndim - 1)), losses, 0)
    total, count = over_devices((kept.sum(0), mask.sum()), axis_name)
    return total / jnp.maximum(count, 1)


def over_devices(values: Any, axis_name: AxisName) -> Any:
    """Sums over the devices of `axis_name`, where one is given."""
    return values if axis_name is None else jax.lax.psum(values, axis_name)
