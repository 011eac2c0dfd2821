"""IP-Adapter (arXiv 2308.06721): images as prompts, by keys and values of their own in the UNet's cross-attention.

An adapter is a network beside the UNet: image features -> tokens -> keys and values for every cross-attention layer.
They do not depend on the latents, so a sampling run computes them once. Reference: tencent-ailab/IP-Adapter
ip_adapter/{ip_adapter,resampler,ip_adapter_faceid}.py, diffusers models/embeddings.py.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import flax.linen as nn
import flax.struct
import jax.numpy as jnp
from einops import rearrange, repeat
from flax import traverse_util
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from ...kernels.activations import ACTIVATIONS
from ..layers import LayerNorm, Mlp, MultiHeadAttention, torch_kernel
from ..ranges import Count, Whole
from .images import ImageContext
from .layers import linear
from .unet import Images, UNetConfig

# What makes tokens of image features: "linear" (the first adapters), "mlp" (one token a patch: full face), "resampler"
# (plus), "identity" (of a face embedding: FaceID, portrait), "identity_resampler" (of both: FaceID plus).
PROJECTIONS = ("linear", "mlp", "resampler", "identity", "identity_resampler")
# "decoupled" is published: the image has a softmax of its own. "joint": one softmax over text and image, with keys and
# values of the adapter's own. "appended" is the notes' form, the paper's simple adapter: the tokens stand behind the
# text's and go through its projections; such an adapter has no layers.
MODES = ("decoupled", "joint", "appended")
_EPS = 1e-5
_HEAD_DIM = 64


@dataclasses.dataclass(frozen=True, kw_only=True)
class IPAdapterConfig:
    """Everything that fixes the function. The defaults are those of the first adapter of SD 1.5."""

    projection: str = "linear"
    features: Count = 1024  # channels of what the image encoder gives
    context_dim: Count = 768  # of the tokens, as wide as the text's
    tokens: Whole = 4  # an image; "mlp": 0, as many as there are features
    hidden: Whole = 0  # of the MLP, or the resampler's width; "linear": 0
    identity_dim: Whole = 0  # of face embeddings, where they go beside the features
    depth: Whole = 0  # of the resampler
    shortcut: bool = False  # the resampler's result is added to the identity's tokens (FaceID plus v2)
    layer_widths: tuple[Count, ...] = ()  # of the cross-attention layers in the published order: down, up, middle
    rank: Whole = 0  # of the low-rank terms on every attention layer (FaceID); 0: none
    mode: str = "decoupled"

    def __post_init__(self) -> None:
        for name, choices in (("projection", PROJECTIONS), ("mode", MODES)):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} is {getattr(self, name)!r}, expected one of {choices}")
        if (self.mode == "appended") != (not self.layer_widths):
            raise ValueError(f"an adapter of mode {self.mode!r} cannot have {len(self.layer_widths)} layers")


@flax.struct.dataclass
class AdapterOutput:
    """Of every image I: its tokens, and each layer's keys and values for them."""

    tokens: Float[Array, "B I S D"]
    keys: tuple[Float[Array, "B I S _"], ...]
    values: tuple[Float[Array, "B I S _"], ...]


class ProjectionMlp(nn.Module):
    """Linear, GELU, linear to so many tokens."""

    hidden: int
    tokens: int
    features: int
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "N E"]) -> Float[Array, "N S D"]:
        y = ACTIVATIONS["gelu"](linear(x.shape[-1], self.hidden, dtype=self.dtype, name="fc1")(x))
        y = linear(self.hidden, self.tokens * self.features, dtype=self.dtype, name="fc2")(y)
        return rearrange(y, "... (s d) -> ... s d", s=self.tokens)


