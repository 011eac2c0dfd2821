"""Wav2Lip: a face whose mouth follows any speech (arXiv 2008.10010; Rudrabha/Wav2Lip models/*.py).

Three convolutional networks: `Generator` (masked target face and reference face + mel window -> face), `SyncNet`, the
lip-sync expert (five lower half faces + mel window -> two unit vectors whose cosine says whether they belong together)
and `Discriminator` (lower half face -> real or generated). Images are BGR in [0, 1], mels [mel bin, time, 1].
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange
from flax import traverse_util
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from ..kernels.convolution import conv2d, conv2d_transpose
from ..kernels.normalization import l2_normalize
from .published import Published, floats
from .ranges import Count, Positive

Tree = dict[str, Any]
Shape = tuple[int, int, int]

BASE_SIZE = 96  # the published face size; every doubling adds one level at the finest resolution
PUBLISHED_CLIP = 5


@dataclasses.dataclass(frozen=True)
class Wav2LipConfig:
    """What fixes the three networks. The defaults are the published ones."""

    image_size: Count = BASE_SIZE
    width_mult: Positive = 1.0  # channels are max(4, int(published * width_mult))
    clip_len: Count = PUBLISHED_CLIP  # video frames the expert sees at once; 16 is the notes' "windows of 16 frames"

    def __post_init__(self) -> None:
        if self.image_size not in [BASE_SIZE << n for n in range(4)]:
            raise ValueError(f"image_size is {self.image_size}, expected 96, 192, 384 or 768")
        if self.width_mult <= 0 or self.clip_len < 1:
            raise ValueError(f"width_mult {self.width_mult} and clip_len {self.clip_len} must be positive")

    @property
    def doublings(self) -> int:
        """How many times the published resolution is doubled."""
        return (self.image_size // BASE_SIZE).bit_length() - 1

    @property
    def mel_steps(self) -> int:
        """Mel frames (80 per second) that clip_len video frames at 25 per second last: 16 for 5."""
        return round(self.clip_len * 80 / 25)

    def channels(self, published: int) -> int:
        """A layer's width after the width multiplier."""
        return max(4, int(published * self.width_mult))


@dataclasses.dataclass(frozen=True)
class Layer:
    """One convolution of a network table: `channels` before the width multiplier."""

    channels: int
    size: int = 3
    stride: int | tuple[int, int] = 1
    padding: int = 1
    residual: bool = False
    transpose: bool = False


def _residuals(channels: int, count: int) -> list[Layer]:
    return [Layer(channels, residual=True)] * count


def _down(channels: int, count: int) -> list[Layer]:
    return [Layer(channels, stride=2), *_residuals(channels, count)]


def _up(channels: int) -> list[Layer]:
    return [Layer(channels, stride=2, transpose=True), *_residuals(channels, 2)]


def face_encoder(doublings: int) -> list[list[Layer]]:
    """The generator's face encoder; the output of each block is a skip connection of the decoder."""
    finest = [[Layer(16, 7, 1, 3)], *[_down(16, 2)] * doublings]
    levels = [_down(32, 2), _down(64, 3), _down(128, 2), _down(256, 2), _down(512, 1)]
    return [*finest, *levels, [Layer(512, padding=0), Layer(512, 1, padding=0)]]


def face_decoder(doublings: int) -> list[list[Layer]]:
    """The generator's decoder; after each block the matching skip connection is concatenated."""
    start = [[Layer(512, 1, padding=0)], [Layer(512, padding=0, transpose=True), *_residuals(512, 1)]]
    return [*start, *[_up(channels) for channels in (512, 384, 256, 128, 64)], *[_up(64)] * doublings]


def audio_encoder(residuals_at_256: int, *, any_length: bool = False) -> list[Layer]:
    """Mel window [80, 16] to one vector; `any_length` expects the 3 x 3 map before the last two layers averaged."""
    return [
        *[Layer(32), *_residuals(32, 2)],
        *[Layer(64, stride=(3, 1)), *_residuals(64, 2)],
        *[Layer(128, stride=3), *_residuals(128, 2)],
        *[Layer(256, stride=(3, 2)), *_residuals(256, residuals_at_256)],
        *[Layer(512, 1 if any_length else 3, padding=0), Layer(512, 1, padding=0)],
    ]


