"""Facenet and Facenet512: Inception-ResNet v1 (deepface models/facial_recognition/pytorch/Facenet.py).

Batch normalisation has no gain. Input: BGR in [0, 1], 160 x 160. The embedding is not normalised.
"""

import functools
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike
from jaxtyping import Float

from .config import FaceConfig
from .layers import ConvNorm, Size, conv, max_pool, norm

EPS, MOMENTUM, DROPOUT = 1e-3, 0.995, 0.2
# A branch is a chain of (channels, kernel size, stride, padding).
Unit = tuple[int, Size, int, Any]
Branch = tuple[Unit, ...]


def _same(channels: int, size: Size = 1) -> Unit:
    return channels, size, 1, "SAME"


BLOCK_35: tuple[Branch, ...] = (
    (_same(32),),
    (_same(32), _same(32, 3)),
    (_same(32), _same(32, 3), _same(32, 3)),
)
BLOCK_17: tuple[Branch, ...] = ((_same(128),), (_same(128), _same(128, (1, 7)), _same(128, (7, 1))))
BLOCK_8: tuple[Branch, ...] = ((_same(192),), (_same(192), _same(192, (1, 3)), _same(192, (3, 1))))
MIXED_6A: tuple[Branch, ...] = (((384, 3, 2, 0),), (_same(192), _same(192, 3), (256, 3, 2, 0)))
MIXED_7A: tuple[Branch, ...] = (
    (_same(256), (384, 3, 2, 0)),
    (_same(256), (256, 3, 2, 0)),
    (_same(256), _same(256, 3), (256, 3, 2, 0)),
)
STEM: tuple[tuple[str, Unit], ...] = (
    ("conv2d_1a_3x3", (32, 3, 2, 0)),
    ("conv2d_2a_3x3", (32, 3, 1, 0)),
    ("conv2d_2b_3x3", _same(64, 3)),
    ("", (0, 3, 2, 0)),  # max pooling
    ("conv2d_3b_1x1", _same(80)),
    ("conv2d_4a_3x3", (192, 3, 1, 0)),
    ("conv2d_4b_3x3", (256, 3, 2, 0)),
)


def _unit(unit: Unit, name: str, dtype: DTypeLike) -> ConvNorm:
    channels, size, stride, padding = unit
    return ConvNorm(channels, size, EPS, stride, padding, scale=False, momentum=MOMENTUM, dtype=dtype, name=name)


class Branches(nn.Module):
    """Chains of convolutions side by side, and max pooling beside them where the block reduces."""

    branches: tuple[Branch, ...]
    reduces: bool = False
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "B X1 Y1 C"], train: bool) -> Float[Array, "B X2 Y2 D"]:
        found = []
        for i, branch in enumerate(self.branches):
            y = x
            for k, unit in enumerate(branch):
                # A branch of one convolution has no number behind its name.
                y = _unit(unit, f"branch_{i}" + (f"_{k}" if len(branch) > 1 else ""), self.dtype)(y, train)
            found.append(y)
        return jnp.concatenate([*found, max_pool(x, 3, 2)] if self.reduces else found, axis=-1)


class Residual(nn.Module):
    """x + gain * (branches, brought back to the channels of x); without ReLU behind it where it is the `last`."""

    branches: tuple[Branch, ...]
    gain: float
    last: bool = False
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "B X Y C"], train: bool) -> Float[Array, "B X Y C"]:
        mixed = Branches(self.branches, dtype=self.dtype, name="mixed")(x, train)
        x = x + self.gain * conv(mixed, x.shape[-1], 1, "up", dtype=self.dtype)
        return x if self.last else nn.relu(x)


class Facenet(nn.Module):
    """Embedding of `width` numbers behind a batch normalisation."""

    config: FaceConfig
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "B X Y 3"], train: bool = False) -> dict[str, Array]:
        residual = functools.partial(Residual, dtype=self.dtype)
        for name, unit in STEM:
            x = _unit(unit, name, self.dtype)(x, train) if name else max_pool(x, 3, 2)
        for i in range(5):
            x = residual(BLOCK_35, 0.17, name=f"block35_{i}")(x, train)
        x = Branches(MIXED_6A, reduces=True, dtype=self.dtype, name="mixed_6a")(x, train)
        for i in range(10):
            x = residual(BLOCK_17, 0.1, name=f"block17_{i}")(x, train)
        x = Branches(MIXED_7A, reduces=True, dtype=self.dtype, name="mixed_7a")(x, train)
        for i in range(5):
            x = residual(BLOCK_8, 0.2, name=f"block8_{i}")(x, train)
        x = residual(BLOCK_8, 1.0, last=True, name="block8_5")(x, train)
        x = nn.Dropout(DROPOUT, deterministic=not train)(x.mean((1, 2)))
        x = nn.Dense(self.config.width, use_bias=False, dtype=self.dtype, name="bottleneck")(x)
        x = norm(x, "bottleneck_bn", train, eps=EPS, momentum=MOMENTUM, scale=False, dtype=self.dtype)
        return {"embedding": x}
