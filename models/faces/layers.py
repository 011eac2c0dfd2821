"""Convolution and batch normalisation as the face networks spell them; called inside their compact methods."""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike
from jaxtyping import Float

from ..mtcnn import PReLU

Size = int | tuple[int, int]
Padding = int | str  # zeros on every side, or "SAME" as in TensorFlow, where the odd one goes to the end


def conv(
    x: Float[Array, "B X1 Y1 C"],
    channels: int,
    size: Size,
    name: str,
    *,
    stride: int = 1,
    padding: Padding = 0,
    bias: bool = True,
    depthwise: bool = False,
    dtype: DTypeLike = jnp.float32,
) -> Float[Array, "B X2 Y2 D"]:
    """A convolution named `name`, with a kernel per channel where it is `depthwise`."""
    sizes = (size, size) if isinstance(size, int) else size
    sides: Any = padding if isinstance(padding, str) else [(padding, padding)] * 2
    groups = x.shape[-1] if depthwise else 1
    layer = nn.Conv(channels, sizes, stride, sides, feature_group_count=groups, use_bias=bias, dtype=dtype, name=name)
    return layer(x)


def norm(
    x: Float[Array, "*B C"],
    name: str,
    train: bool,
    *,
    eps: float,
    momentum: float = 0.9,
    scale: bool = True,
    dtype: DTypeLike = jnp.float32,
) -> Float[Array, "*B C"]:
    """Batch normalisation named `name`; `momentum` is what the running statistics keep, as in Keras."""
    layer = nn.BatchNorm(
        not train, momentum=momentum, epsilon=eps, use_scale=scale, use_fast_variance=False, dtype=dtype, name=name
    )
    return layer(x)


class ConvNorm(nn.Module):
    """Convolution, batch normalisation and an activation: "relu", "prelu" with a slope per channel, or none."""

    channels: int
    size: Size
    eps: float
    stride: int = 1
    padding: Padding = 0
    bias: bool = False
    depthwise: bool = False
    scale: bool = True
    momentum: float = 0.9
    activation: str = "relu"
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "B X1 Y1 C"], train: bool = False) -> Float[Array, "B X2 Y2 D"]:
        options: Any = {name: getattr(self, name) for name in ("stride", "padding", "bias", "depthwise", "dtype")}
        x = conv(x, self.channels, self.size, "conv", **options)
        x = norm(x, "bn", train, eps=self.eps, momentum=self.momentum, scale=self.scale, dtype=self.dtype)
        if self.activation == "prelu":
            return PReLU(name="prelu")(x)
        return nn.relu(x) if self.activation else x


def max_pool(x: Float[Array, "B X1 Y1 C"], size: int, stride: int) -> Float[Array, "B X2 Y2 C"]:
    """The largest value of every whole window."""
    return nn.max_pool(x, (size, size), (stride, stride))


def avg_pool(x: Float[Array, "B X1 Y1 C"], size: int, stride: int) -> Float[Array, "B X2 Y2 C"]:
    """The mean of every whole window."""
    return nn.avg_pool(x, (size, size), (stride, stride))


def pad(x: Float[Array, "B X1 Y1 C"], first: int, last: int) -> Float[Array, "B X2 Y2 C"]:
    """Zeros before and behind rows and columns."""
    return jnp.pad(x, ((0, 0), (first, last), (first, last), (0, 0)))
