"""BERT (arXiv 1810.04805): a text encoder of post-norm blocks; with learned queries and an image to read, a Q-Former.

A Q-Former (BLIP-2, arXiv 2301.12597, section 3.1) is a BERT whose sequence begins with queries: self-attention is
shared, but queries have feed-forward layers of their own, and in every second block they read the image by
cross-attention. Which token sees which is a mask; there is no separate decoder. Reference: transformers models/bert,
LAVIS models/blip2_models/Qformer.py.
"""

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from ..kernels.activations import ACTIVATIONS
from ..kernels.constraints import constrain
from .cache import Cache, LayerCache, with_cache
from .layers import ContextAttention, LayerNorm, Mlp, remat_policy, wide
from .published import Published, integers
from .ranges import BelowOne, Count, Positive, Whole


@dataclasses.dataclass(frozen=True)
class BertConfig:
    """Everything that fixes the function. The defaults are those of bert-base-uncased."""

    width: Count = 768
    depth: Count = 12
    num_heads: Count = 12
    mlp_dim: Count = 3072
    vocab_size: Whole = 30522  # 0: it takes vectors alone
    max_positions: Count = 512
    num_types: Whole = 2  # kinds of tokens with a vector each; 0: none
    pooler: bool = False  # Dense + tanh of the first token
    lm_head: bool = False  # scores over the vocabulary, tied to the embeddings
    text_mlp: bool = True  # feed-forward layers of text; a Q-Former that reads none has only those of queries
    query_mlp: bool = False  # feed-forward layers of queries
    cross_every: Whole = 0  # queries read `context` in blocks 0, n, 2n, ...; 0: in none
    context_width: Whole = 0
    activation: str = "gelu"
    eps: Positive = 1e-12
    dropout: BelowOne = 0.1
    attention_dropout: BelowOne = 0.1
    remat: str = "none"

    def __post_init__(self) -> None:
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"activation {self.activation!r}, expected one of {sorted(ACTIVATIONS)}")
        if self.width % self.num_heads:
            raise ValueError(f"width {self.width} is not divisible by num_heads {self.num_heads}")
        if not (self.text_mlp or self.query_mlp):
            raise ValueError("text_mlp and query_mlp are both False: no token has a feed-forward layer")
        if self.lm_head and not self.vocab_size:
            raise ValueError("lm_head needs a vocabulary")


_INIT = nn.initializers.normal(0.02)


class Block(nn.Module):
    """x = norm(x + attn(x)); queries = norm(queries + cross(queries, context)); x = norm(x + mlp(x)).

    The first `num_queries` rows are queries. Hands back its keys and values, heads first, for a `Cache`.
    """

    config: BertConfig
    cross: bool
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B T D"],
        cache: LayerCache | None,
        context: Float[Array, "B P C"] | None,
        mask: Bool[Array, "B 1 T S"] | None,
        end: Int[Array, ""] | None,
        num_queries: int,
        train: bool,
    ) -> tuple[Float[Array, "B T D"], LayerCache]:
        c = self.config
        options = {"kernel_init": _INIT, "dropout": c.attention_dropout, "dtype": self.dtype}
        attention = functools.partial(ContextAttention, c.num_heads, c.width, **options)

        def add(x: Array, y: Array, name: str) -> Array:
            return LayerNorm(c.eps, name=name)(x + nn.Dropout(c.dropout, deterministic=not train)(y))

        def mlp(x: Array, kind: str) -> Array:
            zeros = nn.initializers.zeros
            options = {"kernel_init": _INIT, "bias_init": zeros, "dtype": self.dtype}
            return add(x, Mlp(c.mlp_dim, c.activation, name=f"{kind}mlp", **options)(x, train), f"{kind}norm2")

        x = constrain(x, "batch", None, None)
        attend = attention(name="attn")
        key, value = attend.keys_and_values(x)
        if cache is None:
            new = key.swapaxes(1, 2), value.swapaxes(1, 2)
        else:
            assert end is not None
            key, value, new = with_cache(key, value, cache, end)
        x = add(x, attend(x, key, value, mask=mask, train=train), "norm1")
        queries, text = x[:, :num_queries], x[:, num_queries:]
        if num_queries and self.cross:
            assert context is not None
            read = attention(name="cross")
            queries = add(queries, read(queries, *read.keys_and_values(context), train=train), "cross_norm")
        parts = [mlp(queries, "query_")] if num_queries else []
        parts += [mlp(text, "")] if text.shape[1] else []
        return jnp.concatenate(parts, 1) if len(parts) > 1 else parts[0], new


