"""3 x 3 convolutions by Winograd's F(2 x 2, 3 x 3) (Lavin and Gray, arXiv 1509.09308), in strips for CPUs.

Four pixels in a row and three taps give two output pixels by four products instead of six, in both directions of an
image by 16 instead of 36: for each of the 16, sums of pixels times sums of taps are one matrix product over the tiles
of 4 x 4 pixels (which overlap by two) and the channels. Exact but for rounding, which is no worse than a plain sum's.
Everything is float32, stride 1, padding 1.
"""

import functools
import math
import operator

import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float

from .strips import Pair, cut_rows, scan_strips, strip_shape

# out = OUTPUT ((KERNEL taps) * (INPUT pixels))
_INPUT = np.array([[1, 0, -1, 0], [0, 1, 1, 0], [0, -1, 1, 0], [0, 1, 0, -1]])
_KERNEL = np.array([[1, 0, 0], [0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0, 0, 1]])
_OUTPUT = np.array([[1, 1, 1, 0], [0, 1, -1, -1]])
# Bytes of the 16 sums of pixels of one strip: two second-level caches; on one core 0.5 to 8 MiB differed little.
_STRIP_BYTES = 1 << 22
# Layers that gain (measured with 8 faces; below, the other forms are as fast): products by one tap of the kernel (a
# longer program must be worth its compilation), channels on both sides, and pixels for the gradient.
_MIN_PRODUCTS = 5e7
_MIN_CHANNELS = 128
_MIN_PIXELS = 1024


def suits(x: Array, kernel: tuple[int, ...], stride: Pair, padding: Pair) -> bool:
    """Whether `convolve` does the convolution of x, or of maps of its size with a kernel so wide, faster on a CPU."""
    return _serves(x, kernel, stride, padding) and min(kernel[2:]) >= _MIN_CHANNELS


def suits_gradient(x: Array, kernel: tuple[int, ...], stride: Pair, padding: Pair) -> bool:
    """Whether `kernel_gradient` is the faster form on a CPU."""
    return _serves(x, kernel, stride, padding) and math.prod(x.shape[:3]) >= _MIN_PIXELS


def _serves(x, kernel, stride, padding):
    worth_compiling = math.prod(x.shape[:3]) * math.prod(kernel[2:]) >= _MIN_PRODUCTS
    form = kernel[:2], stride, padding
    return x.dtype == jnp.float32 and worth_compiling and form == ((3, 3), (1, 1), (1, 1))


def convolve(
    x: Float[Array, "B X Y I"], kernel: Float[Array, "3 3 C D"], *, transpose: bool = False
) -> Float[Array, "B X Y O"]:
    """The convolution from I = C to O = D channels, or its transpose from D to C: the gradient of its input."""
    taps = _transform(_KERNEL, jnp.flip(kernel, (0, 1)) if transpose else kernel)
    product = "bxyd,cd->bxyc" if transpose else "bxyc,cd->bxyd"
    batch, rows, columns, _ = x.shape
    pixels, grid, (images, strip) = _tiles(x)

    def cut(image, row):
        return cut_rows(pixels, image, 2 * row, images, 2 * strip + 2)

    def convolve_strip(_, pixels):
        sums = _transform(_INPUT, _corners(pixels, 4))
        out = [[jnp.einsum(product, *pair) for pair in zip(*row, strict=True)] for row in zip(sums, taps, strict=True)]
        pairs = [jnp.stack(row, 3) for row in _transform(_OUTPUT, out)]
        return None, jnp.stack(pairs, 2)  # images, tile rows, 2, tile columns, 2, D

    _, out = scan_strips(convolve_strip, None, grid, (images, strip), cut)
    return out.reshape(batch, 2 * grid[1], -1, out.shape[-1])[:, :rows, :columns]


def kernel_gradient(x: Float[Array, "B X Y C"], outputs: Float[Array, "B X Y D"]) -> Float[Array, "3 3 C D"]:
    """The gradient of the convolution of x with respect to its kernel from the one with respect to its outputs."""
    pixels, grid, (images, strip) = _tiles(x)
    channels, width = x.shape[-1], outputs.shape[-1]
    outputs = jnp.pad(outputs, [(0, 0), *((0, n % 2) for n in outputs.shape[1:3]), (0, 0)])

    def cut(image, row):
        out = cut_rows(outputs, image, 2 * row, images, 2 * strip)
        columns = [[part.reshape(-1, width).T for part in parts] for parts in _corners(out, 2)]
        return cut_rows(pixels, image, 2 * row, images, 2 * strip + 2), columns

    def add_strip(total, seen):
        pixels, columns = seen
        sums, spread = _transform(_INPUT, _corners(pixels, 4)), _transform(_OUTPUT.T, columns)
        return [
            [old + out @ pixel.reshape(-1, channels) for old, out, pixel in zip(*row, strict=True)]
            for row in zip(total, spread, sums, strict=True)
        ], None

    total = [[jnp.zeros((width, channels), x.dtype)] * 4] * 4
    total, _ = scan_strips(add_strip, total, grid, (images, strip), cut)
    # As a product, so that XLA does not fuse the sums with the transposition, which is 10 times slower.
    return jnp.einsum("ia,jb,ijdc->abcd", _KERNEL.astype(x.dtype), _KERNEL.astype(x.dtype), jnp.array(total))


def _tiles(x):
    """x with a frame of zeros up to whole tiles, the grid (images, rows of tiles) and its share in one strip."""
    batch, rows, columns, channels = x.shape
    grid = batch, -(-rows // 2)
    shape = strip_shape(*grid, 16 * -(-columns // 2) * channels * x.dtype.itemsize, _STRIP_BYTES)
    return jnp.pad(x, [(0, 0), (1, 1 + rows % 2), (1, 1 + columns % 2), (0, 0)]), grid, shape


def _corners(x, size):
    """[size][size] maps: pixel (i, j) of every tile of size x size pixels that begins at an even row and column."""
    rows, columns = (n - size + 1 for n in x.shape[1:3])
    return [[x[:, i : i + rows : 2, j : j + columns : 2] for j in range(size)] for i in range(size)]


def _transform(matrix, parts):
    """matrix parts matrix^T for a matrix of numbers and a matrix of arrays."""
    rows = [[_combine(row, column) for column in zip(*parts, strict=True)] for row in matrix]
    return [[_combine(row, parts) for row in matrix] for parts in rows]


def _combine(weights, parts):
    return functools.reduce(operator.add, [float(w) * part for w, part in zip(weights, parts, strict=True) if w])
