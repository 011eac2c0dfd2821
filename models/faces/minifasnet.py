"""MiniFASNet, the two networks that tell a face from its picture (minivision-ai/Silent-Face-Anti-Spoofing).

Input: BGR in 0 … 255, 80 x 80 crops. Class 1 is a real face.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike
from jaxtyping import Float

from .config import FaceConfig
from .layers import ConvNorm, conv, norm

EPS = 1e-5
# Channels inside the residual units of conv_3, conv_4 and conv_5, as pruned.
INSIDE = {
    "minifasnet_v2": ((13, 13, 13, 13), (231, 52, 26, 77, 26, 26), (26, 26)),
    "minifasnet_v1se": ((13, 26, 13, 52), (154, 52, 26, 52, 26, 26), (26, 26)),
}
# Channels inside and behind the units that halve the map: conv_23, conv_34, conv_45.
HALVING = ((103, 64), (231, 128), (308, 128))
DROPOUT = {"minifasnet_v2": 0.2, "minifasnet_v1se": 0.75}


class SqueezeExcite(nn.Module):
    """Gates per channel from the means of the map, with batch normalisation behind both convolutions."""

    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "B X Y C"], train: bool) -> Float[Array, "B X Y C"]:
        gate, channels = x.mean((1, 2), keepdims=True), x.shape[-1]
        gate = norm(conv(gate, channels // 4, 1, "fc1", bias=False, dtype=self.dtype), "bn1", train, eps=EPS)
        gate = norm(conv(nn.relu(gate), channels, 1, "fc2", bias=False, dtype=self.dtype), "bn2", train, eps=EPS)
        return x * jax.nn.sigmoid(gate)


class DepthWise(nn.Module):
    """1 x 1 to the channels inside, 3 x 3 per channel, 1 x 1 out; added to the input where the size stays."""

    inside: int
    channels: int
    stride: int = 1
    squeeze: bool = False
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "B X1 Y1 C"], train: bool) -> Float[Array, "B X2 Y2 D"]:
        y = ConvNorm(self.inside, 1, EPS, activation="prelu", dtype=self.dtype, name="conv")(x, train)
        y = ConvNorm(
            self.inside, 3, EPS, self.stride, 1, depthwise=True, activation="prelu", dtype=self.dtype, name="conv_dw"
        )(y, train)
        y = ConvNorm(self.channels, 1, EPS, activation="", dtype=self.dtype, name="project")(y, train)
        if self.squeeze:
            y = SqueezeExcite(self.dtype, name="se_module")(y, train)
        return y if self.stride > 1 else x + y


class MiniFASNet(nn.Module):
    """Logits of three classes, and the normalised layer of 128 before them.

    In V1SE the last residual unit of each stage has gates.
    """

    config: FaceConfig
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "B X Y 3"], train: bool = False) -> dict[str, Array]:
        name, dtype = self.config.network, self.dtype
        gated = name == "minifasnet_v1se"
        x = ConvNorm(32, 3, EPS, 2, 1, activation="prelu", dtype=dtype, name="conv1")(x, train)
        x = ConvNorm(32, 3, EPS, 1, 1, depthwise=True, activation="prelu", dtype=dtype, name="conv2_dw")(x, train)
        for stage, (inside, (between, channels)) in enumerate(zip(INSIDE[name], HALVING, strict=True), 3):
            x = DepthWise(between, channels, 2, dtype=dtype, name=f"conv_{stage - 1}{stage}")(x, train)
            for i, width in enumerate(inside):
                squeeze = gated and i == len(inside) - 1
                x = DepthWise(width, channels, 1, squeeze, dtype, name=f"conv_{stage}_model_{i}")(x, train)
        x = ConvNorm(512, 1, EPS, activation="prelu", dtype=dtype, name="conv_6_sep")(x, train)
        x = ConvNorm(512, 5, EPS, depthwise=True, activation="", dtype=dtype, name="conv_6_dw")(x, train)
        x = nn.Dense(self.config.width, use_bias=False, dtype=dtype, name="linear")(x.reshape(len(x), -1))
        x = norm(x, "bn", train, eps=EPS, dtype=dtype)
        dropped = nn.Dropout(DROPOUT[name], deterministic=not train)(x)
        return {
            "embedding": x,
            "logits": nn.Dense(self.config.classes, use_bias=False, dtype=dtype, name="prob")(dropped),
        }
