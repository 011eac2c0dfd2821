"""CLIP: an image and a text encoder trained so that pairs meet in one space (arXiv 2103.00020).

Covers OpenAI's towers, OpenCLIP's (arXiv 2212.07143), EVA-CLIP's (arXiv 2303.15389) and SigLIP's (arXiv 2303.15343):
the image tower is a ViT or an EVA trunk, the text tower a pre-norm transformer, causal except in SigLIP. Reference
implementations: openai/CLIP clip/model.py, mlfoundations/open_clip src/open_clip/{model,transformer}.py, transformers.
"""

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from ..kernels.activations import ACTIVATIONS
from ..kernels.normalization import l2_normalize
from . import eva
from .layers import LayerNorm, Stack, TransformerBlock, wide
from .published import Published, floats, integers
from .ranges import Count, NonNegative, Positive, Real, Whole
from .vit import ViT, ViTConfig

# Which token stands for the text. "argmax": the largest id, CLIP's end of text (and what `eos_token_id: 2` in old
# transformers configs means); "eos": the first `eos_id`; "last" and "first" by position.
POOLS = ("argmax", "eos", "last", "first")


@dataclasses.dataclass(frozen=True)
class ImageConfig:
    """An image tower: a trunk without a head, and the projection into the common space (0: none)."""

    trunk: ViTConfig
    projection_dim: Whole = 0
    projection_bias: bool = False


@dataclasses.dataclass(frozen=True)
class TextConfig:
    """A text tower and its projection into the common space (0: none)."""

    width: Count
    depth: Count
    num_heads: Count
    mlp_dim: Count
    vocab_size: Count = 49408
    context_length: Count = 77
    activation: str = "gelu"
    eps: Positive = 1e-5
    causal: bool = True
    pool: str = "argmax"
    eos_id: Whole = 49407
    projection_dim: Whole = 0
    projection_bias: bool = False
    layer_scale: NonNegative | None = None  # initial gain of the residual branches; None: no gains
    scan: bool = False
    remat: str = "none"

    def __post_init__(self) -> None:
        for name, choices in (("pool", POOLS), ("activation", ACTIVATIONS)):
            if getattr(self, name) not in choices:
                raise ValueError(f"TextConfig.{name} is {getattr(self, name)!r}, expected one of {sorted(choices)}")
        if self.width % self.num_heads:
            raise ValueError(f"width {self.width} is not divisible by num_heads {self.num_heads}")


@dataclasses.dataclass(frozen=True)
class CLIPConfig:
    """Both towers and the initial temperature; a `logit_bias_init` makes it a SigLIP."""

    image: ImageConfig
    text: TextConfig
    logit_scale_init: Real = 2.6592600  # ln(1 / 0.07)
    logit_bias_init: Real | None = None

    def num_forward_flops(self) -> tuple[int, int]:
        """Floating-point operations of one image's and of one text's forward pass."""
        image, text = self.image, self.text
        length, width = text.context_length, text.width
        block = length * (4 * width**2 + 2 * width * text.mlp_dim) + 2 * length**2 * width
        image_flops = image.trunk.num_forward_flops() + 2 * image.trunk.width * image.projection_dim
        return image_flops, 2 * (text.depth * block + width * text.projection_dim)


def trunk_module(config: ViTConfig, dtype: DTypeLike, name: str | None = None) -> ViT:
    """The module that a trunk's config describes."""
    if isinstance(config, eva.EvaConfig):
        return eva.Eva(config, dtype, name=name)
    return ViT(config, dtype, name=name)


