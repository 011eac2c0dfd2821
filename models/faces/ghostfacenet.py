"""GhostFaceNetV1, width 1.3 (HamadYA/GhostFaceNets; deepface models/facial_recognition/pytorch/GhostFaceNet.py).

Half of a layer's channels are made by a convolution, the other half by a cheap one per channel on the first half.
Input: BGR in [0, 1], 112 x 112. The embedding is not normalised.
"""

import functools
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike
from jaxtyping import Float

from ..mtcnn import PReLU
from .config import FaceConfig
from .layers import ConvNorm, conv, norm

EPS, MOMENTUM = 1e-3, 0.99
STEM, TAIL = 20, 664
# Kernel size, channels inside, channels out, stride, channels of the squeeze (0: none).
BOTTLENECKS = (
    *((3, 20, 20, 1, 0), (3, 64, 32, 2, 0), (3, 92, 32, 1, 0), (5, 92, 52, 2, 24), (5, 156, 52, 1, 40)),
    *((3, 312, 104, 2, 0), (3, 260, 104, 1, 0), (3, 240, 104, 1, 0), (3, 240, 104, 1, 0), (3, 624, 144, 1, 156)),
    *((3, 872, 144, 1, 220), (5, 872, 208, 2, 220), (5, 1248, 208, 1, 0), (5, 1248, 208, 1, 312)),
    *((5, 1248, 208, 1, 0), (5, 664, 208, 1, 168)),
)


def _unit(channels: int, size: int, name: str, dtype: DTypeLike, **options: Any) -> ConvNorm:
    return ConvNorm(channels, size, EPS, padding="SAME", momentum=MOMENTUM, dtype=dtype, name=name, **options)


class Ghost(nn.Module):
    """A 1 x 1 convolution to half of the channels, and 3 x 3 per channel on these for the other half."""

    channels: int
    activation: str
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "B X Y C"], train: bool) -> Float[Array, "B X Y D"]:
        half = functools.partial(_unit, self.channels // 2, dtype=self.dtype, activation=self.activation)
        primary = half(1, "primary")(x, train)
        return jnp.concatenate([primary, half(3, "cheap", depthwise=True)(primary, train)], axis=-1)


class SqueezeExcite(nn.Module):
    """Gates per channel; the hard sigmoid is the one of Keras 2, steeper than today's: clip(0.2 x + 0.5)."""

    channels: int
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "B X Y C"]) -> Float[Array, "B X Y C"]:
        gate = conv(x.mean((1, 2), keepdims=True), self.channels, 1, "reduce", dtype=self.dtype)
        gate = conv(PReLU(name="prelu")(gate), x.shape[-1], 1, "expand", dtype=self.dtype)
        return x * jnp.clip(0.2 * gate + 0.5, 0, 1)


class Bottleneck(nn.Module):
    """Expand, perhaps reduce, perhaps gate, project; beside it the input, brought to the new size where it differs."""

    size: int
    inside: int
    channels: int
    stride: int
    squeeze: int
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "B X1 Y1 C"], train: bool) -> Float[Array, "B X2 Y2 D"]:
        unit = functools.partial(_unit, dtype=self.dtype, activation="")
        down = functools.partial(unit, size=self.size, stride=self.stride, depthwise=True)
        shortcut = x
        if self.stride > 1 or self.channels != x.shape[-1]:
            shortcut = down(x.shape[-1], name="shortcut_0")(x, train)
            shortcut = unit(self.channels, 1, "shortcut_1")(shortcut, train)
        x = Ghost(self.inside, "prelu", self.dtype, name="ghost_1")(x, train)
        if self.stride > 1:
            x = down(self.inside, name="downsample")(x, train)
        if self.squeeze:
            x = SqueezeExcite(self.squeeze, self.dtype, name="se")(x)
        return shortcut + Ghost(self.channels, "", self.dtype, name="ghost_2")(x, train)


class GhostFaceNet(nn.Module):
    """Embedding: a kernel as wide as the map for every channel, a 1 x 1 convolution, a batch normalisation."""

    config: FaceConfig
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "B X Y 3"], train: bool = False) -> dict[str, Array]:
        after = {"eps": EPS, "momentum": MOMENTUM, "dtype": self.dtype}
        x = _unit(STEM, 3, "stem", self.dtype, activation="prelu")(x, train)
        for i, row in enumerate(BOTTLENECKS):
            x = Bottleneck(*row, dtype=self.dtype, name=f"bottlenecks_{i}")(x, train)
        x = _unit(TAIL, 1, "tail", self.dtype, activation="prelu")(x, train)
        whole = (x.shape[1], x.shape[2])
        x = conv(x, TAIL, whole, "gdc_dw", bias=False, depthwise=True, dtype=self.dtype)
        x = conv(norm(x, "gdc_bn", train, **after), self.config.width, 1, "gdc_conv", dtype=self.dtype)
        return {"embedding": norm(x.reshape(len(x), -1), "pre_embedding", train, **after)}
