"""OPT (arXiv 2205.01068): a decoder with learned positions, of which the first row is number 2.

Reference: transformers models/opt, whose forms are all here: norms before or behind the branches (OPT-350m), embeddings
narrower than the model, no biases (Galactica).
"""

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from ..kernels.activations import ACTIVATIONS
from ..kernels.constraints import constrain
from .cache import Cache, LayerCache, with_cache
from .layers import ContextAttention, LayerNorm, Mlp, Stack, wide
from .published import Published, integers
from .ranges import BelowOne, Count, Positive, Whole

OFFSET = 2  # rows of the table of positions before the first


@dataclasses.dataclass(frozen=True)
class OPTConfig:
    """Everything that fixes the function."""

    width: Count
    depth: Count
    num_heads: Count
    mlp_dim: Count
    vocab_size: Count = 50272
    max_positions: Count = 2048
    embed_dim: Whole = 0  # of the vocabulary's vectors, projected in and out where it is not the width; 0: the width
    pre_norm: bool = True  # norms before the branches; else behind their sums
    final_norm: bool = True  # one more behind the last block, with pre_norm alone
    use_bias: bool = True
    tie_embeddings: bool = True
    activation: str = "relu"
    eps: Positive = 1e-5
    dropout: BelowOne = 0.1
    scan: bool = False
    remat: str = "none"

    def __post_init__(self) -> None:
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"activation {self.activation!r}, expected one of {sorted(ACTIVATIONS)}")
        if self.width % self.num_heads:
            raise ValueError(f"width {self.width} is not divisible by num_heads {self.num_heads}")


_INIT = nn.initializers.normal(0.02)


class Block(nn.Module):
    """x += attn(norm1(x)), x += mlp(norm2(x)), or the norms behind; beside x come its new keys and values."""

    config: OPTConfig
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B T D"],
        layer: LayerCache | None,
        *,
        mask: Bool[Array, "B 1 1 S"] | None,
        end: Int[Array, ""] | None,
        train: bool = False,
    ) -> tuple[Float[Array, "B T D"], Any]:
        c = self.config
        x = constrain(x, "batch", None, None)
        attend = ContextAttention(c.num_heads, c.width, c.use_bias, _INIT, dtype=self.dtype, name="attn")
        norm1, norm2 = (LayerNorm(c.eps, name=name) for name in ("norm1", "norm2"))
        drop = functools.partial(nn.Dropout(c.dropout), deterministic=not train)
        y = norm1(x) if c.pre_norm else x
        key, value = attend.keys_and_values(y)
        new = None
        if layer is not None:
            assert end is not None
            key, value, new = with_cache(key, value, layer, end)
        x = x + drop(attend(y, key, value, mask=mask, causal=True, query_offset=end))
        x = x if c.pre_norm else norm1(x)
        init = {"kernel_init": _INIT, "bias_init": nn.initializers.zeros}
        mlp = Mlp(c.mlp_dim, c.activation, use_bias=c.use_bias, dtype=self.dtype, name="mlp", **init)
        x = x + drop(mlp(norm2(x) if c.pre_norm else x, train))
        return x if c.pre_norm else norm2(x), new


