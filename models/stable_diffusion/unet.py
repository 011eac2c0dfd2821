"""The denoising UNet of Stable Diffusion 1.x, 2.x and XL (arXiv 2112.10752, 2307.01952).

An `Encoder` whose every block hands a skip connection to the `Decoder`, the middle block between them. A ControlNet is
a second encoder. Reference: diffusers models/unets/unet_2d_condition.py, unet_2d_blocks.py. Latents are NHWC.
"""

import dataclasses
import functools
from collections.abc import Mapping

import flax.linen as nn
import flax.struct
import jax.numpy as jnp
from einops import rearrange
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Num

from ...kernels.activations import ACTIVATIONS
from ...kernels.constraints import constrain
from ...kernels.sinusoids import sinusoids
from ..ranges import Count, Positive, Real, Whole
from .images import ImageContext
from .layers import EmbeddingMlp, GroupNorm, ResnetBlock, Transformer, conv, rematerialized, upsample

# Place of a transformer ("down_1_0", "middle", "up_2_1") -> what image prompts give its layers.
Images = Mapping[str, tuple[ImageContext, ...]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class EncoderConfig:
    """What UNet and ControlNet have in common; tuples have an entry a level, the finest first. SD 1.5 by default."""

    in_channels: Count = 4
    widths: tuple[Count, ...] = (320, 640, 1280, 1280)
    layers: tuple[Count, ...] = (2, 2, 2, 2)
    attention: tuple[bool, ...] = (True, True, True, False)  # whether the level's blocks attend to the text
    depths: tuple[Whole, ...] = (1, 1, 1, 1)  # layers of their transformers; the last is the middle block's too
    num_heads: tuple[Count, ...] = (8, 8, 8, 8)
    context_dim: Count = 768
    linear_projection: bool = False  # how files store the linear layers around the transformers: as 1 x 1 convolutions
    size_dim: Whole = 0  # SDXL: the width of each embedded number of `sizes`; 0: no further conditions
    added_dim: Whole = 0  # of the pooled text and the embedded sizes together
    groups: Count = 32
    eps: Positive = 1e-5
    activation: str = "silu"
    middle_divisor: Positive = 1.0
    downsample_padding: Whole = 1
    cosines_first: bool = True
    frequency_shift: Real = 0.0
    scan: bool = False  # over the layers of a transformer
    remat: str = "none"  # `Stack`'s words, for residual blocks and transformer blocks

    def __post_init__(self) -> None:
        lengths = {name: len(value) for name, value in vars(self).items() if isinstance(value, tuple)}
        per_level = {name: lengths[name] for name in ("widths", "layers", "attention", "depths", "num_heads")}
        if len(set(per_level.values())) > 1:
            raise ValueError(f"{type(self).__name__} has levels {per_level}, expected as many of each")
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"activation is {self.activation!r}, expected one of {sorted(ACTIVATIONS)}")
        if bool(self.size_dim) != bool(self.added_dim):
            raise ValueError(f"size_dim {self.size_dim} and added_dim {self.added_dim}: expected both or neither")

    @property
    def depth(self) -> int:
        """Layers, at least: a bound on the tensors of a file."""
        return sum(self.layers) + sum(self.depths)

    @property
    def steps(self) -> tuple[tuple[str, int, int], ...]:
        """(kind, level, index) of every block of the encoder, each of which gives a skip connection."""
        last = len(self.widths) - 1
        return (
            ("conv_in", 0, 0),
            *(
                step
                for level, count in enumerate(self.layers)
                for step in [
                    *(("block", level, j) for j in range(count)),
                    *([("downsample", level, 0)] if level < last else []),
                ]
            ),
        )

    def step_width(self, step: tuple[str, int, int]) -> int:
        """The channels of a step's output."""
        return self.widths[step[1]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class UNetConfig(EncoderConfig):
    """An encoder and its mirror image."""

    out_channels: Count = 4
    up_attention: tuple[bool, ...] = (True, True, True, False)  # of the decoder's blocks, the finest level first too
    sample_size: Count | None = 64  # rows and columns of the latents it was trained on

    @property
    def transformers(self) -> tuple[tuple[str, int, int], ...]:
        """(place, layers, width) of every transformer in the published order: down, up, middle (IP-Adapter's files)."""
        down = [(f"down_{b}_{j}", b) for b, n in enumerate(self.layers) if self.attention[b] for j in range(n)]
        levels = [*enumerate(reversed(range(len(self.widths))))]
        up = [(f"up_{u}_{j}", b) for u, b in levels if self.up_attention[b] for j in range(self.layers[b] + 1)]
        places = [*down, *up, ("middle", len(self.widths) - 1)]
        return tuple((place, self.depths[b], self.widths[b]) for place, b in places)


@flax.struct.dataclass
class Control:
    """What ControlNets add: to every skip connection, and to the middle block's output."""

    skips: tuple[Float[Array, "B _ _ _"], ...]
    middle: Float[Array, "B X Y C"]


@flax.struct.dataclass
class Conditions:
    """What every block of one network is conditioned on."""

    embedding: Float[Array, "B E"]  # of the time, and of SDXL's pooled text and sizes
    context: Float[Array, "B S D"]  # of the text
    images: Images | None = None


class Block(nn.Module):
    """A residual block, and a transformer where its level has them."""

    config: EncoderConfig
    level: int
    attention: bool
    place: str
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "B X Y C"], conditions: Conditions) -> Float[Array, "B X Y D"]:
        c, level = self.config, self.level
        x = constrain(x, "batch", None, None, None)
        resnet = rematerialized(ResnetBlock, c.remat)
        x = resnet(c.widths[level], c.groups, c.eps, c.activation, dtype=self.dtype, name="resnet")(
            x, conditions.embedding
        )
        if not self.attention:
            return x
        return transformer(c, level, self.dtype)(x, conditions.context, (conditions.images or {}).get(self.place))


