"""Contrastive objectives of image-text pairs: InfoNCE (CLIP, arXiv 2103.00020), sigmoid (SigLIP, arXiv 2303.15343).

With W devices of n pairs each (B = W n), three exact forms differ in what a device holds and recomputes:

| form | logits per device | communication |
|---|---|---|
| "full" | [B, B] | both towers' features gathered |
| "rows" | two [n, B] | both gathered (open_clip's local_loss with gather_with_grad) |
| "ring" | [n, n] | texts travel round the ring, once forward and once backward |

The ring keeps nothing of a visit: the backward pass sends the texts round again, with the gradient they collect on the
way, so memory does not depend on W.
"""

from collections.abc import Sequence
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
from jax.nn import logsumexp
from jaxtyping import Array, Bool, Float, Int, UInt32

AxisName = str | Sequence[str] | None
Form = Literal["full", "rows", "ring"]
Terms = dict[str, Array]

LOSSES = ("info_nce", "sigmoid")
FORMS = ("full", "rows", "ring")
LOG_SCALE_INIT = 2.6592600  # ln(1 / 0.07), CLIP
LOG_SCALE_MAX = 4.6051702  # ln 100: CLIP caps the scale of its logits there
_ABSENT = -1e30  # logit of a masked pair; finite, so that whole masked rows stay free of NaN


def info_nce(
    image: Float[Array, "B D"],
    text: Float[Array, "B D"],
    scale: Float[Array, ""],
    *,
    mask: Bool[Array, " B"] | None = None,
    form: Form = "full",
    axis_name: AxisName = None,
) -> tuple[Float[Array, ""], Terms]:
    """Symmetric InfoNCE of normalised features: each image against all texts and each text against all images.

    `scale` multiplies the cosines (the exponential of CLIP's logit_scale). A pair whose `mask` is False neither counts
    nor serves as a negative. Inside `shard_map` or `pmap`, name the axis the pairs are spread over: every device
    returns the global mean, and gradients of all three forms are those of the dense loss over all pairs.
    """
    queries, keys = _augment(image, text, scale, 0.0, mask)
    if axis_name is not None and form == "ring":
        row_lse, column_lse = _ring_logsumexp(queries, keys, axis_name)  # type: ignore[misc]  # jax.custom_vjp is untyped
        positives = (queries * keys).sum(-1)
        losses = row_lse - positives, column_lse - positives
    else:
        losses = _gathered_losses(queries, keys, form, axis_name)
    to_text, to_image = (_mean(loss, mask, axis_name, form) for loss in losses)
    return (to_text + to_image) / 2, {"image_to_text": to_text, "text_to_image": to_image}


def sigmoid_loss(
    image: Float[Array, "B D"],
    text: Float[Array, "B D"],
    scale: Float[Array, ""],
    bias: Float[Array, ""],
    *,
    mask: Bool[Array, " B"] | None = None,
    form: Form = "full",
    axis_name: AxisName = None,
) -> tuple[Float[Array, ""], Terms]:
    """-1/B Σ_ij log σ(z_ij (scale · <image_i, text_j> + bias)), z = 1 for pairs and -1 for all others.

    Arguments and result as `info_nce`.
    """
    queries, keys = _augment(image, text, scale, bias, mask)
    positives = (queries * keys).sum(-1)
    if axis_name is not None and form == "ring":
        sums: Array = _ring_softplus(queries, keys, axis_name)  # type: ignore[assignment]  # jax.custom_vjp is untyped
    else:
        if axis_name is not None:
            keys = _gather(keys, axis_name)
            if form == "full":
                queries, positives = _gather(queries, axis_name), _gather(positives, axis_name)
        sums = jax.nn.softplus(_logits(queries, keys)).sum(-1)
    # log σ(-l) = -softplus(l) for every pair, and log σ(l) = l - softplus(l) for the true ones.
    total = _mean(sums - positives, mask, axis_name, form)
    return total, {"sigmoid": total}


