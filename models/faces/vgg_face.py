"""VGG-Face (Parkhi et al., BMVC 2015; deepface models/facial_recognition/pytorch/VGGFace.py) and what stands on it.

Age, gender and race are judged by a classifier on the same trunk. Input: BGR in [0, 1], 224 x 224.
"""

import flax.linen as nn
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike
from jaxtyping import Float

from .config import FaceConfig
from .layers import conv, max_pool

BLOCKS = ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3))  # channels, 3 x 3 convolutions before each pool
DROPOUT = 0.5


class VGGFace(nn.Module):
    """Embedding: the second layer of 4,096 behind its ReLU, not normalised; logits of `classes` if there are any.

    Published recognisers drop half of the embedding before their classifier, the judges of attributes do not
    (`head_dropout`).
    """

    config: FaceConfig
    head: str = "fc8"
    head_dropout: float = DROPOUT
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "B X Y 3"], train: bool = False) -> dict[str, Array]:
        config, dtype = self.config, self.dtype
        for block, (channels, count) in enumerate(BLOCKS, 1):
            for i in range(1, count + 1):
                x = nn.relu(conv(x, channels, 3, f"conv{block}_{i}", padding=1, dtype=dtype))
            x = max_pool(x, 2, 2)
        # A convolution as wide as what five pools leave of the image: 7 x 7.
        x = nn.relu(conv(x, config.width, (x.shape[1], x.shape[2]), "fc6", dtype=dtype))
        x = nn.Dropout(DROPOUT, deterministic=not train)(x)
        x = nn.relu(conv(x, config.width, 1, "fc7", dtype=dtype))
        out: dict[str, Array] = {"embedding": x.reshape(len(x), -1)}
        if config.classes:
            x = nn.Dropout(self.head_dropout, deterministic=not train)(x)
            out["logits"] = conv(x, config.classes, 1, self.head, dtype=dtype).reshape(len(x), -1)
        return out