class Resampler(nn.Module):
    """Learned or given latents that attend to features and to themselves, `depth` times (arXiv 2204.14198)."""

    config: IPAdapterConfig
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "N T E"], latents: Float[Array, "N S D"] | None = None
    ) -> Float[Array, "N S D2"]:
        c, width = self.config, self.config.hidden
        if latents is None:
            init = nn.initializers.normal(width**-0.5)
            latents = repeat(self.param("latents", init, (1, c.tokens, width)), "1 s d -> n s d", n=len(x))
        y: Array = jnp.asarray(latents, self.dtype)
        x = linear(x.shape[-1], width, dtype=self.dtype, name="proj_in")(x)
        for i in range(c.depth):
            y = ResamplerBlock(self.dtype, name=f"layers_{i}")(x, y)
        y = linear(width, c.context_dim, dtype=self.dtype, name="proj_out")(y)
        return LayerNorm(_EPS, name="norm_out")(y)


class ResamplerBlock(nn.Module):
    """latents += attention(norm2(latents), [norm1(x), norm2(latents)]); latents += MLP(norm(latents))."""

    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "N T D"], latents: Float[Array, "N S D"]) -> Float[Array, "N S D"]:
        width = latents.shape[-1]
        query = LayerNorm(_EPS, name="norm2")(latents)
        context = jnp.concatenate([LayerNorm(_EPS, name="norm1")(x), query], axis=1)
        attend = MultiHeadAttention(width // _HEAD_DIM, False, torch_kernel, self.dtype, out_bias=False, name="attn")
        latents = latents + attend(query, context)
        mlp = Mlp(4 * width, "gelu", use_bias=False, kernel_init=torch_kernel, dtype=self.dtype, name="mlp")
        return latents + mlp(LayerNorm(_EPS, name="norm3")(latents))


class ImageProjection(nn.Module):
    """Image features, and where the config says so face embeddings, to tokens as wide as the text's."""

    config: IPAdapterConfig
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self, features: Float[Array, "N *T E"], identity: Float[Array, "N F"] | None = None
    ) -> Float[Array, "N S D"]:
        c = self.config
        features = features.astype(self.dtype)
        if c.projection == "resampler":
            return Resampler(c, self.dtype, name="resampler")(features)
        if c.projection == "linear":
            y = linear(c.features, c.tokens * c.context_dim, dtype=self.dtype, name="proj")(features)
            return LayerNorm(_EPS, name="norm")(rearrange(y, "n (s d) -> n s d", s=c.tokens))
        if c.projection == "mlp":
            y = ProjectionMlp(c.hidden, 1, c.context_dim, self.dtype, name="proj")(features)[..., 0, :]
            return LayerNorm(_EPS, name="norm")(y)
        if c.projection == "identity":
            y = ProjectionMlp(c.hidden, c.tokens, c.context_dim, self.dtype, name="proj")(features)
            return LayerNorm(_EPS, name="norm")(y)
        if identity is None:
            raise ValueError("this adapter takes face embeddings beside image features, got none")
        y = ProjectionMlp(2 * c.identity_dim, c.tokens, c.hidden, self.dtype, name="proj")(identity.astype(self.dtype))
        latents = LayerNorm(_EPS, name="norm")(y)
        out = Resampler(c, self.dtype, name="resampler")(features, latents)
        return latents + out if c.shortcut else out


class LowRankTerms(nn.Module):
    """The low-rank terms of one attention layer's four projections: parameters alone, see `add_low_rank`."""

    width: int
    context_dim: int
    rank: int

    @nn.compact
    def __call__(self) -> None:
        for name in ("query", "key", "value", "out"):
            inner = self.context_dim if name in ("key", "value") else self.width
            self.param(f"{name}_a", nn.initializers.normal(1 / self.rank), (inner, self.rank))
            self.param(f"{name}_b", nn.initializers.zeros, (self.rank, self.width))