def count_duplicates(tokens: Int[Array, "B T"]) -> Int[Array, ""]:
    """How many captions of the batch occur earlier in it: each is a false negative of a contrastive loss.

    Captions are compared by 64 bits of a hash (of 32,768 captions, two collide once in 3e10 batches): a sort by all T
    ids takes a TPU's compiler longer than everything else in a training step.
    """
    first, second = jax.lax.sort([_hash(tokens, seed) for seed in (0, 1)], num_keys=2)
    return ((first[1:] == first[:-1]) & (second[1:] == second[:-1])).sum()


def _hash(tokens: Int[Array, "B T"], seed: int) -> UInt32[Array, " B"]:
    """32 bits of each row: the sum of its ids and their positions, both mixed by MurmurHash3's finaliser."""

    def mix(x: Array) -> Array:
        x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
        x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
        return x ^ (x >> 16)

    ids, positions = tokens.astype(jnp.uint32), jnp.arange(tokens.shape[1], dtype=jnp.uint32)
    # A seed beyond all vocabularies: otherwise id 1 under seed 0 would be id 0 under seed 1.
    return mix(mix(ids + jnp.uint32(seed << 24)) + positions).sum(-1, dtype=jnp.uint32)


def clamp_log_scale(log_scale: Float[Array, ""]) -> Float[Array, ""]:
    """The learned logit_scale brought back into [0, ln 100], as after every step of open_clip's training."""
    return jnp.clip(log_scale, 0.0, LOG_SCALE_MAX)


def _augment(image: Array, text: Array, scale: Array, bias: Array | float, mask: Array | None) -> tuple[Array, Array]:
    """Vectors whose inner product is the whole logit: scale · <image, text> + bias, or _ABSENT where either is masked.

    Scale, bias and mask so become part of what a ring already carries and differentiates.
    """
    image, text = image.astype(jnp.float32), text.astype(jnp.float32)
    ones = jnp.ones_like(image[:, :1])
    absent = jnp.zeros_like(ones) if mask is None else jnp.where(mask[:, None], 0.0, _ABSENT)
    queries = jnp.concatenate([scale * image, ones, absent + bias], axis=1)
    return queries, jnp.concatenate([text, absent, ones], axis=1)


def _logits(queries: Float[Array, "Q D"], keys: Float[Array, "K D"]) -> Float[Array, "Q K"]:
    # At a scale of 100 the reduced precision of a default TPU or GPU product would cost whole digits of the loss.
    return jnp.einsum("qd,kd->qk", queries, keys, precision="highest")


def _gather(x: Array, axis_name: AxisName) -> Array:
    return jax.lax.all_gather(x, axis_name, tiled=True)


def _gathered_losses(queries: Array, keys: Array, form: Form, axis_name: AxisName) -> tuple[Array, Array]:
    """Image-to-text and text-to-image losses of this device's pairs ("rows"), or of all pairs ("full")."""
    positives = (queries * keys).sum(-1)
    if axis_name is None:
        logits = _logits(queries, keys)
        return logsumexp(logits, 1) - positives, logsumexp(logits, 0) - positives
    all_queries, all_keys = _gather(queries, axis_name), _gather(keys, axis_name)
    if form == "full":
        return _gathered_losses(all_queries, all_keys, form, None)
    rows, columns = _logits(queries, all_keys), _logits(keys, all_queries)
    return logsumexp(rows, 1) - positives, logsumexp(columns, 1) - positives


def _mean(losses: Array, mask: Array | None, axis_name: AxisName, form: Form) -> Float[Array, ""]:
    """Mean over the unmasked pairs of all devices."""
    if axis_name is not None and form == "full" and mask is not None:
        mask = _gather(mask, axis_name)
    kept = jnp.ones(losses.shape, bool) if mask is None else mask
    total, count = jnp.where(kept, losses, 0.0).sum(), kept.sum().astype(jnp.float32)
    if axis_name is not None:
        total, count = jax.lax.psum((total, count), axis_name)
    return total / jnp.maximum(count, 1.0)


