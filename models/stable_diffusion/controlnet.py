"""ControlNet (arXiv 2302.05543): a trainable copy of the UNet's encoder that sees an image of conditions.

`ControlNet` is the published wiring: the copy's outputs are added to the skip connections and to the middle block's.
`ControlledUNet` is the notes' wording: a branch beside every block, decoder included, whose output is added to that
block's. Both end in 1 x 1 convolutions that start as zero. Reference: diffusers models/controlnets/controlnet.py.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Num

from ..ranges import Count
from .layers import conv, linear
from .unet import Conditions, Control, Decoder, Encoder, EncoderConfig, UNetConfig, check_inputs

Tree = Mapping[str, Any]
CHANNEL_ORDERS = ("rgb", "bgr")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ControlNetConfig(EncoderConfig):
    """The encoder that is copied, and how the hint comes in."""

    hint_channels: Count = 3
    hint_widths: tuple[Count, ...] = (16, 32, 96, 256)  # each but the first halves rows and columns
    channel_order: str = "rgb"  # of the hint as the network sees it; it is always given as RGB
    global_pool: bool = False  # residuals are averaged over positions, and only the conditional half is controlled

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.channel_order not in CHANNEL_ORDERS:
            raise ValueError(f"channel_order is {self.channel_order!r}, expected one of {CHANNEL_ORDERS}")

    @property
    def factor(self) -> int:
        """Pixels of the hint a latent, in rows and in columns."""
        return 2 ** (len(self.hint_widths) - 1)


class HintEncoder(nn.Module):
    """An image of conditions in [0, 1] to features at the latents' resolution; the last convolution starts as zero."""

    widths: tuple[int, ...]
    features: int
    zero: bool = True
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, hint: Float[Array, "B X Y C"]) -> Float[Array, "B X2 Y2 D"]:
        def layer(x: Array, features: int, name: str, stride: int = 1) -> Array:
            return nn.silu(conv(x.shape[-1], features, stride=stride, dtype=self.dtype, name=name)(x))

        x = layer(hint.astype(self.dtype), self.widths[0], "conv_in")
        for i, (width, wider) in enumerate(zip(self.widths, self.widths[1:], strict=False)):
            x = layer(x, width, f"layers_{2 * i}")
            x = layer(x, wider, f"layers_{2 * i + 1}", stride=2)
        return conv(x.shape[-1], self.features, zero=self.zero, dtype=self.dtype, name="conv_out")(x)


