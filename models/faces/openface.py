"""OpenFace's nn4.small2 (deepface models/facial_recognition/pytorch/OpenFace.py). Input: BGR in [0, 1], 96 x 96."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike
from jaxtyping import Float

from .config import FaceConfig
from .layers import ConvNorm, avg_pool, max_pool, pad

EPS, MOMENTUM = 1e-5, 0.99


def lrn(x: Float[Array, "B X Y C"]) -> Float[Array, "B X Y C"]:
    """x (1 + 1e-4 sum of the squares of the 11 channels around)^-0.75: tf.nn.lrn with its defaults but alpha, beta."""
    squares = jax.lax.reduce_window(x * x, 0.0, jax.lax.add, (1, 1, 1, 11), (1, 1, 1, 1), "SAME")
    return x * (1 + 1e-4 * squares) ** -0.75


def l2_pool(x: Float[Array, "B X1 Y1 C"]) -> Float[Array, "B X2 Y2 C"]:
    """The norm of every 3 x 3 window."""
    return jnp.sqrt(avg_pool(x * x, 3, 3) * 9)


@dataclasses.dataclass(frozen=True)
class Block:
    """One inception block; the 3 x 3 and 5 x 5 branches are (channels before, channels, stride)."""

    name: str
    three: tuple[int, int, int]
    five: tuple[int, int, int] | None
    pool: str  # "max" or "l2"
    pool_channels: int  # 0: the pool alone
    pool_pad: tuple[int, int]
    one: int  # channels of the 1 x 1 branch, 0: none


BLOCKS = (
    Block("inception_3a", (96, 128, 1), (16, 32, 1), "max", 32, (3, 4), 64),
    Block("inception_3b", (96, 128, 1), (32, 64, 1), "l2", 64, (4, 4), 64),
    Block("inception_3c", (128, 256, 2), (32, 64, 2), "max", 0, (0, 1), 0),
    Block("inception_4a", (96, 192, 1), (32, 64, 1), "l2", 128, (2, 2), 256),
    Block("inception_4e", (160, 256, 2), (64, 128, 2), "max", 0, (0, 1), 0),
    Block("inception_5a", (96, 384, 1), None, "l2", 96, (1, 1), 256),
    Block("inception_5b", (96, 384, 1), None, "max", 96, (1, 1), 256),
)


class Inception(nn.Module):
    """3 x 3, 5 x 5, pool and 1 x 1 side by side, in this order."""

    block: Block
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "B X1 Y1 C"], train: bool) -> Float[Array, "B X2 Y2 D"]:
        block, found = self.block, []
        for name, size, branch in (("branch_3x3", 3, block.three), ("branch_5x5", 5, block.five)):
            if branch:
                before, channels, stride = branch
                y = self._unit(before, 1, f"{name}_0")(x, train)
                found.append(self._unit(channels, size, f"{name}_1", stride, size // 2)(y, train))
        pooled = max_pool(x, 3, 2) if block.pool == "max" else l2_pool(x)
        if block.pool_channels:
            pooled = self._unit(block.pool_channels, 1, "branch_pool")(pooled, train)
        found.append(pad(pooled, *block.pool_pad))
        if block.one:
            found.append(self._unit(block.one, 1, "branch_1x1")(x, train))
        return jnp.concatenate(found, axis=-1)

    def _unit(self, channels: int, size: int, name: str, stride: int = 1, padding: int = 0) -> ConvNorm:
        return ConvNorm(channels, size, EPS, stride, padding, bias=True, momentum=MOMENTUM, dtype=self.dtype, name=name)


class OpenFace(nn.Module):
    """Embeddings of length 1."""

    config: FaceConfig
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "B X Y 3"], train: bool = False) -> dict[str, Array]:
        def unit(channels: int, size: int, name: str, stride: int = 1) -> ConvNorm:
            return ConvNorm(
                channels, size, EPS, stride, size // 2, bias=True, momentum=MOMENTUM, dtype=self.dtype, name=name
            )

        x = unit(64, 7, "conv1", 2)(x, train)
        x = lrn(max_pool(pad(x, 1, 1), 3, 2))
        x = unit(64, 1, "conv2")(x, train)
        x = lrn(unit(192, 3, "conv3")(x, train))
        x = max_pool(pad(x, 1, 1), 3, 2)
        for block in BLOCKS:
            x = Inception(block, self.dtype, name=block.name)(x, train)
        x = avg_pool(x, 3, 1).reshape(len(x), -1)
        x = nn.Dense(self.config.width, dtype=self.dtype, name="dense_layer")(x)
        # As Keras' l2_normalize, which bounds the squared sum.
        return {"embedding": x * jax.lax.rsqrt(jnp.maximum((x * x).sum(-1, keepdims=True), 1e-12))}
