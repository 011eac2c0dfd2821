"""Activation functions under the names that published configurations use."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def gelu(x: Float[Array, "*dims"]) -> Float[Array, "*dims"]:
    """Exact GELU, x Φ(x) with the Gauss error function (arXiv:1606.08415)."""
    return jax.nn.gelu(x, approximate=False)


def gelu_tanh(x: Float[Array, "*dims"]) -> Float[Array, "*dims"]:
    """Tanh approximation of GELU: what T5, GPT-2, SigLIP and Flax's default use."""
    return jax.nn.gelu(x, approximate=True)


def quick_gelu(x: Float[Array, "*dims"]) -> Float[Array, "*dims"]:
    """Sigmoid approximation of GELU, x σ(1.702 x): the activation of OpenAI's CLIP weights."""
    return x * jax.nn.sigmoid(1.702 * x)


ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "gelu": gelu,
    "gelu_new": gelu_tanh,
    "gelu_pytorch_tanh": gelu_tanh,
    "gelu_tanh": gelu_tanh,
    "mish": jax.nn.mish,
    "quick_gelu": quick_gelu,
    "relu": jax.nn.relu,
    "sigmoid": jax.nn.sigmoid,
    "silu": jax.nn.silu,
    "swish": jax.nn.silu,
    "tanh": jnp.tanh,
}
