"""The Qwen2 and Qwen3 language models as Qwen-VL uses them: grouped-query decoders with multimodal rotary positions.

Sources: Qwen2.5-VL report (arXiv 2502.13923), transformers models/qwen2_5_vl and models/qwen3_vl.
"""

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from ...kernels.attention import attention
from ...kernels.constraints import constrain
from ...kernels.rope import Scaling, apply_rope, rope_multimodal
from ..cache import Cache, with_cache
from ..layers import Mlp, RMSNorm, Rotary, Stack
from ..lora import SUFFIX, LowRank
from ..ranges import Count, Positive, Whole
from .experts import Experts, RouterLoad

_INIT = nn.initializers.normal(0.02)  # initializer_range of every release


@dataclasses.dataclass(frozen=True)
class TextConfig:
    """Everything that fixes the language model's function.

    Qwen2.5: qkv_bias. Qwen3: qk_norm, interleaved MRoPE, and experts in two sizes.
    """

    vocab_size: Count
    width: Count
    depth: Count
    num_heads: Count
    num_kv_heads: Count
    head_dim: Count
    mlp_dim: Count
    num_experts: Whole = 0  # in place of the one MLP; 0: none
    experts_per_token: Whole = 0
    expert_dim: Whole = 0  # hidden width of an expert
    tie_embeddings: bool = False
    qkv_bias: bool = True
    out_bias: bool = False
    qk_norm: bool = False
    rope_theta: Positive = 1e6
    rope_scaling: Scaling | None = None
    mrope_section: tuple[int, int, int] = (16, 24, 24)  # frequencies rotated by time, height, width
    mrope_interleaved: bool = False
    activation: str = "silu"
    eps: Positive = 1e-6
    lora_rank: Whole = 0  # of a low-rank term beside query, key, value and output projections; 0: none
    lora_alpha: Positive = 128.0  # the term is multiplied by lora_alpha / lora_rank
    scan: bool = False
    remat: str = "none"

    def __post_init__(self) -> None:
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_heads {self.num_heads} is not divisible by num_kv_heads {self.num_kv_heads}")
        if 2 * sum(self.mrope_section) != self.head_dim:
            raise ValueError(f"mrope_section {self.mrope_section} does not sum to half of head_dim {self.head_dim}")
        if self.num_experts and not (1 <= self.experts_per_token <= self.num_experts and self.expert_dim):
            raise ValueError(
                f"experts_per_token {self.experts_per_token} and expert_dim {self.expert_dim} do not fit num_experts "
                f"{self.num_experts}, expected 1 to {self.num_experts} and at least 1"
            )


def rotary_of(config: TextConfig, positions: Int[Array, "B T 3"]) -> Rotary:
    """The rotation of queries and keys [B, T, N, H] at positions (time, height, width)."""
    rope = rope_multimodal(
        config.mrope_section,
        theta=config.rope_theta,
        interleaved=config.mrope_interleaved,
        scaling=config.rope_scaling,
    )
    cos, sin = rope.table(positions)
    return functools.partial(apply_rope, cos=cos, sin=sin)


class Attention(nn.Module):
    """Grouped-query causal attention. With a layer's cache also over what it holds; hands back new keys and values."""

    config: TextConfig
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B T D"],
        cache: tuple[Float[Array, "B K S H"], Float[Array, "B K S H"]] | None,
        *,
        rotary: Rotary,
        end: Int[Array, ""] | None,
        used: Bool[Array, "B S"] | None,
        segment_ids: Int[Array, "B T"] | None,
    ) -> tuple[Float[Array, "B T D"], Any]:
        c = self.config
        project_in = functools.partial(self._project, x, use_bias=c.qkv_bias)
        query = project_in("query", (c.num_heads, c.head_dim))  #      B T N H
        key = project_in("key", (c.num_kv_heads, c.head_dim))  #       B T K H
        value = project_in("value", (c.num_kv_heads, c.head_dim))  #   B T K H
        if c.qk_norm:
            query, key = RMSNorm(c.eps, name="query_norm")(query), RMSNorm(c.eps, name="key_norm")(key)
        query, key = rotary(query), rotary(key)
        query, key, value = (constrain(y, "batch", "length", "heads", None) for y in (query, key, value))
        mask, new = None, None
        if cache is not None:
            assert end is not None and used is not None
            mask = used[:, None, None]
            key, value, new = with_cache(key, value, cache, end)
        mixed = attention(query, key, value, mask=mask, causal=True, segment_ids=segment_ids, query_offset=end)
        return self._project(mixed, "out", (x.shape[-1],), use_bias=c.out_bias), new

    def _project(self, x: Array, name: str, features: tuple[int, ...], *, use_bias: bool) -> Array:
        """All axes of `x` behind batch and length -> `features`."""
        axes = tuple(range(2, x.ndim))
        options = {"kernel_init": _INIT, "dtype": self.dtype, "use_bias": use_bias, "name": name}
        y = nn.DenseGeneral(features, axis=axes, **options)(x)
        rank = self.config.lora_rank
        if not rank:
            return y
        return y + self.config.lora_alpha / rank * LowRank(features, rank, self.dtype, name=f"{name}{SUFFIX}")(x)