def _rotate(x: Array, axis_name: AxisName) -> Array:
    size = jax.lax.axis_size(axis_name)
    return jax.lax.ppermute(x, axis_name, [(i, (i + 1) % size) for i in range(size)])


def _travel(visit, home, travelling, axis_name: AxisName):
    """W visits (home, travelling) -> (home, travelling), after each of which `travelling` moves to the next device.

    After the last move it is back where it started.
    """

    def step(_, state):
        home, travelling = visit(*state)
        return home, jax.tree.map(partial(_rotate, axis_name=axis_name), travelling)

    return jax.lax.fori_loop(0, jax.lax.axis_size(axis_name), step, (home, travelling))


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _ring_logsumexp(
    queries: Float[Array, "B D"], keys: Float[Array, "B D"], axis_name: AxisName
) -> tuple[Float[Array, " B"], Float[Array, " B"]]:
    """logsumexp of this device's queries over all keys, and of its keys over all queries."""
    return _ring_logsumexp_forward(queries, keys, axis_name)[0]


def _ring_logsumexp_forward(queries, keys, axis_name):
    def visit(row_lse, travelling):
        keys, column_lse = travelling
        logits = _logits(queries, keys)
        row_lse = jnp.logaddexp(row_lse, logsumexp(logits, 1))
        return row_lse, (keys, jnp.logaddexp(column_lse, logsumexp(logits, 0)))

    nothing = jnp.full_like(queries[:, 0], -jnp.inf)
    row_lse, (_, column_lse) = _travel(visit, nothing, (keys, nothing), axis_name)
    return (row_lse, column_lse), (queries, keys, row_lse, column_lse)


def _ring_logsumexp_backward(axis_name, residuals, cotangents):
    queries, keys, row_lse, column_lse = residuals
    row_weight, column_weight = cotangents

    def visit(query_gradient, travelling):
        keys, key_gradient, column_lse, column_weight = travelling
        logits = _logits(queries, keys)
        pull = row_weight[:, None] * jnp.exp(logits - row_lse[:, None]) + column_weight * jnp.exp(logits - column_lse)
        query_gradient = query_gradient + _logits(pull, keys.T)
        return query_gradient, (keys, key_gradient + _logits(pull.T, queries.T), column_lse, column_weight)

    travelling = (keys, jnp.zeros_like(keys), column_lse, column_weight)
    query_gradient, (_, key_gradient, _, _) = _travel(visit, jnp.zeros_like(queries), travelling, axis_name)
    return query_gradient, key_gradient


_ring_logsumexp.defvjp(_ring_logsumexp_forward, _ring_logsumexp_backward)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _ring_softplus(queries: Float[Array, "B D"], keys: Float[Array, "B D"], axis_name: AxisName) -> Float[Array, " B"]:
    """Σ_j softplus(<query_i, key_j>) of this device's queries over all keys."""
    return _ring_softplus_forward(queries, keys, axis_name)[0]


def _ring_softplus_forward(queries, keys, axis_name):
    def visit(sums, keys):
        return sums + jax.nn.softplus(_logits(queries, keys)).sum(-1), keys

    sums, _ = _travel(visit, jnp.zeros_like(queries[:, 0]), keys, axis_name)
    return sums, (queries, keys)


def _ring_softplus_backward(axis_name, residuals, weight):
    queries, keys = residuals

    def visit(query_gradient, travelling):
        keys, key_gradient = travelling
        pull = weight[:, None] * jax.nn.sigmoid(_logits(queries, keys))
        return query_gradient + _logits(pull, keys.T), (keys, key_gradient + _logits(pull.T, queries.T))

    query_gradient, (_, key_gradient) = _travel(visit, jnp.zeros_like(queries), (keys, jnp.zeros_like(keys)), axis_name)
    return query_gradient, key_gradient


_ring_softplus.defvjp(_ring_softplus_forward, _ring_softplus_backward)
