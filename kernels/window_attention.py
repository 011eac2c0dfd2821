"""Attention inside windows, at a cost linear in the number of tokens.

`window_attention` cuts a regular grid of any number of axes into equal windows, optionally shifted (Swin,
arXiv:2103.14030). `ragged_window_attention` does the same for images of different sizes packed one after another
(Qwen2.5-VL, arXiv:2502.13923); `ragged_windows` decides on the host which token goes where, so that the device sees
static shapes only.

The partition is the same in both: along an axis, with window W and shift s, cell c is in window (c + W - s) // W.
"""

import math
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jaxtyping import Array, Bool, Float, Int, Shaped

from .attention import Backend, attention
from .rope import packed_grid_positions


@partial(jax.jit, static_argnames=("window", "shift", "scale", "backend"))
def window_attention(
    query: Float[Array, "B *grid N H"],
    key: Float[Array, "B *grid K H"],
    value: Float[Array, "B *grid K H"],
    *,
    window: tuple[int, ...],
    shift: tuple[int, ...] | None = None,
    mask: Bool[Array, " B *grid"] | None = None,
    scale: float | None = None,
    backend: Backend = "auto",
) -> Float[Array, "B *grid N H"]:
    """Each cell of a grid attends to the cells of its window.

    A grid that is not a multiple of the window is padded and the padding masked. A shift rolls the grid, so that what
    it cuts off at one side fills the windows of the other, masked from their own cells: it takes no more windows.

    Args:
        query: queries, one token per cell.
        key: keys; heads as in `attention`.
        value: values.
        window: cells per window along each axis.
        shift: cells in the first, cut, window along each axis, less than `window`; 0 is an uncut one.
        mask: False cells are neither seen nor see (their output is zero): images smaller than the grid.
        scale: as in `attention`.
        backend: as in `attention`.

    Raises:
        ValueError: `window` or `shift` do not fit the axes of the grid.
    """
    batch, *grid = query.shape[:-2]
    shift = (0,) * len(window) if shift is None else shift
    if not len(grid) == len(window) == len(shift) or not all(0 <= s < w for s, w in zip(shift, window, strict=True)):
        raise ValueError(
            f"window_attention: window {window} and shift {shift} do not fit a grid of shape {tuple(grid)}"
        )
    split = partial(_split, window=window, shift=shift)
    segment_ids = None
    if mask is not None or any(shift) or any(size % side for size, side in zip(grid, window, strict=True)):
        # The roll keeps each part of the partition together, but puts the two cut ends of the grid into one window.
        part = jnp.broadcast_to(_partition(grid, window, shift), (batch, *grid))
        segment_ids = _segment_ids(split(part if mask is None else jnp.where(mask, part, -1), fill=-1))
    out = attention(split(query), split(key), split(value), segment_ids=segment_ids, scale=scale, backend=backend)
    return _join(out, grid, window, shift)


class RaggedWindows(NamedTuple):
    """Where the tokens of packed images go: W windows of L slots and back. One row per batch row."""

    token: Int[Array | np.ndarray, "B W L"]
    """The token in each slot; T, the number of tokens, in empty slots."""
    slot: Int[Array | np.ndarray, "B T"]
    """The slot of each token, counted through the windows; W L for padding tokens."""

    @jax.jit
    def split(self, x: Shaped[Array, "B T *c"]) -> Shaped[Array, "BW L *c"]:
        """Brings tokens into their windows; empty slots are zero. Layers in a row may share this layout."""
        batch, windows, slots = self.token.shape
        moved = permute(x, self.token.reshape(batch, -1), self.slot)
        return moved.reshape(batch * windows, slots, *x.shape[2:])

    @jax.jit
    def join(self, x: Shaped[Array, "BW L *c"]) -> Shaped[Array, "B T *c"]:
        """Brings them back; padding tokens are zero."""
        batch, windows, slots = self.token.shape
        flat = x.reshape(batch, windows * slots, *x.shape[2:])
        return permute(flat, self.slot, self.token.reshape(batch, -1))

    @property
    def lengths(self) -> Int[Array, " BW"]:
        """Tokens of each window, for `attention` on split queries, keys and values: they fill the first slots."""
        return (self.token < self.slot.shape[1]).sum(-1).reshape(-1)

    @property
    def segment_ids(self) -> tuple[Int[Array, "BW L"], Int[Array, "BW L"]]:
        """The same as ids of segments, where more keys are added behind."""
        occupied = self.token < self.slot.shape[1]
        return _segment_ids(jnp.where(occupied, 0, -1).reshape(-1, self.token.shape[2]))


@partial(jax.jit, static_argnames=("scale", "backend"))
def ragged_window_attention(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B T K H"],
    value: Float[Array, "B T K H"],
    windows: RaggedWindows,
    *,
    scale: float | None = None,
    backend: Backend = "auto",
) -> Float[Array, "B T N H"]:
    """Each token of packed images attends to the tokens of its window; padding tokens give zero.

    Rotary embeddings are applied before, with the tokens in their packed order.
    """
    split = (windows.split(x) for x in (query, key, value))
    return windows.join(attention(*split, key_lengths=windows.lengths, scale=scale, backend=backend))