class Block(nn.Module):
    """x += attn(norm1(x)), x += mlp(norm2(x)), then DeepStack's features of this layer, if it has any.

    `layer` holds this layer's number and cache. Beside x come the new keys and values, and what the router did.
    """

    config: TextConfig
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B T D"],
        layer: dict[str, Any],
        *,
        deep: Float[Array, "L B T D"] | None,
        mask: Bool[Array, "B T"],
        **attention_options: Any,
    ) -> tuple[Float[Array, "B T D"], tuple[Any, RouterLoad | None]]:
        c = self.config
        x = constrain(x, "batch", "length", None)
        attend = Attention(c, self.dtype, name="attn")
        y, new = attend(RMSNorm(c.eps, name="norm1")(x), layer["cache"], **attention_options)
        x = x + y
        y, load = self._mlp(RMSNorm(c.eps, name="norm2")(x), mask)
        return add_deep(x + y, layer["number"], deep), (new, load)

    def _mlp(self, x: Float[Array, "B T D"], mask: Bool[Array, "B T"]) -> tuple[Array, RouterLoad | None]:
        c = self.config
        options: dict[str, Any] = {"kernel_init": _INIT, "dtype": self.dtype, "name": "mlp"}
        if c.num_experts:
            return Experts(c.num_experts, c.experts_per_token, c.expert_dim, c.activation, **options)(x, mask)
        return Mlp(c.mlp_dim, c.activation, gated=True, use_bias=False, **options)(x), None


def add_deep(
    x: Float[Array, "B T D"], number: Int[Array, ""], deep: Float[Array, "L B T D"] | None
) -> Float[Array, "B T D"]:
    """DeepStack (arXiv 2406.04334): layer `number` of the first L adds its features, zero where there is text."""
    if deep is None:
        return x
    count = len(deep)
    if isinstance(number, np.integer):  # an unrolled stack knows it while tracing
        return x + deep[number] if number < count else x
    return jax.lax.cond(number < count, lambda x: x + deep[jnp.minimum(number, count - 1)], lambda x: x, x)


def empty_cache(c: TextConfig, batch: int, capacity: int, dtype: DTypeLike = jnp.float32) -> Cache:
    """A cache with room for `capacity` positions a row."""
    return Cache.empty((c.depth, batch, c.num_kv_heads, capacity, c.head_dim), dtype)


class LanguageModel(nn.Module):
    """Embeddings in, hidden states out; `embed` and `logits` are the two ends of the vocabulary."""

    config: TextConfig
    dtype: DTypeLike = jnp.float32

    def setup(self) -> None:
        c = self.config
        self.embed_tokens = nn.Embed(c.vocab_size, c.width, embedding_init=_INIT, dtype=self.dtype)
        self.decoder = Stack(functools.partial(Block, c, self.dtype), c.depth, c.scan, c.remat)
        self.norm = RMSNorm(c.eps)
        if not c.tie_embeddings:
            self.lm_head = nn.Dense(c.vocab_size, use_bias=False, kernel_init=_INIT, dtype=self.dtype)

    def embed(self, tokens: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        """Token ids -> vectors."""
        return self.embed_tokens(tokens)

    def logits(self, hidden: Float[Array, "*B D"]) -> Float[Array, "*B V"]:
        """Hidden states -> float32 scores over the vocabulary."""
        head = self.embed_tokens.attend if self.config.tie_embeddings else self.lm_head
        return constrain_vocab(head(hidden)).astype(jnp.float32)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        positions: Int[Array, "B T 3"],
        *,
        segment_ids: Int[Array, "B T"] | None = None,
        cache: Cache | None = None,
        deep: Float[Array, "L B T D"] | None = None,
    ) -> tuple[Float[Array, "B T D"], Cache | None, RouterLoad | None]:
        """Runs the decoder on embeddings, after what the cache holds; `deep` is added behind the first layers.

        Returns the hidden states after the final norm, the cache with this call's keys and values written, and what
        the routers of all layers did (segment 0 is padding).
        """
        layers = {"number": np.arange(self.config.depth), "cache": cache and (cache.key, cache.value)}
        options = {
            "deep": deep,
            "mask": jnp.ones(x.shape[:2], bool) if segment_ids is None else segment_ids > 0,
            "rotary": rotary_of(self.config, positions),
            "end": cache and cache.end,
            "used": cache and cache.used,
            "segment_ids": segment_ids,
        }
        x, (new, load) = self.decoder(x, layers, **options)
        return self.norm(x), cache and cache.write(*new), load


def constrain_vocab(logits: Float[Array, "*B V"]) -> Float[Array, "*B V"]:
    """Scores spread over the tensor axis: a vocabulary is the widest dimension of the model."""
    return constrain(logits, "batch", *[None] * (logits.ndim - 2), "vocab")
