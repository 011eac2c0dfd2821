"""The any-resolution vision encoder of Qwen3-VL (arXiv 2511.21631): SigLIP-2 with a grid of positions and DeepStack.

Learned positions are sampled from a square grid for every image size, rotary ones added to them in the blocks; all
blocks see whole frames. Beside the last block, some earlier ones are merged to the language model's width too, each
with a merger of its own: DeepStack (arXiv 2406.04334). Packing is that of vision.py.
"""

import dataclasses
import functools
import math

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from ...kernels.activations import gelu
from ...kernels.interpolation import sample_grid
from ...kernels.rope import apply_rope, rope_axial
from ..layers import LayerNorm, Stack, TransformerBlock
from ..ranges import Count
from .vision import ROPE_THETA, Features, VisionInput, patch_dim

_INIT = nn.initializers.normal(0.02)
_EPS = 1e-6  # of every norm


@dataclasses.dataclass(frozen=True)
class DeepStackConfig:
    """Everything that fixes the encoder's function."""

    depth: Count = 27
    width: Count = 1152
    num_heads: Count = 16
    mlp_dim: Count = 4304
    out_width: Count = 4096  # of the language model
    patch_size: Count = 16
    temporal_patch_size: Count = 2
    merge_size: Count = 2
    num_channels: Count = 3
    num_positions: Count = 2304  # of the table, of which the largest square is used
    deepstack_blocks: tuple[int, ...] = (8, 16, 24)  # whose outputs the language model's first layers get
    activation: str = "gelu_tanh"  # of the blocks' MLPs; the mergers' is GELU
    scan: bool = False
    remat: str = "none"

    def __post_init__(self) -> None:
        if self.width % (4 * self.num_heads):
            raise ValueError(
                f"width {self.width} is not divisible by 4 x num_heads {self.num_heads}, as 2-D rotation needs"
            )
        blocks = self.deepstack_blocks
        if len(set(blocks)) != len(blocks) or any(not 0 <= block < self.depth for block in blocks):
            raise ValueError(f"deepstack_blocks {blocks} are not all different and among the {self.depth} blocks")

    @property
    def patch_dim(self) -> int:
        """Numbers in one flattened space-time patch."""
        return patch_dim(self)


class Merger(nn.Module):
    """Each merge_size² block of patches, their channels side by side, through a two-layer MLP; normed before or so."""

    config: DeepStackConfig
    wide_norm: bool  # of the patches together; else of each
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "B P D"]) -> Float[Array, "B M E"]:
        c = self.config
        wide = c.merge_size**2 * c.width
        norm, dense = LayerNorm(_EPS, name="norm"), functools.partial(nn.Dense, kernel_init=_INIT, dtype=self.dtype)
        x = x if self.wide_norm else norm(x)
        x = x.reshape(x.shape[0], -1, wide)
        x = norm(x) if self.wide_norm else x
        return dense(c.out_width, name="fc2")(gelu(dense(wide, name="fc1")(x)))


class DeepStackEncoder(nn.Module):
    """Patches -> features. Scanned, the outputs of all blocks are kept until the end; unrolled, those that are used."""

    config: DeepStackConfig
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, vision: VisionInput, num_frames: int = 0) -> Features:
        c = self.config
        assert vision.grid_sizes is not None
        x = nn.Dense(c.width, kernel_init=_INIT, dtype=self.dtype, name="patch_embed")(vision.patches)  # B P D
        side = math.isqrt(c.num_positions)
        table = self.param("pos_embed", _INIT, (c.num_positions, c.width))[: side**2].reshape(side, side, -1)
        x = x + sample_grid(table, vision.coordinates, vision.grid_sizes).astype(x.dtype)
        cos, sin = rope_axial((c.width // c.num_heads // 2,) * 2, theta=ROPE_THETA).table(vision.coordinates)
        block = functools.partial(
            TransformerBlock,
            c.num_heads,
            c.mlp_dim,
            _EPS,
            activation=c.activation,
            kernel_init=_INIT,
            mlp_bias_init=nn.initializers.zeros,
            dtype=self.dtype,
        )
        x, outputs = Stack(block, c.depth, c.scan, c.remat, name="encoder")(
            x,
            collect=bool(c.deepstack_blocks),
            rotary=functools.partial(apply_rope, cos=cos, sin=sin),
            segment_ids=vision.frame_ids,
        )
        deep = [
            Merger(c, True, self.dtype, name=f"deepstack_merger_{c.deepstack_blocks.index(i)}")(outputs[i])
            for i in sorted(c.deepstack_blocks)
        ]
        return Features(Merger(c, False, self.dtype, name="merger")(x), jnp.stack(deep) if deep else None)
