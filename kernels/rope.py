"""Rotary position embeddings (RoFormer, arXiv:2104.09864): every variant is one table of rotation angles.

The channels of a head are taken in pairs, and pair j of a token at position p turns by the angle <frequency_j, p>: a
matrix of frequencies [pairs, axes] is the general form (`mixed_table`). Turning by p and then by q is turning by p + q,
so that a product of a turned query and key depends on the difference of their positions: rotations are the only real
representation of translations with that property, and the rows of the matrix are free to be anything.

Where every pair follows one axis, the matrix has one entry a row, and a `Rope` lists axis and frequency of each pair:

    one axis         rope_1d(128)           all pairs follow the sequence                    (language models)
    axial            rope_axial((20, 20))   a block of pairs, with a ladder of its own, per axis
                                            (2-D: Qwen-VL and EVA-02 towers; 3-D: LongCat-Video, Wan)
    multimodal       rope_multimodal(...)   one ladder dealt to time, height, width, in sections (Qwen2.5-VL) or
                                            interleaved (Qwen3-VL)

In the mixed form (RoPE-Mixed, arXiv 2403.13298) each pair follows a direction of its own, fixed or learnt, a matrix for
each head: `mixed_frequencies` draws it, and a model may hold it as a parameter.

    rope = rope_axial((44, 42, 42))
    cos, sin = rope.table(grid_positions((frames, height, width)))      # once per forward pass, float32
    query, key = (apply_rope(x, cos, sin, interleaved=True) for x in (query, key))

Position arrays hold one coordinate per axis in their last dimension. A token at zero on all axes is not turned: give
that to tokens without a place (class token, registers).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Num

Scaling = Callable[[int, float | int], tuple[np.ndarray, float]]
"""(dim, theta) -> frequencies [dim / 2] in float64, and the attention factor."""


@dataclass(frozen=True)
class Rope:
    """What each pair of channels does. Hashable: may be a field of a model's configuration."""

    frequencies: tuple[float, ...]
    """Radians per unit of position, of each pair."""
    axes: tuple[int, ...]
    """The coordinate that each pair follows."""
    attention_factor: float | int = 1.0
    """Multiplies cosine and sine (YaRN), so logits by its square."""

    @partial(jax.jit, static_argnums=0)
    def table(
        self, positions: Num[Array, "*b T A"]
    ) -> tuple[Float[Array, "*b T {len(self.axes)}"], Float[Array, "*b T {len(self.axes)}"]]:
        """Cosine and sine of the angles of each token, float32.

        Raises:
            ValueError: the positions have another number of axes.
        """
        if positions.shape[-1] != max(self.axes) + 1:
            raise ValueError(f"rope: positions must have {max(self.axes) + 1} axes, got shape {positions.shape}")
        frequencies = jnp.asarray(self.frequencies, jnp.float32)
        angles = positions[..., np.array(self.axes)].astype(jnp.float32) * frequencies
        return self.attention_factor * jnp.cos(angles), self.attention_factor * jnp.sin(angles)

    def matrix(self) -> Float[np.ndarray, "R A"]:
        """The frequencies as the general form has them, one entry a row."""
        matrix = np.zeros((len(self.axes), max(self.axes) + 1))
        matrix[np.arange(len(self.axes)), self.axes] = self.frequencies
        return matrix


@jax.jit
def mixed_table(
    positions: Num[Array, "*b T A"], frequencies: Float[Array, "..."]
) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
    """Cosine and sine of the angles <frequency, position>, float32: the general form, differentiable in both.

    A matrix [R, A] serves all heads (table [*b, T, R]); [N, R, A] is one for each, whose table [*b, T, N, R] goes to
    `apply_rope(..., per_head=True)`.
    """
    places, rates = positions.astype(jnp.float32), frequencies.astype(jnp.float32)
    angles = jnp.tensordot(places, rates, axes=((-1,), (-1,)), precision="highest")
    return jnp.cos(angles), jnp.sin(angles)


def mixed_frequencies(
    pairs: int, *, heads: int = 1, theta: float | int = 10.0, seed: int = 0
) -> Float[np.ndarray, "N R 2"]:
    """Frequencies of two axes whose pairs follow directions drawn for each head, as RoPE-Mixed begins.

    Half of the pairs have a ladder of speeds along a random direction, the other half the same across it.
    """
    if pairs % 2:
        raise ValueError(
            f"rope: mixed frequencies come in two directions, expected an even number of pairs, got {pairs}"
        )
    speeds = ladder(pairs, theta)  # pairs / 2
    along = np.random.default_rng(seed).uniform(0, 2 * np.pi, heads)
    angles = np.stack([along, along + np.pi / 2], axis=1)  # N 2
    directions = np.stack([np.cos(angles), np.sin(angles)], axis=-1)  # N 2 A
    return (directions[:, :, None] * speeds[:, None]).reshape(heads, pairs, 2).astype(np.float32)