def ragged_windows(
    grids: Sequence[Sequence[int]] | Int[np.ndarray, "I 3"],
    window: tuple[int, int],
    *,
    shift: tuple[int, int] = (0, 0),
    merge: int = 1,
    length: int | None = None,
    count: int | None = None,
) -> RaggedWindows:
    """Plans the windows of one row of packed images and videos, on the host; windows never span frames.

    In the published encoder a window is 112 pixels, (8, 8) patches, without shift, with merge 2. Windows follow one
    another by frame, row and column, so reading off the occupied slots gives its `window_index` order.

    Args:
        grids: (time, height, width) of each item in patches.
        window: height and width in patches. Windows at the edges hold fewer.
        shift: as in `window_attention`.
        merge: the order of the tokens, see `rope.packed_grid_positions`.
        length: T, the bucket of tokens; default: as many as there are.
        count: W, the bucket of windows; default: as many as there are.

    Returns:
        NumPy arrays with a batch axis of one; concatenate rows that share both buckets.

    Raises:
        ValueError: tokens or windows do not fit their buckets, or a grid its merge blocks.
    """
    positions, frames = packed_grid_positions(grids, merge=merge, length=length)
    tokens = np.flatnonzero(frames)
    parts = (positions[tokens, 1:] + window - np.array(shift)) // window
    keys = np.column_stack([frames[tokens], parts])
    _, part, sizes = np.unique(keys, axis=0, return_inverse=True, return_counts=True)
    count = len(sizes) if count is None else count
    if len(sizes) > count:
        raise ValueError(f"ragged_windows: {len(sizes)} windows do not fit in {count}")
    order = np.argsort(part, kind="stable")
    rank = np.arange(len(tokens)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    slots = math.prod(window)
    token = np.full((count, slots), len(frames), np.int32)
    slot = np.full(len(frames), count * slots, np.int32)
    token[part[order], rank] = tokens[order]
    slot[tokens[order]] = part[order] * slots + rank
    return RaggedWindows(token[None], slot[None])


def _partition(grid: Sequence[int], window: Sequence[int], shift: Sequence[int]) -> np.ndarray:
    """Number of the window that each cell belongs to, in the shape of the grid."""
    along = [(np.arange(size) + side - s) // side for size, side, s in zip(grid, window, shift, strict=True)]
    shape = [axis[-1] + 1 for axis in along]
    return np.ravel_multi_index(np.meshgrid(*along, indexing="ij"), shape).astype(np.int32)


def _layout(window: Sequence[int]) -> tuple[str, str, dict[str, int]]:
    """The two sides of the einops pattern from a grid to its windows, and the sides of the window."""
    count, side = ([f"{letter}{axis}" for axis in range(len(window))] for letter in "nw")
    grid = " ".join(f"({n} {w})" for n, w in zip(count, side, strict=True))
    return f"b {grid} ...", f"(b {' '.join(count)}) ({' '.join(side)}) ...", dict(zip(side, window, strict=True))


def _split(
    x: Shaped[Array, "B ..."], window: Sequence[int], shift: Sequence[int], fill: int = 0
) -> Shaped[Array, "BW L ..."]:
    grid, windows, sides = _layout(window)
    padding = [(0, -size % side) for size, side in zip(x.shape[1:], window, strict=False)]
    x = jnp.pad(x, [(0, 0), *padding, *[(0, 0)] * (x.ndim - 1 - len(window))], constant_values=fill)
    x = jnp.roll(x, [-s for s in shift], range(1, 1 + len(window)))
    return rearrange(x, f"{grid} -> {windows}", **sides)


def _join(
    x: Shaped[Array, "BW L *c"], size: Sequence[int], window: Sequence[int], shift: Sequence[int]
) -> Shaped[Array, "B ..."]:
    grid, windows, sides = _layout(window)
    counts = {f"n{axis}": math.ceil(n / side) for axis, (n, side) in enumerate(zip(size, window, strict=True))}
    x = rearrange(x, f"{windows} -> {grid}", **sides, **counts)
    x = jnp.roll(x, shift, range(1, 1 + len(window)))
    return x[:, *(slice(n) for n in size)]


def _segment_ids(part: Int[Array, "BW L"]) -> tuple[Int[Array, "BW L"], Int[Array, "BW L"]]:
    """For queries and keys; the tokens without a part (-1) match nothing, not even each other, and so give zero."""
    return part, jnp.where(part < 0, -2, part)


@jax.custom_vjp
def permute(
    x: Shaped[Array, "B S *c"], source: Int[Array, "B R"], target: Int[Array, "B S"]
) -> Shaped[Array, "B R *c"]:
    """x[source] in each row, zero where `source` is out of range. `target` is the inverse: where each row of x went.

    With it the derivative is a gather too, where that of plain indexing is a scatter, slow on accelerators.
    """
    return jax.vmap(lambda row, index: row.at[index].get(mode="fill", fill_value=0))(x, source)


def _permute_forward(x, source, target):
    return permute(x, source, target), (source, target)


def _permute_backward(indices, cotangent):
    source, target = indices
    return permute(cotangent, target, source), None, None


permute.defvjp(_permute_forward, _permute_backward)
