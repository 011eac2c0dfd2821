"""Scaled dot-product attention: one entry, several back ends."""

from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

Backend = Literal["auto", "xla", "cudnn", "splash"]


@partial(jax.jit, static_argnames=("causal", "scale", "block_size", "backend"))
def attention(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S K H"],
    value: Float[Array, "B S K H"],
    *,
    mask: Bool[Array, "#B #N #T #S"] | None = None,
    causal: bool = False,
    segment_ids: Int[Array, "B T"] | tuple[Int[Array, "B T"], Int[Array, "B S"]] | None = None,
    query_offset: int | Int[Array, ""] | Int[Array, " B"] | None = None,
    scale: float | None = None,
    block_size: int | None = None,
    backend: Backend = "auto",
) -> Float[Array, "B T N H"]:
    """softmax(scale · query keyᵀ) value, the softmax in float32; rows that may see no key give zeros.

    Args:
      query: Queries; head n reads key head n // (N / K) (grouped-query attention, arXiv:2305.13245).
      key: Keys.
      value: Values.
      mask: True where a query may see a key; any axis may be 1.
      causal: Query t sees the keys up to position t + query_offset.
      segment_ids: Queries see keys of the same segment; one array when queries and keys are the same tokens.
      query_offset: Position of the first query among the keys (KV caches), one for all or one per row.
      scale: Factor of the logits, H**-0.5 unless told.
      block_size: Queries at a time, so that memory is linear in length, also in the backward pass.
      backend: "auto" takes what suits the platform.
    """
    B, T, N, H = query.shape
    S, K = key.shape[1:3]
    if N % K:
        raise ValueError(f"attention: {N} query heads are not a multiple of {K} key heads")
    if backend not in ("auto", "xla"):
        raise ValueError(f"attention: backend {backend!r} is not available")
    scale = H**-0.5 if scale is None else scale
    keep = jnp.ones((1, 1, 1, 1), bool) if mask is None else mask
    if causal:
        offset = jnp.reshape(0 if query_offset is None else query_offset, (-1, 1, 1, 1))
        keep = keep & (jnp.arange(S) <= jnp.arange(T)[:, None] + offset)
    if segment_ids is not None:
        queries, keys = segment_ids if isinstance(segment_ids, tuple) else (segment_ids, segment_ids)
        keep = keep & (queries[:, None, :, None] == keys[:, None, None, :])
    if block_size is None or block_size >= T:
        return _dense(query, key, value, keep, scale)
    keep = jnp.broadcast_to(keep, (*keep.shape[:2], T, S))
    pad = -T % block_size
    blocks = jnp.pad(query, ((0, 0), (0, pad), (0, 0), (0, 0))).reshape(B, -1, block_size, N, H)
    keeps = jnp.pad(keep, ((0, 0), (0, 0), (0, pad), (0, 0))).reshape(*keep.shape[:2], -1, block_size, S)
    step = jax.checkpoint(lambda block: _dense(block[0], key, value, block[1], scale))
    out = jax.lax.map(step, (jnp.moveaxis(blocks, 1, 0), jnp.moveaxis(keeps, 2, 0)))
    return jnp.moveaxis(out, 0, 1).reshape(B, -1, N, H)[:, :T]


def _dense(query: Array, key: Array, value: Array, keep: Array, scale: float) -> Array:
    B, T, N, H = query.shape
    K = key.shape[2]
    logits = jnp.einsum("btkgh,bskh->bkgts", query.reshape(B, T, K, N // K, H), key, preferred_element_type=jnp.float32)
    keep = keep[:, :, None] if keep.shape[1] == 1 else keep.reshape(keep.shape[0], K, N // K, *keep.shape[2:])
    logits = jnp.where(keep, scale * logits, jnp.finfo(jnp.float32).min)
    weights = jnp.where(keep, jnp.exp(logits - jax.lax.stop_gradient(logits.max(-1, keepdims=True))), 0)
    total = weights.sum(-1, keepdims=True)
    weights = (weights / jnp.where(total == 0, 1, total)).astype(value.dtype)
    return jnp.einsum("bkgts,bskh->btkgh", weights, value).reshape(B, T, N, H)