class OPT(nn.Module):
    """Token ids, or vectors in their place, to next-token scores; `extend` does it with a cache."""

    config: OPTConfig
    dtype: DTypeLike = jnp.float32

    def setup(self) -> None:
        c = self.config
        dense = functools.partial(nn.Dense, use_bias=False, kernel_init=_INIT, dtype=self.dtype)
        embed_dim = c.embed_dim or c.width
        self.embed_tokens = nn.Embed(c.vocab_size, embed_dim, embedding_init=_INIT, dtype=self.dtype)
        self.pos_embed = nn.Embed(c.max_positions + OFFSET, c.width, embedding_init=_INIT, dtype=jnp.float32)
        if embed_dim != c.width:
            self.project_in, self.project_out = dense(c.width), dense(embed_dim)
        self.layers = Stack(functools.partial(Block, c, self.dtype), c.depth, c.scan, c.remat)
        if c.pre_norm and c.final_norm:
            self.norm = LayerNorm(c.eps)
        if not c.tie_embeddings:
            self.lm_head = dense(c.vocab_size)

    def embed(self, tokens: Int[Array, "B T"] | Float[Array, "B T E"]) -> Float[Array, "B T E"]:
        """Token ids -> vectors; vectors stay as they are."""
        return self.embed_tokens(tokens) if jnp.issubdtype(tokens.dtype, jnp.integer) else tokens.astype(self.dtype)

    def decode(
        self,
        tokens: Int[Array, "B T"] | Float[Array, "B T E"],
        mask: Bool[Array, "B T"] | None = None,
        cache: Cache | None = None,
        *,
        train: bool = False,
    ) -> tuple[Float[Array, "B T E"], Cache | None]:
        """The last hidden states (in the width of the embeddings), and the cache with these tokens.

        `mask` is True on what is no padding, wherever that stands: positions count the others. ValueError for more
        tokens than there are positions.
        """
        x = self.embed(tokens)
        length = x.shape[1] if cache is None else cache.used.shape[1]
        if length > self.config.max_positions:
            raise ValueError(f"{length} tokens with the answer's, expected at most {self.config.max_positions}")
        kept = jnp.ones(x.shape[:2], bool) if mask is None else mask
        count = jnp.cumsum(kept, 1) + (0 if cache is None else cache.length[:, None])
        positions = wide(self.pos_embed(jnp.where(kept, count - 1, -1) + OFFSET))
        if self.config.embed_dim not in (0, self.config.width):
            x = self.project_in(x)
        x = (wide(x) + positions).astype(self.dtype)
        if cache is None:
            x, _ = self.layers(x, mask=None if mask is None else mask[:, None, None], end=None, train=train)
            return self._out(x), None
        cache = cache.append(kept)
        options = {"mask": cache.used[:, None, None], "end": cache.end, "train": train}
        x, new = self.layers(x, (cache.key, cache.value), **options)
        return self._out(x), cache.write(*new)

    def _out(self, x: Float[Array, "B T D"]) -> Float[Array, "B T E"]:
        c = self.config
        x = self.norm(x) if c.pre_norm and c.final_norm else x
        return x if c.embed_dim in (0, c.width) else self.project_out(x)

    def start(self, batch: int, capacity: int) -> Cache:
        """An empty cache with room for `capacity` tokens a row."""
        c = self.config
        return Cache.empty((c.depth, batch, c.num_heads, capacity, c.width // c.num_heads), self.dtype)

    def logits(self, hidden: Float[Array, "*B E"]) -> Float[Array, "*B V"]:
        """Hidden states -> float32 scores over the vocabulary."""
        head = self.embed_tokens.attend if self.config.tie_embeddings else self.lm_head
        return constrain(head(hidden), "batch", *[None] * (hidden.ndim - 2), "vocab").astype(jnp.float32)

    def __call__(
        self,
        tokens: Int[Array, "B T"] | Float[Array, "B T E"],
        mask: Bool[Array, "B T"] | None = None,
        *,
        train: bool = False,
    ) -> dict[str, Array]:
        """{"hidden" [B, T, E], "logits" [B, T, V]}."""
        hidden, _ = self.decode(tokens, mask, train=train)
        return {"hidden": hidden, "logits": self.logits(hidden)}


# Published sizes: width, depth, heads, MLP width.
SIZES: dict[str, tuple[int, int, int, int]] = {
    "125m": (768, 12, 12, 3072),
    "350m": (1024, 24, 16, 4096),
    "1.3b": (2048, 24, 32, 8192),
    "2.7b": (2560, 32, 32, 10240),
    "6.7b": (4096, 32, 32, 16384),
    "13b": (5120, 40, 40, 20480),
    "30b": (7168, 48, 56, 28672),
    "66b": (9216, 64, 72, 36864),
}


def config(variant: str, **fields: Any) -> OPTConfig:
    """The config of a published size; `fields` override. ValueError names the choices."""
    if variant not in SIZES:
        raise ValueError(f"unknown OPT variant {variant!r}, expected one of {list(SIZES)}")
    shape: dict[str, Any] = dict(zip(("width", "depth", "num_heads", "mlp_dim"), SIZES[variant], strict=True))
    if variant == "350m":
        shape |= {"pre_norm": False, "embed_dim": 512}
    return OPTConfig(**(shape | fields))


PUBLISHED = {
    name: Published(
        lambda scan, name=name: OPT(config(name, scan=scan)), {"tokens": integers(1, 512)}, f"facebook/opt-{name}"
    )
    for name in SIZES
}
