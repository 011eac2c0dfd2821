"""Scaled dot-product attention: one entry, four back ends.

- xla: everywhere, every option; in blocks when asked (`attention_xla`).
- cudnn: cuDNN's flash attention, on NVIDIA GPUs in half precision (`attention_cudnn`).
- rows: a Pallas kernel for TPUs that takes short rows whole, in bfloat16 (`attention_rows`).
- splash: the Pallas flash kernel that comes with JAX for TPUs, for what it can do without a mask (`attention_splash`).

Where the length lies on a mesh's `context` axis, its devices share the work (`attention_context`).
`python -m omnax.kernels.attention` prints which of them is taken for which call on which platform.
"""

import functools
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Bool, Float, Int

from .attention_context import attend_over_context, context_size
from .attention_cudnn import Words, attend_masked, attend_plain
from .attention_platform import Platform, platform
from .attention_rows import attend_rows, fits
from .attention_splash import attend_splash
from .attention_xla import Rules, attend, attend_biased, attend_blockwise

Backend = Literal["auto", "xla", "cudnn", "rows", "splash"]

# From so many keys on "auto" takes splash on TPUs: it pads lengths to tiles of 128, and XLA holds short rows of logits.
_LONG = 1024
# Fewer queries (a step of decoding) than this leave most of a tile empty, or of a row.
_MANY, _SOME = 128, 64


