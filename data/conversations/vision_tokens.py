"""Images and videos of any size as packed patches for Qwen-VL: sizes, frame sampling, patch order, positions.

Everything here is NumPy on the host: what depends on a grid's size never enters a jitted function except as an array of
a declared bucket's length. Sources: qwen-vl-utils vision_process.py, transformers models/qwen2_vl and qwen2_5_vl.
"""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
from einops import rearrange
from jaxtyping import Float, Int

from ...models.ranges import Count, Positive

Grid = tuple[int, int, int]  # temporal, vertical and horizontal count of patches

MAX_ASPECT_RATIO = 200


def smart_resize(height: int, width: int, factor: int, min_pixels: int, max_pixels: int) -> tuple[int, int]:
    """The size nearest to (height, width) whose sides are multiples of `factor` and whose area lies in the given range.

    ValueError for an aspect ratio over 200. Rounding is Python's, half to even.
    """
    if min(height, width) <= 0 or max(height, width) / min(height, width) > MAX_ASPECT_RATIO:
        raise ValueError(f"image of {height}x{width} pixels: expected an aspect ratio of at most {MAX_ASPECT_RATIO}")
    rows, columns = round(height / factor) * factor, round(width / factor) * factor
    if rows * columns > max_pixels:
        shrink = math.sqrt(height * width / max_pixels)
        rows, columns = (max(factor, math.floor(side / shrink / factor) * factor) for side in (height, width))
    elif rows * columns < min_pixels:
        grow = math.sqrt(min_pixels / (height * width))
        rows, columns = (math.ceil(side * grow / factor) * factor for side in (height, width))
    return rows, columns


def resize_clip(
    clip: tuple[int, int, int], factors: tuple[int, int], min_pixels: int, max_pixels: int
) -> tuple[int, int]:
    """`smart_resize` of a clip of (frames, height, width) whose bounds are of all its frames together.

    `factors` are of time and of sides; a side below its factor is first scaled up to it. Source: transformers
    models/qwen3_vl/video_processing_qwen3_vl.py.
    """
    frames, height, width = clip
    step, factor = factors
    if min(height, width) < factor:
        scale = max(factor / height, factor / width)
        height, width = int(height * scale), int(width * scale)
    if max(height, width) / min(height, width) > MAX_ASPECT_RATIO:
        raise ValueError(f"image of {height}x{width} pixels: expected an aspect ratio of at most {MAX_ASPECT_RATIO}")
    rows, columns = round(height / factor) * factor, round(width / factor) * factor
    volume = round(frames / step) * step * rows * columns
    if volume > max_pixels:
        shrink = math.sqrt(frames * height * width / max_pixels)
        rows, columns = (max(factor, math.floor(side / shrink / factor) * factor) for side in (height, width))
    elif volume < min_pixels:
        grow = math.sqrt(min_pixels / (frames * height * width))
        rows, columns = (math.ceil(side * grow / factor) * factor for side in (height, width))
    return rows, columns


@dataclasses.dataclass(frozen=True)
class FrameSampling:
    """How many frames of a video are seen: `fps` a second, in bounds; an even number as qwen-vl-utils smart_nframes.

    Not `even`, it is as transformers samples for Qwen3-VL (models/qwen3_vl/video_processing_qwen3_vl.py).
    """

    fps: Positive = 2.0
    min_frames: Count = 4
    max_frames: Count = 768
    even: bool = True

    def indices(self, total: int, video_fps: float, num_frames: int | None = None) -> Int[np.ndarray, " T"]:
        """Evenly spaced frame numbers, first and last included; `num_frames` asks for that many (rounded to even)."""
        if not self.even:
            count = num_frames or min(max(int(total / video_fps * self.fps), self.min_frames), self.max_frames, total)
            if not 1 <= count <= total:
                raise ValueError(f"video of {total} frames: expected 1 to {total} sampled frames, got {count}")
            return np.linspace(0, total - 1, count).round().astype(np.int64)
        if num_frames is not None:
            count = round(num_frames / 2) * 2
        else:
            low = math.ceil(self.min_frames / 2) * 2
            high = math.floor(min(self.max_frames, total) / 2) * 2
            count = math.floor(min(min(max(total / video_fps * self.fps, low), high), total) / 2) * 2
        if not 2 <= count <= total:
            raise ValueError(f"video of {total} frames: expected 2 to {total} sampled frames, got {count}")
        # Half-way values round as torch.round does, to even
        return np.round(np.linspace(0, total - 1, count, dtype=np.float32)).astype(np.int64)


