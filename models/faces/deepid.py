"""DeepID (Sun et al., CVPR 2014; deepface models/facial_recognition/pytorch/DeepID.py).

Input: BGR in [0, 1], 55 x 47.
"""

import flax.linen as nn
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike
from jaxtyping import Float

from .config import FaceConfig
from .layers import conv, max_pool

DROPOUT = 0.99  # as published


class DeepID(nn.Module):
    """Embedding: ReLU of the sum of two dense layers, on the third and the fourth convolution."""

    config: FaceConfig
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "B X Y 3"], train: bool = False) -> dict[str, Array]:
        for name, channels, size in (("Conv1", 20, 4), ("Conv2", 40, 3), ("Conv3", 60, 3)):
            x = max_pool(nn.relu(conv(x, channels, size, name, dtype=self.dtype)), 2, 2)
            x = nn.Dropout(DROPOUT, deterministic=not train)(x)
        last = nn.relu(conv(x, 80, 2, "Conv4", dtype=self.dtype))
        third = nn.Dense(self.config.width, dtype=self.dtype, name="fc11")(x.reshape(len(x), -1))
        fourth = nn.Dense(self.config.width, dtype=self.dtype, name="fc12")(last.reshape(len(x), -1))
        return {"embedding": nn.relu(third + fourth)}