def sync_face_encoder(doublings: int) -> list[Layer]:
    """The expert's face encoder; note padding 1 under the 5 x 5 kernel."""
    finest = [Layer(32, 7, 1, 3), *[Layer(32, stride=2)] * doublings]
    first = [Layer(64, 5, (1, 2), 1), *_residuals(64, 2)]
    return [
        *[*finest, *first, *_down(128, 3), *_down(256, 2), *_down(512, 2)],
        *[Layer(512, stride=2), Layer(512, padding=0), Layer(512, 1, padding=0)],
    ]


def discriminator(doublings: int) -> list[list[Layer]]:
    """The visual quality discriminator, without normalisation."""
    finest = [[Layer(32, 7, 1, 3)], *[[Layer(32, stride=2)]] * doublings]
    wide = [[Layer(c, 5, s, 2), Layer(c, 5, 1, 2)] for c, s in ((64, (1, 2)), (128, 2), (256, 2))]
    narrow = [[Layer(512, stride=2), Layer(512)]] * 2
    return [*finest, *wide, *narrow, [Layer(512, padding=0), Layer(512, 1, padding=0)]]


# torch's default for convolutions: kaiming_uniform(a=sqrt(5)), that is U(-1, 1) / sqrt(fan in).
_kernel_init = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")


class Conv(nn.Module):
    """A convolution or transposed convolution with bias, in torch's conventions and with torch's initial values."""

    layer: Layer
    channels: int
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "B X1 Y1 C"]) -> Float[Array, "B X2 Y2 D"]:
        layer = self.layer
        ends = (self.channels, x.shape[-1]) if layer.transpose else (x.shape[-1], self.channels)
        kernel = self.param("kernel", _kernel_init, (layer.size, layer.size, *ends))
        bound = (layer.size**2 * ends[0]) ** -0.5  # torch counts dimension 1 of its weight as the fan in, both ways
        uniform = functools.partial(jax.random.uniform, minval=-bound, maxval=bound)
        bias = self.param("bias", uniform, (self.channels,))
        x, kernel, bias = (jnp.asarray(a, self.dtype) for a in (x, kernel, bias))
        stride = layer.stride if isinstance(layer.stride, tuple) else (layer.stride,) * 2
        padding = (layer.padding,) * 2
        convolve: Any = conv2d_transpose if layer.transpose else conv2d
        output_padding = [(stride[0] - 1, stride[1] - 1)] if layer.transpose else []
        return convolve(x, kernel, stride, padding, *output_padding) + bias


def initial_values(rng: Array, shapes: Tree) -> Tree:
    """Values for a network's tree of shapes from the distribution of `init`, in one draw.

    `init` compiles a generator for every array, which takes a CPU half a minute; this takes a second. The tree may
    hold the batch statistics too (`mean` and `var` beside `scale` and `bias`).
    """
    leaves: dict[tuple[str, ...], Any] = traverse_util.flatten_dict(shapes)
    drawn = {path for path in leaves if (*path[:-1], "kernel") in leaves}
    sizes = {path: math.prod(leaves[path].shape) for path in drawn}
    numbers = jax.random.uniform(rng, (sum(sizes.values()),), minval=-1.0, maxval=1.0)
    values, start = {}, 0
    for path, leaf in leaves.items():
        if path in drawn:
            fan_in = math.prod(leaves[*path[:-1], "kernel"].shape[:3])
            values[path] = numbers[start : start + sizes[path]].reshape(leaf.shape) * fan_in**-0.5
            start += sizes[path]
        else:
            values[path] = jnp.full(leaf.shape, float(path[-1] in ("scale", "var")))
    return traverse_util.unflatten_dict(values)


class BatchNorm(nn.Module):
    """torch.nn.BatchNorm2d: normalises by the biased batch variance and tracks the unbiased one, momentum 0.1."""

    @nn.compact
    def __call__(self, x: Float[Array, "B X Y C"], train: bool) -> Float[Array, "B X Y C"]:
        shape = (x.shape[-1],)
        scale, bias = self.param("scale", nn.initializers.ones, shape), self.param("bias", nn.initializers.zeros, shape)
        mean = self.variable("batch_stats", "mean", jnp.zeros, shape)
        var = self.variable("batch_stats", "var", jnp.ones, shape)
        wide = x.astype(jnp.float32)
        if not train:
            return ((wide - mean.value) * (jax.lax.rsqrt(var.value + 1e-5) * scale) + bias).astype(x.dtype)
        batch_mean, batch_var = wide.mean((0, 1, 2)), wide.var((0, 1, 2))
        if self.is_mutable_collection("batch_stats") and not self.is_initializing():
            count = x.size // x.shape[-1]
            mean.value = 0.9 * mean.value + 0.1 * batch_mean
            var.value = 0.9 * var.value + 0.1 * batch_var * (count / max(count - 1, 1))
        return ((wide - batch_mean) * (jax.lax.rsqrt(batch_var + 1e-5) * scale) + bias).astype(x.dtype)


