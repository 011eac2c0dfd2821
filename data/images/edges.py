"""Canny edges, bit for bit those of OpenCV (cv2.Canny with aperture 3), without OpenCV.

Sobel gradients, of which each pixel keeps its strongest channel's; thinning to the crest of the gradient; then every
weak crest that touches a strong one. There is no blur before, unlike in scikit-image.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from .transforms import Example, Transform

_SHIFT = 15  # OpenCV's fixed point of the tangent of 22.5 degrees
_TANGENT = 13573


def canny_edges(image: np.ndarray, low: float = 100, high: float = 200, *, euclidean: bool = False) -> np.ndarray:
    """Edges of uint8 [X, Y] or [X, Y, C] as uint8 [X, Y]: 255 on an edge, else 0.

    Thresholds are of |dx| + |dy|, or of the length of the gradient where `euclidean`; they may be in either order.
    """
    from scipy import ndimage  # only where edges are found: half a second, and memory of every worker process

    low, high = sorted((low, high))
    if euclidean:
        low, high = (min(threshold, 32767.0) ** 2 for threshold in (low, high))
    low, high = int(np.floor(low)), int(np.floor(high))
    dx, dy, strength = _gradient(image.reshape(*image.shape[:2], -1).astype(np.int32), euclidean)
    crest = (strength > low) & _is_crest(dx, dy, strength)
    strong = crest & (strength > high)
    parts: Any = ndimage.label(crest, np.ones((3, 3)))[0]  # type: ignore[index]  # without `output` it is a pair
    chosen = np.unique(parts[strong])
    return np.where(crest & np.isin(parts, chosen), 255, 0).astype(np.uint8)


def _gradient(image: np.ndarray, euclidean: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """dx, dy and their strength [X, Y], of the channel where it is largest."""
    padded = np.pad(image, ((1, 1), (1, 1), (0, 0)), mode="edge")
    rows, columns = padded[:-2] + 2 * padded[1:-1] + padded[2:], padded[:, :-2] + 2 * padded[:, 1:-1] + padded[:, 2:]
    dx, dy = rows[:, 2:] - rows[:, :-2], columns[2:] - columns[:-2]
    strength = dx**2 + dy**2 if euclidean else abs(dx) + abs(dy)
    best = strength.argmax(-1, keepdims=True)
    dx, dy, strength = (np.take_along_axis(x, best, -1)[..., 0] for x in (dx, dy, strength))
    return dx, dy, strength


def _is_crest(dx: np.ndarray, dy: np.ndarray, strength: np.ndarray) -> np.ndarray:
    """Where the gradient is the largest along its own direction, rounded to a multiple of 45 degrees."""
    around = np.pad(strength, 1)
    rows, columns = strength.shape

    def at(down: int, right: int) -> np.ndarray:
        return around[1 + down : 1 + down + rows, 1 + right : 1 + right + columns]

    x, y = abs(dx).astype(np.int64), abs(dy).astype(np.int64) << _SHIFT
    flat, steep = y < x * _TANGENT, y > x * _TANGENT + (x << (_SHIFT + 1))
    falling = (dx ^ dy) < 0
    # Of two equal neighbours along rows or columns the first is the crest; along diagonals neither is.
    level, upright = (strength > at(0, -1)) & (strength >= at(0, 1)), (strength > at(-1, 0)) & (strength >= at(1, 0))
    down = (strength > at(-1, -1)) & (strength > at(1, 1))
    up = (strength > at(-1, 1)) & (strength > at(1, -1))
    return np.where(flat, level, np.where(steep, upright, np.where(falling, up, down)))


def canny(low: float | Sequence[float] = 100, high: float | Sequence[float] = 200) -> Transform:
    """The image's edges as "condition", uint8 [X, Y, 3]. A threshold is a number, or the range it is drawn from.

    The ControlNet paper drew thresholds at random in training. ValueError for a range that is not two numbers in order.
    """
    ranges: list[Any] = [(x, x) if isinstance(x, int | float) else tuple(x) for x in (low, high)]
    for bounds in ranges:
        if len(bounds) != 2 or not 0 <= bounds[0] <= bounds[1]:
            raise ValueError(f"canny: a threshold is a number or a range of two from 0 on, got {bounds}")

    def apply(example: Example, rng: np.random.Generator) -> Example:
        edges = canny_edges(example["image"], *(rng.uniform(start, end) for start, end in ranges))
        return {**example, "condition": np.repeat(edges[..., None], 3, -1)}

    return apply
