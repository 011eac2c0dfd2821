"""Vision Transformer: an image as a sequence of patches through a pre-norm transformer encoder (arXiv 2010.11929).

One model covers the published variants: Google's checkpoints of both generations (google-research/vision_transformer,
google-research/big_vision), timm's and the Hugging Face ones. What differs between them (eps, GELU flavour, pooling,
order of class token and positions, representation layer) is a field of `ViTConfig`.
"""

import dataclasses
import functools
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from ..kernels.activations import ACTIVATIONS
from ..kernels.interpolation import resize_grid
from ..kernels.resize_matrices import METHODS, resize_matrix
from ..kernels.rope import apply_rope, rope_axial
from .layers import Initializer, LayerNorm, Mlp, MultiHeadAttention, PatchEmbed, Rotary, Stack, TransformerBlock, wide
from .published import Published, floats
from .ranges import BelowOne, Count, NonNegative, Positive, Real, Whole

POOLS = ("token", "gap", "gap_all", "map", "map_all", "none")
POSITIONS = ("learn", "learn2d", "sincos1d", "sincos2d", "none")


@dataclasses.dataclass(frozen=True)
class ViTConfig:
    """Everything that fixes a ViT's function. Sizes in pixels are (rows, columns)."""

    width: Count
    depth: Count
    num_heads: Count
    mlp_dim: Count
    patch_size: tuple[int, int]
    image_size: tuple[int, int] = (224, 224)
    num_channels: Count = 3
    num_classes: Whole = 1000  # 0: no head
    # "token": the class token; "gap": mean of the patch tokens; "gap_all": mean of all tokens (vision_transformer's gap
    # beside a class token); "map": attention pooling of the patch tokens by a learned probe, "map_all": of all tokens
    # (Perception Encoder); "none": no pooled output.
    pool: str = "token"
    map_heads: Whole = 0  # of the attention pooling; 0: num_heads
    map_mlp_dim: Whole = 0  # 0: mlp_dim
    class_token: bool = True
    distilled: bool = False  # DeiT's second token and head (arXiv 2012.12877); the logits are the mean of both heads'
    num_registers: Whole = 0  # learned tokens without meaning behind the class token (arXiv 2309.16588)
    # Original order: the tokens before the patches first, then positions for all. big_vision: for the N patches only.
    class_position: bool = True
    pos_embed: str = "learn"
    # How learned positions follow an image of another size (kernels/interpolation.py); the published libraries differ.
    pos_interpolation: str = "bicubic_antialias"
    pre_logits_dim: Whole = 0  # representation layer Dense + tanh before the head; 0: none
    norm_after_pool: bool = (
        False  # timm's global_pool="avg": no final norm on the tokens, one (`fc_norm`) on their mean
    )
    patch_bias: bool = True
    pre_norm: bool = False  # CLIP: one more norm on the embeddings, before the first block
    final_norm: bool = True  # BLIP-2's image encoders end without one
    qkv_bias: bool = True
    qk_norm: bool = False  # norms of every head's queries and keys (arXiv 2302.05442)
    proj_bias: bool = True  # of the attention's output and of the MLP
    layer_scale: NonNegative | None = None  # initial gain of the residual branches (arXiv 2103.17239); None: no gains
    # Rotary positions of the patch tokens, beside `pos_embed`: half of a head's channel pairs turns by the row, half by
    # the column (which comes first with `rope_xy`). A grid, counted from `rope_offset`, is spread over `rope_grid`.
    rope: bool = False
    rope_grid: tuple[int, int] | None = None
    rope_offset: Real = 0.0
    rope_xy: bool = False
    rope_theta: Positive = 10_000.0
    gated: bool = False  # fc2(activation(gate(x)) · fc1(x)), arXiv 2002.05202
    activation: str = "gelu_tanh"  # Google's JAX models; timm and Hugging Face: "gelu" (erf)
    eps: Positive = 1e-6  # Hugging Face: 1e-12
    dropout: BelowOne = 0.0
    drop_path: BelowOne = 0.0  # rate of the last block, growing linearly from 0 at the first
    patch_dropout: BelowOne = 0.0  # share of the patch tokens left out in training (FLIP, arXiv 2212.00794)
    init: str = "big_vision"
    head_bias_init: Real = 0.0  # -log(classes) scale for sigmoid losses: -10 (21k), -6.9 (1k)
    scan: bool = False
    remat: str = "none"

    def __post_init__(self) -> None:
        for name in ("image_size", "patch_size", "rope_grid"):
            value = getattr(self, name)
            pair = value if value is None else (value, value) if isinstance(value, int) else tuple(value)
            object.__setattr__(self, name, pair)
        for name, choices in (
            ("pool", POOLS),
            ("pos_embed", POSITIONS),
            ("pos_interpolation", METHODS),
            ("activation", ACTIVATIONS),
            ("init", INITS),
        ):
            if getattr(self, name) not in choices:
                raise ValueError(f"ViTConfig.{name} is {getattr(self, name)!r}, expected one of {sorted(choices)}")
        if 0 in self.grid:
            raise ValueError(f"image_size {self.image_size} is smaller than patch_size {self.patch_size}")
        if self.width % self.num_heads:
            raise ValueError(f"width {self.width} is not divisible by num_heads {self.num_heads}")
        divisor = {"learn2d": 2, "sincos1d": 2, "sincos2d": 4}.get(self.pos_embed, 1)
        if self.width % divisor:
            raise ValueError(f"width {self.width} is not divisible by {divisor}, as pos_embed {self.pos_embed!r} needs")
        if self.pool == "token" and not self.class_token:
            raise ValueError("pool 'token' needs class_token=True")
        beside = (self.num_registers, self.pre_logits_dim, self.norm_after_pool)
        if self.distilled and (self.pool != "token" or any(beside)):
            raise ValueError("distilled needs pool 'token', no registers, no pre_logits_dim and no norm_after_pool")
        if self.rope and self.patch_dropout:
            raise ValueError("rope and patch_dropout exclude each other: positions follow the whole grid")
        if self.rope and self.width // self.num_heads % 4:
            raise ValueError(f"rope needs heads of a multiple of 4 channels, got {self.width // self.num_heads}")

    @property
    def grid(self) -> tuple[int, int]:
        """Patches per column and per row of an image; pixels beyond the last whole patch do not count."""
        return self.image_size[0] // self.patch_size[0], self.image_size[1] // self.patch_size[1]

    @property
    def num_prefix_tokens(self) -> int:
        """Tokens before those of the patches: class, distillation, registers."""
        return self.class_token + self.distilled + self.num_registers

    def num_forward_flops(self) -> int:
        """Floating-point operations of one image's forward pass: two per multiply-accumulate of the matrix products."""
        patches = math.prod(self.grid)
        tokens = patches + self.num_prefix_tokens
        embed = math.prod(self.patch_size) * self.num_channels * self.width * patches
        layers = 3 if self.gated else 2
        block = tokens * (4 * self.width**2 + layers * self.width * self.mlp_dim) + 2 * tokens**2 * self.width
        return 2 * (embed + self.depth * block + self.width * self.num_classes)


