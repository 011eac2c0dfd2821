"""T5 (arXiv 1910.10683) in its 1.1, Flan and multilingual forms: an encoder, or an encoder and a decoder.

Pre-norm blocks without biases, RMS norms, no scale on the attention logits but a learned bias by relative position, and
gated feed-forward layers. mT5 is a T5 1.1; umT5 (arXiv 2304.09151) has a table of biases in every layer. Reference:
transformers models/t5 and models/umt5.
"""

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import flax.struct
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from ..kernels.attention import attention
from ..kernels.constraints import constrain
from .cache import Cache, LayerCache, with_cache
from .layers import Mlp, RMSNorm, Stack
from .published import Published, integers
from .ranges import BelowOne, Count, Positive, Whole


@dataclasses.dataclass(frozen=True)
class T5Config:
    """Everything that fixes the function. The defaults are T5 1.1's."""

    vocab_size: Count
    width: Count
    depth: Count  # of the encoder
    decoder_depth: Whole  # 0: an encoder alone
    num_heads: Count
    head_dim: Count
    mlp_dim: Count
    gated: bool = True
    activation: str = "gelu_tanh"
    num_buckets: Count = 32
    max_distance: Count = 128
    layer_bias: bool = False  # a table of position biases in every layer (umT5), else one a stack, of its first layer
    tie_embeddings: bool = False
    scale_logits: bool = False  # hidden states times width^-0.5 before the head (the T5 of 2019, whose head is tied)
    eps: Positive = 1e-6
    dropout: BelowOne = 0.1
    scan: bool = False
    remat: str = "none"


def relative_buckets(
    queries: Int[Array, " T"], keys: Int[Array, " S"], num_buckets: int, max_distance: int, bidirectional: bool
) -> Int[Array, "T S"]:
    """The bucket of key position minus query position: near ones have one each, far ones share them by logarithm.

    Bidirectional buckets are halves, keys behind the query in the second; else the keys behind it share bucket 0.
    """
    offset = keys[None, :] - queries[:, None]
    base = jnp.zeros_like(offset)
    if bidirectional:
        num_buckets //= 2
        base = jnp.where(offset > 0, num_buckets, 0)
        distance = jnp.abs(offset)
    else:
        distance = jnp.maximum(-offset, 0)
    near = num_buckets // 2
    # In float32, as published; at least 1 keeps the logarithm finite where it is not used.
    far = jnp.log(jnp.maximum(distance, 1).astype(jnp.float32) / near) / np.float32(np.log(max_distance / near))
    shared = jnp.minimum(near + (far * (num_buckets - near)).astype(jnp.int32), num_buckets - 1)
    return base + jnp.where(distance < near, distance, shared)


class PositionBias(nn.Module):
    """A learned number a head and bucket of relative positions."""

    config: T5Config
    bidirectional: bool

    @nn.compact
    def __call__(self, queries: Int[Array, " T"], keys: Int[Array, " S"]) -> Float[Array, "1 N T S"]:
        c = self.config
        init = nn.initializers.normal(c.width**-0.5)
        table = self.param("embedding", init, (c.num_buckets, c.num_heads))
        buckets = relative_buckets(queries, keys, c.num_buckets, c.max_distance, self.bidirectional)
        return jnp.moveaxis(table[buckets], -1, 0)[None]


