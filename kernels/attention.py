"""Scaled dot-product attention: one entry, three back ends.

- xla: everywhere, every option; in blocks when asked (`attention_xla`).
- cudnn: cuDNN's flash attention, on CUDA GPUs in half precision.
- splash: the Pallas flash kernel that comes with JAX for TPUs; full, causal and packed self-attention.
"""

import functools
from typing import Literal, cast

import jax
import jax.numpy as jnp
from einops import rearrange
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as splash_masks
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from .attention_xla import Rules, attend, attend_biased, attend_blockwise, visible_keys
from .constraints import mesh_axes

Backend = Literal["auto", "xla", "cudnn", "splash"]

# From so many keys on "auto" takes splash on TPUs: it pads lengths to tiles of 128, and XLA holds short rows of logits.
_LONG = 1024


@functools.partial(jax.jit, static_argnames=("causal", "scale", "block_size", "backend"))
def attention(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S K H"],
    value: Float[Array, "B S K H"],
    *,
    mask: Bool[Array, "#B #N #T #S"] | None = None,
    bias: Float[Array, "#B #N T S"] | None = None,
    causal: bool = False,
    segment_ids: Int[Array, "B T"] | tuple[Int[Array, "B T"], Int[Array, "B S"]] | None = None,
    query_offset: int | Int[Array, ""] | Int[Array, " B"] | None = None,
    scale: float | None = None,
    block_size: int | None = None,
    backend: Backend = "auto",
) -> Float[Array, "B T N H"]:
    """softmax(scale · query keyᵀ + bias) value, the softmax in float32; queries that see no key give zeros.

    Args:
      query: Queries; head n reads key head n // (N / K) (grouped-query attention, arXiv:2305.13245).
      key: Keys.
      value: Values.
      mask: True where a query may see a key; any axis may be 1.
      bias: Added to the logits, learned relative positions say; XLA's dense form alone takes it.
      causal: Query t sees the keys 0 … t + query_offset.
      segment_ids: Queries see the keys of their own segment; one array where queries and keys are the same tokens.
      query_offset: Position of the first query among the keys (of a cache), for all or for each row; 0 unless told.
      scale: Factor of the logits, H**-0.5 unless told.
      block_size: In the XLA back end, take queries and keys in blocks of so many and pass over blocks that nobody sees:
        memory is linear in the lengths, forward and backward (the other back ends always work so).
      backend: "auto" takes the kernel of the platform where it can do what is asked, else XLA.

    Returns:
      The mixed values, in the dtype of `query`.

    Raises:
      ValueError: if the shapes do not fit, or the back end asked for cannot do this.
    """
    _check(query, key, causal, segment_ids, query_offset, block_size)
    scale = float(query.shape[-1] ** -0.5 if scale is None else scale)
    if bias is not None:
        if backend not in ("auto", "xla") or block_size is not None:
            raise ValueError(
                f"attention: a bias needs the dense XLA back end, got {backend!r} in blocks of {block_size}"
            )
        rules = _rules(query, key, mask, causal, segment_ids, query_offset)
        return attend_biased(query, key, value, bias, rules, scale)
    plain = mask is None and query_offset is None and segment_ids is None
    if backend == "auto":
        backend = _preferred(key.shape[1])
        if _obstacle(backend, query, key, mask, segment_ids, query_offset, block_size):
            backend = "xla"
    elif obstacle := _obstacle(backend, query, key, mask, segment_ids, query_offset, block_size):
        raise ValueError(f"attention: backend {backend!r} {obstacle}")
    if backend == "splash":
        return _splash(query, key, value, causal, segment_ids, scale)
    if backend == "cudnn" and plain:
        return jax.nn.dot_product_attention(query, key, value, is_causal=causal, scale=scale, implementation="cudnn")
    rules = _rules(query, key, mask, causal, segment_ids, query_offset)
    if backend == "cudnn":
        return _cudnn(query, key, value, rules, scale)
    if block_size is None or block_size >= max(query.shape[1], key.shape[1]):
        return attend(query, key, value, rules, scale)
    return attend_blockwise(query, key, value, rules, scale, block_size)


def _check(query, key, causal, segment_ids, query_offset, block_size) -> None:
    (length, heads), (keys, key_heads) = query.shape[1:3], key.shape[1:3]
    if heads % key_heads:
        raise ValueError(f"attention: {heads} query heads are not a multiple of {key_heads} key heads")
    if query_offset is not None and not causal:
        raise ValueError("attention: query_offset needs causal=True")
    if segment_ids is not None and not isinstance(segment_ids, tuple) and length != keys:
        raise ValueError(f"attention: one array of segment_ids for {length} queries and {keys} keys, expected a pair")
    if block_size is not None and block_size < 1:
        raise ValueError(f"attention: block_size must be at least 1, got {block_size}")


def _preferred(keys: int) -> Backend:
    """The back end of the platform: that of the mesh in use (it may be compile-only), else of the default device."""
    mesh = jax.sharding.get_abstract_mesh()
    device = mesh.abstract_device or jax.devices()[0]
    # Outside a mesh, several devices may hold an array in ways that a Pallas kernel cannot see.
    if device.platform == "tpu" and keys >= _LONG and (not mesh.empty or jax.device_count() == 1):
        return "splash"
    return "cudnn" if device.platform == "gpu" else "xla"