# Published widths, depths, MLP dimensions and heads (big_vision/models/vit.py decode_variant).
SIZES: dict[str, tuple[int, int, int, int]] = {
    "mu": (32, 1, 128, 2),
    "Ti": (192, 12, 768, 3),
    "S": (384, 12, 1536, 6),
    "M": (512, 12, 2048, 8),
    "B": (768, 12, 3072, 12),
    "L": (1024, 24, 4096, 16),
    "So400m": (1152, 27, 4304, 16),
    "H": (1280, 32, 5120, 16),
    "g": (1408, 40, 6144, 16),
    "g-opt": (1536, 40, 6144, 16),
    "G": (1664, 48, 8192, 16),
    "G-opt": (1536, 48, 8192, 16),
    "e": (1792, 56, 15360, 16),
}


def config(variant: str, **fields: Any) -> ViTConfig:
    """The config of a published size, as "B/16" (size, then patch size); `fields` override the defaults."""
    size, _, patch = variant.partition("/")
    if size not in SIZES or not patch.isdigit() or int(patch) == 0:
        raise ValueError(
            f"unknown ViT variant {variant!r}, expected SIZE/PATCH with a size of {list(SIZES)}, as in 'B/16'"
        )
    width, depth, mlp_dim, num_heads = SIZES[size]
    shape = {
        "width": width,
        "depth": depth,
        "mlp_dim": mlp_dim,
        "num_heads": num_heads,
        "patch_size": (int(patch),) * 2,
    }
    return ViTConfig(**(shape | fields))


