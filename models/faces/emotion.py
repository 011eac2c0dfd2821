"""The facial expression network (deepface models/demography/pytorch/Emotion.py). Input: grey in [0, 1], 48 x 48."""

import flax.linen as nn
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike
from jaxtyping import Float

from .config import FaceConfig
from .layers import avg_pool, conv, max_pool

DROPOUT = 0.2


class Emotion(nn.Module):
    """Logits of seven emotions, and the layer before them."""

    config: FaceConfig
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "B X Y 1"], train: bool = False) -> dict[str, Array]:
        def unit(x: Array, channels: int, size: int, name: str) -> Array:
            return nn.relu(conv(x, channels, size, name, dtype=self.dtype))

        x = max_pool(unit(x, 64, 5, "conv_1"), 5, 2)
        x = avg_pool(unit(unit(x, 64, 3, "conv_2"), 64, 3, "conv_3"), 3, 2)
        x = avg_pool(unit(unit(x, 128, 3, "conv_4"), 128, 3, "conv_5"), 3, 2)
        x = x.reshape(len(x), -1)
        for name in ("fc_1", "fc_2"):
            x = nn.relu(nn.Dense(self.config.width, dtype=self.dtype, name=name)(x))
            x = nn.Dropout(DROPOUT, deterministic=not train)(x)
        return {"embedding": x, "logits": nn.Dense(self.config.classes, dtype=self.dtype, name="fc_3")(x)}
