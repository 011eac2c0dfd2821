"""Normalisations over the last axis, or groups of it: statistics in float32, result in the dtype of the input."""

import functools

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


@functools.partial(jax.jit, static_argnames="groups")
def group_norm(
    x: Float[Array, "B *grid C"],
    scale: Float[Array, " C"],
    bias: Float[Array, " C"],
    groups: int,
    eps: float | Float[Array, ""] = 1e-6,
) -> Float[Array, "B *grid C"]:
    """Normalises each of so many groups of channels over all positions of an example (arXiv:1803.08494)."""
    if x.shape[-1] % groups:
        raise ValueError(f"group_norm: {x.shape[-1]} channels are not divisible by {groups} groups")
    wide = x.astype(jnp.float32).reshape(x.shape[0], -1, groups, x.shape[-1] // groups)
    centred = wide - wide.mean((1, 3), keepdims=True)
    normed = centred * jax.lax.rsqrt(jnp.square(centred).mean((1, 3), keepdims=True) + eps)
    return (normed.reshape(x.shape) * scale + bias).astype(x.dtype)


@jax.jit
def l2_normalize(x: Float[Array, "*dims D"], eps: float | Float[Array, ""] = 1e-12) -> Float[Array, "*dims D"]:
    """x / max(‖x‖₂, eps), as torch.nn.functional.normalize; the gradient at zero is finite."""
    wide = x.astype(jnp.float32)
    square = jnp.square(wide).sum(-1, keepdims=True)
    norm = jnp.sqrt(jnp.maximum(square, jnp.square(eps)))
    return (wide / norm).astype(x.dtype)