class Middle(nn.Module):
    """Residual block, transformer, residual block on the coarsest level."""

    config: EncoderConfig
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "B X Y C"], conditions: Conditions) -> Float[Array, "B X Y C"]:
        c = self.config
        resnet = functools.partial(
            rematerialized(ResnetBlock, c.remat),
            *(c.widths[-1], c.groups, c.eps, c.activation, c.middle_divisor),
            dtype=self.dtype,
        )
        x = resnet(name="resnet_0")(x, conditions.embedding)
        images = (conditions.images or {}).get("middle")
        x = transformer(c, -1, self.dtype)(x, conditions.context, images)
        return resnet(name="resnet_1")(x, conditions.embedding)


def transformer(c: EncoderConfig, level: int, dtype: DTypeLike) -> Transformer:
    """The transformer of a level's blocks."""
    return Transformer(c.depths[level], c.num_heads[level], c.groups, c.scan, c.remat, dtype, name="attention")


class Encoder(nn.Module):
    """From noisy latents to skip connections and the middle block's output."""

    config: EncoderConfig
    dtype: DTypeLike = jnp.float32

    def setup(self) -> None:
        c, dtype = self.config, self.dtype
        hidden, last = 4 * c.widths[0], len(c.widths) - 1
        self.conv_in = conv(c.in_channels, c.widths[0], dtype=dtype)
        self.time_embedding = EmbeddingMlp(hidden, c.activation, dtype)
        if c.added_dim:
            self.add_embedding = EmbeddingMlp(hidden, "silu", dtype)
        self.down = [
            [Block(c, level, c.attention[level], f"down_{level}_{j}", dtype) for j in range(count)]
            for level, count in enumerate(c.layers)
        ]
        # Without padding diffusers adds a row and a column of zeros at the end, as the VAE does.
        padding = [(c.downsample_padding, c.downsample_padding) if c.downsample_padding else (0, 1)] * 2
        self.downsample = [conv(w, w, stride=2, padding=padding, dtype=dtype) for w in c.widths[:last]]
        self.middle = Middle(c, dtype)

    def embed(
        self,
        timestep: Num[Array, "*B"],
        batch: int,
        pooled: Float[Array, "B P"] | None = None,
        sizes: Num[Array, "B 6"] | None = None,
    ) -> Float[Array, "B E"]:
        """The embedding of the time, and of SDXL's pooled text and sizes; ValueError where these are missing."""
        c = self.config
        embed = functools.partial(sinusoids, shift=c.frequency_shift, cosines_first=c.cosines_first)
        embedding = self.time_embedding(embed(jnp.broadcast_to(timestep, (batch,)), c.widths[0]).astype(self.dtype))
        if not c.added_dim:
            return embedding
        if pooled is None or sizes is None:
            raise ValueError("this network is conditioned on pooled text and sizes (SDXL), got none")
        numbers = rearrange(embed(jnp.asarray(sizes), c.size_dim), "b n f -> b (n f)")
        added = jnp.concatenate([pooled, numbers], -1)  # B A
        if added.shape[-1] != c.added_dim:
            raise ValueError(
                f"pooled text of {pooled.shape[-1]} and {sizes.shape[-1]} sizes of {c.size_dim} channels are "
                f"{added.shape[-1]}, expected {c.added_dim}"
            )
        return embedding + self.add_embedding(added.astype(self.dtype))

    def step(self, i: int, x: Float[Array, "B X Y C"], conditions: Conditions) -> Float[Array, "B X2 Y2 D"]:
        """The i-th of the config's steps."""
        kind, level, j = self.config.steps[i]
        if kind == "block":
            return self.down[level][j](x, conditions)
        return (self.conv_in if kind == "conv_in" else self.downsample[level])(x)

    def __call__(
        self, x: Float[Array, "B X Y C"], conditions: Conditions, hint: Float[Array, "B X Y D"] | None = None
    ) -> tuple[list[Array], Float[Array, "B X2 Y2 D2"]]:
        """Every step's output, and the middle block's; a `hint` is added to the first."""
        skips = []
        for i in range(len(self.config.steps)):
            x = self.step(i, x, conditions)
            if i == 0 and hint is not None:
                x = x + hint
            skips.append(x)
        return skips, self.middle(x, conditions)