class ConvBlock(nn.Module):
    """Convolution, batch normalisation, the residual where there is one, ReLU; without norm: leaky ReLU 0.01."""

    layer: Layer
    channels: int
    norm: bool = True
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "B X1 Y1 C"], train: bool) -> Float[Array, "B X2 Y2 D"]:
        y = Conv(self.layer, self.channels, self.dtype, name="conv")(x)
        if not self.norm:
            return nn.leaky_relu(y, 0.01)
        y = BatchNorm(name="norm")(y, train)
        return nn.relu(y + x) if self.layer.residual else nn.relu(y)


class ConvStack(nn.Module):
    """Convolution blocks in a row."""

    layers: Sequence[Layer]
    config: Wav2LipConfig
    norm: bool = True
    mean_before: int | None = None  # the layer before which the map is averaged to one vector
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "B X1 Y1 C"], train: bool) -> Float[Array, "B X2 Y2 D"]:
        for i, layer in enumerate(self.layers):
            if i == self.mean_before:
                x = x.mean((1, 2), keepdims=True)
            channels = self.config.channels(layer.channels)
            x = ConvBlock(layer, channels, self.norm, self.dtype, name=f"layer_{i}")(x, train)
        return x


class Generator(nn.Module):
    """Per frame: mel window [80, 16, 1] and face [X, Y, 6] (target with its lower half zeroed, reference) -> face.

    Both inputs may have a time axis after the batch; the frames are independent of each other except for the batch
    statistics in training.
    """

    config: Wav2LipConfig = Wav2LipConfig()
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self, mel: Float[Array, "*B M S 1"], face: Float[Array, "*B X Y 6"], train: bool = False
    ) -> Float[Array, "*B X Y 3"]:
        c, batch = self.config, face.shape[:-3]
        mel, face = mel.reshape(-1, *mel.shape[-3:]), face.reshape(-1, *face.shape[-3:])
        stack = functools.partial(ConvStack, config=c, dtype=self.dtype)
        skips = []
        for i, layers in enumerate(face_encoder(c.doublings)):
            face = stack(layers, name=f"face_encoder_{i}")(face, train)
            skips.append(face)
        x = stack(audio_encoder(1), name="audio_encoder")(mel, train)  # B 1 1 D
        for i, layers in enumerate(face_decoder(c.doublings)):
            x = stack(layers, name=f"face_decoder_{i}")(x, train)
            x = jnp.concatenate([x, skips.pop()], axis=-1)
        x = stack([Layer(32)], name="output")(x, train)
        # The last layer and the sigmoid stay float32: its result becomes 8-bit pixels.
        x = nn.sigmoid(Conv(Layer(3, 1, padding=0), 3, name="output_conv")(x.astype(jnp.float32)))
        return x.reshape(*batch, *x.shape[1:])


class SyncNet(nn.Module):
    """The lip-sync expert: embeds `clip_len` lower half faces [X/2, Y, 3 clip_len] and their mel window [80, S, 1].

    Gives {"audio", "face"}: unit vectors [B, D], not negative, so that their cosine lies in [0, 1].
    """

    config: Wav2LipConfig = Wav2LipConfig()
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self, mel: Float[Array, "B M S 1"], face: Float[Array, "B X Y C"], train: bool = False
    ) -> dict[str, Float[Array, "B D"]]:
        c, any_length = self.config, self.config.clip_len != PUBLISHED_CLIP
        stack = functools.partial(ConvStack, config=c, dtype=self.dtype)
        face = stack(sync_face_encoder(c.doublings), name="face_encoder")(face, train)  # B 1 1 D
        layers = audio_encoder(2, any_length=any_length)
        audio = stack(layers, mean_before=len(layers) - 2 if any_length else None, name="audio_encoder")(mel, train)
        embeddings = {"audio": audio[:, 0, 0], "face": face[:, 0, 0]}
        return {name: l2_normalize(x.astype(jnp.float32), 1e-12) for name, x in embeddings.items()}


