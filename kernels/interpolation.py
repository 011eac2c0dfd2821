"""Resizing of position tables and patch kernels, rule for rule as the published systems do it.

Every rule is separable: `output = W_x @ table @ W_y^T` per channel with small constant matrices (resize_matrices.py).
"""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from .resize_matrices import resize_matrix


def resize_grid(table: Float[Array, "X Y D"], shape: tuple[int, int], method: str) -> Float[Array, "X2 Y2 D"]:
    """Resizes a grid of vectors to `shape` (rows, columns); float32, whatever the table's dtype. Equal grids pass."""
    rows, columns, _ = table.shape
    if (rows, columns) == tuple(shape):
        return table
    matrix_rows, matrix_columns = resize_matrix(rows, shape[0], method), resize_matrix(columns, shape[1], method)
    wide = table.astype(jnp.float32)
    return jnp.einsum("xi,yj,ijd->xyd", matrix_rows, matrix_columns, wide, precision="highest")


def resize_positions(
    table: Float[Array, "1 T D"], grid: tuple[int, int], shape: tuple[int, int], method: str
) -> Float[Array, "1 T2 D"]:
    """A table of learned positions of `grid`, behind rows of other tokens if any, for `shape`; those rows stay.

    What is resized is float32: a table in half precision becomes what it would be had it been read in float32.
    """
    prefix = table.shape[1] - math.prod(grid)
    patches = resize_grid(table[0, prefix:].reshape(*grid, -1), shape, method)
    return jnp.concatenate([table[:, :prefix], patches.reshape(1, -1, table.shape[-1])], axis=1)


def resample_patch_kernel(
    kernel: Float[Array, "P1 P2 C D"], shape: tuple[int, int], method: str = "bicubic_antialias"
) -> Float[Array, "Q1 Q2 C D"]:
    """Changes the patch size of a kernel so that <resized patch, new kernel> = <patch, old kernel> (FlexiViT, eq. 4).

    The result is float32. It takes the pseudo-inverse of the patch resize and is no resize; its axes separate because
    pinv(A kron B) = pinv(A) kron pinv(B). Source: timm/layers/patch_embed.py resample_patch_embed.
    """
    if kernel.shape[:2] == tuple(shape):
        return kernel
    rows, columns = (
        np.linalg.pinv(resize_matrix(old, new, method).astype(np.float64).T).astype(np.float32)
        for old, new in zip(kernel.shape[:2], shape, strict=True)
    )
    return jnp.einsum("xp,yq,pqcd->xycd", rows, columns, kernel.astype(jnp.float32), precision="highest")


@jax.jit
def sample_grid(
    table: Float[Array, "X Y D"], cells: Int[Array, "*b 2"], sizes: Int[Array, "*b 2"]
) -> Float[Array, "*b D"]:
    """The vectors that cells of grids of other sizes have in a table stretched over each, bilinear, corners aligned.

    In float32. `sizes` are rows and columns of the grid that each cell is in: one call serves packed images of any
    sizes, where `resize_grid` makes the whole grid of one. Source: transformers vision_utils.py.
    """
    rows, columns, width = table.shape
    flat = table.astype(jnp.float32).reshape(-1, width)
    last = jnp.array([rows - 1, columns - 1], jnp.int32)
    source = cells.astype(jnp.float32) * last / jnp.maximum(sizes - 1, 1).astype(jnp.float32)
    low = jnp.floor(source)
    fraction = source - low
    total = jnp.zeros((*cells.shape[:-1], width), jnp.float32)
    for corner in itertools.product((0, 1), repeat=2):
        place = jnp.minimum(low.astype(jnp.int32) + jnp.array(corner, jnp.int32), last)
        weight = jnp.where(jnp.array(corner, bool), fraction, 1 - fraction).prod(-1, keepdims=True)
        total = total + weight * flat[place[..., 0] * columns + place[..., 1]]
    return total