class ImageTower(nn.Module):
    """The trunk's outputs (see `ViT`), with "projected" [B, E] float32: the pooled output in the common space
    (unless the trunk's pool is "none").

    As for the convolution of the published towers, pixels beyond the last whole patch do not exist: SigLIP's 384 with
    patches of 14 is 378.
    """

    config: ImageConfig
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self, image: Float[Array, "B X Y C"], *, train: bool = False, hidden_states: bool = False
    ) -> dict[str, Array]:
        c = self.config
        rows, columns = (s // p * p for s, p in zip(image.shape[1:3], c.trunk.patch_size, strict=True))
        image = image[:, :rows, :columns]
        trunk = trunk_module(c.trunk, self.dtype, name="trunk")
        out = trunk(image, train=train, hidden_states=hidden_states)
        if c.trunk.pool == "none":
            return out
        projected = out["pooled"]
        if c.projection_dim:
            init = nn.initializers.normal(c.trunk.width**-0.5)
            dense = nn.Dense(c.projection_dim, c.projection_bias, dtype=self.dtype, kernel_init=init, name="projection")
            projected = dense(projected)
        return out | {"projected": projected.astype(jnp.float32)}


class TextTower(nn.Module):
    """Token ids [B, T], T up to the context length, through the text transformer.

    `mask` [B, T] is True for real tokens; CLIP itself does without, since no token sees the padding behind it. Returns
    a dict: "tokens" [B, T, D] (after the final norm), "pooled" [B, D], "projected" [B, E] float32, and with
    `hidden_states=True` "hidden_states" [L + 1, B, T, D]: the embeddings and every block's output, before the norm.
    """

    config: TextConfig
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self,
        tokens: Int[Array, "B T"],
        *,
        mask: Bool[Array, "B T"] | None = None,
        train: bool = False,
        hidden_states: bool = False,
    ) -> dict[str, Array]:
        c, length = self.config, tokens.shape[1]
        if length > c.context_length:
            raise ValueError(f"text of {length} tokens, expected at most {c.context_length}")
        embedding = nn.Embed(c.vocab_size, c.width, embedding_init=nn.initializers.normal(0.02), name="token_embed")
        positions = self.param("pos_embed", nn.initializers.normal(0.01), (c.context_length, c.width))
        x = embeddings = (wide(embedding(tokens)) + wide(positions[:length])).astype(self.dtype)  # B T D
        keys = None if mask is None else mask[:, None, None]
        x, outputs = self._encoder()(x, collect=hidden_states, train=train, causal=c.causal, mask=keys)
        x = LayerNorm(c.eps, name="norm")(x)
        pooled = x[jnp.arange(len(x)), pool_index(tokens, c.pool, c.eos_id)]  # B D
        out = {"tokens": x, "pooled": pooled, "projected": self._project(pooled).astype(jnp.float32)}
        return out if outputs is None else out | {"hidden_states": jnp.concatenate([embeddings[None], outputs])}

    def _encoder(self) -> Stack:
        c, normal = self.config, nn.initializers.normal
        block = functools.partial(
            TransformerBlock,
            num_heads=c.num_heads,
            mlp_dim=c.mlp_dim,
            eps=c.eps,
            activation=c.activation,
            layer_scale=c.layer_scale,
            kernel_init=normal(c.width**-0.5),
            mlp_bias_init=None,
            dtype=self.dtype,
            mlp_init=normal((2 * c.width) ** -0.5),
            out_init=normal(c.width**-0.5 * (2 * c.depth) ** -0.5),
        )
        return Stack(block, c.depth, c.scan, c.remat, name="encoder")

    def _project(self, pooled: Float[Array, "B D"]) -> Float[Array, "B E"]:
        c = self.config
        if not c.projection_dim:
            return pooled
        init = nn.initializers.normal(c.width**-0.5)
        dense = nn.Dense(c.projection_dim, c.projection_bias, dtype=self.dtype, kernel_init=init, name="projection")
        return dense(pooled)


def pool_index(tokens: Int[Array, "B T"], pool: str, eos_id: int) -> Int[Array, " B"]:
    """The position of each text's pooled token by a rule of `POOLS`; 0 where "eos" finds none."""
    if pool == "argmax":
        return tokens.argmax(-1)
    if pool == "eos":
        return (tokens == eos_id).argmax(-1)
    return jnp.full(len(tokens), tokens.shape[1] - 1 if pool == "last" else 0)


