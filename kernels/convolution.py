"""2-D convolution and transposed convolution in torch's conventions, with kernel gradients that are fast on CPUs too.

XLA runs both directions of both operations at the speed of its matrix products, except one: on CPUs the kernel gradient
is a convolution whose window is the whole image, 2-4 times slower than a matrix product on large images, and for
transposed convolutions it leaves the fast path altogether (two orders of magnitude). There the same sum is taken as
matrix products over strips of the image small enough to stay in cache. Other platforms keep XLA's own gradient.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

Pair = tuple[int, int]

_DIMENSIONS = ("NHWC", "HWIO", "NHWC")
# Bytes of gathered columns per matrix product: about a second-level cache (best of 0.25 to 4 MiB).
_STRIP_BYTES = 1 << 21
# A convolution of smaller images than this keeps XLA's kernel gradient on CPUs: it is the faster one there.
_IMAGE_BYTES = 1 << 19


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def conv2d(
    x: Float[Array, "B X1 Y1 C"], kernel: Float[Array, "K1 K2 C D"], stride: Pair, padding: Pair
) -> Float[Array, "B X2 Y2 D"]:
    """torch.nn.functional.conv2d: `padding` zeros on both sides of rows and columns, never "SAME" (asymmetric)."""
    return lax.conv_general_dilated(x, kernel, stride, _both_sides(padding), dimension_numbers=_DIMENSIONS)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def conv2d_transpose(
    x: Float[Array, "B X1 Y1 C"], kernel: Float[Array, "K1 K2 D C"], stride: Pair, padding: Pair, output_padding: Pair
) -> Float[Array, "B X2 Y2 D"]:
    """torch.nn.functional.conv_transpose2d: the gradient of `conv2d` with respect to its input, as a layer.

    The kernel is the one of that convolution: [rows, columns, its input = our output, its output = our input].
    The output has (X1 - 1) * stride - 2 * padding + K1 + output_padding rows, with output_padding < stride.
    """
    sides = [
        (size - 1 - pad, size - 1 - pad + extra)
        for size, pad, extra in zip(kernel.shape[:2], padding, output_padding, strict=True)
    ]
    flipped = jnp.flip(kernel, (0, 1)).swapaxes(2, 3)
    return lax.conv_general_dilated(x, flipped, (1, 1), sides, lhs_dilation=stride, dimension_numbers=_DIMENSIONS)


def _conv2d_forward(x, kernel, stride, padding):
    return conv2d(x, kernel, stride, padding), (x, kernel)


def _conv2d_backward(stride, padding, residuals, gradient):
    x, kernel = residuals
    sizes = zip(x.shape[1:3], gradient.shape[1:3], stride, kernel.shape[:2], padding, strict=True)
    unseen = tuple(rows - ((steps - 1) * jump + size - 2 * pad) for rows, steps, jump, size, pad in sizes)
    to_x = conv2d_transpose(gradient, kernel, stride, padding, unseen)
    large = math.prod(x.shape[1:]) * x.dtype.itemsize >= _IMAGE_BYTES
    return to_x, _kernel_gradient(x, gradient, kernel.shape, stride, padding, strips_on_cpu=large)


def _conv2d_transpose_forward(x, kernel, stride, padding, output_padding):
    return conv2d_transpose(x, kernel, stride, padding, output_padding), (x, kernel)


def _conv2d_transpose_backward(stride, padding, output_padding, residuals, gradient):
    x, kernel = residuals
    # The roles change: `gradient` is the input of the convolution whose transpose this is, `x` its output.
    to_x = conv2d(gradient, kernel, stride, padding)
    return to_x, _kernel_gradient(gradient, x, kernel.shape, stride, padding, strips_on_cpu=True)


conv2d.defvjp(_conv2d_forward, _conv2d_backward)
conv2d_transpose.defvjp(_conv2d_transpose_forward, _conv2d_transpose_backward)


def _both_sides(padding: Pair) -> list[Pair]:
    return [(pad, pad) for pad in padding]


def _kernel_gradient(x, outputs, shape, stride, padding, *, strips_on_cpu):
    """[K1, K2, C, D]: the sum over output pixels of (the window of x it sees) times (its gradient in `outputs`)."""
    by_xla = functools.partial(_kernel_gradient_by_xla, shape=shape, stride=stride, padding=padding)
    by_strips = functools.partial(_kernel_gradient_by_strips, shape=shape, stride=stride, padding=padding)
    return lax.platform_dependent(x, outputs, cpu=by_strips if strips_on_cpu else by_xla, default=by_xla)


def _kernel_gradient_by_xla(x, outputs, *, shape, stride, padding):
    def convolve(kernel):
        return lax.conv_general_dilated(x, kernel, stride, _both_sides(padding), dimension_numbers=_DIMENSIONS)

    _, pullback = jax.vjp(convolve, jnp.zeros(shape, x.dtype))
    return pullback(outputs)[0]


def _kernel_gradient_by_strips(x, outputs, *, shape, stride, padding):
    size1, size2, channels, width = shape
    batch, rows, columns, _ = outputs.shape
    images, strip = _strip_shape(batch, rows, columns * size1 * size2 * channels * x.dtype.itemsize)
    x = jnp.pad(x, [(0, 0), *_both_sides(padding), (0, 0)])
    seen_shape = (images, (strip - 1) * stride[0] + size1, *x.shape[2:])

    def add_strip(total, index):
        image, row = index // (rows // strip) * images, index % (rows // strip) * strip
        seen = lax.dynamic_slice(x, (image, row * stride[0], 0, 0), seen_shape)
        output = lax.dynamic_slice(outputs, (image, row, 0, 0), (images, strip, columns, width))
        taps = [
            seen[:, i : i + (strip - 1) * stride[0] + 1 : stride[0], j : j + (columns - 1) * stride[1] + 1 : stride[1]]
            for i in range(size1)
            for j in range(size2)
        ]
        return total + jnp.einsum("bxyd,bxyc->dc", output, jnp.concatenate(taps, axis=-1)), None

    total = jnp.zeros((width, size1 * size2 * channels), x.dtype)
    total, _ = lax.scan(add_strip, total, jnp.arange((batch // images) * (rows // strip)))
    return total.reshape(width, size1, size2, channels).transpose(1, 2, 3, 0)


def _strip_shape(batch: int, rows: int, row_bytes: int) -> Pair:
    """(images, rows) of one strip, divisors of the batch and of its rows: what `_STRIP_BYTES` hold, at least one."""
    strip = _largest_divisor(rows, _STRIP_BYTES // row_bytes)
    images = _largest_divisor(batch, _STRIP_BYTES // (rows * row_bytes)) if strip == rows else 1
    return images, strip


def _largest_divisor(number: int, limit: int) -> int:
    return max((d for d in range(1, min(number, limit) + 1) if number % d == 0), default=1)