class Decoder(nn.Module):
    """From the middle block's output and the skip connections, last in first out, to the prediction."""

    config: UNetConfig
    dtype: DTypeLike = jnp.float32

    def setup(self) -> None:
        c, dtype = self.config, self.dtype
        self.levels = levels = tuple(reversed(range(len(c.widths))))
        self.up = [
            [Block(c, level, c.up_attention[level], f"up_{u}_{j}", dtype) for j in range(c.layers[level] + 1)]
            for u, level in enumerate(levels)
        ]
        self.upsample = [conv(c.widths[level], c.widths[level], dtype=dtype) for level in levels[:-1]]
        self.norm_out = GroupNorm(c.groups, c.eps)
        self.conv_out = conv(c.widths[0], c.out_channels, zero=True, dtype=dtype)

    @property
    def steps(self) -> tuple[tuple[int, int], ...]:
        """(level counted from the coarsest, index) of every block."""
        layers = reversed(self.config.layers)
        return tuple((u, j) for u, count in enumerate(layers) for j in range(count + 1))

    def step(
        self, i: int, x: Float[Array, "B X Y C"], conditions: Conditions, shape: tuple[int, ...] | None
    ) -> Float[Array, "B X2 Y2 D"]:
        """The i-th block on [hidden, skip]; the last of a level brings its output to the next skip's `shape`."""
        u, j = self.steps[i]
        x = self.up[u][j](x, conditions)
        if shape is None or j < len(self.up[u]) - 1:
            return x
        return self.upsample[u](upsample(x, shape))

    def head(self, x: Float[Array, "B X Y C"]) -> Float[Array, "B X Y D"]:
        """The prediction."""
        return self.conv_out(ACTIVATIONS[self.config.activation](self.norm_out(x)))

    def __call__(
        self, x: Float[Array, "B X Y C"], skips: list[Array], conditions: Conditions
    ) -> Float[Array, "B X2 Y2 D"]:
        skips = list(skips)
        for i in range(len(self.steps)):
            x = jnp.concatenate([x, skips.pop()], -1)
            x = self.step(i, x, conditions, skips[-1].shape[1:3] if skips else None)
        return self.head(x)


class UNet(nn.Module):
    """The prediction [B, X, Y, C] for noisy latents: their noise or velocity, as the checkpoint was trained.

    `timestep` is one number, or one an example, and may be fractional; `context` the text's hidden states. SDXL takes
    `pooled` text and `sizes` (original height and width, crop's top and left, target height and width). `control` is
    what ControlNets add, `images` what IP-Adapters do.
    """

    config: UNetConfig
    dtype: DTypeLike = jnp.float32

    def setup(self) -> None:
        self.encoder = Encoder(self.config, self.dtype)
        self.decoder = Decoder(self.config, self.dtype)

    def __call__(
        self,
        latents: Float[Array, "B X Y C"],
        timestep: Num[Array, "*B"],
        context: Float[Array, "B S D"],
        *,
        pooled: Float[Array, "B P"] | None = None,
        sizes: Num[Array, "B 6"] | None = None,
        control: Control | None = None,
        images: Images | None = None,
    ) -> Float[Array, "B X Y C2"]:
        check_inputs(self.config, latents, context)
        embedding = self.encoder.embed(timestep, len(latents), pooled, sizes)
        conditions = Conditions(embedding, context.astype(self.dtype), images)
        skips, x = self.encoder(latents.astype(self.dtype), conditions)
        if control is not None:
            skips = [skip + more for skip, more in zip(skips, control.skips, strict=True)]
            x = x + control.middle
        return self.decoder(x, skips, conditions)


def check_inputs(c: EncoderConfig, latents: Array, context: Array) -> None:
    """ValueError for latents or text of other channels than the network has."""
    if latents.shape[-1] != c.in_channels:
        raise ValueError(f"latents have {latents.shape[-1]} channels, expected {c.in_channels}")
    if context.shape[-1] != c.context_dim:
        raise ValueError(f"the text's hidden states have {context.shape[-1]} channels, expected {c.context_dim}")
