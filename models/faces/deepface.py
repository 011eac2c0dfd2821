"""Facebook's DeepFace (Taigman et al., CVPR 2014), as trained by swghosh/DeepFace on VGGFace2.

Two convolutions, three layers whose kernels differ from place to place, and a dense representation
(deepface models/facial_recognition/pytorch/FbDeepFace.py). Input: BGR in [0, 1], 152 x 152.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike
from jaxtyping import Float

from .config import FaceConfig
from .layers import conv

DROPOUT = 0.5
# The paper's initial values: normal with deviation 0.01, biases of 0.5.
_KERNEL, _BIAS = nn.initializers.normal(0.01), nn.initializers.constant(0.5)


class LocallyConnected(nn.Module):
    """A convolution with a kernel [place, (row, column, channel), D] and a bias [X, Y, D] of its own at every place."""

    channels: int
    size: int
    stride: int = 1
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "B X1 Y1 C"]) -> Float[Array, "B X2 Y2 D"]:
        rows, columns = ((side - self.size) // self.stride + 1 for side in x.shape[1:3])
        inputs = self.size**2 * x.shape[-1]
        kernel = self.param("kernel", _KERNEL, (rows * columns, inputs, self.channels))
        bias = self.param("bias", _BIAS, (rows, columns, self.channels))
        x, kernel, bias = (jnp.asarray(part, self.dtype) for part in (x, kernel, bias))
        dimensions = ("NHWC", "HWIO", "NHWC")
        patches = jax.lax.conv_general_dilated_patches(
            x, (self.size, self.size), (self.stride, self.stride), "VALID", dimension_numbers=dimensions
        )
        # Patches come as (channel, row, column), kernels lie as Keras has them.
        patches = patches.reshape(len(x), rows * columns, x.shape[-1], -1).swapaxes(2, 3)
        y = jnp.einsum("bpi,pid->bpd", patches.reshape(len(x), rows * columns, inputs), kernel)
        return y.reshape(len(x), rows, columns, -1) + bias


class DeepFace(nn.Module):
    """Embedding: the dense layer F7 behind its ReLU; logits of `classes` (F8) if there are any."""

    config: FaceConfig
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "B X Y 3"], train: bool = False) -> dict[str, Array]:
        dtype = self.dtype
        x = nn.relu(conv(x, 32, 11, "C1", dtype=dtype))
        x = nn.max_pool(x, (3, 3), (2, 2), "SAME")
        x = nn.relu(conv(x, 16, 9, "C3", dtype=dtype))
        x = nn.relu(LocallyConnected(16, 9, dtype=dtype, name="L4")(x))
        x = nn.relu(LocallyConnected(16, 7, 2, dtype=dtype, name="L5")(x))
        x = nn.relu(LocallyConnected(16, 5, dtype=dtype, name="L6")(x))
        dense = {"dtype": dtype, "kernel_init": _KERNEL, "bias_init": _BIAS}
        x = nn.relu(nn.Dense(self.config.width, name="F7", **dense)(x.reshape(len(x), -1)))
        if not self.config.classes:
            return {"embedding": x}
        dropped = nn.Dropout(DROPOUT, deterministic=not train)(x)
        return {"embedding": x, "logits": nn.Dense(self.config.classes, name="F8", **dense)(dropped)}