class Discriminator(nn.Module):
    """Logits [B] of "this lower half face [B, X/2, Y, 3] is real"; the published network ends in their sigmoid."""

    config: Wav2LipConfig = Wav2LipConfig()
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, face: Float[Array, "B X Y 3"]) -> Float[Array, " B"]:
        stack = functools.partial(ConvStack, config=self.config, norm=False, dtype=self.dtype)
        for i, layers in enumerate(discriminator(self.config.doublings)):
            face = stack(layers, name=f"face_encoder_{i}")(face, False)
        logits = Conv(Layer(1, 1, padding=0), 1, name="binary_pred")(face.astype(jnp.float32))  # B 1 1 1
        return logits[:, 0, 0, 0]


def lower_half(face: Float[Array, "*B X Y C"]) -> Float[Array, "*B X2 Y C"]:
    """The rows of a face that hold the mouth: all that the expert and the discriminator see."""
    return face[..., face.shape[-3] // 2 :, :, :]


def stack_frames(clip: Float[Array, "B T X Y C"]) -> Float[Array, "B X Y T*C"]:
    """A clip as the expert takes it: channel 3 t + c is colour c of frame t."""
    return rearrange(clip, "b t x y c -> b x y (t c)")


def num_forward_flops(network: str, config: Wav2LipConfig) -> float:
    """Operations (two per multiplication) of "generator" or "discriminator" per frame, of "expert" per window."""
    side, d = config.image_size, config.doublings
    half, mel = (side // 2, side, 3), (80, 16, 1)
    if network == "discriminator":
        macs, shape = _count([layer for block in discriminator(d) for layer in block], half, config)
        return 2.0 * (macs + shape[2])
    if network == "expert":
        any_length = config.clip_len != PUBLISHED_CLIP
        face, _ = _count(sync_face_encoder(d), (*half[:2], 3 * config.clip_len), config)
        return 2.0 * (face + _count(audio_encoder(2, any_length=any_length), (80, config.mel_steps, 1), config)[0])
    total, x = _count(audio_encoder(1), mel, config)
    shapes = [(side, side, 6)]
    for layers in face_encoder(d):
        macs, shape = _count(layers, shapes[-1], config)
        total, shapes = total + macs, [*shapes, shape]
    for layers in face_decoder(d):
        macs, x = _count(layers, x, config)
        total, x = total + macs, (*x[:2], x[2] + shapes.pop()[2])
    macs, x = _count([Layer(32)], x, config)
    return 2.0 * (total + macs + 3 * math.prod(x))


def _count(layers: Sequence[Layer], shape: Shape, config: Wav2LipConfig) -> tuple[int, Shape]:
    """Multiplications of a stack for one input [rows, columns, channels], and the shape of its output."""
    total, (rows, columns, channels) = 0, shape
    for layer in layers:
        pixels, width = rows * columns, config.channels(layer.channels)
        stride = layer.stride if isinstance(layer.stride, tuple) else (layer.stride,) * 2
        if layer.transpose:
            grown = layer.size - 1 - 2 * layer.padding
            rows, columns = (n * s + max(grown, 0) for n, s in zip((rows, columns), stride, strict=True))
        else:
            shrunk = layer.size - 2 * layer.padding
            rows, columns = ((n - shrunk) // s + 1 for n, s in zip((rows, columns), stride, strict=True))
            pixels = rows * columns
        total += pixels * layer.size**2 * channels * width
        channels = width
    return total, (rows, columns, channels)


def published(network: str, module: type[nn.Module], checkpoint: str, **inputs: Any) -> Published:
    """A network of the published size; a forward pass is of one frame, of the expert of one window.

    Its operations are not counted in the traced program, where CPUs have forms of their own.
    """
    flops = int(num_forward_flops(network, Wav2LipConfig()))
    return Published(lambda scan: module(), inputs, checkpoint, flops)


_MEL, _FACE = floats(1, 80, 16, 1), floats(1, BASE_SIZE, BASE_SIZE, 6)
_WINDOW, _HALF = (floats(1, BASE_SIZE // 2, BASE_SIZE, channels) for channels in (3 * PUBLISHED_CLIP, 3))
PUBLISHED = {
    "generator": published("generator", Generator, "wav2lip.pth, wav2lip_gan.pth", mel=_MEL, face=_FACE),
    "expert": published("expert", SyncNet, "lipsync_expert.pth", mel=_MEL, face=_WINDOW),
    "discriminator": published("discriminator", Discriminator, "visual_quality_disc.pth", face=_HALF),
}
