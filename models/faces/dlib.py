"""dlib's face recognition ResNet, 29 convolutions (davisking/dlib examples/dnn_metric_learning_on_images_ex.cpp).

Gains and shifts per channel are what is left of its batch normalisations. Input: RGB in 0 … 255, 150 x 150.
"""

import flax.linen as nn
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike
from jaxtyping import Float

from .config import FaceConfig
from .layers import avg_pool, conv, max_pool

MEAN = (122.782, 117.001, 104.298)
# (channels, whether it halves the map) of each residual unit.
UNITS = (
    *((32, False),) * 3,
    *((64, True), (64, False), (64, False), (64, False)),
    *((128, True), (128, False), (128, False)),
    *((256, True), (256, False), (256, False), (256, True)),
)


class Affine(nn.Module):
    """x * scale + bias, per channel."""

    @nn.compact
    def __call__(self, x: Float[Array, "*B C"]) -> Float[Array, "*B C"]:
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
        return x * scale + self.param("bias", nn.initializers.zeros, (x.shape[-1],))


class Unit(nn.Module):
    """relu(x + two convolutions); where it halves, x is averaged, and zeros at the ends make up what either lacks."""

    channels: int
    halves: bool
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "B X1 Y1 C"]) -> Float[Array, "B X2 Y2 D"]:
        stride, padding = (2, 0) if self.halves else (1, 1)
        y = conv(x, self.channels, 3, "con1", stride=stride, padding=padding, dtype=self.dtype)
        y = conv(nn.relu(Affine(name="affine1")(y)), self.channels, 3, "con2", padding=1, dtype=self.dtype)
        y = Affine(name="affine2")(y)
        x = avg_pool(x, 2, 2) if self.halves else x
        shape = tuple(map(max, x.shape, y.shape))
        x, y = (jnp.pad(z, [(0, full - size) for full, size in zip(shape, z.shape, strict=True)]) for z in (x, y))
        return nn.relu(x + y)


class DlibResNet(nn.Module):
    """Embedding: the means of the last map through a matrix; not normalised."""

    config: FaceConfig
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "B X Y 3"], train: bool = False) -> dict[str, Array]:
        del train  # what would differ in training is folded into the gains
        x = (jnp.asarray(x, self.dtype) - jnp.array(MEAN, self.dtype)) / 256
        x = conv(x, 32, 7, "con", stride=2, dtype=self.dtype)
        x = max_pool(nn.relu(Affine(name="affine")(x)), 3, 2)
        for i, (channels, halves) in enumerate(UNITS):
            x = Unit(channels, halves, self.dtype, name=f"unit_{i}")(x)
        return {"embedding": nn.Dense(self.config.width, use_bias=False, dtype=self.dtype, name="fc")(x.mean((1, 2)))}