class IPAdapter(nn.Module):
    """Features of I images an example [B, I, E] (or [B, I, T, E]: patches) to tokens, keys and values."""

    config: IPAdapterConfig
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self, features: Float[Array, "B I *T E"], identity: Float[Array, "B I F"] | None = None
    ) -> AdapterOutput:
        c, (batch, count) = self.config, features.shape[:2]
        self._check(features, identity)
        flat = features.reshape(batch * count, *features.shape[2:])
        faces = None if identity is None else identity.reshape(batch * count, -1)
        tokens = ImageProjection(c, self.dtype, name="image_proj")(flat, faces)
        tokens = tokens.reshape(batch, count, *tokens.shape[1:])
        keys, values = (
            tuple(
                nn.Dense(width, False, self.dtype, kernel_init=torch_kernel, name=f"layers_{i}_{name}")(tokens)
                for i, width in enumerate(c.layer_widths)
            )
            for name in ("key", "value")
        )
        if c.rank:
            for i, width in enumerate(c.layer_widths):
                for n, inner in ((2 * i, width), (2 * i + 1, c.context_dim)):
                    LowRankTerms(width, inner, c.rank, name=f"lora_{n}")()
        return AdapterOutput(tokens, keys, values)

    def _check(self, features: Array, identity: Array | None) -> None:
        c = self.config
        dims = 3 if c.projection in ("linear", "identity") else 4
        if features.ndim != dims or features.shape[-1] != c.features:
            expected = f"[B, I{', T' * (dims - 3)}, {c.features}]"
            raise ValueError(f"image features {list(features.shape)}, expected {expected} for a {c.projection} adapter")
        if identity is not None and identity.shape != (*features.shape[:2], c.identity_dim):
            wanted = [*features.shape[:2], c.identity_dim]
            raise ValueError(f"face embeddings {list(identity.shape)}, expected {wanted}")


def place(
    unet: UNetConfig,
    adapter: IPAdapterConfig,
    output: AdapterOutput,
    scale: float | Float[Array, ""] | Sequence[float] | Mapping[str, float] = 1.0,
    mask: Float[Array, "I X Y"] | None = None,
) -> Images:
    """What a UNet takes as `images`: an adapter's keys and values, by transformer.

    `scale` is one number, one for every cross-attention layer, or one by the transformer's place with zero for all
    others ("up_0_1" alone is the style in SDXL). Masks say where each image counts. ValueError for the adapter of
    another base model.
    """
    check_base(unet, adapter)
    depths = [depth for _, depth, _ in unet.transformers]
    scales = _scales(unet, scale)
    fold = (lambda x: x) if mask is not None else lambda x: rearrange(x, "b i s d -> b 1 (i s) d")
    images: dict[str, tuple[ImageContext, ...]] = {}
    start = 0
    for (name, depth, _), own in zip(unet.transformers, scales, strict=True):
        layers = slice(start, start + depth)
        start += depth
        if depth:
            key, value = (jnp.stack(list(map(fold, x[layers]))) for x in (output.keys, output.values))
            masks = None if mask is None else jnp.broadcast_to(mask, (depth, *mask.shape))
            images[name] = (ImageContext(key, value, own, masks, adapter.mode == "joint"),)
    assert start == sum(depths)
    return images


def _scales(unet: UNetConfig, scale: Any) -> list[Float[Array, " L"]]:
    """Every transformer's scales."""
    places = {name: depth for name, depth, _ in unet.transformers}
    if isinstance(scale, Mapping):
        if unknown := [name for name in scale if name not in places]:
            raise ValueError(f"scales for {unknown}, expected some of {list(places)}")
        return [jnp.full(depth, scale.get(name, 0.0), jnp.float32) for name, depth in places.items()]
    total = sum(places.values())
    flat = jnp.asarray(scale, jnp.float32)
    if flat.shape not in ((), (total,)):
        raise ValueError(f"{flat.size} scales, expected one or as many as the {total} cross-attention layers")
    ends = [sum(list(places.values())[: i + 1]) for i in range(len(places))]
    return jnp.split(jnp.broadcast_to(flat, (total,)), ends[:-1])