class ControlNet(nn.Module):
    """What a UNet adds to its skip connections and its middle block's output. Inputs as those of `UNet`.

    `hint` is an image [B, factor·X, factor·Y, 3] in [0, 1]. `scale` multiplies everything; in `guess_mode` the finest
    residual counts a tenth, rising to the middle's whole.
    """

    config: ControlNetConfig
    dtype: DTypeLike = jnp.float32

    def setup(self) -> None:
        c, dtype = self.config, self.dtype
        self.encoder = Encoder(c, dtype)
        self.hint_encoder = HintEncoder(c.hint_widths, c.widths[0], dtype=dtype)
        self.zero = [_zero_conv(c.step_width(step), dtype) for step in c.steps]
        self.zero_middle = _zero_conv(c.widths[-1], dtype)

    def encode_hint(self, hint: Float[Array, "B X Y C"]) -> Float[Array, "B X2 Y2 D"]:
        """The hint's features, which do not change from step to step; ValueError for other channels."""
        c = self.config
        if hint.shape[-1] != c.hint_channels:
            raise ValueError(f"the control image has {hint.shape[-1]} channels, expected {c.hint_channels}")
        return self.hint_encoder(hint if c.channel_order == "rgb" else hint[..., ::-1])

    def __call__(
        self,
        latents: Float[Array, "B X Y C"],
        timestep: Num[Array, "*B"],
        context: Float[Array, "B S D"],
        hint: Float[Array, "B X2 Y2 C2"] | None = None,
        *,
        pooled: Float[Array, "B P"] | None = None,
        sizes: Num[Array, "B 6"] | None = None,
        scale: float | Float[Array, ""] = 1.0,
        guess_mode: bool = False,
        hint_features: Float[Array, "B X Y D"] | None = None,
    ) -> Control:
        """`hint_features` is what `encode_hint` gave, in the place of the hint."""
        c = self.config
        check_inputs(c, latents, context)
        if hint_features is None:
            if hint is None:
                raise ValueError("a ControlNet needs a control image or its features, got neither")
            hint_features = self.encode_hint(hint)
        if hint_features.shape[1:3] != latents.shape[1:3]:
            got, wanted = ([f * n for n in x.shape[1:3]] for f, x in ((c.factor, hint_features), (c.factor, latents)))
            raise ValueError(f"the control image has about {got} pixels, expected {wanted} ({c.factor} a latent)")
        conditions = Conditions(self.encoder.embed(timestep, len(latents), pooled, sizes), context.astype(self.dtype))
        skips, middle = self.encoder(latents.astype(self.dtype), conditions, hint_features)
        outputs = [zero(x) for zero, x in zip([*self.zero, self.zero_middle], [*skips, middle], strict=True)]
        if guess_mode and not c.global_pool:
            scales = scale * jnp.logspace(-1, 0, len(outputs))
            outputs = [x * s.astype(x.dtype) for x, s in zip(outputs, scales, strict=True)]
        else:
            outputs = [x * jnp.asarray(scale, x.dtype) for x in outputs]
        if c.global_pool:
            outputs = [x.mean((1, 2), keepdims=True) for x in outputs]
        return Control(tuple(outputs[:-1]), outputs[-1])


def _zero_conv(features: int, dtype: DTypeLike) -> nn.Dense:
    return linear(features, features, zero=True, dtype=dtype)


def add_controls(controls: Sequence[Control]) -> Control:
    """Several ControlNets at once: the sum of what they add."""
    return jax.tree.map(lambda *leaves: sum(leaves[1:], leaves[0]), *controls)


def config_from_unet(c: UNetConfig, **fields: Any) -> ControlNetConfig:
    """The ControlNet for a UNet; `fields` are those of the hint."""
    shared = {field.name: getattr(c, field.name) for field in dataclasses.fields(EncoderConfig)}
    return ControlNetConfig(**shared | fields)


def controlnet_from_unet(unet_params: Tree, fresh: Tree) -> dict[str, Any]:
    """The parameters at the start of training: the UNet's encoder copied, everything else as in `fresh`.

    `fresh` are initial values of the ControlNet. The copies are arrays of their own, so that either may be donated.
    ValueError where the two encoders differ.
    """
    encoder, expected = unet_params["encoder"], fresh["encoder"]
    if jax.tree.map(jnp.shape, encoder) != jax.tree.map(jnp.shape, expected):
        raise ValueError("the UNet's encoder does not have the parameters of the ControlNet's: another base model")
    return {**fresh, "encoder": jax.tree.map(jnp.copy, encoder)}