class CLIP(nn.Module):
    """Both towers. Call it with images and texts, or one tower by `method=CLIP.encode_image` or `CLIP.encode_text`.

    Returns a dict: "image_embeds" and "text_embeds" [B, E], normalised float32; "logit_scale" (the factor of the
    cosines) and "logit_bias" (SigLIP) as scalars; "logits" [B, B2], images by texts.
    """

    config: CLIPConfig
    dtype: DTypeLike = jnp.float32

    def setup(self) -> None:
        c = self.config
        self.image = ImageTower(c.image, self.dtype)
        self.text = TextTower(c.text, self.dtype)
        self.logit_scale = self.param("logit_scale", nn.initializers.constant(c.logit_scale_init), ())
        if c.logit_bias_init is not None:
            self.logit_bias = self.param("logit_bias", nn.initializers.constant(c.logit_bias_init), ())

    def __call__(
        self,
        image: Float[Array, "B X Y C"],
        tokens: Int[Array, "B2 T"],
        *,
        mask: Bool[Array, "B2 T"] | None = None,
        train: bool = False,
    ) -> dict[str, Array]:
        out = {
            "image_embeds": self.encode_image(image, train=train)["embeds"],
            "text_embeds": self.encode_text(tokens, mask=mask, train=train)["embeds"],
            "logit_scale": jnp.exp(wide(self.logit_scale)),
        }
        cosines = jnp.einsum("id,td->it", out["image_embeds"], out["text_embeds"], precision="highest")
        logits = out["logit_scale"] * cosines
        if self.config.logit_bias_init is None:
            return out | {"logits": logits}
        bias = wide(self.logit_bias)
        return out | {"logits": logits + bias, "logit_bias": bias}

    def encode_image(self, image: Float[Array, "B X Y C"], **options: Any) -> dict[str, Array]:
        """The image tower's outputs, with "embeds" [B, E]: the projection normalised."""
        out = self.image(image, **options)
        return out | {"embeds": l2_normalize(out["projected"])}

    def encode_text(self, tokens: Int[Array, "B T"], **options: Any) -> dict[str, Array]:
        """The text tower's outputs, with "embeds" [B, E]: the projection normalised."""
        out = self.text(tokens, **options)
        return out | {"embeds": l2_normalize(out["projected"])}


# Published pairs: width of the common space; image tower (size, patch, width, depth, heads, MLP width, or the name of
# an EVA trunk and the image size); text tower (width, depth, heads).
SIZES: dict[str, tuple[int, tuple[Any, ...], tuple[int, int, int]]] = {
    "B/32": (512, (224, 32, 768, 12, 12, 3072), (512, 12, 8)),
    "B/16": (512, (224, 16, 768, 12, 12, 3072), (512, 12, 8)),
    "L/14": (768, (224, 14, 1024, 24, 16, 4096), (768, 12, 12)),
    "L/14@336": (768, (336, 14, 1024, 24, 16, 4096), (768, 12, 12)),
    "H/14": (1024, (224, 14, 1280, 32, 16, 5120), (1024, 24, 16)),
    "H/14@378": (1024, (378, 14, 1280, 32, 16, 5120), (1024, 24, 16)),
    "g/14": (1024, (224, 14, 1408, 40, 16, 6144), (1024, 24, 16)),
    "bigG/14": (1280, (224, 14, 1664, 48, 16, 8192), (1280, 32, 20)),
    "EVA01-g/14": (1024, ("EVA01-g/14", 224), (768, 12, 12)),
    "EVA01-g/14+": (1024, ("EVA01-g/14", 224), (1024, 24, 16)),
    "EVA02-B/16": (512, ("EVA02-B/16", 224), (512, 12, 8)),
    "EVA02-L/14": (768, ("EVA02-L/14", 224), (768, 12, 12)),
    "EVA02-L/14@336": (768, ("EVA02-L/14", 336), (768, 12, 12)),
    "EVA02-E/14": (1024, ("EVA02-E/14", 224), (1024, 24, 16)),
    "EVA02-E/14+": (1024, ("EVA02-E/14", 224), (1280, 32, 20)),
    "SigLIP-B/16": (768, (224, 16, 768, 12, 12, 3072), (768, 12, 12)),
    "SigLIP-So400m/14@384": (1152, (378, 14, 1152, 27, 16, 4304), (1152, 27, 16)),
}


def image_trunk(
    size: int | tuple[int, int], patch: int, width: int, depth: int, num_heads: int, mlp_dim: int, **fields: Any
) -> ViTConfig:
    """The trunk of OpenAI's and OpenCLIP's image towers: no bias on the patches, a norm before the first block."""
    family = {
        "num_classes": 0,
        "patch_bias": False,
        "pre_norm": True,
        "activation": "gelu",
        "eps": 1e-5,
        "init": "openai",
    }
    shape = {"width": width, "depth": depth, "num_heads": num_heads, "mlp_dim": mlp_dim}
    settings: dict[str, Any] = {**family, **shape, "image_size": size, "patch_size": patch, **fields}
    return ViTConfig(**settings)


def siglip_trunk(
    size: int | tuple[int, int], patch: int, width: int, depth: int, num_heads: int, mlp_dim: int, **fields: Any
) -> ViTConfig:
    """The trunk of SigLIP's image towers: no class token, attention pooling."""
    family = {
        "pre_norm": False,
        "patch_bias": True,
        "class_token": False,
        "class_position": False,
        "pool": "map",
    }
    family |= {"activation": "gelu_tanh", "eps": 1e-6, "init": "big_vision"}
    return image_trunk(size, patch, width, depth, num_heads, mlp_dim, **(family | fields))


