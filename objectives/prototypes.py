"""DINO's and iBOT's losses with Sinkhorn-Knopp targets where batch x prototypes would not fit in memory.

At the published size, 235,000 masked patches x 131,072 prototypes are 123 GB in float32: once for the teacher, once for
the student, and again for the gradients. Here both sides come as the two factors of their logits, and logits exist for
a block of rows at a time: in each round of Sinkhorn-Knopp, in the loss, and again in its backward pass. Between them
only the scaling of the prototypes is kept: the targets are u_k exp(z_bk / T) v_b, and v_b follows from u. The values
are those of objectives/self_distillation.py. The published code has no such form.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange, repeat
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from ..kernels.sinkhorn import column_potential, scaled_rows
from .self_distillation import AxisName, Scalar, Terms, cross_entropy, entropy, over_devices, pair_losses


class Factors(NamedTuple):
    """Logits as a product: features [N, M, S, F] of N groups of M images or patches, and prototypes [F, V]."""

    features: Float[Array, "N M S F"]
    prototypes: Float[Array, "F V"]

    def logits(self, features: Float[Array, "B S F"]) -> Float[Array, "B S V"]:
        """Of some of the rows, in float32 (as models/dinov2.py Head)."""
        return jnp.dot(features, self.prototypes.astype(features.dtype), preferred_element_type=jnp.float32)


def blockwise_dino_loss(
    student: Factors,
    teacher: Factors,
    teacher_temperature: ArrayLike,
    block: int,
    *,
    temperature: ArrayLike = 0.1,
    iterations: int = 3,
    axis_name: AxisName = None,
) -> tuple[Scalar, Terms]:
    """`dino_loss` with `sinkhorn_targets`, and the terms of `target_statistics`.

    Args:
        student: S crops of each image; the first G are the global ones.
        teacher: the G global crops.
        teacher_temperature: of the targets.
        block: images of each group whose logits exist at a time.
        temperature: the student's.
        iterations: rounds of Sinkhorn-Knopp.
        axis_name: mesh axes over which further groups are spread, inside `jax.shard_map`.
    """

    def losses(logits: Array, targets: Array, weights: Array) -> Array:
        return jnp.stack([(weights * loss).sum() for loss in pair_losses(logits, targets, temperature)])

    weights = jnp.ones(student.features.shape[:2])
    sums, terms = _blockwise(losses, student, teacher, weights, teacher_temperature, block, iterations, axis_name)
    sums, images = over_devices((sums, weights.sum()), axis_name)
    total = sums / images
    return total.sum(), {"dino_global": total[0], "dino_local": total[1]} | terms


def blockwise_ibot_loss(
    student: Factors,
    teacher: Factors,
    weights: Float[Array, "N M"],
    num_crops: int,
    teacher_temperature: ArrayLike,
    block: int,
    *,
    temperature: ArrayLike = 0.1,
    iterations: int = 3,
    axis_name: AxisName = None,
) -> tuple[Scalar, Terms]:
    """`ibot_loss` with `sinkhorn_targets`, and the terms of `target_statistics`.

    Args:
        student: its masked patches (S = 1).
        teacher: the same patches.
        weights: of `ibot_loss`; rows of weight 0 are padding.
        num_crops: crops of this device's rows, including those without a mask.
        teacher_temperature: of the targets.
        block: patches of each group whose logits exist at a time.
        temperature: the student's.
        iterations: rounds of Sinkhorn-Knopp.
        axis_name: mesh axes over which further groups are spread, inside `jax.shard_map`.
    """

    def losses(logits: Array, targets: Array, weights: Array) -> Array:
        return weights @ cross_entropy(logits[:, 0], targets[:, 0], temperature)

    total, terms = _blockwise(losses, student, teacher, weights, teacher_temperature, block, iterations, axis_name)
    total, count = over_devices((total, jnp.float32(num_crops)), axis_name)
    return total / count, {"ibot": total / count} | terms


def _blockwise(
    losses: Callable[[Array, Array, Array], Array],
    student: Factors,
    teacher: Factors,
    weights: Float[Array, "N M"],
    teacher_temperature: ArrayLike,
    block: int,
    iterations: int,
    axis_name: AxisName,
) -> tuple[Array, Terms]:
    """Sums of losses(logits [B, S, V], targets [B, G, V], weights [B]) over this device's blocks; target statistics."""
    teacher = jax.lax.stop_gradient(teacher)
    crops = teacher.features.shape[2]
    rows_s, rows_t, weights = (_blocks(x, block) for x in (student.features, teacher.features, weights))
    valid = repeat(weights > 0, "n l b -> n l (b g)", g=crops)

    def scores(features: Array) -> Array:
        return rearrange(teacher.logits(features), "b g v -> (b g) v") / teacher_temperature

    column = column_potential(scores, rows_t, valid, iterations=iterations, axis_name=axis_name)

    @jax.checkpoint  # the backward pass computes the logits again
    def of_block(rows_s: Array, rows_t: Array, weights: Array, valid: Array) -> tuple[Array, tuple[Array, Array]]:
        targets = jax.lax.stop_gradient(scaled_rows(scores(rows_t), column, valid))
        loss = losses(student.logits(rows_s), rearrange(targets, "(b g) v -> b g v", g=crops), weights)
        return loss, (targets.sum(0), entropy(targets).sum())

    blocks = (rows_s, rows_t, weights, valid)
    sums = jax.tree.map(lambda x: jnp.zeros(x.shape), jax.eval_shape(of_block, *(x[0, 0] for x in blocks)))
    add = lambda total, rows: (jax.tree.map(jnp.add, total, of_block(*rows)), None)  # noqa: E731
    sums = jax.vmap(lambda *run: jax.lax.scan(add, sums, run)[0])(*blocks)
    total, statistics = jax.tree.map(lambda x: x.sum(0), sums)
    (usage, target_entropy), count = over_devices((statistics, valid.sum()), axis_name)
    count = jnp.maximum(count, 1)
    return total, {"usage_entropy": entropy(usage / count), "target_entropy": target_entropy / count}


def _blocks(x: Float[Array, "N M ..."], block: int) -> Float[Array, "N L B ..."]:
    """Runs of `block` rows, the last one filled up with zeros."""
    missing = -x.shape[1] % block
    x = jnp.pad(x, ((0, 0), (0, missing), *[(0, 0)] * (x.ndim - 2)))
    return rearrange(x, "n (l b) ... -> n l b ...", b=block)