@partial(jax.jit, static_argnames=("interleaved", "per_head"))
def apply_rope(
    x: Float[Array, "*b T N H"],
    cos: Float[Array, "..."],
    sin: Float[Array, "..."],
    *,
    interleaved: bool = False,
    per_head: bool = False,
) -> Float[Array, "*b T N H"]:
    """Turns queries or keys by the angles of a table, in float32, and returns them in their own dtype.

    Args:
        x: queries or keys.
        cos: from `Rope.table` or `mixed_table`; one row of R = H / 2 angles per token [*b, T, R], shared by the heads.
        sin: likewise.
        per_head: the heads have angles of their own, [*b, T, N, R].
        interleaved: pair j is the channels (2j, 2j + 1) (RoFormer, EVA, LongCat); else (j, j + H / 2), the "rotate
            half" of GPT-NeoX, Llama and Qwen.

    Raises:
        ValueError: the table has not one angle per pair of channels.
    """
    if 2 * cos.shape[-1] != x.shape[-1]:
        raise ValueError(f"apply_rope: {cos.shape[-1]} angles cannot turn {x.shape[-1]} channels, a half is needed")
    if not per_head:
        cos, sin = cos[..., None, :], sin[..., None, :]  # *b T 1 R
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    if interleaved:
        first, second = wide[..., 0::2], wide[..., 1::2]
        turned = jnp.stack([first * cos - second * sin, second * cos + first * sin], axis=-1).reshape(x.shape)
    else:
        first, second = jnp.split(wide, 2, axis=-1)
        turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x.dtype)


def ladder(dim: int, theta: float | int) -> np.ndarray:
    """theta ** (-2j / dim) for j < dim / 2, float64."""
    if dim % 2:
        raise ValueError(f"rope: the number of channels must be even, got {dim}")
    return theta ** (-np.arange(0, dim, 2) / dim)


