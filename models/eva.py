"""EVA image encoders: the trunks of EVA-CLIP and of BLIP-2 (arXiv 2211.07636, 2303.11331, 2303.15389).

A ViT with another block (baaivision/EVA EVA-CLIP/rei/eva_clip/eva_vit_model.py): keys without bias, and by generation
rotary positions on the patch tokens, SwiGLU, a norm inside both branches (sub-LN), or the norms behind the branches.
"""

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from ..kernels.activations import ACTIVATIONS
from ..kernels.attention import attention
from ..kernels.constraints import constrain
from .layers import DropPath, LayerNorm, LayerScale, Rotary, Stack
from .vit import INITS, ViT, ViTConfig


@dataclasses.dataclass(frozen=True)
class EvaConfig(ViTConfig):
    """A ViTConfig with the switches of EVA's block."""

    sub_norm: bool = False  # norm on the mixed values
    mlp_norm: bool = False  # norm on the MLP's hidden units
    post_norm: bool = False  # x += norm(branch(x)) instead of x += branch(norm(x))


class EvaAttention(nn.Module):
    """Self-attention whose keys have no bias, with an optional norm before the output projection."""

    config: EvaConfig
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"], rotary: Rotary | None = None) -> Float[Array, "B T D"]:
        c = self.config
        heads = (c.num_heads, c.width // c.num_heads)
        dense = functools.partial(nn.DenseGeneral, kernel_init=INITS[c.init].kernel, dtype=self.dtype)
        query = dense(heads, use_bias=c.qkv_bias, name="query")(x)  #  B T N H
        key = dense(heads, use_bias=False, name="key")(x)  #           B T N H
        value = dense(heads, use_bias=c.qkv_bias, name="value")(x)  #  B T N H
        if c.qk_norm:
            query, key = LayerNorm(c.eps, name="q_norm")(query), LayerNorm(c.eps, name="k_norm")(key)
        if rotary is not None:
            query, key = rotary(query), rotary(key)
        query, key, value = (constrain(y, "batch", None, "heads", None) for y in (query, key, value))
        mixed = attention(query, key, value)  #                        B T N H
        if c.sub_norm:
            mixed = LayerNorm(c.eps, name="norm")(mixed.reshape(x.shape)).reshape(mixed.shape)
        return dense(c.width, axis=(-2, -1), name="out")(mixed)


class EvaMlp(nn.Module):
    """fc2(norm(activation(fc1(x)))), or SwiGLU fc2(norm(silu(gate(x)) · fc1(x))); the norm is there with mlp_norm."""

    config: EvaConfig
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        c = self.config
        dense = functools.partial(nn.Dense, kernel_init=INITS[c.init].kernel, dtype=self.dtype)
        y = dense(c.mlp_dim, name="fc1")(x)  # B T F
        y = jax.nn.silu(dense(c.mlp_dim, name="gate")(x)) * y if c.gated else ACTIVATIONS[c.activation](y)
        y = constrain(y, "batch", None, "mlp")
        if c.mlp_norm:
            y = LayerNorm(c.eps, name="norm")(y)
        return dense(c.width, name="fc2")(y)  # B T D


class EvaBlock(nn.Module):
    """Attention and MLP branches, normalised before or (post_norm) behind."""

    config: EvaConfig
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B T D"],
        drop_path: Float[Array, ""] | None = None,
        *,
        train: bool = False,
        rotary: Rotary | None = None,
    ) -> Float[Array, "B T D"]:
        norm1, norm2 = (LayerNorm(self.config.eps, name=f"norm{i}") for i in (1, 2))
        attend = EvaAttention(self.config, self.dtype, name="attn")
        mlp = EvaMlp(self.config, self.dtype, name="mlp")

        def residual(y: Float[Array, "B T D"], index: int) -> Float[Array, "B T D"]:
            if self.config.layer_scale is not None:
                y = LayerScale(self.config.layer_scale, name=f"scale{index}")(y)
            return y if drop_path is None else DropPath(name=f"drop_path{index}")(y, drop_path, train)

        x = constrain(x, "batch", None, None)
        if self.config.post_norm:
            x = x + residual(norm1(attend(x, rotary)), 1)
            return x + residual(norm2(mlp(x)), 2)
        x = x + residual(attend(norm1(x), rotary), 1)
        return x + residual(mlp(norm2(x)), 2)


class Eva(ViT):
    """An EVA encoder; inputs and outputs as `ViT`."""

    config: EvaConfig  # type: ignore[assignment]  # narrows ViT's

    def _encoder(self) -> Stack:
        block = functools.partial(EvaBlock, config=self.config, dtype=self.dtype)
        return Stack(block, self.config.depth, self.config.scan, self.config.remat, name="encoder")


# Published trunks: width, depth, heads, MLP width, patch, generation.
SIZES: dict[str, tuple[int, int, int, int, int, str]] = {
    "EVA01-g/14": (1408, 40, 16, 6144, 14, "eva01"),
    "EVA02-B/16": (768, 12, 12, 2048, 16, "eva02"),
    "EVA02-L/14": (1024, 24, 16, 2730, 14, "eva02"),
    "EVA02-E/14": (1792, 64, 16, 15360, 14, "eva02_enormous"),
}
GENERATIONS: dict[str, dict[str, Any]] = {
    "eva01": {},
    "eva02": {"rope": True, "rope_grid": (16, 16), "gated": True, "sub_norm": True, "mlp_norm": True},
    "eva02_enormous": {"post_norm": True},
}


def config(variant: str, **fields: Any) -> EvaConfig:
    """The trunk of a published size, without a head; `fields` override.

    BLIP-2's ViT-g is config("EVA01-g/14", depth=39, pool="none", final_norm=False).
    """
    if variant not in SIZES:
        raise ValueError(f"unknown EVA variant {variant!r}, expected one of {list(SIZES)}")
    width, depth, num_heads, mlp_dim, patch, generation = SIZES[variant]
    shape = {"width": width, "depth": depth, "num_heads": num_heads, "mlp_dim": mlp_dim, "patch_size": patch}
    family = {
        "num_classes": 0,
        "activation": "gelu",
        "eps": 1e-6,
        "pos_interpolation": "bicubic",
        "init": "timm",
    }
    settings: dict[str, Any] = {**family, **shape, **GENERATIONS[generation], **fields}
    return EvaConfig(**settings)


def rescale_init(params: dict[str, Any], depth: int) -> dict[str, Any]:
    """EVA's initialisation: the last kernels of both branches of block i (from 1) divided by sqrt(2 i)."""

    def rescale(path: tuple[Any, ...], leaf: Array) -> Array:
        names = [str(part.key) for part in path]
        if names[-3:-1] not in (["attn", "out"], ["mlp", "fc2"]) or names[-1] != "kernel":
            return leaf
        if "blocks" in names:
            return leaf / jnp.sqrt(2.0 * jnp.arange(1, depth + 1)).reshape(-1, *[1] * (leaf.ndim - 1))
        index = next(int(name.removeprefix("blocks_")) for name in names if name.startswith("blocks_"))
        return leaf / np.sqrt(2.0 * (index + 1))

    return jax.tree_util.tree_map_with_path(rescale, params)
