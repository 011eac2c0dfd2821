"""MTCNN's three networks (arXiv 1604.02878), a cascade that proposes, refines and outputs faces with five points.

Inputs are RGB, (x - 127.5) / 128. The cascade itself, with its pyramid and suppressions, is infer/face_detection.py.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from .published import Published, floats


class PReLU(nn.Module):
    """max(x, 0) + slope min(x, 0), one slope per channel."""

    @nn.compact
    def __call__(self, x: Float[Array, "... C"]) -> Float[Array, "... C"]:
        slope = self.param("slope", nn.initializers.constant(0.25), (x.shape[-1],))
        return jnp.maximum(x, 0) + slope * jnp.minimum(x, 0)


class Features(nn.Module):
    """Convolutions without padding, each with PReLU, some with max pooling whose last window may hang over the edge."""

    layers: tuple[tuple[int, int, int], ...]  # channels, kernel size, size of the pool behind it (0: none), stride 2

    @nn.compact
    def __call__(self, x: Float[Array, "B X1 Y1 3"]) -> Float[Array, "B X2 Y2 C"]:
        for i, (channels, size, pool) in enumerate(self.layers, 1):
            x = nn.Conv(channels, (size, size), padding="VALID", name=f"conv{i}")(x)
            x = PReLU(name=f"prelu{i}")(x)
            if pool:
                # Ceil mode: an odd rest gets a window of its own, padded with minus infinity.
                sides: Any = [(0, (pool - n) % 2 if n > pool else 0) for n in x.shape[1:3]]
                x = nn.max_pool(x, (pool, pool), (2, 2), padding=sides)
        return x


class PNet(nn.Module):
    """Face probability and box offsets for every 12 x 12 window at stride 2."""

    @nn.compact
    def __call__(self, x: Float[Array, "B X1 Y1 3"]) -> tuple[Float[Array, "B X Y"], Float[Array, "B X Y 4"]]:
        x = Features(((10, 3, 2), (16, 3, 0), (32, 3, 0)), name="features")(x)
        box = nn.Conv(4, (1, 1), name="box")(x)
        return jax.nn.softmax(nn.Conv(2, (1, 1), name="face")(x))[..., 1], box


class RefineNet(nn.Module):
    """R-Net (24 x 24 crops) or O-Net (48 x 48, with `points`): face probability, box offsets, five points."""

    layers: tuple[tuple[int, int, int], ...]
    width: int
    points: bool = False

    @nn.compact
    def __call__(
        self, x: Float[Array, "B X Y 3"]
    ) -> tuple[Float[Array, " B"], Float[Array, "B 4"], Float[Array, "B 10"] | None]:
        x = Features(self.layers, name="features")(x)
        x = x.swapaxes(1, 2).reshape(len(x), -1)  # the published weights read columns first
        x = PReLU(name="prelu")(nn.Dense(self.width, name="dense")(x))
        face, box = jax.nn.softmax(nn.Dense(2, name="face")(x))[:, 1], nn.Dense(4, name="box")(x)
        return face, box, nn.Dense(10, name="points")(x) if self.points else None


RNET = RefineNet(((28, 3, 3), (48, 3, 3), (64, 2, 0)), 128)
ONET = RefineNet(((32, 3, 3), (64, 3, 3), (64, 3, 2), (128, 2, 0)), 256, points=True)


# The weights of the Python package mtcnn; a forward pass is of one window.
PUBLISHED = {
    "P-Net": Published(lambda scan: PNet(), {"x": floats(1, 12, 12, 3)}, "mtcnn: pnet.lz4"),
    "R-Net": Published(lambda scan: RNET, {"x": floats(1, 24, 24, 3)}, "mtcnn: rnet.lz4"),
    "O-Net": Published(lambda scan: ONET, {"x": floats(1, 48, 48, 3)}, "mtcnn: onet.lz4"),
}
