"""Mixing of whole batches: pure JAX functions that run inside the jitted step, on the global batch.

Both pair each example with the one before it (a roll by one), so a batch needs no second, shuffled copy.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key, Scalar


def mixup(
    key: Key[Scalar, ""], image: Float[Array, "B X Y C"], label: Float[Array, "B V"], alpha: float
) -> tuple[Float[Array, "B X Y C"], Float[Array, "B V"]]:
    """a x + (1 - a) roll(x) of images and one-hot labels, one a = max(b, 1 - b), b ~ Beta(alpha, alpha), per batch.

    The larger half of the weight stays with the example itself (arXiv 1710.09412; big_vision/utils.py get_mixup).
    """
    weight = jax.random.beta(key, alpha, alpha)
    weight = jnp.maximum(weight, 1 - weight)
    return _blend(image, weight), _blend(label, weight)


def cutmix(
    key: Key[Scalar, ""], image: Float[Array, "B X Y C"], label: Float[Array, "B V"], alpha: float
) -> tuple[Float[Array, "B X Y C"], Float[Array, "B V"]]:
    """Pastes one box of the rolled images into all images; labels are mixed by the area that is left.

    The box has the aspect ratio of the image and, before the border cuts it, the fraction 1 - Beta(alpha, alpha) of its
    area (arXiv 1905.04899; rounding as in torchvision.transforms.v2.CutMix).
    """
    key_weight, key_row, key_column = jax.random.split(key, 3)
    half = 0.5 * jnp.sqrt(1 - jax.random.beta(key_weight, alpha, alpha))
    rows = _interval(key_row, image.shape[1], half)
    columns = _interval(key_column, image.shape[2], half)
    box = rows[:, None] & columns[None, :]
    mixed = jnp.where(box[None, :, :, None], jnp.roll(image, 1, axis=0), image)
    return mixed, _blend(label, 1 - jnp.mean(box))


def _interval(key: Key[Scalar, ""], length: int, half: Float[Scalar, ""]) -> Array:
    """Bool [length]: the pixels within int(half * length) of a uniform centre, which itself is the first after it."""
    reach = (half * length).astype(int)
    offset = jnp.arange(length) - jax.random.randint(key, (), 0, length)
    return (-reach <= offset) & (offset < reach)


def _blend(values: Array, weight: Array) -> Array:
    return weight * values + (1 - weight) * jnp.roll(values, 1, axis=0)