@dataclasses.dataclass(frozen=True)
class Init:
    """Initialisers by parameter group; `position` is a function of the width."""

    patch: Initializer
    token: Initializer
    position: Any
    kernel: Initializer
    mlp_bias: Initializer | None  # None: torch's default
    head: Initializer
    mlp: Initializer | None = None  # of the MLP's first kernel; None: `kernel`
    out: Initializer | None = None  # of the last kernel of attention and MLP; None: `kernel`


_TRUNCATED = nn.initializers.truncated_normal(0.02)
_XAVIER, _LECUN = nn.initializers.xavier_uniform(), nn.initializers.lecun_normal()
_ZEROS = nn.initializers.zeros
_TORCH = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")  # torch's Conv2d and Linear: U(±1/sqrt(fan_in))

INITS: dict[str, Init] = {
    "big_vision": Init(
        _LECUN, _ZEROS, lambda d: nn.initializers.normal(d**-0.5), _XAVIER, nn.initializers.normal(1e-6), _ZEROS
    ),
    "vision_transformer": Init(
        _LECUN, _ZEROS, lambda d: nn.initializers.normal(0.02), _XAVIER, nn.initializers.normal(1e-6), _ZEROS
    ),
    "timm": Init(_TORCH, nn.initializers.normal(1e-6), lambda d: _TRUNCATED, _TRUNCATED, _ZEROS, _TRUNCATED),
    "hf": Init(
        nn.initializers.normal(0.02),
        _TRUNCATED,
        lambda d: _TRUNCATED,
        nn.initializers.normal(0.02),
        _ZEROS,
        nn.initializers.normal(0.02),
    ),
    # openai/CLIP clip/model.py: torch's defaults, where in_proj is xavier_uniform over the packed [3D, D].
    "openai": Init(
        _TORCH,
        lambda key, shape, dtype=jnp.float32, **_: nn.initializers.normal(shape[-1] ** -0.5)(key, shape, dtype),
        lambda d: nn.initializers.normal(d**-0.5),
        nn.initializers.variance_scaling(0.5, "fan_in", "uniform"),
        None,
        nn.initializers.normal(0.02),
        _TORCH,
        _TORCH,
    ),
}


