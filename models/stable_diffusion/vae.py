"""The autoencoder between pixels and latents, the same for Stable Diffusion 1.x, 2.x and XL (arXiv 2112.10752).

Reference: diffusers models/autoencoders/{autoencoder_kl,vae}.py. Images are NHWC in [-1, 1].
"""

import dataclasses
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from ...kernels.activations import ACTIVATIONS
from ..layers import MultiHeadAttention, torch_kernel
from ..ranges import Count, Positive
from .layers import GroupNorm, ResnetBlock, conv, linear, rematerialized, upsample

_EPS = 1e-6  # of every norm


@dataclasses.dataclass(frozen=True, kw_only=True)
class VAEConfig:
    """Everything that fixes the function; tuples have an entry a level, the finest first."""

    in_channels: Count = 3
    out_channels: Count = 3
    widths: tuple[Count, ...] = (128, 256, 512, 512)
    layers: Count = 2
    latent_channels: Count = 4
    groups: Count = 32
    activation: str = "silu"
    scaling_factor: Positive = 0.18215  # of the latents that a UNet works on: one over their standard deviation
    remat: str = "none"

    def __post_init__(self) -> None:
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"activation is {self.activation!r}, expected one of {sorted(ACTIVATIONS)}")

    @property
    def depth(self) -> int:
        """Layers, at least: a bound on the tensors of a file."""
        return self.layers * len(self.widths)

    @property
    def factor(self) -> int:
        """Pixels a latent, in rows and in columns."""
        return 2 ** (len(self.widths) - 1)


@flax.struct.dataclass
class Posterior:
    """A diagonal Gaussian over latents, not scaled."""

    mean: Float[Array, "B X Y C"]
    logvar: Float[Array, "B X Y C"]

    def sample(self, rng: Array) -> Float[Array, "B X Y C"]:
        """mean + standard deviation · noise."""
        return self.mean + jnp.exp(0.5 * self.logvar) * jax.random.normal(rng, self.mean.shape, self.mean.dtype)

    def kl(self) -> Float[Array, " B"]:
        """The divergence from the standard normal, summed over each example."""
        terms = jnp.square(self.mean) + jnp.exp(self.logvar) - 1 - self.logvar
        return 0.5 * terms.sum((1, 2, 3))


class Blocks(nn.Module):
    """The residual blocks of one level."""

    config: VAEConfig
    features: int
    count: int
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "B X Y C"]) -> Float[Array, "B X Y D"]:
        for j in range(self.count):
            x = resnet(self.config, self.features, self.dtype, f"resnet_{j}")(x)
        return x


def resnet(c: VAEConfig, features: int, dtype: DTypeLike, name: str) -> Any:
    """A residual block without a time embedding."""
    block = rematerialized(ResnetBlock, c.remat)
    return block(features, c.groups, _EPS, c.activation, zero=False, dtype=dtype, name=name)


class Middle(nn.Module):
    """Residual block, attention of one head over all positions, residual block."""

    config: VAEConfig
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "B X Y C"]) -> Float[Array, "B X Y C"]:
        c, width = self.config, x.shape[-1]
        x = resnet(c, width, self.dtype, "resnet_0")(x)
        y = GroupNorm(c.groups, _EPS, name="norm")(x).reshape(len(x), -1, width)  # B T C
        y = MultiHeadAttention(1, True, torch_kernel, self.dtype, name="attn")(y)
        return resnet(c, width, self.dtype, "resnet_1")(x + y.reshape(x.shape))


class Encoder(nn.Module):
    """Pixels to the posterior's mean and logarithm of variance, side by side."""

    config: VAEConfig
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "B X Y C"]) -> Float[Array, "B X2 Y2 D"]:
        c, dtype = self.config, self.dtype
        x = conv(c.in_channels, c.widths[0], dtype=dtype, name="conv_in")(x)
        for level, width in enumerate(c.widths):
            if level:  # one row and one column of zeros at the end, unlike the UNet
                last = c.widths[level - 1]
                shrink = conv(last, last, stride=2, padding=[(0, 1)] * 2, dtype=dtype, name=f"downsample_{level - 1}")
                x = shrink(x)
            x = Blocks(c, width, c.layers, dtype, name=f"down_{level}")(x)
        x = Middle(c, dtype, name="middle")(x)
        x = nn.silu(GroupNorm(c.groups, _EPS, name="norm_out")(x))
        return conv(c.widths[-1], 2 * c.latent_channels, dtype=dtype, name="conv_out")(x)


class Decoder(nn.Module):
    """Latents to pixels."""

    config: VAEConfig
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "B X Y C"]) -> Float[Array, "B X2 Y2 D"]:
        c, dtype = self.config, self.dtype
        x = conv(c.latent_channels, c.widths[-1], dtype=dtype, name="conv_in")(x)
        x = Middle(c, dtype, name="middle")(x)
        for level, width in enumerate(reversed(c.widths)):
            if level:
                last = x.shape[-1]
                x = upsample(x, (2 * x.shape[1], 2 * x.shape[2]))
                x = conv(last, last, dtype=dtype, name=f"upsample_{level - 1}")(x)
            x = Blocks(c, width, c.layers + 1, dtype, name=f"up_{level}")(x)
        x = nn.silu(GroupNorm(c.groups, _EPS, name="norm_out")(x))
        return conv(c.widths[0], c.out_channels, dtype=dtype, name="conv_out")(x)


class VAE(nn.Module):
    """Images to latents and back; the call does both, through the mean."""

    config: VAEConfig
    dtype: DTypeLike = jnp.float32

    def setup(self) -> None:
        c, dtype = self.config, self.dtype
        self.encoder, self.decoder = Encoder(c, dtype), Decoder(c, dtype)
        self.quant_conv = linear(2 * c.latent_channels, 2 * c.latent_channels, dtype=dtype)
        self.post_quant_conv = linear(c.latent_channels, c.latent_channels, dtype=dtype)

    def __call__(self, image: Float[Array, "B X Y C"]) -> Float[Array, "B X Y C"]:
        return self.decode(self.encode(image).mean)

    def encode(self, image: Float[Array, "B X Y C"]) -> Posterior:
        """The posterior, float32; ValueError where rows or columns are no multiple of the factor."""
        factor = self.config.factor
        if image.shape[1] % factor or image.shape[2] % factor:
            raise ValueError(f"image of {image.shape[1]} x {image.shape[2]} pixels, expected multiples of {factor}")
        moments = self.quant_conv(self.encoder(image.astype(self.dtype))).astype(jnp.float32)
        mean, logvar = jnp.split(moments, 2, -1)
        return Posterior(mean, jnp.clip(logvar, -30.0, 20.0))

    def decode(self, latents: Float[Array, "B X Y C"]) -> Float[Array, "B X Y C"]:
        """Images, float32, about [-1, 1] and not clipped."""
        return self.decoder(self.post_quant_conv(latents.astype(self.dtype))).astype(jnp.float32)

    def encode_scaled(self, image: Float[Array, "B X Y C"], rng: Array | None = None) -> Float[Array, "B X Y C"]:
        """Latents as a UNet takes them, drawn from the posterior; without `rng` its mean."""
        posterior = self.encode(image)
        return self.config.scaling_factor * (posterior.mean if rng is None else posterior.sample(rng))

    def decode_scaled(self, latents: Float[Array, "B X Y C"]) -> Float[Array, "B X Y C"]:
        """Images for latents as a UNet gives them."""
        return self.decode(latents / self.config.scaling_factor)
