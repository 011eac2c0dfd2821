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


def dot_general(
    x: Float[Array, "..."],
    kernel: Float[Array, "..."],
    dimension_numbers: lax.DotDimensionNumbers,
    precision: lax.PrecisionLike = None,
) -> Float[Array, "..."]:
    """`lax.dot_general` of the last axes of `x` with the first axes of `kernel`, in that order, and no batch axes."""
    (axes, _) = dimension_numbers
    inner = len(axes[1])
    expected = tuple(range(x.ndim - inner, x.ndim)), tuple(range(inner))
    assert tuple(map(tuple, axes)) == expected, f"not last with first axes: {dimension_numbers}"
    return _product(x, kernel, dimension_numbers, precision)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _product(x, kernel, dimension_numbers, precision):
    apart, joined = _forms(dimension_numbers, precision)
    return lax.platform_dependent(x, kernel, cpu=joined, default=apart)


def _product_forward(x, kernel, dimension_numbers, precision):
    return _product(x, kernel, dimension_numbers, precision), (x, kernel)


def _product_backward(dimension_numbers, precision, residuals, gradient):
    def pull_back(form):
        return lambda x, kernel, gradient: jax.vjp(form, x, kernel)[1](gradient)

    apart, joined = map(pull_back, _forms(dimension_numbers, precision))
    return lax.platform_dependent(*residuals, gradient, cpu=joined, default=apart)


_product.defvjp(_product_forward, _product_backward)


def _forms(dimension_numbers, precision):
    """The product with the axes of x and kernel apart, and joined to two."""

    def apart(x, kernel):
        return lax.dot_general(x, kernel, dimension_numbers, precision)

    def joined(x, kernel):
        inner = len(dimension_numbers[0][1])
        size = math.prod(kernel.shape[:inner])
        product = lax.dot(x.reshape(-1, size), kernel.reshape(size, -1), precision=precision)
        return product.reshape(*x.shape[: x.ndim - inner], *kernel.shape[inner:])

    return apart, joined
