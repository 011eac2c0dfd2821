"""The networks of DINO, iBOT and DINOv2: a ViT with mask token, registers, layer scale and gated MLPs, and the heads.

Papers: DINO arXiv 2104.14294, iBOT 2111.07832, DINOv2 2304.07193, registers 2309.16588. Reference code:
facebookresearch/dinov2:dinov2/models/vision_transformer.py, dinov2/layers/dino_head.py; facebookresearch/dino;
bytedance/ibot.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange, repeat
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float

from ..kernels.activations import ACTIVATIONS, gelu
from ..kernels.dense import dot_general
from ..kernels.interpolation import resize_grid
from ..kernels.normalization import l2_normalize
from ..kernels.resize_matrices import METHODS
from .layers import LayerNorm, PatchEmbed, Stack, TransformerBlock, wide
from .published import Published, floats
from .ranges import BelowOne, Count, NonNegative, Positive, Whole

# torch's Conv2d and Linear default, U(±1/sqrt(fan_in)).
_TORCH_UNIFORM = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")


@dataclasses.dataclass(frozen=True)
class Dinov2Config:
    """Everything that fixes a backbone's function. Sizes in pixels are sides of squares; images may have any shape."""

    width: Count
    depth: Count
    num_heads: Count
    mlp_dim: Count
    patch_size: Count
    image_size: Count = 224  # what the stored position table belongs to
    num_channels: Count = 3
    num_classes: Whole = 0  # linear classifier on [class token, mean patch]; 0: none
    num_registers: Whole = 0
    gated: bool = False  # SwiGLU instead of the GELU MLP
    activation: str = "gelu"  # of the MLP that is not gated
    layer_scale: NonNegative | None = 1e-5  # initial value; None: no layer scale (DINO, iBOT)
    mask_token: bool = True
    class_position: bool = True  # False: the class token has absorbed its position (timm's weights with registers)
    # How positions follow an image of another size (kernels/interpolation.py): "bicubic_offset" in all training and the
    # released weights, "bicubic_antialias" with registers, "bicubic" in transformers' Dinov2Model.
    pos_interpolation: str = "bicubic_offset"
    token_std: NonNegative = 1e-6  # of the class and register tokens at the start; DINO and iBOT: 0.02
    # Of kernels and positions at the start. The reference truncates at ±2, which never happens. Bodies much narrower
    # than the published ones need more: at a width of 64, 0.02 leaves the blocks without effect.
    init_std: Positive = 0.02
    qkv_bias: bool = True
    eps: Positive = 1e-6
    drop_path: BelowOne = 0.0
    drop_path_uniform: bool = True  # the same rate in every block; False (DINO, iBOT): growing linearly from 0
    scan: bool = False
    remat: str = "none"

    def __post_init__(self) -> None:
        if self.pos_interpolation not in METHODS:
            choices = sorted(METHODS)
            raise ValueError(f"Dinov2Config.pos_interpolation is {self.pos_interpolation!r}, expected one of {choices}")
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"Dinov2Config.activation is {self.activation!r}, expected one of {sorted(ACTIVATIONS)}")
        if self.image_size % self.patch_size:
            raise ValueError(f"image_size {self.image_size} is not divisible by patch_size {self.patch_size}")
        if self.width % self.num_heads:
            raise ValueError(f"width {self.width} is not divisible by num_heads {self.num_heads}")

    @property
    def num_prefix(self) -> int:
        """Tokens before the patches: the class token and the registers."""
        return 1 + self.num_registers

    def num_forward_flops(self, image_size: int | None = None) -> int:
        """Floating-point operations of one square image's forward pass: two per multiply-accumulate of the products."""
        patches = ((image_size or self.image_size) // self.patch_size) ** 2
        tokens = patches + self.num_prefix
        embed = self.patch_size**2 * self.num_channels * self.width * patches
        mlp = (3 if self.gated else 2) * self.width * self.mlp_dim
        block = tokens * (4 * self.width**2 + mlp) + 2 * tokens**2 * self.width
        return 2 * (embed + self.depth * block + 2 * self.width * self.num_classes)


# Published widths, depths and heads. Ti exists in DINO only.
SIZES: dict[str, tuple[int, int, int]] = {
    "Ti": (192, 12, 3),
    "S": (384, 12, 6),
    "B": (768, 12, 12),
    "L": (1024, 24, 16),
    "g": (1536, 40, 24),
}


def swiglu_dim(width: int) -> int:
    """Hidden size of the gated MLP: two thirds of 4 · width, rounded up to a multiple of 8 (dinov2 swiglu_ffn.py)."""
    return (int(4 * width * 2 / 3) + 7) // 8 * 8


def config(variant: str, **fields: Any) -> Dinov2Config:
    """The config of a size as "L/14"; `fields` override the defaults.

    Without fields it is the released backbone (position table of 518 px); the g is gated, as published. `gated=True`
    gives the L/14 of the training configs its SwiGLU of 2736.
    """
    size, _, patch = variant.partition("/")
    if size not in SIZES or not patch.isdigit() or int(patch) == 0:
        raise ValueError(
            f"unknown DINOv2 variant {variant!r}, expected SIZE/PATCH with a size of {list(SIZES)}, as in 'L/14'"
        )
    width, depth, num_heads = SIZES[size]
    gated = fields.get("gated", size == "g")
    defaults = {
        "mlp_dim": swiglu_dim(width) if gated else 4 * width,
        "gated": gated,
        "image_size": 37 * int(patch),
        "pos_interpolation": "bicubic_antialias" if fields.get("num_registers") else "bicubic_offset",
    }
    return Dinov2Config(width=width, depth=depth, num_heads=num_heads, patch_size=int(patch), **(defaults | fields))


def config_v1(variant: str, **fields: Any) -> Dinov2Config:
    """The plain ViT of DINO and iBOT: no layer scale, no mask token (iBOT's student: mask_token=True), 224 px."""
    defaults = {
        "image_size": 224,
        "layer_scale": None,
        "mask_token": False,
        "token_std": 0.02,
        "drop_path_uniform": False,
    }
    return config(variant, **(defaults | fields))


class Embed(nn.Module):
    """Patches [B, X, Y, D] -> tokens [B, 1 + R + X·Y, D]: mask, positions, class token, registers (without position).

    The mask token exists as a parameter wherever the config has one, used or not: checkpoints carry it.
    """

    config: Dinov2Config

    @nn.compact
    def __call__(
        self, patches: Float[Array, "B X Y D"], masked: Bool[Array, "B X Y"] | None = None
    ) -> Float[Array, "B T D"]:
        c = self.config
        batch, rows, columns, width = patches.shape
        side = c.image_size // c.patch_size
        token_init = nn.initializers.normal(c.token_std)
        class_token = wide(self.param("cls_token", token_init, (1, 1, width)))
        table = self.param("pos_embed", nn.initializers.normal(c.init_std), (1, c.class_position + side**2, width))
        table = wide(table)
        mask_token = self.param("mask_token", nn.initializers.zeros, (1, width)) if c.mask_token else None
        if masked is not None:
            if mask_token is None:
                raise ValueError("masked patches were given, but the config has mask_token=False")
            patches = jnp.where(masked[..., None], mask_token.astype(patches.dtype), patches)
        grid = table[0, int(c.class_position) :].reshape(side, side, width)
        positions = resize_grid(grid, (rows, columns), c.pos_interpolation)
        tokens = rearrange(patches + positions.astype(patches.dtype), "b x y d -> b (x y) d")
        prefix = (class_token + table[:, :1] if c.class_position else class_token)[0]  # 1 D
        if c.num_registers:
            registers = wide(self.param("register_tokens", token_init, (1, c.num_registers, width)))
            prefix = jnp.concatenate([prefix, registers[0]])  # 1+R D
        prefix = repeat(prefix.astype(tokens.dtype), "t d -> b t d", b=batch)
        return jnp.concatenate([prefix, tokens], axis=1)


class Dinov2(nn.Module):
    """The backbone. `image` [B, X, Y, C] float of any size divisible into patches; `masked` True = hidden from it.

    Returns a dict: "cls" [B, D], "registers" [B, R, D] and "patches" [B, X, Y, D] after the final norm, "tokens"
    [B, 1 + R + X·Y, D] (all of them), "pooled" [B, D] (the class token), "pre_norm" [B, 1 + R + X·Y, D] (before the
    norm), "logits" [B, E] float32 where the config has classes, and with `hidden_states=True` "hidden_states"
    [L + 1, B, T, D]: the embeddings and every block's output, before the final norm.
    """

    config: Dinov2Config
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self,
        image: Float[Array, "B X Y C"],
        *,
        masked: Bool[Array, "B X2 Y2"] | None = None,
        train: bool = False,
        hidden_states: bool = False,
    ) -> dict[str, Array]:
        c = self.config
        if image.shape[-1] != c.num_channels:
            raise ValueError(f"image has {image.shape[-1]} channels, expected {c.num_channels}")
        embed = PatchEmbed(
            c.width,
            (c.patch_size, c.patch_size),
            kernel_init=_TORCH_UNIFORM,
            bias_init=_uniform(1 / math.sqrt(c.num_channels * c.patch_size**2)),
            dtype=self.dtype,
            name="patch_embed",
        )
        patches = embed(image)  #                         B X Y D
        x = Embed(c, name="embed")(patches, masked)  #    B T D
        embeddings = x
        x, outputs = self._encoder()(x, self._drop_path_rates(train), collect=hidden_states, train=train)
        tokens = LayerNorm(c.eps, name="norm")(x)
        out = {
            "cls": tokens[:, 0],
            "pooled": tokens[:, 0],
            "registers": tokens[:, 1 : c.num_prefix],
            "patches": tokens[:, c.num_prefix :].reshape(patches.shape),
            "tokens": tokens,
            "pre_norm": x,
        }
        if outputs is not None:
            out["hidden_states"] = jnp.concatenate([embeddings[None], outputs])
        if c.num_classes:
            features = jnp.concatenate([out["cls"], out["patches"].mean((1, 2))], axis=-1)
            kernel_init = nn.initializers.normal(c.init_std)
            out["logits"] = nn.Dense(c.num_classes, kernel_init=kernel_init, dtype=jnp.float32, name="head")(features)
        return out

    def _encoder(self) -> Stack:
        c = self.config
        block = functools.partial(
            TransformerBlock,
            num_heads=c.num_heads,
            mlp_dim=c.mlp_dim,
            eps=c.eps,
            activation="silu" if c.gated else c.activation,
            gated=c.gated,
            qkv_bias=c.qkv_bias,
            layer_scale=c.layer_scale,
            kernel_init=nn.initializers.normal(c.init_std),
            mlp_bias_init=nn.initializers.zeros,
            dtype=self.dtype,
        )
        return Stack(block, c.depth, c.scan, c.remat, name="encoder")

    def _drop_path_rates(self, train: bool) -> Array | None:
        c = self.config
        if not train or c.drop_path == 0:
            return None
        return jnp.linspace(c.drop_path if c.drop_path_uniform else 0.0, c.drop_path, c.depth)