def patchify_frames(
    frames: Float[np.ndarray, "T X Y C"], patch_size: int, temporal_patch_size: int = 2, merge_size: int = 2
) -> tuple[Float[np.ndarray, "P F"], Grid]:
    """Cuts frames into space-time patches, flattened as (channel, time, row, column), in merge order.

    The order is frames, then blocks of merge_size², then patches within a block: each run of merge_size² rows becomes
    one visual token. Frames short of a multiple of `temporal_patch_size` are filled by repeating the last: an image is
    the same frame twice.
    """
    missing = -len(frames) % temporal_patch_size
    frames = np.concatenate([frames, np.repeat(frames[-1:], missing, 0)]) if missing else frames
    grid = (len(frames) // temporal_patch_size, frames.shape[1] // patch_size, frames.shape[2] // patch_size)
    patches = rearrange(
        frames,
        "(t dt) (y my py) (x mx px) c -> (t y x my mx) (c dt py px)",
        dt=temporal_patch_size,
        my=merge_size,
        mx=merge_size,
        py=patch_size,
        px=patch_size,
    )
    return np.ascontiguousarray(patches), grid


def num_tokens(grid: Grid, merge_size: int = 2) -> int:
    """Visual tokens of one item after merging."""
    return math.prod(grid) // merge_size**2


@dataclasses.dataclass(frozen=True)
class Segment:
    """A run of one kind in a sequence: `length` text tokens, or the tokens of one image or video."""

    length: int
    grid: Grid | None = None
    seconds_per_grid: float | None = None  # of a video: time between two temporal patches; None for an image


def mrope_positions(
    segments: Sequence[Segment], tokens_per_second: float, merge_size: int = 2, advance_by_space: bool = False
) -> tuple[Int[np.ndarray, "T 3"], int]:
    """Positions (time, height, width) of a sequence and the offset of whatever is generated after it.

    Text advances all three axes together. An image or video starts where the text before it stopped: rows and columns
    count merged patches, time counts `tokens_per_second` a second. What follows starts after the largest position on
    any axis. `advance_by_space=True` is the behaviour of transformers 5.0 to 5.23, which looks at rows and columns
    only, so that text overlaps a long video in time; for comparisons with it.

    Returns positions [T, 3] and rope_delta: token number n after the sequence has position n + rope_delta on all axes.
    """
    parts: list[np.ndarray] = [np.zeros((0, 3), np.int64)]
    cursor, largest = 0, -1
    for segment in segments:
        if segment.grid is None:
            part = np.broadcast_to(np.arange(segment.length)[:, None], (segment.length, 3))
            step = segment.length
        else:
            part, step = _visual_positions(segment, tokens_per_second, merge_size, advance_by_space)
        parts.append(part + cursor)
        largest = max(largest, int(parts[-1].max(initial=-1)))
        cursor += step
    positions = np.concatenate(parts)
    return positions, largest + 1 - len(positions)


def _visual_positions(
    segment: Segment, tokens_per_second: float, merge_size: int, advance_by_space: bool
) -> tuple[np.ndarray, int]:
    assert segment.grid is not None
    frames, rows, columns = segment.grid[0], segment.grid[1] // merge_size, segment.grid[2] // merge_size
    time, row, column = np.meshgrid(*map(np.arange, (frames, rows, columns)), indexing="ij")
    seconds = 0.0 if segment.seconds_per_grid is None else segment.seconds_per_grid
    # float32 product, truncated: as the released code computes it
    time = (time.astype(np.float32) * np.float32(seconds) * np.float32(tokens_per_second)).astype(np.int64)
    positions = np.stack([time, row, column], -1).reshape(-1, 3)
    return positions, max(rows, columns) if advance_by_space else int(positions.max()) + 1
