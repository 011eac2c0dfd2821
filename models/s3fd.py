"""S3FD, the face detector of Wav2Lip's preparation and inference (arXiv 1708.05237; its face_detection/detection/sfd).

A VGG whose maps at six strides each give a face score and a box per cell. Input: RGB minus (104, 117, 123), which is
the published order (the means are BGR's), float32, not scaled.
"""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from ..kernels.convolution import conv2d
from .published import Published, floats

MEAN = (104.0, 117.0, 123.0)
STRIDES = (4, 8, 16, 32, 64, 128)
# (name, channels) of the body's 3 x 3 convolutions, "pool" between them.
BODY = (
    *[("conv1_1", 64), ("conv1_2", 64), ("pool", 0), ("conv2_1", 128), ("conv2_2", 128), ("pool", 0)],
    *[("conv3_1", 256), ("conv3_2", 256), ("conv3_3", 256), ("pool", 0)],
    *[("conv4_1", 512), ("conv4_2", 512), ("conv4_3", 512), ("pool", 0)],
    *[("conv5_1", 512), ("conv5_2", 512), ("conv5_3", 512), ("pool", 0)],
)
# (name, channels, kernel size, stride, padding) behind the body.
TAIL = (
    ("fc6", 1024, 3, 1, 3),
    ("fc7", 1024, 1, 1, 0),
    ("conv6_1", 256, 1, 1, 0),
    ("conv6_2", 512, 3, 2, 1),
    ("conv7_1", 128, 1, 1, 0),
    ("conv7_2", 256, 3, 2, 1),
)
HEADS = ("conv3_3_norm", "conv4_3_norm", "conv5_3_norm", "fc7", "conv6_2", "conv7_2")
NORMALISED = {"conv3_3": 10.0, "conv4_3": 8.0, "conv5_3": 5.0}  # with the initial gain


class _Conv(nn.Module):
    """A convolution with bias, padded by zeros on both sides."""

    channels: int
    size: int = 3
    stride: int = 1
    padding: int = 1

    @nn.compact
    def __call__(self, x: Float[Array, "B X1 Y1 C"]) -> Float[Array, "B X2 Y2 D"]:
        shape = (self.size, self.size, x.shape[-1], self.channels)
        kernel = self.param("kernel", nn.initializers.xavier_uniform(), shape)
        bias = self.param("bias", nn.initializers.zeros, (self.channels,))
        return jnp.add(conv2d(x, kernel, (self.stride,) * 2, (self.padding,) * 2), bias)


class L2Norm(nn.Module):
    """x / (norm over channels + 1e-10) times a gain per channel."""

    gain: float

    @nn.compact
    def __call__(self, x: Float[Array, "B X Y C"]) -> Float[Array, "B X Y C"]:
        scale = self.param("scale", nn.initializers.constant(self.gain), (x.shape[-1],))
        return x / (jnp.linalg.norm(x, axis=-1, keepdims=True) + 1e-10) * scale


@dataclasses.dataclass(frozen=True)
class S3FDConfig:
    """The published detector has one size."""


class S3FD(nn.Module):
    """Images [B, X, Y, 3] -> per stride: face probability [B, X', Y'] and offsets [B, X', Y', 4] of `decode`."""

    @nn.compact
    def __call__(self, image: Float[Array, "B X Y 3"]) -> list[tuple[Array, Array]]:
        maps, x = {}, image
        for name, channels in BODY:
            if name == "pool":
                x = nn.max_pool(x, (2, 2), (2, 2))
                continue
            x = nn.relu(_Conv(channels, name=name)(x))
            if name in NORMALISED:
                maps[f"{name}_norm"] = L2Norm(NORMALISED[name], name=f"{name}_norm")(x)
        for name, channels, size, stride, padding in TAIL:
            x = maps[name] = nn.relu(_Conv(channels, size, stride, padding, name=name)(x))
        return [self._head(name, maps[name]) for name in HEADS]

    def _head(self, name: str, x: Array) -> tuple[Array, Array]:
        offsets = _Conv(4, name=f"{name}_mbox_loc")(x)
        logits = _Conv(4 if name == HEADS[0] else 2, name=f"{name}_mbox_conf")(x)
        if name == HEADS[0]:  # max-out: the best of three background scores
            logits = jnp.stack([logits[..., :3].max(-1), logits[..., 3]], axis=-1)
        return jax.nn.softmax(logits)[..., 1], offsets


def decode(offsets: np.ndarray, rows: np.ndarray, columns: np.ndarray, stride: int) -> np.ndarray:
    """Boxes [n, 4] (left, top, right, bottom) of cells with offsets [n, 4]; anchors are squares of 4 strides."""
    centre = np.stack([columns, rows], axis=1) * stride + stride / 2 + offsets[:, :2] * 0.1 * 4 * stride
    size = 4 * stride * np.exp(offsets[:, 2:] * 0.2)
    return np.concatenate([centre - size / 2, centre + size / 2], axis=1)


PUBLISHED = {"S3FD": Published(lambda scan: S3FD(), {"image": floats(1, 640, 640, 3)}, "s3fd.pth")}
