"""Layers that Stable Diffusion's networks share: convolutions, group norm, residual and transformer blocks.

Images are NHWC. Reference: diffusers models/{resnet,attention,transformers/transformer_2d}.py. Initial values are those
of CompVis' code where it departs from torch's defaults: the last layer of a residual branch starts as zero.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from einops import rearrange, repeat
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from ...kernels.activations import ACTIVATIONS
from ...kernels.constraints import constrain
from ...kernels.dense import dot_general
from ...kernels.normalization import group_norm
from ..layers import LayerNorm, Mlp, MultiHeadAttention, Stack, remat_policy, torch_bias, torch_kernel
from .images import ImageContext, attend_with_images

TRANSFORMER_NORM_EPS = 1e-6  # of the group norm; the residual blocks have the config's
_LAYER_NORM_EPS = 1e-5

Padding = Sequence[tuple[int, int]]


def conv(
    channels: int,
    features: int,
    size: int = 3,
    *,
    stride: int = 1,
    padding: Padding | None = None,
    zero: bool = False,
    dtype: DTypeLike = jnp.float32,
    name: str | None = None,
) -> nn.Conv:
    """A convolution as torch has it: the same zeros on both sides unless told, never "SAME" (asymmetric)."""
    return nn.Conv(
        features,
        (size, size),
        (stride, stride),
        padding=[(size // 2, size // 2)] * 2 if padding is None else list(padding),
        dtype=dtype,
        kernel_init=nn.initializers.zeros if zero else torch_kernel,
        bias_init=nn.initializers.zeros if zero else torch_bias(size**2 * channels),
        name=name,
    )


def linear(
    channels: int, features: int, *, zero: bool = False, dtype: DTypeLike = jnp.float32, name: str | None = None
) -> nn.Dense:
    """A linear layer or 1 x 1 convolution with bias and torch's initial values, or zeros."""
    return nn.Dense(
        features,
        dtype=dtype,
        kernel_init=nn.initializers.zeros if zero else torch_kernel,
        bias_init=nn.initializers.zeros if zero else torch_bias(channels),
        dot_general=dot_general,
        name=name,
    )


def upsample(x: Float[Array, "B X Y C"], shape: tuple[int, ...]) -> Float[Array, "B X2 Y2 C"]:
    """Nearest neighbours as torch has them: output i shows input floor(i * in / out)."""
    rows, columns = x.shape[1:3]
    if shape == (2 * rows, 2 * columns):
        return repeat(x, "b x y c -> b (x i) (y j) c", i=2, j=2)
    for axis, (size_in, size_out) in enumerate(zip((rows, columns), shape, strict=True), 1):
        x = jnp.take(x, jnp.arange(size_out) * size_in // size_out, axis)
    return x


class GroupNorm(nn.Module):
    """Group normalisation; eps has no default: 1e-5 and 1e-6 both occur in one network."""

    groups: int
    eps: float

    @nn.compact
    def __call__(self, x: Float[Array, "B *grid C"]) -> Float[Array, "B *grid C"]:
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
        bias = self.param("bias", nn.initializers.zeros, (x.shape[-1],))
        return group_norm(x, scale, bias, self.groups, self.eps)


class EmbeddingMlp(nn.Module):
    """Linear, activation, linear: of the time's sinusoids, and of SDXL's further conditions."""

    features: int
    activation: str
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "B F"]) -> Float[Array, "B E"]:
        y = linear(x.shape[-1], self.features, dtype=self.dtype, name="linear_1")(x)
        y = ACTIVATIONS[self.activation](y)
        return linear(self.features, self.features, dtype=self.dtype, name="linear_2")(y)


class ResnetBlock(nn.Module):
    """norm, activation, convolution, + embedding, norm, activation, convolution; the input added, over `divisor`."""

    features: int
    groups: int
    eps: float
    activation: str = "silu"
    divisor: float = 1.0
    zero: bool = True  # whether the branch starts as zero
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "B X Y C"], embedding: Float[Array, "B E"] | None = None
    ) -> Float[Array, "B X Y D"]:
        activation, width = ACTIVATIONS[self.activation], self.features
        y = activation(GroupNorm(self.groups, self.eps, name="norm1")(x))
        y = conv(x.shape[-1], width, dtype=self.dtype, name="conv1")(y)  # B X Y D
        if embedding is not None:
            project = linear(embedding.shape[-1], width, dtype=self.dtype, name="time_emb_proj")
            y = y + project(activation(embedding))[:, None, None]
        y = activation(GroupNorm(self.groups, self.eps, name="norm2")(y))
        y = conv(width, width, zero=self.zero, dtype=self.dtype, name="conv2")(y)
        if x.shape[-1] != width:
            x = linear(x.shape[-1], width, dtype=self.dtype, name="conv_shortcut")(x)
        return (x + y) / self.divisor


class TransformerBlock(nn.Module):
    """x += self-attention(norm1(x)); x += attention(norm2(x), text); x += GEGLU(norm3(x)).

    `images` are further keys and values of the second attention (IP-Adapter).
    """

    num_heads: int
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B T D"],
        images: tuple[ImageContext, ...] | None = None,
        *,
        context: Float[Array, "B S E"],
    ) -> Float[Array, "B T D"]:
        attend = functools.partial(MultiHeadAttention, self.num_heads, False, torch_kernel, self.dtype)
        x = constrain(x, "batch", None, None)
        norm = functools.partial(LayerNorm, _LAYER_NORM_EPS)
        x = x + attend(name="attn1")(norm(name="norm1")(x))
        cross: dict[str, Any] = {"attend": functools.partial(attend_with_images, images=images)} if images else {}
        x = x + attend(name="attn2")(norm(name="norm2")(x), context, **cross)
        mlp = Mlp(
            4 * x.shape[-1], "gelu", gated=True, kernel_init=torch_kernel, bias_init=None, dtype=self.dtype, name="ff"
        )
        return x + mlp(norm(name="norm3")(x))


class Transformer(nn.Module):
    """Attention over the positions of an image: norm, linear, blocks, linear; the input added."""

    depth: int
    num_heads: int
    groups: int
    scan: bool = False
    remat: str = "none"
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "B X Y C"], context: Float[Array, "B S E"], images: tuple[ImageContext, ...] | None = None
    ) -> Float[Array, "B X Y C"]:
        width = x.shape[-1]
        if width % self.num_heads:
            raise ValueError(f"{width} channels are not divisible by {self.num_heads} heads")
        y = rearrange(GroupNorm(self.groups, TRANSFORMER_NORM_EPS, name="norm")(x), "b x y c -> b (x y) c")
        y = linear(width, width, dtype=self.dtype, name="proj_in")(y)
        if self.depth:
            block = functools.partial(TransformerBlock, self.num_heads, self.dtype)
            stack = Stack(block, self.depth, self.scan, self.remat, name="transformer")
            y, _ = stack(y, images, context=context)
        y = linear(width, width, zero=True, dtype=self.dtype, name="proj_out")(y)
        return x + y.reshape(x.shape)


def rematerialized(module: Callable[..., nn.Module], remat: str) -> Callable[..., nn.Module]:
    """The module, whose backward pass keeps what the policy says (`Stack`'s words)."""
    return module if remat == "none" else nn.remat(module, policy=remat_policy(remat))