def intermediate_layers(
    model: Dinov2, params: dict[str, Any], image: Float[Array, "B X Y C"], layers: int | Sequence[int] = 1
) -> list[dict[str, Array]]:
    """The outputs of the last `layers` blocks, or of the blocks with those indices, each through the final norm.

    Returns one dict per block with "cls" [B, D] and "patches" [B, X, Y, D]: the official `get_intermediate_layers`
    with `return_class_token=True, reshape=True`, channels last. `params` are the backbone's.

    Raises:
        ValueError: an index outside the blocks, or more blocks than there are.
    """
    c = model.config
    indices = range(c.depth - layers, c.depth) if isinstance(layers, int) else layers
    if not indices or not all(0 <= i < c.depth for i in indices):
        raise ValueError(f"intermediate layers {layers!r} of a backbone with {c.depth} blocks")
    out: Any = model.apply({"params": params}, image, hidden_states=True)
    norm = LayerNorm(c.eps)
    shape = out["patches"].shape
    normed: list[Any] = [norm.apply({"params": params["norm"]}, out["hidden_states"][i + 1]) for i in indices]
    return [{"cls": x[:, 0], "patches": x[:, c.num_prefix :].reshape(shape)} for x in normed]


def probe_features(
    model: Dinov2, params: dict[str, Any], image: Float[Array, "B X Y C"], blocks: int
) -> Float[Array, "B F"]:
    """What linear classifiers are given: class tokens of the last `blocks` blocks, oldest first, and the mean patch.

    [B, (blocks + 1) · D]; with 4 blocks the inputs of the published `*_linear4_head.pth`, with 1 of `*_linear_head`.
    """
    layers = intermediate_layers(model, params, image, blocks)
    return jnp.concatenate([*(layer["cls"] for layer in layers), layers[-1]["patches"].mean((1, 2))], axis=-1)


