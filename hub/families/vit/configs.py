"""What a ViT checkpoint is, read from its `config.json` and the shapes of its tensors; and back.

Each format fixes what its files do not say: Hugging Face eps 1e-12 and exact GELU unless the config differs, Google
1e-6 and the tanh form; and each resizes positions by a rule of its own. timm's are in `timm.py`.
"""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from ....models.vit import ViTConfig
from ...files.tensors import TensorFile
from ...keys import Section, harmless, only, used
from ..transformers_keys import COMMON, HIDDEN_ACT, names_of, num_classes
from .timm import as_pair, published_heads

Overrides = Mapping[str, Any]
Pair = tuple[int, int]


# transformers' ViTConfig.
TRANSFORMERS = Section(
    {
        **COMMON,
        "hidden_size": used("count", 768),
        "num_hidden_layers": used("count", 12),
        "num_attention_heads": used("count", 12),
        "intermediate_size": used("count", 3072),
        "hidden_act": used("text", "gelu", choices=HIDDEN_ACT),
        "layer_norm_eps": used("number", 1e-12),
        "image_size": used("size", 224),
        "patch_size": used("size", 16),
        "num_channels": used("count", 3),
        "qkv_bias": used("flag", True),
        "pooler_output_size": used("count", None),
        "pooler_act": only("tanh"),
        "id2label": used("object", None),
        "num_labels": used("count", None),
        "hidden_dropout_prob": harmless("training"),
        "attention_probs_dropout_prob": harmless("training"),
        "encoder_stride": harmless("training"),  # of the decoder of masked pixels
    }
)


def from_transformers(
    file: TensorFile, metadata: Mapping[str, Any], overrides: Overrides, where: str = "config.json"
) -> ViTConfig:
    """`file` with the names of `ViTModel`; entries that `metadata` lacks are the defaults of HF's ViTConfig."""
    c = TRANSFORMERS.read(metadata or _transformers_metadata(file, overrides), where)
    architectures = c["architectures"]
    classifies = "ForImageClassification" in architectures[0] if architectures else "classifier.weight" in file
    pooled = not classifies and ("pooler.dense.weight" in file or "pooler.dense.bias" in file)
    return ViTConfig(
        width=c["hidden_size"],
        depth=c["num_hidden_layers"],
        num_heads=c["num_attention_heads"],
        mlp_dim=c["intermediate_size"],
        patch_size=as_pair(c["patch_size"]),
        image_size=as_pair(c["image_size"]),
        num_channels=c["num_channels"],
        num_classes=num_classes(c) if classifies else 0,
        pos_interpolation="bicubic",
        pre_logits_dim=(c["pooler_output_size"] or c["hidden_size"]) if pooled else 0,
        qkv_bias=c["qkv_bias"],
        activation=HIDDEN_ACT[c["hidden_act"]],
        eps=c["layer_norm_eps"],
        init="hf",
    )


def _transformers_metadata(file: TensorFile, overrides: Overrides) -> dict[str, Any]:
    """The `config.json` of a bare file of tensors."""
    width, channels, *patch_size = file.shape("embeddings.patch_embeddings.projection.weight")
    mlp_dim = file.shape("encoder.layer.0.intermediate.dense.weight")[0]
    names = ("embeddings.position_embeddings", "embeddings.cls_token")
    image_size, *_ = _positions(file, *names, patch_size, [], overrides)
    return {
        "hidden_size": width,
        "num_hidden_layers": _depth(file, r"encoder\.layer\.(\d+)\."),
        "num_attention_heads": published_heads(file, width, mlp_dim, overrides),
        "intermediate_size": mlp_dim,
        "patch_size": patch_size,
        "image_size": image_size,
        "num_channels": channels,
        "num_labels": _rows(file, "classifier") or None,
    }


def from_npz(file: TensorFile, generation: str, overrides: Overrides) -> ViTConfig:
    """Everything from shapes; `file` without prefixes (see `vit_formats.npz_table` for the generations)."""
    attention, mlp = (1, 3) if generation == "old" else (0, 0)
    *patch_size, channels, width = file.shape("embedding/kernel")
    stacked = "Transformer/encoderblock/LayerNorm_0/scale" in file
    layer = "Transformer/encoderblock" if stacked else "Transformer/encoderblock_0"
    depth = file.shape(f"{layer}/LayerNorm_0/scale")[0] if stacked else _depth(file, r"Transformer/encoderblock_(\d+)/")
    fixed = "pos_embedding" not in file and overrides.get("pos_embed", "learn") != "learn"  # big_vision vit_s16_i1k
    if fixed:
        image_size, class_token, class_position = as_pair(overrides.get("image_size", 224)), "cls" in file, False
    else:
        image_size, class_token, class_position = _positions(file, "pos_embedding", "cls", patch_size, [], overrides)
    return ViTConfig(
        width=width,
        depth=depth,
        num_heads=file.shape(f"{layer}/MultiHeadDotProductAttention_{attention}/query/bias")[-2],
        mlp_dim=file.shape(f"{layer}/MlpBlock_{mlp}/Dense_0/bias")[-1],
        patch_size=as_pair(patch_size),
        image_size=image_size,
        num_channels=channels,
        num_classes=file.shape("head/bias")[0] if "head/bias" in file else 0,
        pool="map" if "MAPHead_0/probe" in file else "token" if class_token else "gap",
        class_token=class_token,
        class_position=class_position,
        pos_embed=overrides["pos_embed"] if fixed else "learn",
        pos_interpolation="bilinear_align_corners",
        pre_logits_dim=file.shape("pre_logits/bias")[0] if "pre_logits/bias" in file else 0,
        activation="gelu_tanh",
        init="big_vision" if not class_position else "vision_transformer",
    )


