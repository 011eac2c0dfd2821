"""The any-resolution vision encoder of Qwen2.5-VL: packed patches of images and videos of any size, in buckets.

Published form (arXiv 2502.13923, section 2.1.1): attention in 8x8-patch windows, over the whole frame in four blocks,
2-D rotary positions, SwiGLU, 2x2 merger. The form of the user's notes is a configuration: windows shifted in every
second windowed block, and a learnable global query per four blocks that reads its whole frame and is read by all of it.

A batch row holds patches one image after the other. Frames never attend to each other; `frame_ids` says which patch is
whose (0: padding).
"""

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from ...kernels.activations import gelu
from ...kernels.attention import attention
from ...kernels.constraints import constrain
from ...kernels.rope import apply_rope, rope_axial
from ...kernels.window_attention import RaggedWindows, ragged_window_attention
from ..layers import Mlp, RMSNorm, Rotary, Stack
from ..ranges import Count, Positive, Whole

_INIT = nn.initializers.normal(0.02)
ROPE_THETA = 1e4
FULL, WINDOW, SHIFTED = range(3)  # what a block's queries see


@dataclasses.dataclass(frozen=True)
class VisionConfig:
    """Everything that fixes the encoder's function."""

    depth: Count = 32
    width: Count = 1280
    num_heads: Count = 16
    mlp_dim: Count = 3420
    out_width: Count = 3584  # of the language model
    patch_size: Count = 14
    temporal_patch_size: Count = 2
    merge_size: Count = 2
    num_channels: Count = 3
    window: Count = 8  # patches a side
    shifted: bool = False  # every second windowed block uses windows displaced by window // 2
    full_blocks: tuple[int, ...] = (7, 15, 23, 31)
    global_query_every: Whole = 0  # blocks that share a global query; 0: none
    global_query_carry: bool = False  # the next group's query starts from this one's result
    activation: str = "silu"  # of the blocks' MLPs; the merger's is GELU
    eps: Positive = 1e-6
    scan: bool = False
    remat: str = "none"

    def __post_init__(self) -> None:
        if self.width % (4 * self.num_heads):
            raise ValueError(
                f"width {self.width} is not divisible by 4 x num_heads {self.num_heads}, as 2-D rotation needs"
            )
        if self.global_query_every and self.depth % self.global_query_every:
            raise ValueError(f"depth {self.depth} is not divisible by global_query_every {self.global_query_every}")
        if any(not 0 <= block < self.depth for block in self.full_blocks):
            raise ValueError(f"full_blocks {self.full_blocks} are not all among the {self.depth} blocks")

    @property
    def patch_dim(self) -> int:
        """Numbers in one flattened space-time patch."""
        return patch_dim(self)

    def modes(self) -> np.ndarray:
        """What each block sees: FULL, WINDOW or SHIFTED."""
        modes = np.full(self.depth, FULL)
        windowed = [block for block in range(self.depth) if block not in self.full_blocks]
        modes[windowed] = WINDOW
        if self.shifted:
            modes[windowed[1::2]] = SHIFTED
        return modes


def patch_dim(c: Any) -> int:
    """Numbers in one flattened space-time patch of an encoder's config."""
    return c.num_channels * c.temporal_patch_size * c.patch_size**2


@flax.struct.dataclass
class VisionInput:
    """Packed patches and what places them (data/conversations/qwen_vl.py makes it)."""

    patches: Float[Array, "B P F"]
    coordinates: Int[Array, "B P 2"]  # row, column in the image's patch grid
    frame_ids: Int[Array, "B P"]  # 1, 2, ... per frame; 0: padding
    windows: RaggedWindows | None = None
    shifted_windows: RaggedWindows | None = None  # of the notes' encoder
    grid_sizes: Int[Array, "B P 2"] | None = None  # rows, columns of each patch's image, where positions are sampled


@flax.struct.dataclass
class Features:
    """What an encoder gives the language model, in its width, one vector per merge_size² patches."""

    merged: Float[Array, "B M D"]  # stand in the place of placeholder tokens
    deep: Float[Array, "L B M D"] | None = None  # added to them behind the first layers


def _with_frames(frame_ids: Int[Array, "B P"], num_frames: int) -> Int[Array, "B T"]:
    """The frame of every patch, then of one global query per frame."""
    frames = jnp.arange(1, num_frames + 1, dtype=frame_ids.dtype)
    return jnp.concatenate([frame_ids, jnp.broadcast_to(frames, (len(frame_ids), num_frames))], axis=1)


def _with_global_queries(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B T N H"],
    value: Float[Array, "B T N H"],
    windows: RaggedWindows,
    segments: Int[Array, "B T"],
    num_frames: int,
) -> Float[Array, "B T N H"]:
    """Patches see their window and their frame's global query, which sees the whole frame.

    The last `num_frames` tokens are the global queries. The cost is linear in patches for a bounded number of frames.
    """
    patches = query.shape[1] - num_frames
    first = windows.token[:, :, 0]  # B W
    frame = jnp.take_along_axis(segments, jnp.minimum(first, patches - 1), axis=1) - 1
    split_key, split_value = (_append_frame(windows.split(x[:, :patches]), x[:, patches:], frame) for x in (key, value))
    of_queries, of_keys = windows.segment_ids
    local = attention(
        windows.split(query[:, :patches]),
        split_key,
        split_value,
        segment_ids=(of_queries, jnp.pad(of_keys, ((0, 0), (0, 1)))),
    )
    overall = attention(query[:, patches:], key, value, segment_ids=(segments[:, patches:], segments))
    return jnp.concatenate([windows.join(local), overall], axis=1)


