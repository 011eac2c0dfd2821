"""2-D convolution and transposed convolution in torch's conventions, in forms that are fast on CPUs too.

XLA runs them at the speed of its matrix products, except on CPUs in two places, which take other forms of the same
sums there (other platforms keep XLA's own): 3 x 3 convolutions with many channels need less than half the products
(winograd.py); and the kernel gradient is a convolution whose window is the whole image, 2-4 times slower than a matrix
product on large images, and off the fast path altogether (two orders of magnitude) for transposed convolutions. Strips
are cut from a batch that is in one place; on a mesh of several CPUs, which split it, the first keeps XLA's form and the
second has one strip. What each is worth to Wav2Lip as a whole is measured in docs/wav2lip.md.
"""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from . import winograd
from .strips import Pair, cut_rows, scan_strips, strip_shape

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
    by_xla = functools.partial(_convolve_by_xla, stride=stride, padding=padding)
    suits = _on_one_device() and winograd.suits(x, kernel.shape, stride, padding)
    return _choose(winograd.convolve if suits else by_xla, by_xla, x, kernel)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def conv2d_transpose(
    x: Float[Array, "B X1 Y1 C"], kernel: Float[Array, "K1 K2 D C"], stride: Pair, padding: Pair, output_padding: Pair
) -> Float[Array, "B X2 Y2 D"]:
    """torch.nn.functional.conv_transpose2d: the gradient of `conv2d` with respect to its input, as a layer.

    The kernel is the one of that convolution: [rows, columns, its input = our output, its output = our input].
    The output has (X1 - 1) * stride - 2 * padding + K1 + output_padding rows, with output_padding < stride.
    """
    by_xla = functools.partial(_transpose_by_xla, stride=stride, padding=padding, output_padding=output_padding)
    by_winograd = functools.partial(winograd.convolve, transpose=True)
    suits = _on_one_device() and winograd.suits(x, kernel.shape, stride, padding)
    return _choose(by_winograd if suits else by_xla, by_xla, x, kernel)


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


def _on_one_device() -> bool:
    """Whether arrays are whole here: no mesh is set, or one of a single device."""
    mesh = jax.sharding.get_abstract_mesh()
    return mesh.empty or mesh.size == 1


def _choose(on_cpu: Callable[..., Array], by_xla: Callable[..., Array], *operands: Array) -> Array:
    """`on_cpu` on CPUs, `by_xla` elsewhere; where both are the same it is traced once."""
    return by_xla(*operands) if on_cpu is by_xla else lax.platform_dependent(*operands, cpu=on_cpu, default=by_xla)


def _convolve_by_xla(x, kernel, *, stride, padding):
    return lax.conv_general_dilated(x, kernel, stride, _both_sides(padding), dimension_numbers=_DIMENSIONS)


def _transpose_by_xla(x, kernel, *, stride, padding, output_padding):
    sides = [
        (size - 1 - pad, size - 1 - pad + extra)
        for size, pad, extra in zip(kernel.shape[:2], padding, output_padding, strict=True)
    ]
    flipped = jnp.flip(kernel, (0, 1)).swapaxes(2, 3)
    return lax.conv_general_dilated(x, flipped, (1, 1), sides, lhs_dilation=stride, dimension_numbers=_DIMENSIONS)


def _both_sides(padding: Pair) -> list[Pair]:
    return [(pad, pad) for pad in padding]


def _kernel_gradient(x, outputs, shape, stride, padding, *, strips_on_cpu):
    """[K1, K2, C, D]: the sum over output pixels of (the window of x it sees) times (its gradient in `outputs`)."""
    by_xla = functools.partial(_kernel_gradient_by_xla, shape=shape, stride=stride, padding=padding)
    by_strips = functools.partial(_kernel_gradient_by_strips, shape=shape, stride=stride, padding=padding)
    on_cpu = by_strips if strips_on_cpu else by_xla
    if _on_one_device() and winograd.suits_gradient(x, shape, stride, padding):
        on_cpu = winograd.kernel_gradient
    return _choose(on_cpu, by_xla, x, outputs)


def _kernel_gradient_by_xla(x, outputs, *, shape, stride, padding):
    convolve = functools.partial(_convolve_by_xla, x, stride=stride, padding=padding)
    _, pullback = jax.vjp(convolve, jnp.zeros(shape, x.dtype))
    return pullback(outputs)[0]


def _kernel_gradient_by_strips(x, outputs, *, shape, stride, padding):
    size1, size2, channels, width = shape
    batch, rows, columns, _ = outputs.shape
    row_bytes = columns * size1 * size2 * channels * x.dtype.itemsize
    whole = batch, rows
    images, strip = strip_shape(*whole, row_bytes, _STRIP_BYTES) if _on_one_device() else whole
    x = jnp.pad(x, [(0, 0), *_both_sides(padding), (0, 0)])
    # The product is faster with a transposed strip of `outputs`, but transposing the result costs more if it is large.
    turned = math.prod(shape) < x.size

    def cut(image, row):
        seen = cut_rows(x, image, row * stride[0], images, (strip - 1) * stride[0] + size1)
        output = cut_rows(outputs, image, row, images, strip).reshape(-1, width)
        return seen, output.T if turned else output

    def add_strip(total, strips):
        seen, output = strips
        taps = [
            seen[:, i : i + (strip - 1) * stride[0] + 1 : stride[0], j : j + (columns - 1) * stride[1] + 1 : stride[1]]
            for i in range(size1)
            for j in range(size2)
        ]
        seen = jnp.concatenate(taps, axis=-1).reshape(-1, size1 * size2 * channels)
        return total + (output @ seen if turned else seen.T @ output), None

    total = jnp.zeros((width, size1 * size2 * channels), x.dtype)
    total, _ = scan_strips(add_strip, total if turned else total.T, (batch, rows), (images, strip), cut)
    return (total.T if turned else total).reshape(shape)