def _obstacle(backend, query, key, mask, segment_ids, query_offset, block_size) -> str | None:
    """Why a back end cannot do this; None if it can."""
    if backend == "splash":
        if mask is not None or query_offset is not None or isinstance(segment_ids, tuple):
            return "takes no mask, no query_offset and no pair of segment_ids"
        return "takes no float16" if query.dtype == jnp.float16 else None
    if backend == "cudnn":
        if query.dtype not in (jnp.bfloat16, jnp.float16):
            return f"takes bfloat16 and float16, got {query.dtype}"
        if query.shape[-1] % 8 or query.shape[-1] > 128:
            return f"takes heads of a multiple of 8 up to 128, got {query.shape[-1]}"
        if query.shape[1] % 2 or key.shape[1] % 2:  # JAX refuses them in the backward pass
            return f"takes even lengths, got {query.shape[1]} queries and {key.shape[1]} keys"
        masked = mask is not None or query_offset is not None or segment_ids is not None
        return "has no blockwise masks" if masked and block_size is not None else None
    return None if backend == "xla" else "is unknown, expected 'auto', 'xla', 'cudnn' or 'splash'"


def _rules(query, key, mask, causal, segment_ids, query_offset) -> Rules:
    length, heads = query.shape[1:3]
    if mask is not None:
        mask = rearrange(mask, "b (k g) t s -> b k g t s", k=key.shape[2] if mask.shape[1] == heads else 1)
    positions = None
    if causal:
        positions = jnp.arange(length) + jnp.reshape(0 if query_offset is None else query_offset, (-1, 1))
    if segment_ids is not None and not isinstance(segment_ids, tuple):
        segment_ids = segment_ids, segment_ids
    return Rules(mask, positions, segment_ids)


def _cudnn(query, key, value, rules: Rules, scale: float):
    """cuDNN with the rules as one mask; it adds a large negative number, so that fully masked rows need clearing."""
    visible = visible_keys(rules, jnp.arange(key.shape[1]))
    assert visible is not None, "nothing to mask"
    visible = rearrange(visible, "b k g t s -> b (k g) t s")
    visible = jnp.broadcast_to(visible, (*visible.shape[:2], query.shape[1], key.shape[1]))
    out = jax.nn.dot_product_attention(query, key, value, mask=visible, scale=scale, implementation="cudnn")
    return jnp.where(rearrange(visible.any(-1), "b n t -> b t n 1"), out, 0)


def _splash(query, key, value, causal: bool, segment_ids, scale: float):
    """The splash kernel on each device's examples and heads."""
    mesh = jax.sharding.get_abstract_mesh()
    run = functools.partial(_splash_on_device, causal=causal, scale=scale)
    if mesh.empty or mesh.manual_axes:
        return run(query, key, value, segment_ids)
    batch, heads = mesh_axes(mesh, key.shape[0], "batch"), mesh_axes(mesh, key.shape[2], "heads")
    whole = PartitionSpec(batch, None, heads, None)
    ids = None if segment_ids is None else PartitionSpec(batch, None)
    mapped = jax.shard_map(run, in_specs=(whole, whole, whole, ids), out_specs=whole, check_vma=False)
    return mapped(query, key, value, segment_ids)


def _splash_on_device(query, key, value, segment_ids, *, causal: bool, scale: float):
    """Pads lengths to tiles of 128: added keys are a segment of their own, added queries are in that of the last."""
    (batch, length, heads), keys = query.shape[:3], key.shape[1]
    if segment_ids is None:
        ids = splash.SegmentIds(jnp.zeros((batch, length), jnp.int32), jnp.zeros((batch, keys), jnp.int32))
    else:
        ids = splash.SegmentIds(segment_ids, segment_ids)
    rows, columns = (0, -length % 128), (0, -keys % 128)
    ids = splash.SegmentIds(
        jnp.pad(ids.q, ((0, 0), rows), mode="edge"),
        jnp.pad(ids.kv, ((0, 0), columns), constant_values=jnp.iinfo(jnp.int32).min),
    )
    query, key, value = (
        jnp.pad(rearrange(x, "b t n h -> b n t h"), ((0, 0), (0, 0), sides, (0, 0)))
        for x, sides in ((scale * query, rows), (key, columns), (value, columns))
    )
    shape = query.shape[2], key.shape[2]
    mask = splash_masks.CausalMask(shape) if causal else splash_masks.FullMask(shape)
    tile, key_tile = (next(size for size in (512, 256, 128) if n % size == 0) for n in shape)
    sizes = splash.BlockSizes(
        block_q=tile,
        block_kv=key_tile,
        block_q_dkv=tile,
        block_kv_dkv=key_tile,
        block_q_dq=tile,
        block_kv_dq=key_tile,
    )
    kernel = splash.make_splash_mha_single_device(splash_masks.MultiHeadMask([mask] * heads), block_sizes=sizes)
    padded = segment_ids is not None or keys % 128 > 0
    out = cast(Array, jax.vmap(kernel)(query, key, value, ids if padded else None))
    return rearrange(out, "b n t h -> b t n h")[:, :length]
