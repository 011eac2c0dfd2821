"""Principal components, and patch features as colours (DINOv2, arXiv 2304.07193, section 7.5)."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float


def principal_components(
    x: Float[Array, "B D"], count: int, mask: Bool[Array, " B"] | None = None
) -> tuple[Float[Array, " D"], Float[Array, "D K"]]:
    """Mean and the `count` unit directions of largest variance, largest first, over the rows that are not masked.

    The sign of a direction is arbitrary in theory; here its largest entry is positive.
    """
    weight = jnp.ones(x.shape[0]) if mask is None else mask.astype(jnp.float32)
    weight = weight / jnp.maximum(weight.sum(), 1)
    x = x.astype(jnp.float32)
    mean = weight @ x
    centred = x - mean
    covariance = jnp.einsum("b,bd,be->de", weight, centred, centred, precision="highest")
    _, vectors = jnp.linalg.eigh(covariance)
    directions = vectors[:, ::-1][:, :count]
    largest = jnp.take_along_axis(directions, jnp.abs(directions).argmax(0)[None], axis=0)
    return mean, directions * jnp.where(largest < 0, -1, 1)


@jax.jit
def pca_colors(patches: Float[Array, "B X Y D"]) -> tuple[Float[Array, "B X Y 3"], Bool[Array, "B X Y"]]:
    """The first three components of all images' patches as red, green and blue in [0, 1], and the foreground.

    The first component of all patches tells foreground from background: the foreground is its side that fills less of
    the images' borders. Colours come from a second analysis of the foreground alone; the background is black.
    """
    shape = patches.shape[:3]
    x = patches.reshape(-1, patches.shape[-1])
    mean, directions = principal_components(x, 1)
    positive = ((x.astype(jnp.float32) - mean) @ directions[:, 0] > 0).reshape(shape)
    border = jnp.ones(shape[1:], bool).at[1:-1, 1:-1].set(False)
    outside = (positive & border).sum() / (shape[0] * border.sum())
    foreground = jnp.where(outside > 0.5, ~positive, positive)
    mask = foreground.reshape(-1)
    mean, directions = principal_components(x, 3, mask)
    values = (x.astype(jnp.float32) - mean) @ directions
    low = jnp.where(mask[:, None], values, jnp.inf).min(0)
    high = jnp.where(mask[:, None], values, -jnp.inf).max(0)
    scaled = (values - low) / jnp.maximum(high - low, 1e-12)
    colors = jnp.where(mask[:, None], jnp.clip(scaled, 0, 1), 0)
    return colors.reshape(*shape, 3), foreground
