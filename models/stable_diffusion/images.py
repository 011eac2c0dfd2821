"""Image prompts in cross-attention (IP-Adapter, arXiv 2308.06721): keys and values beside those of the text.

Published, the image's attention is a softmax of its own whose result is added ("decoupled"); in the notes' form its
keys stand behind those of the text in one softmax ("joint"), where image and text compete.
"""

import math
from collections.abc import Sequence

import flax.struct
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Float

from ...kernels.attention import attention
from ...kernels.interpolation import resize_grid


@flax.struct.dataclass
class ImageContext:
    """What one adapter gives the cross-attention layers of one transformer, a layer axis L in front.

    Without masks I is 1: the tokens of several images stand in one sequence. With masks each image has a softmax of its
    own, and counts where its mask says.
    """

    key: Float[Array, "L B I S D"]
    value: Float[Array, "L B I S D"]
    scale: Float[Array, " L"]
    mask: Float[Array, "L I X Y"] | None = None  # in pixels of any resolution, repeated for every layer
    joint: bool = flax.struct.field(pytree_node=False, default=False)


def attend_with_images(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S N H"],
    value: Float[Array, "B S N H"],
    *,
    images: Sequence[ImageContext],
) -> Float[Array, "B T N H"]:
    """Attention to the text, with that to the images by one layer's contexts (without their layer axis)."""
    heads = query.shape[2]
    joint = [image for image in images if image.joint]
    bias = [jnp.zeros((1, heads, query.shape[1], key.shape[1]))]
    for image in joint:
        image_key, image_value = (rearrange(x, "b i s (n h) -> b (i s) n h", n=heads) for x in (image.key, image.value))
        key, value = jnp.concatenate([key, image_key], 1), jnp.concatenate([value, image_value], 1)
        shape = (1, heads, query.shape[1], image_key.shape[1])
        bias.append(jnp.broadcast_to(jnp.log(jnp.maximum(image.scale, 1e-30)), shape))
    mixed = attention(query, key, value, bias=jnp.concatenate(bias, -1) if joint else None)
    for image in images:
        if not image.joint:
            mixed = mixed + image.scale.astype(mixed.dtype) * _attend_to_images(query, image)
    return mixed


def _attend_to_images(query: Float[Array, "B T N H"], image: ImageContext) -> Float[Array, "B T N H"]:
    heads, total = query.shape[2], jnp.zeros((), query.dtype)
    for i in range(image.key.shape[1]):
        key, value = (rearrange(x[:, i], "b s (n h) -> b s n h", n=heads) for x in (image.key, image.value))
        mixed = attention(query, key, value)  # B T N H
        if image.mask is not None:
            mixed = mixed * mask_of_queries(image.mask[i], query.shape[1])[None, :, None, None].astype(mixed.dtype)
        total = total + mixed
    return total


def mask_of_queries(mask: Float[Array, "X Y"], queries: int) -> Float[Array, " T"]:
    """A mask of any resolution for the queries of a grid of the same proportions.

    As published (diffusers image_processor.py IPAdapterMaskProcessor.downsample): the grid is guessed from the number
    of queries and the mask's proportions, resized to bicubically, and filled up with zeros or cut where that is off.
    """
    rows, columns = mask.shape
    height = int(math.sqrt(queries / (columns / rows)))
    height += queries % height != 0
    width = queries // height
    flat = resize_grid(mask[..., None], (height, width), "bicubic").reshape(-1)[:queries]
    return jnp.pad(flat, (0, queries - len(flat)))
