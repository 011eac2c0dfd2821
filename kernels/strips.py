"""Work on images in strips of rows small enough to stay in a CPU's cache."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike

Pair = tuple[int, int]


def strip_shape(batch: int, rows: int, row_bytes: int, limit: int) -> Pair:
    """(images, rows) of one strip, divisors of the batch and of its rows: what `limit` bytes hold, at least one row."""
    strip = _largest_divisor(rows, limit // row_bytes)
    images = _largest_divisor(batch, limit // (rows * row_bytes)) if strip == rows else 1
    return images, strip


def scan_strips(
    function: Callable[..., tuple[Any, Any]],
    total: Any,
    grid: Pair,
    shape: Pair,
    cut: Callable[[ArrayLike, ArrayLike], Any],
) -> tuple[Any, Any]:
    """lax.scan of `function(total, strip) -> (total, output)` over a grid of (images, rows) in strips of a `shape`.

    `cut(image, row)` gives the strip that begins there. It does so an iteration ahead, into the loop's carry: XLA would
    fuse a slice at a variable place with the arithmetic that follows, which then does without vector instructions and
    is up to 25 times slower.
    """
    (batch, rows), (images, strip) = grid, shape
    per_image = rows // strip
    if shape == grid:  # no loop, and on a mesh no slices of a batch that is split
        total, output = function(total, cut(0, 0))
        return total, jax.tree.map(lambda part: part[None], output)

    def cut_number(index):
        return cut(index // per_image * images, index % per_image * strip)

    def step(carry, index):
        total, output = function(*carry)
        return (total, cut_number(index + 1)), output

    numbers = jnp.arange(batch // images * per_image)
    (total, _), outputs = lax.scan(step, (total, cut_number(0)), numbers)
    return total, outputs


def cut_rows(x: Array, image: ArrayLike, row: ArrayLike, images: int, rows: int) -> Array:
    """[images, rows, ...] from row `row` of image `image` of x [B, X, ...] on."""
    return lax.dynamic_slice(x, (image, row, *[0] * (x.ndim - 2)), (images, rows, *x.shape[2:]))


def _largest_divisor(number: int, limit: int) -> int:
    return max((d for d in range(1, min(number, limit) + 1) if number % d == 0), default=1)