class Attention(nn.Module):
    """Attention with kernels [D, N, H] whose logits are not scaled; over `context`, or causally over a cache."""

    config: T5Config
    dtype: DTypeLike = jnp.float32

    def setup(self) -> None:
        c = self.config
        heads, width = (c.num_heads, c.head_dim), c.width
        dense = functools.partial(nn.DenseGeneral, use_bias=False, dtype=self.dtype)
        normal = nn.initializers.normal
        self.query = dense(heads, kernel_init=normal((width * c.head_dim) ** -0.5))
        self.key = dense(heads, kernel_init=normal(width**-0.5))
        self.value = dense(heads, kernel_init=normal(width**-0.5))
        self.out = dense(width, axis=(-2, -1), kernel_init=normal((c.num_heads * c.head_dim) ** -0.5))

    def keys_and_values(self, context: Float[Array, "B S D"]) -> LayerCache:
        """Of a context, [B, S, N, H] each."""
        return self.key(context), self.value(context)

    def __call__(self, x: Float[Array, "B T D"], key: Array, value: Array, **options: Any) -> Float[Array, "B T D"]:
        query = self.query(x)  # B T N H
        query, key, value = (constrain(y, "batch", None, "heads", None) for y in (query, key, value))
        return self.out(attention(query, key, value, scale=1.0, **options))


class Block(nn.Module):
    """x += attn(norm1(x)); in decoders x += cross(norm2(x), encoded); x += mlp(norm3(x))."""

    config: T5Config
    decoder: bool
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B T D"],
        layer: Any = None,
        *,
        positions: tuple[Int[Array, " T"], Int[Array, " S"]],
        bias: Float[Array, "1 N T S"] | None,
        mask: Bool[Array, "B 1 1 S"] | None = None,
        end: Int[Array, ""] | None = None,
        encoded: Float[Array, "B E D"] | None = None,
        encoded_mask: Bool[Array, "B 1 1 E"] | None = None,
        keep_encoded: bool = False,
        train: bool = False,
    ) -> tuple[Float[Array, "B T D"], Any]:
        c = self.config
        drop = functools.partial(nn.Dropout(c.dropout), deterministic=not train)
        cache, cross = layer or (None, None)
        x = constrain(x, "batch", None, None)
        attend, y = Attention(c, self.dtype, name="attn"), RMSNorm(c.eps, name="norm1")(x)
        key, value = attend.keys_and_values(y)
        new = None
        if cache is not None:
            assert end is not None
            key, value, new = with_cache(key, value, cache, end)
        if c.layer_bias:
            bias = PositionBias(c, not self.decoder, name="position_bias")(*positions)
        x = x + drop(attend(y, key, value, mask=mask, bias=bias, causal=self.decoder, query_offset=end))
        if self.decoder:
            attend, y = Attention(c, self.dtype, name="cross"), RMSNorm(c.eps, name="norm2")(x)
            if cross is None:
                assert encoded is not None
                cross = attend.keys_and_values(encoded)
            x = x + drop(attend(y, *cross, mask=encoded_mask))
        init = nn.initializers.normal(c.width**-0.5)
        out_init = nn.initializers.normal(c.mlp_dim**-0.5)
        mlp = Mlp(c.mlp_dim, c.activation, c.gated, False, c.dropout, init, None, self.dtype, out_init, name="mlp")
        return x + drop(mlp(RMSNorm(c.eps, name="norm3")(x), train)), (new, cross if keep_encoded else None)


class TokenStack(nn.Module):
    """Dropout, blocks, norm, dropout; one table of position biases for all blocks unless each has its own."""

    config: T5Config
    decoder: bool
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "B T D"], layers: Any = None, *, offset: Int[Array, ""] | int = 0, **options: Any
    ) -> tuple[Float[Array, "B T D"], Any]:
        c, train = self.config, options.get("train", False)
        keys = x.shape[1] if layers is None else layers[0][0].shape[3]  # positions of a cache
        positions = jnp.arange(x.shape[1]) + offset, jnp.arange(keys)
        bias = None if c.layer_bias else PositionBias(c, not self.decoder, name="position_bias")(*positions)
        drop = functools.partial(nn.Dropout(c.dropout), deterministic=not train)
        block = functools.partial(Block, c, self.decoder, self.dtype)
        depth = c.decoder_depth if self.decoder else c.depth
        stack = Stack(block, depth, c.scan, c.remat, name="layers")
        x, new = stack(drop(x), layers, positions=positions, bias=bias, **options)
        return drop(RMSNorm(c.eps, name="norm")(x)), new


