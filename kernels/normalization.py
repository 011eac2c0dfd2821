"""Normalisations over the last axis: statistics in float32, result in the dtype of the input."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


@jax.jit
def layer_norm(
    x: Float[Array, "*dims D"],
    scale: Float[Array, " D"] | None = None,
    bias: Float[Array, " D"] | None = None,
    eps: float | Float[Array, ""] = 1e-6,
) -> Float[Array, "*dims D"]:
    """(x - mean) / sqrt(variance + eps) · scale + bias (arXiv:1607.06450), the variance taken in two passes."""
    wide = x.astype(jnp.float32)
    centred = wide - wide.mean(-1, keepdims=True)
    normed = centred * jax.lax.rsqrt(jnp.square(centred).mean(-1, keepdims=True) + eps)
    if scale is not None:
        normed = normed * scale
    if bias is not None:
        normed = normed + bias
    return normed.astype(x.dtype)


@jax.jit
def rms_norm(
    x: Float[Array, "*dims D"],
    scale: Float[Array, " D"] | None = None,
    eps: float | Float[Array, ""] = 1e-6,
) -> Float[Array, "*dims D"]:
    """x / sqrt(mean(x²) + eps) · scale (arXiv:1910.07467)."""
    wide = x.astype(jnp.float32)
    normed = wide * jax.lax.rsqrt(jnp.square(wide).mean(-1, keepdims=True) + eps)
    return (normed if scale is None else normed * scale).astype(x.dtype)


@jax.jit
def l2_normalize(x: Float[Array, "*dims D"], eps: float | Float[Array, ""] = 1e-12) -> Float[Array, "*dims D"]:
    """x / max(‖x‖₂, eps), as torch.nn.functional.normalize; the gradient at zero is finite."""
    wide = x.astype(jnp.float32)
    square = jnp.square(wide).sum(-1, keepdims=True)
    norm = jnp.sqrt(jnp.maximum(square, jnp.square(eps)))
    return (wide / norm).astype(x.dtype)