@dataclasses.dataclass(frozen=True)
class HeadConfig:
    """A projection head (DINO, appendix C): sizes of its MLP and the number of prototypes."""

    prototypes: Count = 65536
    hidden: Count = 2048
    bottleneck: Count = 256
    layers: Count = 3
    init_std: Positive = 0.02


class Head(nn.Module):
    """MLP, bottleneck, L2 normalisation, weight-normed prototypes: [..., D] -> logits [..., V] float32.

    `features` and `prototypes` are the two factors of the logits, for callers that never build the product
    (objectives/prototypes.py). Parameters: `fc{1…}`, `last_layer/{direction [F, V], gain [V]}`.
    """

    config: HeadConfig
    dtype: DTypeLike = jnp.float32

    def setup(self) -> None:
        c = self.config
        sizes = [c.hidden] * (c.layers - 1) + [c.bottleneck]
        kernel_init = nn.initializers.normal(c.init_std)
        self.dense = [
            nn.Dense(size, kernel_init=kernel_init, dtype=self.dtype, dot_general=dot_general, name=f"fc{i}")
            for i, size in enumerate(sizes, 1)
        ]
        self.last_layer = Prototypes(c.prototypes, c.bottleneck)

    def features(self, x: Float[Array, "*B D"]) -> Float[Array, "*B F"]:
        """The normalised bottleneck."""
        for i, dense in enumerate(self.dense):
            x = dense(x if i == 0 else gelu(x))
        return l2_normalize(x, 1e-12)

    def prototypes(self) -> Float[Array, "F V"]:
        """The prototype matrix: columns of norm `gain`."""
        return self.last_layer()

    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B V"]:
        features, prototypes = self.features(x), self.prototypes()
        return jnp.dot(features, prototypes.astype(features.dtype), preferred_element_type=jnp.float32)