class ControlledUNet(nn.Module):
    """The notes' ControlNet: y_i = F_i(x_i) + Z2_i(F'_i(x_i + Z1_i(r_i))) for every block i, F' a copy of F.

    Blocks are the encoder's steps, the middle, and the decoder's. r_i are the hint's features averaged to the block's
    resolution; Z1 and Z2 are 1 x 1 convolutions that start as zero. y_i goes on, and into the skip connections. (The
    published one copies the encoder alone and adds to the skip connections.) Hint as in `ControlNet`; the hint
    encoder's last convolution starts as any other, since Z1 is zero.
    """

    config: UNetConfig
    hint_widths: tuple[int, ...] = (16, 32, 96, 256)
    dtype: DTypeLike = jnp.float32

    def setup(self) -> None:
        c, dtype = self.config, self.dtype
        self.encoder, self.decoder = Encoder(c, dtype), Decoder(c, dtype)
        self.branch_encoder, self.branch_decoder = Encoder(c, dtype), Decoder(c, dtype)
        self.hint_encoder = HintEncoder(self.hint_widths, c.widths[0], zero=False, dtype=dtype)
        inner, outer = block_widths(c)
        self.zero_in = [linear(c.widths[0], width, zero=True, dtype=dtype) for width in inner]
        self.zero_out = [_zero_conv(width, dtype) for width in outer]

    def __call__(
        self,
        latents: Float[Array, "B X Y C"],
        timestep: Num[Array, "*B"],
        context: Float[Array, "B S D"],
        hint: Float[Array, "B X2 Y2 3"],
        *,
        pooled: Float[Array, "B P"] | None = None,
        sizes: Num[Array, "B 6"] | None = None,
        scale: float | Float[Array, ""] = 1.0,
    ) -> Float[Array, "B X Y C2"]:
        check_inputs(self.config, latents, context)
        features = self.hint_encoder(hint)
        trunk, branch = (
            Conditions(encoder.embed(timestep, len(latents), pooled, sizes), context.astype(self.dtype))
            for encoder in (self.encoder, self.branch_encoder)
        )
        pairs = list(zip(self.zero_in, self.zero_out, strict=True))

        def controlled(x: Array, block: Any, copy: Any) -> Array:
            zero_in, zero_out = pairs.pop(0)
            hinted = x + zero_in(average(features, x.shape[1:3]))
            return block(x, trunk) + jnp.asarray(scale, x.dtype) * zero_out(copy(hinted, branch))

        x, skips = latents.astype(self.dtype), []
        for i in range(len(self.config.steps)):
            block, copy = (_step(encoder, i) for encoder in (self.encoder, self.branch_encoder))
            x = controlled(x, block, copy)
            skips.append(x)
        x = controlled(x, self.encoder.middle, self.branch_encoder.middle)
        for i in range(len(self.decoder.steps)):
            x = jnp.concatenate([x, skips.pop()], -1)
            shape = skips[-1].shape[1:3] if skips else None
            block, copy = (_step(decoder, i, shape) for decoder in (self.decoder, self.branch_decoder))
            x = controlled(x, block, copy)
        return self.decoder.head(x)


def _step(network: Encoder | Decoder, i: int, *shape: tuple[int, ...] | None) -> Any:
    return lambda x, conditions: network.step(i, x, conditions, *shape)


def average(x: Float[Array, "B X Y C"], shape: tuple[int, ...]) -> Float[Array, "B X2 Y2 C"]:
    """Means over equal cells; ValueError where the cells are not equal."""
    (rows, columns), (batch, channels) = x.shape[1:3], (len(x), x.shape[-1])
    if rows % shape[0] or columns % shape[1]:
        raise ValueError(f"features of {rows} x {columns} do not fall into {shape[0]} x {shape[1]} equal cells")
    cells = x.reshape(batch, shape[0], rows // shape[0], shape[1], columns // shape[1], channels)
    return cells.mean((2, 4))


def block_widths(c: UNetConfig) -> tuple[list[int], list[int]]:
    """The channels of every block's input and output, in the order of encoder, middle, decoder."""
    outer = [c.step_width(step) for step in c.steps]
    inner = [c.in_channels, *outer[:-1]]
    skips, width = list(outer), c.widths[-1]
    inner, outer = [*inner, width], [*outer, width]
    for level in reversed(range(len(c.widths))):
        for _ in range(c.layers[level] + 1):
            inner.append(width + skips.pop())
            width = c.widths[level]
            outer.append(width)
    return inner, outer


def controlled_from_unet(unet_params: Tree, fresh: Tree) -> dict[str, Any]:
    """The notes' start of training: every block's copy has the UNet's own, non-zero weights."""
    parts = {name: unet_params[name] for name in ("encoder", "decoder")}
    branches = {  # without the decoder's head, which is no block
        f"branch_{name}": {key: jax.tree.map(jnp.copy, part[key]) for key in fresh[f"branch_{name}"]}
        for name, part in parts.items()
    }
    return {**fresh, **parts, **branches}