def attention_layers(unet: UNetConfig) -> Iterator[tuple[tuple[str, ...], int]]:
    """(path of a block in the parameters, which layer of its transformer it is), as the published files number them."""
    for place, depth, _ in unet.transformers:
        root = ("decoder" if place.startswith("up") else "encoder", place, "attention", "transformer")
        yield from ((root, layer) for layer in range(depth))


def adapter_from_unet(
    unet: UNetConfig, params: Mapping[str, Any], fresh: Mapping[str, Any], adapter: IPAdapterConfig
) -> dict[str, Any]:
    """An adapter's parameters at the start of training: keys and values as the UNet projects the text, the rest fresh.

    Unlike a ControlNet it changes the output from the first step on, unless its scale is zero.
    """
    check_base(unet, adapter)
    flat: dict[tuple[str, ...], Any] = traverse_util.flatten_dict(dict(params))  # type: ignore[assignment]
    started = dict(fresh)
    for i, (root, layer) in enumerate(attention_layers(unet)) if adapter.layer_widths else ():
        for name in ("key", "value"):
            kernel = flat.get((*root, f"blocks_{layer}", "attn2", name, "kernel"))
            if kernel is None:
                kernel = flat[*root, "blocks", "attn2", name, "kernel"][layer]
            started[f"layers_{i}_{name}"] = {"kernel": jnp.array(kernel.reshape(len(kernel), -1), jnp.float32)}
    return started


def add_low_rank(
    unet: UNetConfig, params: Mapping[str, Any], adapter: Mapping[str, Any], scale: float | Float[Array, ""] = 1.0
) -> dict[str, Any]:
    """A UNet's parameters with the low-rank terms of a FaceID adapter's parameters in its attention kernels.

    In the cross-attention they touch the text's keys and values alone: the image's are the adapter's own.
    """
    flat: dict[tuple[str, ...], Any] = traverse_util.flatten_dict(dict(params))  # type: ignore[assignment]
    attentions = ((root, layer, name) for root, layer in attention_layers(unet) for name in ("attn1", "attn2"))
    for n, (root, layer, attention) in enumerate(attentions):
        terms = adapter[f"lora_{n}"]
        for name in ("query", "key", "value", "out"):
            product = jnp.asarray(scale, jnp.float32) * (terms[f"{name}_a"] @ terms[f"{name}_b"])
            own, scanned = ((*root, block, attention, name, "kernel") for block in (f"blocks_{layer}", "blocks"))
            if own in flat:
                flat[own] = flat[own] + product.reshape(flat[own].shape).astype(flat[own].dtype)
            else:
                stack = flat[scanned]
                flat[scanned] = stack.at[layer].add(product.reshape(stack.shape[1:]).astype(stack.dtype))
    return traverse_util.unflatten_dict(flat)


def check_base(unet: UNetConfig, adapter: IPAdapterConfig) -> None:
    """ValueError where an adapter was made for another base model than this UNet."""
    widths = tuple(width for _, depth, width in unet.transformers for _ in range(depth))
    if adapter.context_dim != unet.context_dim or (adapter.layer_widths and adapter.layer_widths != widths):
        raise ValueError(
            f"an adapter of another base model: {len(adapter.layer_widths)} layers on tokens of {adapter.context_dim} "
            f"channels, expected {len(widths)} of {list(dict.fromkeys(widths))} on {unet.context_dim}"
        )


def merge(*images: Images) -> Images:
    """Several adapters at once."""
    places = dict.fromkeys(name for one in images for name in one)
    return {name: tuple(context for one in images for context in one.get(name, ())) for name in places}


def append(context: Float[Array, "B S D"], output: AdapterOutput) -> Float[Array, "B S2 D"]:
    """The notes' form: the tokens of all images behind those of the text, for the text's own keys and values."""
    return jnp.concatenate([context, rearrange(output.tokens, "b i s d -> b (i s) d").astype(context.dtype)], axis=1)