class Prototypes(nn.Module):
    """The weight-normed last layer: `gain` · `direction` / |`direction`| per prototype (torch weight_norm, dim 0)."""

    count: int
    width: int

    @nn.compact
    def __call__(self) -> Float[Array, "F V"]:
        direction = wide(self.param("direction", _uniform(1 / math.sqrt(self.width)), (self.width, self.count)))
        gain = wide(self.param("gain", nn.initializers.ones, (self.count,)))
        return direction * (gain * jax.lax.rsqrt(jnp.square(direction).sum(0)))


def _uniform(bound: float) -> nn.initializers.Initializer:
    return lambda key, shape, dtype=jnp.float32: jax.random.uniform(key, shape, dtype, -bound, bound)


def published(shape: Dinov2Config, checkpoint: str) -> Published:
    """A backbone; a forward pass is of the crop of 224 pixels that every release is evaluated on."""
    return Published(
        build=lambda scan: Dinov2(dataclasses.replace(shape, scan=scan)),
        inputs={"image": floats(1, 224, 224, shape.num_channels)},
        checkpoint=checkpoint,
    )


PUBLISHED = {
    "S/14": published(config("S/14"), "facebook/dinov2-small"),
    "B/14": published(config("B/14"), "facebook/dinov2-base"),
    "L/14": published(config("L/14"), "facebook/dinov2-large"),
    "g/14": published(config("g/14"), "facebook/dinov2-giant"),
    "S/14+registers": published(config("S/14", num_registers=4), "facebook/dinov2-with-registers-small"),
    "B/14+registers": published(config("B/14", num_registers=4), "facebook/dinov2-with-registers-base"),
    "L/14+registers": published(config("L/14", num_registers=4), "facebook/dinov2-with-registers-large"),
    "g/14+registers": published(config("g/14", num_registers=4), "facebook/dinov2-with-registers-giant"),
    "DINO-S/16": published(config_v1("S/16"), "dino_deitsmall16_pretrain.pth"),
    "DINO-S/8": published(config_v1("S/8"), "dino_deitsmall8_pretrain.pth"),
    "DINO-B/16": published(config_v1("B/16"), "dino_vitbase16_pretrain.pth"),
    "DINO-B/8": published(config_v1("B/8"), "dino_vitbase8_pretrain.pth"),
}