def rope_1d(dim: int, *, theta: float | int = 10_000.0, scaling: Scaling | None = None) -> Rope:
    """All `dim` channels follow one axis."""
    frequencies, factor = (ladder(dim, theta), 1.0) if scaling is None else scaling(dim, theta)
    return Rope(tuple(frequencies.tolist()), (0,) * (dim // 2), factor)


def rope_axial(dims: Sequence[int], *, theta: float | int = 10_000.0) -> Rope:
    """Axis a turns dims[a] channels with the full ladder of that width; the head has sum(dims) channels.

    Qwen-VL towers, head dim 80: (40, 40) with rotate-half. EVA-02: (H/2, H/2), interleaved, positions from
    `grid_positions(shape, reference=(16, 16))`. LongCat-Video and Wan, head dim 128: (44, 42, 42), interleaved.
    """
    frequencies = np.concatenate([ladder(dim, theta) for dim in dims])
    return Rope(tuple(frequencies.tolist()), tuple(np.repeat(range(len(dims)), [dim // 2 for dim in dims]).tolist()))


def rope_multimodal(
    sections: Sequence[int], *, theta: float | int, interleaved: bool = False, scaling: Scaling | None = None
) -> Rope:
    """MRoPE: one ladder over the head, whose pairs are shared out as `sections` (time, height, width) says.

    Args:
        sections: pairs per axis; their sum is half the head dim: (16, 24, 24) in Qwen2.5-VL, (24, 20, 20) in Qwen3-VL.
        theta: base of the ladder.
        interleaved: deal the pairs in turn, t h w t h w ..., so that each axis gets all speeds; time takes what the
            others leave (Qwen3-VL). Else in consecutive sections, the fastest to time (Qwen2.5-VL).
        scaling: extension of the context.

    Raises:
        ValueError: interleaving would take more pairs than there are.
    """
    pairs = sum(sections)
    axes = np.repeat(range(len(sections)), sections)
    if interleaved:
        if max(sections[1:]) * len(sections) > pairs:
            raise ValueError(f"rope: sections {tuple(sections)} cannot be interleaved, the first must be the largest")
        axes = np.zeros(pairs, int)
        for axis, count in enumerate(sections[1:], start=1):
            axes[axis : count * len(sections) : len(sections)] = axis
    frequencies, factor = (ladder(2 * pairs, theta), 1.0) if scaling is None else scaling(2 * pairs, theta)
    return Rope(tuple(frequencies.tolist()), tuple(axes.tolist()), factor)


@dataclass(frozen=True)
class LinearScaling:
    """Position interpolation (arXiv:2306.15595): all frequencies divided by `factor`."""

    factor: float | int

    def __call__(self, dim: int, theta: float | int) -> tuple[np.ndarray, float]:
        return ladder(dim, theta) / self.factor, 1.0


@dataclass(frozen=True)
class NtkScaling:
    """NTK-aware interpolation: a larger theta, so that the slowest pair is divided by `factor` and the fastest kept.

    The dynamic form for a sequence longer than the trained length L0 is factor' = factor * length / L0 - (factor - 1).
    """

    factor: float | int

    def __call__(self, dim: int, theta: float | int) -> tuple[np.ndarray, float]:
        return ladder(dim, theta * self.factor ** (dim / (dim - 2))), 1.0


@dataclass(frozen=True)
class YarnScaling:
    """YaRN (arXiv:2309.00071): pairs that turn often over the trained length are kept, slow ones interpolated.

    In between, by a ramp over pair numbers from `beta_fast` turns to `beta_slow` turns, whose ends are rounded outwards
    if `truncate`. The attention factor is 0.1 ln(factor) + 1 unless given.
    """

    factor: float | int
    original_length: int
    beta_fast: float | int = 32.0
    beta_slow: float | int = 1.0
    truncate: bool = True
    attention_factor: float | int | None = None

    def __call__(self, dim: int, theta: float | int) -> tuple[np.ndarray, float]:
        def pair_with(turns: float | int) -> float:
            return dim * math.log(self.original_length / (turns * 2 * math.pi)) / (2 * math.log(theta))

        low, high = pair_with(self.beta_fast), pair_with(self.beta_slow)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, dim - 1)
        ramp = np.clip((np.arange(dim // 2) - low) / max(high - low, 1e-3), 0, 1)
        frequencies = ladder(dim, theta)
        factor = self.attention_factor
        if factor is None:
            factor = 0.1 * math.log(self.factor) + 1 if self.factor > 1 else 1.0
        return frequencies * (1 - ramp) + frequencies / self.factor * ramp, factor


@dataclass(frozen=True)
class Llama3Scaling:
    """Llama 3.1: pairs of long wavelength interpolated, short ones kept, a linear blend in turns between."""

    factor: float | int
    original_length: int
    low_freq_factor: float | int = 1.0
    high_freq_factor: float | int = 4.0

    def __call__(self, dim: int, theta: float | int) -> tuple[np.ndarray, float]:
        frequencies = ladder(dim, theta)
        turns = self.original_length * frequencies / (2 * math.pi)
        keep = np.clip((turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor), 0, 1)
        return frequencies * keep + frequencies / self.factor * (1 - keep), 1.0


def sequence_positions(length: int, offset: int | Int[Array, "*b"] = 0) -> Int[Array, "*b {length} 1"]:
    """0, 1, 2, ... from `offset` on (tokens already in a KV cache, one number or one per row)."""
    return jnp.asarray(offset)[..., None, None] + jnp.arange(length)[:, None]


@jax.jit
def segment_positions(segment_ids: Int[Array, "*b T"]) -> Int[Array, "*b T 1"]:
    """Positions that start again at 0 with every run of equal segment ids: packed sequences."""
    index = jnp.broadcast_to(jnp.arange(segment_ids.shape[-1]), segment_ids.shape)
    starts = jnp.diff(segment_ids, axis=-1, prepend=segment_ids[..., :1] - 1) != 0
    return (index - jax.lax.cummax(jnp.where(starts, index, 0), axis=segment_ids.ndim - 1))[..., None]


def grid_positions(shape: Sequence[int], *, reference: Sequence[int] | None = None) -> Num[Array, "P A"]:
    """Coordinates of the cells of a grid of any number of axes, last axis fastest.

    Int32, or with a `reference` grid float32 coordinates scaled as if the grid were stretched over it (EVA-02, timm).
    """
    axes = [np.arange(size, dtype=np.int32) for size in shape]
    if reference is not None:
        axes = [axis.astype(np.float32) / size * to for axis, size, to in zip(axes, shape, reference, strict=True)]
    return jnp.stack([axis.ravel() for axis in np.meshgrid(*axes, indexing="ij")], axis=-1)


def packed_grid_positions(
    grids: Sequence[Sequence[int]] | Int[np.ndarray, "I 3"], *, merge: int = 1, length: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Coordinates of the patches of images and videos of different sizes, packed one after another (on the host).

    Args:
        grids: (time, height, width) of each item in patches, as in `grid_thw` of Qwen-VL.
        merge: side of the blocks in which Qwen-VL orders the patches of a frame: blocks row by row, patches row by row
            within a block. 1 is plain row-major order.
        length: size of the result, at least the number of patches; the rest is padding.

    Returns:
        positions [length, 3] int32 (time, row, column; zero in the padding) and segment ids [length] int32: 1, 2, ...
        for the frames in order (patches attend within a frame), 0 for the padding.

    Raises:
        ValueError: a grid that the blocks do not tile, or more patches than `length`.
    """
    sizes = np.reshape(grids, (-1, 3)).astype(int).tolist()
    total = sum(t * h * w for t, h, w in sizes)
    length = total if length is None else length
    if total > length:
        raise ValueError(f"packed_grid_positions: {total} patches do not fit in length {length}")
    positions, segments = np.zeros((length, 3), np.int32), np.zeros(length, np.int32)
    start = frame = 0
    for t, h, w in sizes:
        if h % merge or w % merge:
            raise ValueError(f"packed_grid_positions: grid {(t, h, w)} is not a multiple of the merge size {merge}")
        item = np.stack(np.meshgrid(np.arange(t), np.arange(h), np.arange(w), indexing="ij"), axis=-1)
        blocks = item.reshape(t, h // merge, merge, w // merge, merge, 3).swapaxes(2, 3)
        stop = start + t * h * w
        positions[start:stop] = blocks.reshape(-1, 3)
        segments[start:stop] = frame + 1 + np.repeat(np.arange(t), h * w)
        start, frame = stop, frame + t
    return positions, segments