@functools.partial(jax.jit, static_argnames=("causal", "window", "scale", "block_size", "backend"))
def attention(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S K H"],
    value: Float[Array, "B S K H"],
    *,
    mask: Bool[Array, "#B #N #T #S"] | None = None,
    bias: Float[Array, "#B #N T S"] | None = None,
    causal: bool = False,
    window: int | None = None,
    segment_ids: Int[Array, "B T"] | tuple[Int[Array, "B T"], Int[Array, "B S"]] | None = None,
    key_lengths: Int[Array, " B"] | None = None,
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
      window: Of these the last so many only.
      segment_ids: Queries see the keys of their own segment; one array where queries and keys are the same tokens.
      key_lengths: How many keys each row has; the rest is padding.
      query_offset: Position of the first query among the keys (of a cache), for all or for each row; 0 unless told.
      scale: Factor of the logits, H**-0.5 unless told.
      block_size: In the XLA back end, take queries and keys in blocks of so many and pass over blocks that nobody sees:
        memory is linear in the lengths, forward and backward (the other back ends always work so).
      backend: "auto" takes the kernel of the platform where it can do what is asked, else XLA. A `mask`, a pair of
        `segment_ids` or a `query_offset` of several queries costs the kernels most: say it in the other ways where
        they do.

    Returns:
      The mixed values, in the dtype of `query`.

    Raises:
      ValueError: if the shapes do not fit, or the back end asked for cannot do this.
    """
    _check(query, key, causal, window, segment_ids, query_offset, block_size)
    scale = float(query.shape[-1] ** -0.5 if scale is None else scale)
    if causal and window is None and query.shape[1] == 1:  # one query: what is before it is a number of keys
        seen = jnp.asarray(1 if query_offset is None else query_offset + 1)
        key_lengths = seen if key_lengths is None else jnp.minimum(key_lengths, seen)
        causal, query_offset = False, None
    call = Call(query, key, mask, causal, window, segment_ids, key_lengths, query_offset, block_size)
    if bias is not None:
        if backend not in ("auto", "xla") or block_size is not None:
            raise ValueError(
                f"attention: a bias needs the dense XLA back end, got {backend!r} in blocks of {block_size}"
            )
        return attend_biased(query, key, value, bias, call.rules(), scale)
    if mask is None and query_offset is None and context_size(query.shape[1], key.shape[1]) > 1:
        lengths = None if key_lengths is None else jnp.broadcast_to(key_lengths, query.shape[:1])
        words = {"causal": causal, "window": window, "scale": scale, "block_size": block_size}
        run = functools.partial(_attend_rows, backend=backend, **words)
        return attend_over_context(run, query, key, value, segment_ids, lengths, tuple(words.values()))
    if backend == "auto":
        backend = choose(call, platform())
    elif found := obstacle(backend, call, platform()):
        raise ValueError(f"attention: backend {backend!r} {found}")
    lengths = None if key_lengths is None else jnp.broadcast_to(key_lengths, query.shape[:1])
    if backend == "splash":
        return attend_splash(query, key, value, causal, window, segment_ids, lengths, scale)
    if backend == "rows":
        return attend_rows(query, key, value, causal, scale)
    if backend == "cudnn" and call.plain:
        return attend_plain(query, key, value, lengths, Words(scale, causal, window))
    if backend == "cudnn":
        return attend_masked(query, key, value, call.rules(), scale)
    if block_size is None or block_size >= max(query.shape[1], key.shape[1]):
        return attend(query, key, value, call.rules(), scale)
    return attend_blockwise(query, key, value, call.rules(), scale, block_size)


def _attend_rows(query, key, value, segment_ids, key_lengths, **words):
    return attention(query, key, value, segment_ids=segment_ids, key_lengths=key_lengths, **words)


class Call(NamedTuple):
    """What is asked of a back end: the arguments of `attention` of these names; of arrays the shapes will do."""

    query: Array | jax.ShapeDtypeStruct
    key: Array | jax.ShapeDtypeStruct
    mask: Array | None = None
    causal: bool = False
    window: int | None = None
    segment_ids: Array | tuple[Array, Array] | None = None
    key_lengths: Array | None = None
    query_offset: Array | int | None = None
    block_size: int | None = None

    @property
    def plain(self) -> bool:
        """Whether words say everything: no mask, no segments, no offset, and no row may turn out to see nothing."""
        said_by_arrays = self.mask, self.segment_ids, self.query_offset
        return all(x is None for x in said_by_arrays) and None in (self.window, self.key_lengths)

    def rules(self) -> Rules:
        """The same for XLA."""
        (length, heads), mask, segment_ids, positions = self.query.shape[1:3], self.mask, self.segment_ids, None
        if mask is not None:
            mask = rearrange(mask, "b (k g) t s -> b k g t s", k=self.key.shape[2] if mask.shape[1] == heads else 1)
        if self.causal:
            offset = 0 if self.query_offset is None else self.query_offset
            positions = jnp.arange(length) + jnp.reshape(offset, (-1, 1))
        if segment_ids is not None and not isinstance(segment_ids, tuple):
            segment_ids = segment_ids, segment_ids
        return Rules(mask, positions, segment_ids, self.key_lengths, self.window)


def choose(call: Call, on: Platform) -> Backend:
    """The back end that "auto" takes: the platform's kernel where it can do this, else XLA."""
    preferred: Backend = "xla"
    if on.name == "gpu" and on.capability:
        preferred = "cudnn"
    # Outside a mesh, several devices may hold an array in ways that a Pallas kernel cannot see.
    whole = not jax.sharding.get_abstract_mesh().empty or jax.device_count() == 1
    if on.name == "tpu" and call.query.shape[1] >= _MANY and call.key.shape[1] >= _LONG and whole:
        preferred = "splash"
    elif on.name == "tpu" and call.query.shape[1] >= _SOME and whole:
        preferred = "rows"
    return "xla" if obstacle(preferred, call, on) else preferred


def obstacle(backend: str, call: Call, on: Platform) -> str | None:
    """Why a back end cannot do this; None if it can."""
    if backend == "splash":
        return _obstacle_to_splash(call)
    if backend == "rows":
        return _obstacle_to_rows(call)
    if backend == "cudnn":
        return _obstacle_to_cudnn(call, on)
    return None if backend == "xla" else "is unknown, expected 'auto', 'xla', 'cudnn', 'rows' or 'splash'"


def _obstacle_to_rows(call: Call) -> str | None:
    (length, heads, width), (keys, key_heads) = call.query.shape[1:], call.key.shape[1:3]
    if not call.plain or call.key_lengths is not None or call.window is not None:
        return "takes rows that are seen whole, or causally"
    if heads != key_heads or call.query.dtype != jnp.bfloat16 or width % 8:
        return "takes as many key heads as heads, of a multiple of 8, in bfloat16"
    if not fits(length, keys, heads * width, call.query.dtype.itemsize):
        return f"holds an example in vector memory, which {length} x {heads * width} numbers do not fit"
    return None


def _obstacle_to_splash(call: Call) -> str | None:
    if call.mask is not None or call.query_offset is not None or isinstance(call.segment_ids, tuple):
        return "takes no mask, no query_offset and no pair of segment_ids"
    if call.key_lengths is not None and not call.plain:
        return "takes key_lengths without segment_ids and without a window"
    return "takes no float16" if call.query.dtype == jnp.float16 else None


def _obstacle_to_cudnn(call: Call, on: Platform) -> str | None:
    dtype, width = call.query.dtype, call.query.shape[-1]
    if dtype not in (jnp.bfloat16, jnp.float16):
        return f"takes bfloat16 and float16, got {dtype}"
    widest = 256 if on.capability and on.capability >= (9, 0) else 128
    if width % 8 or width > widest:
        return f"takes heads of a multiple of 8 up to {widest} (256 from Hopper on), got {width}"
    return "has no blockwise masks" if not call.plain and call.block_size is not None else None


def _check(query, key, causal, window, segment_ids, query_offset, block_size) -> None:
    (length, heads), (keys, key_heads) = query.shape[1:3], key.shape[1:3]
    if heads % key_heads:
        raise ValueError(f"attention: {heads} query heads are not a multiple of {key_heads} key heads")
    for name, value in {"query_offset": query_offset, "window": window}.items():
        if value is not None and not causal:
            raise ValueError(f"attention: {name} needs causal=True")
    if segment_ids is not None and not isinstance(segment_ids, tuple) and length != keys:
        raise ValueError(f"attention: one array of segment_ids for {length} queries and {keys} keys, expected a pair")
    for name, value in {"block_size": block_size, "window": window}.items():
        if value is not None and value < 1:
            raise ValueError(f"attention: {name} must be at least 1, got {value}")


if __name__ == "__main__":
    from .attention_table import main

    main()
