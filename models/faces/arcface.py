"""ArcFace's ResNet34 (arXiv 1801.07698; deepface models/facial_recognition/pytorch/ArcFace.py).

Residual units that begin with a normalisation, and put their stride into the second convolution.
Input: BGR in [0, 1], 112 x 112. The embedding is not normalised.
"""

import flax.linen as nn
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike
from jaxtyping import Float

from ..mtcnn import PReLU
from .config import FaceConfig
from .layers import conv, norm

EPS, DROPOUT = 2e-5, 0.4
STAGES = ((64, 3), (128, 4), (256, 6), (512, 3))  # channels, units


class Unit(nn.Module):
    """x (projected where the stage begins) + norm, 3 x 3, norm, PReLU, 3 x 3, norm; no activation behind the sum."""

    channels: int
    first: bool
    eps: float = EPS
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "B X1 Y1 C"], train: bool) -> Float[Array, "B X2 Y2 D"]:
        options = {"eps": self.eps, "dtype": self.dtype}
        stride, shortcut = 2 if self.first else 1, x
        if self.first:
            shortcut = conv(x, self.channels, 1, "conv_0", stride=stride, bias=False, dtype=self.dtype)
            shortcut = norm(shortcut, "bn_0", train, **options)
        x = norm(x, "bn_1", train, **options)
        x = norm(conv(x, self.channels, 3, "conv_1", padding=1, bias=False, dtype=self.dtype), "bn_2", train, **options)
        x = PReLU(name="prelu_1")(x)
        x = conv(x, self.channels, 3, "conv_2", stride=stride, padding=1, bias=False, dtype=self.dtype)
        return shortcut + norm(x, "bn_3", train, **options)


class ArcFace(nn.Module):
    """Embedding: a dense layer on the whole map, behind a batch normalisation; `stages` are (channels, units)."""

    config: FaceConfig
    stages: tuple[tuple[int, int], ...] = STAGES
    eps: float = EPS
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "B X Y 3"], train: bool = False) -> dict[str, Array]:
        options = {"eps": self.eps, "dtype": self.dtype}
        x = conv(x, self.stages[0][0], 3, "conv1_conv", padding=1, bias=False, dtype=self.dtype)
        x = PReLU(name="conv1_prelu")(norm(x, "conv1_bn", train, **options))
        for stage, (channels, units) in enumerate(self.stages, 2):
            for i in range(units):
                x = Unit(channels, i == 0, self.eps, self.dtype, name=f"conv{stage}_{i}")(x, train)
        x = norm(x, "bn", train, **options)
        x = nn.Dropout(DROPOUT, deterministic=not train)(x)
        x = nn.Dense(self.config.width, dtype=self.dtype, name="dense")(x.reshape(len(x), -1))
        return {"embedding": norm(x, "embedding", train, **options)}
