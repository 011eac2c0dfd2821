"""Sinusoidal embeddings of numbers: timesteps of diffusion models, sizes and positions of images."""

import math

import jax.numpy as jnp
from jaxtyping import Array, Float, Num


def sinusoids(
    t: Num[Array, "*dims"], width: int, *, max_period: float = 10000.0, shift: float = 0.0, cosines_first: bool = True
) -> Float[Array, "*dims width"]:
    """[cos(t f_i) | sin(t f_i)] in float32, f_i = max_period^(-i / (width / 2 - shift)) (arXiv:2006.11239).

    Numbers may be fractional; ValueError for an odd width. Source: diffusers models/embeddings.py.
    """
    if width % 2:
        raise ValueError(f"sinusoids: width is {width}, expected an even number")
    half = width // 2
    frequencies = jnp.exp(-math.log(max_period) * jnp.arange(half, dtype=jnp.float32) / (half - shift))
    angles = t.astype(jnp.float32)[..., None] * frequencies
    pair = [jnp.cos(angles), jnp.sin(angles)]
    return jnp.concatenate(pair if cosines_first else pair[::-1], axis=-1)
