"""Next-token prediction over packed sequences, without ever holding the scores of a whole batch.

At a vocabulary of 152,064, float32 scores of one 8,192-token sequence take 5 GB: they are made, used and made again in
the backward pass chunk by chunk.
"""

from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from .classification import rank

Weighting = Literal["token", "sqrt", "sample"]
IGNORE = -100  # label of a token that is not learnt


def token_losses(
    hidden: Float[Array, "B T D"],
    head: Float[Array, "D V"],
    labels: Int[Array, "B T"],
    *,
    chunk: int = 1024,
) -> tuple[Float[Array, "B T"], Bool[Array, "B T"]]:
    """-log softmax(hidden head)[label] in float32, and whether the label is likelier than every other token.

    Both are 0 where the label is IGNORE; any other label that is no token has a loss of NaN. `chunk` tokens of a row at
    a time have scores in memory.
    """
    chunk = min(chunk, labels.shape[1])
    pad = -labels.shape[1] % chunk

    def chunked(x: Array) -> Array:
        x = jnp.pad(x, [(0, 0), (0, pad), *[(0, 0)] * (x.ndim - 2)])
        return jnp.moveaxis(x.reshape(x.shape[0], -1, chunk, *x.shape[2:]), 1, 0)

    @jax.checkpoint
    def losses(inputs: tuple[Array, Array]) -> tuple[Array, Array]:
        hidden, labels = inputs
        logits = jnp.einsum("btd,dv->btv", hidden, head.astype(hidden.dtype)).astype(jnp.float32)
        labels = jnp.where(labels == IGNORE, 0, labels)
        chosen = jnp.take_along_axis(logits, labels[..., None], axis=-1)[..., 0]
        chosen = jnp.where(labels < 0, jnp.nan, chosen)  # as for ids beyond the vocabulary
        return jax.nn.logsumexp(logits, axis=-1) - chosen, rank(logits, labels) == 0

    def whole(x: Array) -> Array:
        x = jnp.moveaxis(x, 0, 1).reshape(labels.shape[0], -1)[:, : labels.shape[1]]
        return jnp.where(labels == IGNORE, jnp.zeros_like(x), x)

    loss, hit = jax.lax.map(losses, (chunked(hidden), chunked(labels)))
    return whole(loss), whole(hit)


def token_weights(
    labels: Int[Array, "B T"], segment_ids: Int[Array, "B T"], weighting: Weighting, max_segments: int
) -> Float[Array, "B T"]:
    """What each learnt token counts: 1, or by the number n of learnt tokens of its sample, n^-1/2 ("sqrt") or 1/n.

    Samples are the segments of a row (ids below `max_segments`). "token" lets long answers dominate, "sample" short
    ones; "sqrt" stands between (InternVL2.5, arXiv 2412.05271, section 3.3; named in the Qwen3-VL report).
    """
    learnt = (labels != IGNORE).astype(jnp.float32)
    if weighting == "token":
        return learnt
    counts = jax.vmap(lambda x, ids: jax.ops.segment_sum(x, ids, max_segments))(learnt, segment_ids)
    count = jnp.maximum(jnp.take_along_axis(counts, segment_ids, axis=1), 1.0)
    return learnt * count ** {"sqrt": -0.5, "sample": -1.0}[weighting]


def next_token_loss(
    losses: Float[Array, "B T"],
    weights: Float[Array, "B T"],
    *,
    denominator: Float[Array, ""] | None = None,
    axis_name: str | None = None,
) -> tuple[Float[Array, ""], dict[str, Array]]:
    """Σ w l / Σ w over all tokens of all devices; `denominator` replaces Σ w where the batch comes in parts."""
    numerator, total = (losses * weights).sum(), weights.sum()
    if axis_name is not None:
        numerator, total = jax.lax.psum((numerator, total), axis_name)
    loss = numerator / jnp.maximum(total if denominator is None else denominator, 1e-6)
    return loss, {"next_token": loss}