def _depth(file: TensorFile, pattern: str) -> int:
    """Layers counted by the highest number, so that a gap shows as missing tensors."""
    return 1 + max((int(match[1]) for name in file if (match := re.match(pattern, name))), default=-1)


def _rows(file: TensorFile, layer: str) -> int:
    """Outputs of a torch linear layer, from whatever of it the file has; 0 without it."""
    present = (name for name in (f"{layer}.weight", f"{layer}.bias") if name in file)
    return next((file.shape(name)[0] for name in present), 0)


def _positions(
    file: TensorFile, table: str, token: str, patch_size: Sequence[int], hints: Sequence[Any], overrides: Overrides
) -> tuple[Pair, bool, bool]:
    """The image size that a table of positions was made for, whether there is a class token, and a position for it.

    Sizes count where they have as many patches: first those the file came with, then a square, last the one asked for.
    One row beyond a square tells of a class token even if the file lacks it: that is damage, not another architecture.
    """
    rows, has_token = file.shape(table)[1], token in file
    sizes = [*hints, "square", overrides.get("image_size")]
    choices = [(position, size) for position in (True, False) for size in sizes if has_token or not position]
    for class_position, size in [*choices, (True, "square")]:
        patches = rows - class_position
        if size == "square":
            size = [math.isqrt(patches) * patch for patch in patch_size]
        grid = [side // patch for side, patch in zip(as_pair(size), patch_size, strict=True)] if size else [0]
        if patches and math.prod(grid) == patches:
            return as_pair(size), has_token or class_position, class_position
    raise ValueError(
        f"{file.path}: the {rows} rows of {table!r} are no square grid; give the image_size= they were made for"
    )


_TRANSFORMERS_FIXED = {
    "pool": ("token", "none"),
    "class_token": (True,),
    "norm_after_pool": (False,),
    "patch_bias": (True,),
    "pre_norm": (False,),
    "final_norm": (True,),
    "distilled": (False,),
    "num_registers": (0,),
    "qk_norm": (False,),
    "proj_bias": (True,),
    "gated": (False,),
    "layer_scale": (None,),
    "rope": (False,),
}


def to_transformers(
    config: ViTConfig, dtype: str, labels: Sequence[str] | None, metadata: Mapping[str, Any]
) -> dict[str, Any]:
    """The `config.json`, with what `metadata` says beyond the config; ValueError if transformers has no such ViT."""
    unknown = [
        f"{name}={getattr(config, name)!r}"
        for name, known in _TRANSFORMERS_FIXED.items()
        if getattr(config, name) not in known
    ]
    if config.num_classes and config.pre_logits_dim:
        unknown.append(f"pre_logits_dim={config.pre_logits_dim!r} with a classifier")
    if unknown:
        raise ValueError(f"transformers has no ViT with {', '.join(unknown)}")
    names = names_of(labels or [f"LABEL_{i}" for i in range(config.num_classes)])
    return dict(metadata) | {
        "architectures": ["ViTForImageClassification" if config.num_classes else "ViTModel"],
        "model_type": "vit",
        "hidden_size": config.width,
        "num_hidden_layers": config.depth,
        "num_attention_heads": config.num_heads,
        "intermediate_size": config.mlp_dim,
        "hidden_act": {"gelu_tanh": "gelu_pytorch_tanh"}.get(config.activation, config.activation),
        "layer_norm_eps": config.eps,
        "image_size": _scalar(config.image_size),
        "patch_size": _scalar(config.patch_size),
        "num_channels": config.num_channels,
        "qkv_bias": config.qkv_bias,
        "pooler_output_size": config.pre_logits_dim or config.width,
        "pooler_act": "tanh",
        "dtype": dtype,
        **(names if config.num_classes else {}),
    }


def _scalar(size: Pair) -> int | list[int]:
    return size[0] if size[0] == size[1] else list(size)