def config(variant: str, **fields: Any) -> CLIPConfig:
    """The config of a published pair.

    `fields` override those of both towers that have them: activation="quick_gelu" for OpenAI's weights (the default is
    OpenCLIP's exact GELU), scan, remat, vocab_size, context_length, patch_dropout, …
    """
    if variant not in SIZES:
        raise ValueError(f"unknown CLIP variant {variant!r}, expected one of {list(SIZES)}")
    embed, image, (width, depth, num_heads) = SIZES[variant]
    sigmoid = variant.startswith("SigLIP")
    mlp_dim = image[5] if sigmoid else 4 * width
    text_family: dict[str, Any] = {"projection_dim": embed}
    if sigmoid:
        text_family |= {"causal": False, "pool": "last", "projection_bias": True, "vocab_size": 32000}
        text_family |= {"context_length": 64, "activation": "gelu_tanh", "eps": 1e-6}
    image_fields = {k: v for k, v in fields.items() if k in eva.EvaConfig.__dataclass_fields__}
    text_fields = {k: v for k, v in fields.items() if k in TextConfig.__dataclass_fields__}
    unknown = sorted(set(fields) - set(image_fields) - set(text_fields))
    if unknown:
        raise ValueError(f"unknown fields {unknown}, expected some of either tower's config")
    if isinstance(image[0], str):
        trunk: ViTConfig = eva.config(image[0], **({"image_size": image[1]} | image_fields))
    else:
        trunk = (siglip_trunk if sigmoid else image_trunk)(*image, **image_fields)
    return CLIPConfig(
        ImageConfig(trunk, 0 if sigmoid else embed, isinstance(trunk, eva.EvaConfig)),
        TextConfig(width, depth, num_heads, mlp_dim, **(text_family | text_fields)),
        *((2.3025851, -10.0) if sigmoid else ()),  # ln 10 and -10: arXiv 2303.15343, section 3.2
    )


def published(variant: str, checkpoint: str) -> Published:
    """A pair of the table; a forward pass is of one image and one text."""
    shape = config(variant)
    trunk = shape.image.trunk
    image, tokens = floats(1, *trunk.image_size, trunk.num_channels), integers(1, shape.text.context_length)
    return Published(
        build=lambda scan: CLIP(config(variant, scan=scan)),
        inputs={"image": image, "tokens": tokens},
        checkpoint=checkpoint,
    )


# Files of EVA-CLIP are those of the repository QuanSun/EVA-CLIP.
CHECKPOINTS = {
    "B/32": "openai/clip-vit-base-patch32, laion/CLIP-ViT-B-32-laion2B-s34B-b79K",
    "B/16": "openai/clip-vit-base-patch16, laion/CLIP-ViT-B-16-laion2B-s34B-b88K",
    "L/14": "openai/clip-vit-large-patch14, laion/CLIP-ViT-L-14-laion2B-s32B-b82K",
    "L/14@336": "openai/clip-vit-large-patch14-336",
    "H/14": "laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
    "H/14@378": "apple/DFN5B-CLIP-ViT-H-14-378",
    "g/14": "laion/CLIP-ViT-g-14-laion2B-s34B-b88K",
    "bigG/14": "laion/CLIP-ViT-bigG-14-laion2B-39B-b160k",
    "EVA01-g/14": "EVA01_CLIP_g_14_psz14_s11B.pt",
    "EVA01-g/14+": "EVA01_CLIP_g_14_plus_psz14_s11B.pt",
    "EVA02-B/16": "EVA02_CLIP_B_psz16_s8B.pt",
    "EVA02-L/14": "EVA02_CLIP_L_psz14_s4B.pt",
    "EVA02-L/14@336": "EVA02_CLIP_L_336_psz14_s6B.pt",
    "EVA02-E/14": "EVA02_CLIP_E_psz14_s4B.pt",
    "EVA02-E/14+": "EVA02_CLIP_E_psz14_plus_s9B.pt",
    "SigLIP-B/16": "google/siglip-base-patch16-224",
    "SigLIP-So400m/14@384": "google/siglip-so400m-patch14-384",
}
PUBLISHED = {variant: published(variant, checkpoint) for variant, checkpoint in CHECKPOINTS.items()}