class Bert(nn.Module):
    """The encoder. `__call__` takes token ids; `embed`, `encode` and `logits` are its parts, for a Q-Former."""

    config: BertConfig
    dtype: DTypeLike = jnp.float32

    def setup(self) -> None:
        c = self.config
        embed = functools.partial(nn.Embed, features=c.width, embedding_init=_INIT, dtype=jnp.float32)
        dense = functools.partial(nn.Dense, c.width, kernel_init=_INIT, dtype=self.dtype)
        if c.vocab_size:
            self.token_embed, self.pos_embed = embed(c.vocab_size), embed(c.max_positions)
        if c.num_types:
            self.type_embed = embed(c.num_types)
        self.embed_norm = LayerNorm(c.eps)
        self.embed_drop = nn.Dropout(c.dropout)
        block = nn.remat(Block, policy=remat_policy(c.remat), static_argnums=(6, 7)) if c.remat != "none" else Block
        reads = [c.cross_every > 0 and i % c.cross_every == 0 for i in range(c.depth)]
        self.blocks = [block(c, cross, self.dtype) for cross in reads]
        if c.pooler:
            self.pooler = dense()
        if c.lm_head:
            self.head_dense, self.head_norm = dense(), LayerNorm(c.eps)
            self.head_bias = self.param("head_bias", nn.initializers.zeros, (c.vocab_size,))

    def embed(
        self, tokens: Int[Array, "B T"], types: Int[Array, "B T"] | None = None, start: Int[Array, ""] | int = 0
    ) -> Float[Array, "B T D"]:
        """Vectors of tokens at positions from `start` on, before the norm. Without `types` all are of kind 0."""
        c, length = self.config, tokens.shape[1]
        if length > c.max_positions:
            raise ValueError(f"text of {length} tokens, expected at most {c.max_positions}")
        x = wide(self.token_embed(tokens)) + wide(self.pos_embed(start + jnp.arange(length)))
        if c.num_types:
            x = x + wide(self.type_embed(jnp.zeros_like(tokens) if types is None else types))
        return x.astype(self.dtype)

    def encode(
        self,
        x: Float[Array, "B T D"],
        *,
        mask: Bool[Array, "#B #T S"] | None = None,
        num_queries: int = 0,
        context: Float[Array, "B P C"] | None = None,
        cache: Cache | None = None,
        train: bool = False,
    ) -> tuple[Float[Array, "B T D"], LayerCache]:
        """The last hidden states of vectors before the norm, and all layers' new keys and values [L, B, N, T, H].

        `mask` is True where a row sees a column: of the cache, where there is one, with the new ones at its end. The
        first `num_queries` rows are queries that read `context`.
        """
        x = self.embed_drop(self.embed_norm(x.astype(self.dtype)), deterministic=not train)
        mask = None if mask is None else mask[:, None]
        new = []
        for i, block in enumerate(self.blocks):
            layer = None if cache is None else (cache.key[i], cache.value[i])
            x, kept = block(x, layer, context, mask, None if cache is None else cache.end, num_queries, train)
            new.append(kept)
        return x, jax.tree.map(lambda *leaves: jnp.stack(leaves), *new)

    def logits(self, hidden: Float[Array, "*B D"]) -> Float[Array, "*B V"]:
        """Hidden states -> float32 scores over the vocabulary."""
        y = self.head_norm(ACTIVATIONS[self.config.activation](self.head_dense(hidden)))
        scores = jnp.dot(y, self.token_embed.embedding.T.astype(y.dtype))
        scores = constrain(scores, "batch", *[None] * (hidden.ndim - 2), "vocab")
        return scores.astype(jnp.float32) + wide(self.head_bias)

    def __call__(
        self,
        tokens: Int[Array, "B T"],
        mask: Bool[Array, "B T"] | None = None,
        types: Int[Array, "B T"] | None = None,
        *,
        train: bool = False,
    ) -> dict[str, Array]:
        """{"tokens" [B, T, D]}, with a pooler "pooled" [B, D], with a head "logits" [B, T, V].

        `mask` is True on what is no padding.
        """
        c = self.config
        hidden, _ = self.encode(self.embed(tokens, types), mask=None if mask is None else mask[:, None], train=train)
        out = {"tokens": hidden}
        if c.pooler:
            out["pooled"] = jnp.tanh(self.pooler(hidden[:, 0]))
        return out | ({"logits": self.logits(hidden)} if c.lm_head else {})

    def initialize(self, queries: Float[Array, "B Q D"], context: Float[Array, "B P C"] | None) -> None:
        """Runs every part once, for `init`: queries with a token of text behind them, where it reads any."""
        c, x = self.config, queries
        if c.text_mlp:
            text = self.embed(jnp.zeros((len(x), 1), jnp.int32)) if c.vocab_size else jnp.zeros_like(x[:, :1])
            x = jnp.concatenate([x, text], 1)
        hidden, _ = self.encode(x, num_queries=queries.shape[1], context=context)
        if c.lm_head:
            self.logits(hidden)


# Published sizes: width, depth, heads, MLP width.
SIZES: dict[str, tuple[int, int, int, int]] = {
    "base": (768, 12, 12, 3072),
    "large": (1024, 24, 16, 4096),
    "MiniLM-L6": (384, 6, 12, 1536),
}


def config(variant: str, **fields: Any) -> BertConfig:
    """The config of a published size; `fields` override. ValueError names the choices."""
    if variant not in SIZES:
        raise ValueError(f"unknown BERT variant {variant!r}, expected one of {list(SIZES)}")
    shape = dict(zip(("width", "depth", "num_heads", "mlp_dim"), SIZES[variant], strict=True))
    return BertConfig(**{**shape, **fields})


CHECKPOINTS = {
    "base": "google-bert/bert-base-uncased",
    "large": "google-bert/bert-large-uncased",
    "MiniLM-L6": "sentence-transformers/all-MiniLM-L6-v2",
}
PUBLISHED = {
    name: Published(
        lambda scan, name=name: Bert(config(name, pooler=True)), {"tokens": integers(1, 128)}, CHECKPOINTS[name]
    )
    for name in SIZES
}