@flax.struct.dataclass
class DecoderCache:
    """What a decoder keeps: its own keys and values, and those of the encoded text in every layer."""

    own: Cache
    encoded: LayerCache  # [L, B, E, N, H] each
    encoded_mask: Bool[Array, "B 1 1 E"] | None

    def rows(self, index: Int[Array, " C"]) -> "DecoderCache":
        """The cache of those rows, in that order."""
        key, value = self.encoded
        mask = None if self.encoded_mask is None else self.encoded_mask[index]
        return DecoderCache(self.own.rows(index), (key[:, index], value[:, index]), mask)


class T5(nn.Module):
    """Token ids to scores; `encode` and `decode` are its halves, and take embeddings as well as ids."""

    config: T5Config
    dtype: DTypeLike = jnp.float32

    def setup(self) -> None:
        c = self.config
        normal = nn.initializers.normal
        self.embed_tokens = nn.Embed(c.vocab_size, c.width, embedding_init=normal(1.0), dtype=self.dtype)
        self.encoder = TokenStack(c, decoder=False, dtype=self.dtype)
        if c.decoder_depth:
            self.decoder = TokenStack(c, decoder=True, dtype=self.dtype)
            if not c.tie_embeddings:
                init = normal(c.width**-0.5)
                self.lm_head = nn.Dense(c.vocab_size, use_bias=False, kernel_init=init, dtype=self.dtype)

    def embed(self, tokens: Int[Array, "B T"] | Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """Token ids -> vectors; vectors stay as they are."""
        return self.embed_tokens(tokens) if jnp.issubdtype(tokens.dtype, jnp.integer) else tokens.astype(self.dtype)

    def encode(
        self, tokens: Int[Array, "B E"] | Float[Array, "B E D"], mask: Bool[Array, "B E"] | None = None, **options: Any
    ) -> Float[Array, "B E D"]:
        """The encoder's last hidden states; `mask` is True on what is no padding. Option: train."""
        hidden, _ = self.encoder(self.embed(tokens), mask=_columns(mask), **options)
        return hidden

    def decode(
        self,
        tokens: Int[Array, "B T"] | Float[Array, "B T D"],
        encoded: Float[Array, "B E D"],
        mask: Bool[Array, "B E"] | None = None,
        **options: Any,
    ) -> Float[Array, "B T D"]:
        """The decoder's last hidden states, each of the tokens up to its own and of all that is encoded."""
        hidden, _ = self.decoder(self.embed(tokens), encoded=encoded, encoded_mask=_columns(mask), **options)
        return hidden

    def start(self, encoded: Float[Array, "B E D"], mask: Bool[Array, "B E"] | None, capacity: int) -> DecoderCache:
        """An empty cache with room for `capacity` tokens, beside the encoded text's keys and values."""
        c = self.config
        own = Cache.empty((c.decoder_depth, encoded.shape[0], c.num_heads, capacity, c.head_dim), encoded.dtype)
        first = jnp.zeros((encoded.shape[0], 1, c.width), encoded.dtype)
        _, (_, cross) = self.decoder(first, encoded=encoded, keep_encoded=True)
        return DecoderCache(own, cross, _columns(mask))

    def extend(
        self, tokens: Int[Array, "B T"] | Float[Array, "B T D"], cache: DecoderCache
    ) -> tuple[Float[Array, "B T V"], DecoderCache]:
        """Scores behind each of some more tokens, and the cache with them."""
        own = cache.own
        options = {"end": own.end, "mask": own.used[:, None, None], "encoded_mask": cache.encoded_mask}
        layers = (own.key, own.value), cache.encoded
        hidden, (new, _) = self.decoder(self.embed(tokens), layers, offset=own.end, **options)
        own = dataclasses.replace(own.write(*new), length=own.length + tokens.shape[1])
        return self.logits(hidden), dataclasses.replace(cache, own=own)

    def logits(self, hidden: Float[Array, "*B D"]) -> Float[Array, "*B V"]:
        """Hidden states of the decoder -> float32 scores over the vocabulary."""
        if self.config.scale_logits:
            hidden = hidden * self.config.width**-0.5
        head = self.embed_tokens.attend if self.config.tie_embeddings else self.lm_head
        return constrain(head(hidden), "batch", *[None] * (hidden.ndim - 2), "vocab").astype(jnp.float32)

    def __call__(
        self,
        tokens: Int[Array, "B E"] | Float[Array, "B E D"],
        decoder_tokens: Int[Array, "B T"] | None = None,
        mask: Bool[Array, "B E"] | None = None,
        **options: Any,
    ) -> dict[str, Array]:
        """{"encoded"} of an encoder, and with `decoder_tokens` {"hidden", "logits"} beside it."""
        encoded = self.encode(tokens, mask, **options)
        if not self.config.decoder_depth:
            return {"encoded": encoded}
        if decoder_tokens is None:
            raise ValueError("a T5 with a decoder needs decoder_tokens")
        hidden = self.decode(decoder_tokens, encoded, mask, **options)
        return {"encoded": encoded, "hidden": hidden, "logits": self.logits(hidden)}


def _columns(mask: Bool[Array, "B S"] | None) -> Bool[Array, "B 1 1 S"] | None:
    return None if mask is None else mask[:, None, None]


def shift_right(labels: Int[Array, "B T"], start: int = 0, ignore: int = -100) -> Int[Array, "B T"]:
    """What a decoder reads to predict `labels`: the start token, then all but the last; ignored ones become padding."""
    first = jnp.full_like(labels[:, :1], start)
    return jnp.where((shifted := jnp.concatenate([first, labels[:, :-1]], 1)) == ignore, start, shifted)


# Published sizes: vocabulary, width, depth of both stacks, heads, channels a head, MLP width.
SIZES: dict[str, tuple[int, int, int, int, int, int]] = {
    "flan-t5-small": (32128, 512, 8, 6, 64, 1024),
    "flan-t5-base": (32128, 768, 12, 12, 64, 2048),
    "flan-t5-large": (32128, 1024, 24, 16, 64, 2816),
    "flan-t5-xl": (32128, 2048, 24, 32, 64, 5120),
    "flan-t5-xxl": (32128, 4096, 24, 64, 64, 10240),
    "umt5-small": (256384, 512, 8, 6, 64, 1024),
    "umt5-base": (256384, 768, 12, 12, 64, 2048),
    "umt5-xl": (256384, 2048, 24, 32, 64, 5120),
    "umt5-xxl": (256384, 4096, 24, 64, 64, 10240),
}


def config(variant: str, **fields: Any) -> T5Config:
    """The config of a published size; `fields` override. ValueError names the choices."""
    if variant not in SIZES:
        raise ValueError(f"unknown T5 variant {variant!r}, expected one of {list(SIZES)}")
    names = ("vocab_size", "width", "depth", "num_heads", "head_dim", "mlp_dim")
    shape = dict(zip(names, SIZES[variant], strict=True))
    settings: dict[str, Any] = {"decoder_depth": shape["depth"], "layer_bias": variant.startswith("umt5")}
    return T5Config(**{**shape, **settings, **fields})


def _published(variant: str, checkpoint: str, **fields: Any) -> Published:
    inputs = {"tokens": integers(1, 512), **({} if fields else {"decoder_tokens": integers(1, 128)})}
    return Published(lambda scan: T5(config(variant, scan=scan, **fields)), inputs, checkpoint)


PUBLISHED = {
    **{name: _published(name, f"google/{name}") for name in SIZES if name.startswith("flan")},
    # The text tower of Wan 2.1 and LongCat-Video.
    "umt5-xxl encoder": _published("umt5-xxl", "google/umt5-xxl", decoder_depth=0),
}