def sincos_1d(num_tokens: int, width: int) -> np.ndarray:
    """Fixed 1-D table [N, D]: sine in even, cosine in odd channels (arXiv 1706.03762, section 3.5)."""
    angles = np.arange(num_tokens)[:, None] / 10000 ** (2 * np.arange(width // 2) / width)
    return rearrange(np.stack([np.sin(angles), np.cos(angles)], -1), "n d two -> n (d two)").astype(np.float32)


def sincos_2d(grid: tuple[int, int], width: int) -> np.ndarray:
    """Fixed 2-D table [X, Y, D]: [sin, cos] of the column, then of the row (MoCo v3; big_vision posemb_sincos_2d)."""
    omega = 1 / 10000 ** (np.arange(width // 4) / max(width // 4 - 1, 1))
    rows, columns = np.meshgrid(*map(np.arange, grid), indexing="ij")
    row_angles, column_angles = rows[..., None] * omega, columns[..., None] * omega
    parts = [np.sin(column_angles), np.cos(column_angles), np.sin(row_angles), np.cos(row_angles)]
    return np.concatenate(parts, -1).astype(np.float32)


def rotary(config: ViTConfig, grid: tuple[int, int]) -> Rotary:
    """What turns queries and keys [B, T, N, H] on a grid of patches; the tokens before the patches do not turn."""
    channels = config.width // config.num_heads
    scales = config.rope_grid or grid
    axes = [
        (np.arange(size, dtype=np.float32) + np.float32(config.rope_offset)) / np.float32(size) * np.float32(reference)
        if config.rope_grid
        else np.arange(size, dtype=np.float32) + np.float32(config.rope_offset)
        for size, reference in zip(grid, scales, strict=True)
    ]
    rows, columns = (axis.ravel() for axis in np.meshgrid(*axes, indexing="ij"))
    positions = np.stack([columns, rows] if config.rope_xy else [rows, columns], -1)
    rope = rope_axial((channels // 2,) * 2, theta=config.rope_theta)
    cosine, sine = rope.table(jnp.pad(positions, ((config.num_prefix_tokens, 0), (0, 0))))
    return functools.partial(apply_rope, cos=cosine, sin=sine, interleaved=True)


class PositionEmbedding(nn.Module):
    """Adds positions to patches [B, X, Y, D] and prepends class token and registers: [B, (prefix +) X·Y, D]."""

    config: ViTConfig

    @nn.compact
    def __call__(self, patches: Float[Array, "B X Y D"]) -> Float[Array, "B T D"]:
        c = self.config
        batch, *grid, width = patches.shape
        prefix_rows, table = self._table((grid[0], grid[1]), width)
        tokens = rearrange(patches + table.astype(patches.dtype), "b x y d -> b (x y) d")
        counts = {"cls_token": int(c.class_token), "dist_token": int(c.distilled), "register_tokens": c.num_registers}
        init = INITS[c.init].token
        prefix = [wide(self.param(name, init, (1, n, width))) for name, n in counts.items() if n]
        if not prefix:
            return tokens
        placed = (jnp.concatenate(prefix, axis=1) + prefix_rows).astype(tokens.dtype)  # 1 P D
        return jnp.concatenate([jnp.broadcast_to(placed, (batch, *placed.shape[1:])), tokens], axis=1)

    def _table(self, grid: tuple[int, int], width: int) -> tuple[Array | float, Array]:
        """The positions of the tokens before the patches (0 without) and the patches' [X, Y, D], for any grid."""
        c, count = self.config, self.config.num_prefix_tokens
        init = INITS[c.init].position(width)
        if c.pos_embed == "none":
            return 0.0, jnp.zeros((*grid, width))
        if c.pos_embed == "sincos2d":
            return 0.0, jnp.asarray(sincos_2d(grid, width))
        if c.pos_embed == "sincos1d":
            table = jnp.asarray(sincos_1d(math.prod(grid) + count, width))
            return table[:count], table[count:].reshape(*grid, width)
        if c.pos_embed == "learn2d":
            axes = zip(("pos_embed_rows", "pos_embed_columns"), c.grid, grid, strict=True)
            rows, columns = (
                resize_matrix(stored, wanted, c.pos_interpolation) @ table if stored != wanted else table
                for name, stored, wanted in axes
                for table in [wide(self.param(name, init, (stored, width // 2)))]
            )
            shape = (*grid, width // 2)
            halves = [jnp.broadcast_to(rows[:, None], shape), jnp.broadcast_to(columns[None], shape)]
            return 0.0, jnp.concatenate(halves, -1)
        prefix = count if c.class_position else 0
        table = wide(self.param("pos_embed", init, (1, math.prod(c.grid) + prefix, width)))
        patches = resize_grid(table[0, prefix:].reshape(*c.grid, width), grid, c.pos_interpolation)
        return table[:, :prefix] if prefix else 0.0, patches


def drop_patches(tokens: Float[Array, "B T D"], key: Array, rate: float, prefix: int) -> Float[Array, "B S D"]:
    """The first `prefix` tokens and a random max(1, int(N (1 - rate))) of the N others, chosen anew for each image."""
    batch, total, _ = tokens.shape
    kept = max(1, int((total - prefix) * (1 - rate)))
    noise = jax.random.uniform(key, (batch, total - prefix))
    chosen = prefix + jnp.argsort(noise, axis=1)[:, :kept, None]
    return jnp.concatenate([tokens[:, :prefix], jnp.take_along_axis(tokens, chosen, axis=1)], axis=1)


class MapHead(nn.Module):
    """Attention pooling: a learned probe attends to all tokens, then a residual MLP (arXiv 2106.04560, section 3.2)."""

    config: ViTConfig
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, tokens: Float[Array, "B T D"]) -> Float[Array, "B D"]:
        c, width = self.config, tokens.shape[-1]
        kernel_init, bias_init = INITS[c.init].kernel, INITS[c.init].mlp_bias
        probe = self.param("probe", _XAVIER, (1, 1, width))
        probe = jnp.broadcast_to(probe.astype(tokens.dtype), (tokens.shape[0], 1, width))
        heads, mlp_dim = c.map_heads or c.num_heads, c.map_mlp_dim or c.mlp_dim
        y = MultiHeadAttention(heads, kernel_init=kernel_init, dtype=self.dtype, name="attn")(probe, tokens)
        mlp = Mlp(mlp_dim, c.activation, kernel_init=kernel_init, bias_init=bias_init, dtype=self.dtype, name="mlp")
        return (y + mlp(LayerNorm(c.eps, name="norm")(y)))[:, 0]


class ViT(nn.Module):
    """The Vision Transformer. `image` [B, X, Y, C] float, of the config's size or any other divisible into patches.

    As for the convolution of the published models, what the config's size has beyond the last whole patch does not
    exist: SigLIP's 384 with patches of 14 is 378.

    Returns a dict: "tokens" [B, T, D] (after the final norm), "patches" [B, X, Y, D] (the same without class token and
    registers, as a map; absent where patch dropout has taken some), "pooled" [B, D] (unless pool is "none"),
    "pre_logits" [B, R] (what the head sees), "logits" [B, E] float32 (where num_classes is not 0), and with
    `hidden_states=True` "hidden_states" [L + 1, B, T, D]: the embeddings and every block's output, before the final
    norm.
    """

    config: ViTConfig
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self, image: Float[Array, "B X Y C"], *, train: bool = False, hidden_states: bool = False
    ) -> dict[str, Array]:
        c = self.config
        if image.shape[-1] != c.num_channels:
            raise ValueError(f"image has {image.shape[-1]} channels, expected {c.num_channels}")
        if image.shape[1:3] == c.image_size:
            image = image[:, : c.grid[0] * c.patch_size[0], : c.grid[1] * c.patch_size[1]]
        init = INITS[c.init].patch
        embed = PatchEmbed(c.width, c.patch_size, c.patch_bias, init, dtype=self.dtype, name="patch_embed")
        patches = embed(image)  #                                         B X Y D
        x = PositionEmbedding(c, name="embed")(patches)  #                B T D
        x = nn.Dropout(c.dropout, deterministic=not train)(x)
        if train and c.patch_dropout > 0:
            x = drop_patches(x, self.make_rng("dropout"), c.patch_dropout, c.num_prefix_tokens)
        if c.pre_norm:
            x = LayerNorm(c.eps, name="pre_norm")(x)
        embeddings = x
        options = self._attention_options((patches.shape[1], patches.shape[2]))
        x, outputs = self._encoder()(x, self._drop_path_rates(train), collect=hidden_states, train=train, **options)
        if c.final_norm and not c.norm_after_pool:
            x = LayerNorm(c.eps, name="norm")(x)
        out = {"tokens": x}
        if not (train and c.patch_dropout > 0):
            out["patches"] = x[:, c.num_prefix_tokens :].reshape(patches.shape)
        if outputs is not None:
            out["hidden_states"] = jnp.concatenate([embeddings[None], outputs])
        if c.pool != "none":
            out |= self._head(x)
        return out

    def _encoder(self) -> Stack:
        c = self.config
        block = functools.partial(
            TransformerBlock,
            num_heads=c.num_heads,
            mlp_dim=c.mlp_dim,
            eps=c.eps,
            activation=c.activation,
            gated=c.gated,
            qkv_bias=c.qkv_bias,
            qk_norm=c.qk_norm,
            proj_bias=c.proj_bias,
            layer_scale=c.layer_scale,
            dropout=c.dropout,
            kernel_init=INITS[c.init].kernel,
            mlp_bias_init=INITS[c.init].mlp_bias,
            dtype=self.dtype,
            mlp_init=INITS[c.init].mlp,
            out_init=INITS[c.init].out,
        )
        return Stack(block, c.depth, c.scan, c.remat, name="encoder")

    def _attention_options(self, grid: tuple[int, int]) -> dict[str, Any]:
        """What every block's attention is given besides the tokens."""
        return {"rotary": rotary(self.config, grid)} if self.config.rope else {}

    def _drop_path_rates(self, train: bool) -> Array | None:
        c = self.config
        return jnp.linspace(0.0, c.drop_path, c.depth) if train and c.drop_path > 0 else None

    def _head(self, tokens: Float[Array, "B T D"]) -> dict[str, Array]:
        c = self.config
        first = c.num_prefix_tokens if c.pool in ("map", "gap") else 0
        if c.pool in ("map", "map_all"):
            pooled = MapHead(c, self.dtype, name="map_head")(tokens[:, first:])
        elif c.pool == "token":
            pooled = (tokens[:, 0] + tokens[:, 1]) / 2 if c.distilled else tokens[:, 0]
        else:
            pooled = tokens[:, first:].mean(1, dtype=jnp.float32).astype(tokens.dtype)
        if c.norm_after_pool:
            pooled = LayerNorm(c.eps, name="fc_norm")(pooled)
        out = {"pooled": pooled, "pre_logits": pooled}
        if c.pre_logits_dim:
            kernel_init = INITS[c.init].kernel
            dense = nn.Dense(c.pre_logits_dim, kernel_init=kernel_init, dtype=self.dtype, name="pre_logits")
            out["pre_logits"] = jnp.tanh(dense(pooled))
        if c.num_classes:
            head = functools.partial(
                nn.Dense,
                c.num_classes,
                kernel_init=INITS[c.init].head,
                bias_init=nn.initializers.constant(c.head_bias_init),
                dtype=jnp.float32,  # logits in float32 whatever the body computes in: the loss is a float32 island
            )
            out["logits"] = head(name="head")(tokens[:, 0] if c.distilled else out["pre_logits"])
            if c.distilled:
                out["logits"] = (out["logits"] + head(name="head_dist")(tokens[:, 1])) / 2
        return out


def published(variant: str, checkpoint: str, **fields: Any) -> Published:
    """A size of the table with the fields that a checkpoint has."""
    shape = config(variant, **fields)
    return Published(
        build=lambda scan: ViT(dataclasses.replace(shape, scan=scan)),
        inputs={"image": floats(1, *shape.image_size, shape.num_channels)},
        checkpoint=checkpoint,
    )


_SIGLIP = {"num_classes": 0, "class_token": False, "pool": "map", "image_size": 378}
PUBLISHED = {
    "mu/16": published("mu/16", "", num_classes=0),
    "Ti/16": published("Ti/16", "timm/vit_tiny_patch16_224.augreg_in21k_ft_in1k"),
    "S/32": published("S/32", "timm/vit_small_patch32_224.augreg_in21k_ft_in1k"),
    "S/16": published("S/16", "timm/vit_small_patch16_224.augreg_in21k_ft_in1k"),
    "M/16": published("M/16", "", num_classes=0),
    "B/32": published("B/32", "timm/vit_base_patch32_224.augreg_in21k_ft_in1k"),
    "B/16": published("B/16", "google/vit-base-patch16-224"),
    "B/16@384": published("B/16", "google/vit-base-patch16-384", image_size=384),
    "B/8": published("B/8", "timm/vit_base_patch8_224.augreg_in21k_ft_in1k"),
    "L/32@384": published("L/32", "google/vit-large-patch32-384", image_size=384),
    "L/16": published("L/16", "google/vit-large-patch16-224"),
    "L/16@384": published("L/16", "google/vit-large-patch16-384", image_size=384),
    "So400m/14@384": published("So400m/14", "timm/vit_so400m_patch14_siglip_384.webli", **_SIGLIP),
    "H/14": published("H/14", "google/vit-huge-patch14-224-in21k", num_classes=0, pre_logits_dim=1280),
    "g/14": published("g/14", "", num_classes=0),
    "g-opt/16": published("g-opt/16", "", num_classes=0),
    "G/14": published("G/14", "", num_classes=0),
    "G-opt/16": published("G-opt/16", "", num_classes=0),
    "e/14": published("e/14", "", num_classes=0),
}
