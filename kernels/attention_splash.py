"""The splash back end of attention: the Pallas flash kernel that comes with JAX for TPUs.

Lengths are cut into equal tiles of a multiple of 128, as few as the table below allows, and padded to them: 577 tokens
are one tile of 640, not five of 128. Added keys are a segment of their own; added queries are cut off.
"""

import functools
from typing import NamedTuple, cast

import jax
import jax.numpy as jnp
from einops import rearrange
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as splash_masks
from jax.sharding import PartitionSpec
from jaxtyping import Array

from .attention_platform import platform
from .constraints import mesh_axes

_LANES = 128
# The segment of added keys, which no caller's id is.
_ADDED = jnp.iinfo(jnp.int32).min


class Tiles(NamedTuple):
    """The largest tiles for a chip and a size of heads."""

    length: int
    """Of queries and of keys; the backward pass takes two tiles of keys in one where their number is even."""
    logits: int
    """Queries of a tile times the keys that they are multiplied with at a time."""
    fused: int
    """With up to so many tiles of keys one kernel computes all gradients. It writes a part of the queries' gradient for
    every tile of keys: beyond, a kernel of its own for that gradient costs less memory."""


def largest_tiles(device_kind: str, head_dim: int) -> Tiles:
    """The table: tiles of 1024 and 2048 and the fused backward kernel, as MaxText and MaxDiffusion take them.

    Smaller ones where these would not fit into 16 MiB of vector memory: wide heads, and chips before v5.
    """
    small = head_dim > 128 or device_kind.startswith(("TPU v2", "TPU v3", "TPU v4"))
    return Tiles(512, 512 * 512, 4) if small else Tiles(1024, 1024 * 512, 8)


def block_sizes(length: int, keys: int, largest: Tiles) -> splash.BlockSizes:
    """Equal tiles of a multiple of 128, as few as allowed; the padded lengths are multiples of them."""
    (tile, _), (key_tile, number) = (_equal_tiles(n, largest.length) for n in (length, keys))
    backward = key_tile * (2 if number % 2 == 0 else 1)
    fused = keys <= largest.fused * backward
    inner, backward_inner = (_inner(n, largest.logits // tile) for n in (key_tile, backward))
    of_queries = (None, None) if fused else (tile, key_tile)
    return splash.BlockSizes(
        *(tile, key_tile, inner, tile, backward, backward_inner, *of_queries), use_fused_bwd_kernel=fused
    )


def _equal_tiles(length: int, limit: int) -> tuple[int, int]:
    """(tile, number of them)."""
    number = -(-length // limit)
    return -(-length // (number * _LANES)) * _LANES, number


def _inner(tile: int, limit: int) -> int:
    """The largest divisor of a tile that is a multiple of 128, within the limit."""
    return max(n for n in range(_LANES, max(limit, _LANES) + 1, _LANES) if tile % n == 0)


def attend_splash(query, key, value, causal: bool, window: int | None, segment_ids, lengths, scale: float):
    """softmax(scale · query keyᵀ) value on each device's examples and heads; `lengths` are how many keys a row has."""
    mesh = jax.sharding.get_abstract_mesh()
    run = functools.partial(_attend_on_device, causal=causal, window=window, scale=scale)
    if mesh.empty or mesh.manual_axes:
        return run(query, key, value, segment_ids, lengths)
    batch, heads = mesh_axes(mesh, key.shape[0], "batch"), mesh_axes(mesh, key.shape[2], "heads")
    whole, rows = PartitionSpec(batch, None, heads, None), PartitionSpec(batch)
    mapped = jax.shard_map(run, in_specs=(whole, whole, whole, rows, rows), out_specs=whole, check_vma=False)
    return mapped(query, key, value, segment_ids, lengths)


def _attend_on_device(query, key, value, segment_ids, lengths, *, causal, window, scale):
    (length, heads, width), keys = query.shape[1:], key.shape[1]
    sizes = block_sizes(length, keys, largest_tiles(platform().device_kind, width))
    rows, columns = -length % sizes.block_q, -keys % cast(int, sizes.block_kv_dkv)
    ids = _segments(query, key, segment_ids, lengths, rows, columns)
    query, key, value = (
        jnp.pad(rearrange(x, "b t n h -> b n t h"), ((0, 0), (0, 0), (0, added), (0, 0)))
        for x, added in ((scale * query, rows), (key, columns), (value, columns))
    )
    mask = splash_masks.MultiHeadMask([_mask((length + rows, keys + columns), causal, window)] * heads)
    kernel = splash.make_splash_mha_single_device(mask, block_sizes=sizes)
    out = cast(Array, jax.vmap(kernel)(query, key, value, ids))
    out = rearrange(out, "b n t h -> b t n h")[:, :length]
    return out if lengths is None else jnp.where(rearrange(lengths > 0, "b -> b 1 1 1"), out, 0)


def _segments(query, key, segment_ids, lengths, rows, columns):
    """Ids of queries and keys with what is added to them; None where nobody is hidden from anybody."""
    (batch, length), keys = query.shape[:2], key.shape[1]
    if segment_ids is None and lengths is None and not columns:
        return None
    ids = jnp.zeros((batch, length), jnp.int32) if segment_ids is None else segment_ids
    key_ids = jnp.zeros((batch, keys), jnp.int32) if segment_ids is None else segment_ids
    if lengths is not None:
        key_ids = jnp.where(jnp.arange(keys) < jnp.maximum(lengths, 1)[:, None], key_ids, _ADDED)
    ids = jnp.pad(ids, ((0, 0), (0, rows)), mode="edge")
    return splash.SegmentIds(ids, jnp.pad(key_ids, ((0, 0), (0, columns)), constant_values=_ADDED))


def _mask(shape, causal, window):
    if window is not None:
        return splash_masks.LocalMask(shape, (window - 1, 0), offset=0)
    return splash_masks.CausalMask(shape) if causal else splash_masks.FullMask(shape)
