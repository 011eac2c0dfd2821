"""The product of a dense layer in the form each platform is fast at; for the `dot_general` of flax's Dense layers.

XLA's CPU back end contracts one axis in place but copies an operand to contract several at once, and the kernel's
gradient contracts all leading axes of the input: at ViT-B/16, batch 8, those copies are a fifth of a training step.
There the axes are joined first. Elsewhere they stay apart: joining a sharded or padded axis would move data.
"""

import functools
import math

import jax
from jax import lax
from jaxtyping import Array, Float


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def dot_general(
    x: Float[Array, "..."],
    kernel: Float[Array, "..."],
    dimension_numbers: lax.DotDimensionNumbers,
    precision: lax.PrecisionLike = None,
) -> Float[Array, "..."]:
    """`lax.dot_general` of the last axes of `x` with the first axes of `kernel`, in that order."""
    ((x_axes, kernel_axes), _) = dimension_numbers
    inner = len(kernel_axes)
    last, first = tuple(range(x.ndim - inner, x.ndim)), tuple(range(inner))
    assert (tuple(x_axes), tuple(kernel_axes)) == (last, first), f"not last with first axes: {dimension_numbers}"
    apart, joined = _products(dimension_numbers, precision)
    return lax.platform_dependent(x, kernel, cpu=joined, default=apart)


def _forward(x, kernel, dimension_numbers, precision):
    return dot_general(x, kernel, dimension_numbers, precision), (x, kernel)


def _backward(dimension_numbers, precision, residuals, gradient):
    def pull_back(product):
        return lambda x, kernel, gradient: jax.vjp(product, x, kernel)[1](gradient)

    apart, joined = map(pull_back, _products(dimension_numbers, precision))
    return lax.platform_dependent(*residuals, gradient, cpu=joined, default=apart)


dot_general.defvjp(_forward, _backward)


def _products(dimension_numbers, precision):
    def apart(x, kernel):
        return lax.dot_general(x, kernel, dimension_numbers, precision)

    def joined(x, kernel):
        inner = len(dimension_numbers[0][0])
        size = math.prod(kernel.shape[:inner])
        product = lax.dot(x.reshape(-1, size), kernel.reshape(size, -1), precision=precision)
        return product.reshape(*x.shape[: x.ndim - inner], *kernel.shape[inner:])

    return apart, joined