def _append_frame(
    split: Float[Array, "BW L N H"], of_frames: Float[Array, "B R N H"], frame: Int[Array, "B W"]
) -> Float[Array, "BW S N H"]:
    """Each window's tokens, then its frame's."""
    chosen = jax.vmap(lambda rows, index: rows[index])(of_frames, frame)  # B W N H
    return jnp.concatenate([split, chosen.reshape(-1, 1, *chosen.shape[2:])], axis=1)


class VisionAttention(nn.Module):
    """Attention of patches inside their frame or window; the last `num_frames` rows of `x` are global queries."""

    config: VisionConfig
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "B T D"], mode: Int[Array, ""], vision: VisionInput, rotary: Rotary, num_frames: int
    ) -> Float[Array, "B T D"]:
        c = self.config
        heads = (c.num_heads, c.width // c.num_heads)
        project = functools.partial(nn.DenseGeneral, kernel_init=_INIT, dtype=self.dtype)
        query, key, value = (project(heads, name=name)(x) for name in ("query", "key", "value"))  # B T N H
        query, key = rotary(query), rotary(key)
        query, key, value = (constrain(y, "batch", "length", "heads", None) for y in (query, key, value))
        segments = vision.frame_ids if not num_frames else _with_frames(vision.frame_ids, num_frames)

        def full() -> Array:
            return attention(query, key, value, segment_ids=segments)

        def windowed(windows: RaggedWindows | None) -> Array:
            assert windows is not None
            if not num_frames:
                return ragged_window_attention(query, key, value, windows)
            return _with_global_queries(query, key, value, windows, segments, num_frames)

        branches = (full, lambda: windowed(vision.windows), lambda: windowed(vision.shifted_windows))
        branches = branches[: 3 if c.shifted else 2]
        # An unrolled stack knows the block's mode while tracing, a scanned one does not.
        mixed = branches[int(mode)]() if isinstance(mode, np.integer) else jax.lax.switch(mode, branches)
        return project(c.width, axis=(-2, -1), name="out")(mixed)


class VisionBlock(nn.Module):
    """x += attn(norm1(x)), x += mlp(norm2(x)); the first block of a group puts in the group's global query."""

    config: VisionConfig
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "B T D"], layer: dict[str, Any], *, num_frames: int, **options: Any
    ) -> Float[Array, "B T D"]:
        c = self.config
        x = constrain(x, "batch", "length", None)
        if num_frames:
            last = x[:, -num_frames:]
            fresh = jnp.broadcast_to(layer["global_query"].astype(x.dtype), last.shape)
            fresh = fresh + last if c.global_query_carry else fresh
            x = x.at[:, -num_frames:].set(jnp.where(layer["first"], fresh, last))
        attend = VisionAttention(c, self.dtype, name="attn")
        x = x + attend(RMSNorm(c.eps, name="norm1")(x), layer["mode"], num_frames=num_frames, **options)
        zeros = nn.initializers.zeros
        mlp = Mlp(c.mlp_dim, c.activation, gated=True, kernel_init=_INIT, bias_init=zeros, dtype=self.dtype, name="mlp")
        return x + mlp(RMSNorm(c.eps, name="norm2")(x))


class VisionEncoder(nn.Module):
    """Patches -> features of the language model's width, one per merge_size² patches: [B, P / merge_size², out_width].

    `num_frames` bounds the frames of a row; only the global queries need it (elsewhere 0).
    """

    config: VisionConfig
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, vision: VisionInput, num_frames: int = 0) -> Float[Array, "B M D"]:
        c = self.config
        dense = functools.partial(nn.Dense, kernel_init=_INIT, dtype=self.dtype)
        x = dense(c.width, use_bias=False, name="patch_embed")(vision.patches)  # B P D
        num_frames = num_frames if c.global_query_every else 0
        coordinates = vision.coordinates
        layers: dict[str, Any] = {"mode": c.modes()}
        if num_frames:
            group = np.arange(c.depth) // c.global_query_every
            queries = self.param("global_query", _INIT, (c.depth // c.global_query_every, c.width))
            layers |= {"global_query": queries[group], "first": np.arange(c.depth) % c.global_query_every == 0}
            # The queries enter as zeros, rotated by nothing.
            x = jnp.pad(x, ((0, 0), (0, num_frames), (0, 0)))
            coordinates = jnp.pad(coordinates, ((0, 0), (0, num_frames), (0, 0)))
        head_dim = c.width // c.num_heads
        cos, sin = rope_axial((head_dim // 2,) * 2, theta=ROPE_THETA).table(coordinates)
        block = functools.partial(VisionBlock, c, self.dtype)
        x, _ = Stack(block, c.depth, c.scan, c.remat, name="encoder")(
            x,
            layers,
            vision=vision,
            rotary=functools.partial(apply_rope, cos=cos, sin=sin),
            num_frames=num_frames,
        )
        return self._merge(x[:, : vision.patches.shape[1]], dense)

    def _merge(self, x: Float[Array, "B P D"], dense: Any) -> Float[Array, "B M D"]:
        """Each merge_size² block of patches, their channels side by side, through a two-layer MLP."""
        c = self.config
        wide = c.merge_size**2 * c.width
        x = RMSNorm(c.eps, name="merger_norm")(x).reshape(x.shape[0], -1, wide)
        return dense(c.out_width, name="merger_fc2")(gelu(dense(wide, name="merger_fc1")(x)))
