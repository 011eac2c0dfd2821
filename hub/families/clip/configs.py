"""What a CLIP checkpoint is, read from its JSON files and the shapes of its tensors; and back."""

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from ....models.clip import CLIPConfig, ImageConfig, TextConfig
from ....models.eva import GENERATIONS, EvaConfig
from ....models.vit import ViTConfig
from ...files.tensors import TensorFile
from ..vit import timm
from ..vit.timm import as_pair

Metadata = Mapping[str, Any]
Overrides = Mapping[str, Any]
_SIGLIP = {"siglip", "siglip_text_model", "siglip_vision_model"}
MODEL_TYPES = {"clip", "clip_text_model", "clip_vision_model"} | _SIGLIP
# Entries that a published config.json may leave out: CLIPTextConfig, CLIPVisionConfig and their SigLIP counterparts.
_TEXT_DEFAULTS = {
    "vocab_size": 49408,
    "hidden_size": 512,
    "intermediate_size": 2048,
    "projection_dim": 512,
    "num_hidden_layers": 12,
    "num_attention_heads": 8,
    "max_position_embeddings": 77,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
    "eos_token_id": 49407,
}
_IMAGE_DEFAULTS = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "projection_dim": 512,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "num_channels": 3,
    "image_size": 224,
    "patch_size": 32,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
}
_SIGLIP_COMMON = {"hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6, "hidden_size": 768}
_SIGLIP_COMMON |= {"intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
_SIGLIP_TEXT = {**_TEXT_DEFAULTS, **_SIGLIP_COMMON, "vocab_size": 32000, "max_position_embeddings": 64}
_SIGLIP_IMAGE = {**_IMAGE_DEFAULTS, **_SIGLIP_COMMON, "patch_size": 16}


def from_transformers(metadata: Metadata) -> CLIPConfig | ImageConfig | TextConfig:
    """Of a `config.json` whose model_type is one of MODEL_TYPES."""
    kind = metadata["model_type"]
    siglip = kind in _SIGLIP
    projects = "WithProjection" in (metadata.get("architectures") or [""])[0]
    if kind.endswith("text_model"):
        return _transformers_text(metadata, siglip, None if projects else 0)
    if kind.endswith("vision_model"):
        return _transformers_image(metadata, siglip, None if projects else 0)
    # `*_config_dict` is what old files were written with; transformers lets it win.
    text = {**(metadata.get("text_config") or {}), **(metadata.get("text_config_dict") or {})}
    image = {**(metadata.get("vision_config") or {}), **(metadata.get("vision_config_dict") or {})}
    shared = metadata.get("projection_dim", 512)
    return CLIPConfig(
        _transformers_image(image, siglip, shared),
        _transformers_text(text, siglip, shared),
        logit_scale_init=metadata.get("logit_scale_init_value", 2.6592),
        logit_bias_init=-10.0 if siglip else None,
    )


def _transformers_text(metadata: Metadata, siglip: bool, projection_dim: int | None) -> TextConfig:
    c = {**(_SIGLIP_TEXT if siglip else _TEXT_DEFAULTS), **metadata}
    if siglip:
        projection_dim = c.get("projection_size") or c["hidden_size"]
    # 2 is what old configs say by mistake: then the largest id is the end of text (transformers, modeling_clip.py).
    pool = "last" if siglip else "argmax" if c["eos_token_id"] == 2 else "eos"
    return TextConfig(
        width=c["hidden_size"],
        depth=c["num_hidden_layers"],
        num_heads=c["num_attention_heads"],
        mlp_dim=c["intermediate_size"],
        vocab_size=c["vocab_size"],
        context_length=c["max_position_embeddings"],
        activation=c["hidden_act"],
        eps=c["layer_norm_eps"],
        causal=not siglip,
        pool=pool,
        eos_id=c["eos_token_id"],
        projection_dim=c["projection_dim"] if projection_dim is None else projection_dim,
        projection_bias=siglip,
    )


def _transformers_image(metadata: Metadata, siglip: bool, projection_dim: int | None) -> ImageConfig:
    c = {**(_SIGLIP_IMAGE if siglip else _IMAGE_DEFAULTS), **metadata}
    size, patch = (as_pair(c[name]) for name in ("image_size", "patch_size"))
    trunk = ViTConfig(
        width=c["hidden_size"],
        depth=c["num_hidden_layers"],
        num_heads=c["num_attention_heads"],
        mlp_dim=c["intermediate_size"],
        patch_size=patch,
        image_size=(size[0] // patch[0] * patch[0], size[1] // patch[1] * patch[1]),  # SigLIP's 384 / 14
        num_channels=c["num_channels"],
        num_classes=0,
        pool="map" if siglip else "token",
        class_token=not siglip,
        class_position=not siglip,
        patch_bias=siglip,
        pre_norm=not siglip,
        pos_interpolation="bicubic",
        activation=c["hidden_act"],
        eps=c["layer_norm_eps"],
        init="openai",
    )
    if siglip:
        return ImageConfig(trunk)
    return ImageConfig(trunk, c["projection_dim"] if projection_dim is None else projection_dim)


def to_transformers(config: CLIPConfig | ImageConfig | TextConfig, dtype: str, metadata: Metadata) -> dict[str, Any]:
    """The `config.json`, with what `metadata` says beyond the config; ValueError if transformers has no such model."""
    image = config if isinstance(config, ImageConfig) else config.image if isinstance(config, CLIPConfig) else None
    text = config if isinstance(config, TextConfig) else config.text if isinstance(config, CLIPConfig) else None
    siglip = text.projection_bias if text else image is not None and image.trunk.pool == "map"
    family = "Siglip" if siglip else "CLIP"
    parts: dict[str, Any] = {}
    if image is not None:
        parts["vision"] = _to_transformers_image(image, siglip)
    if text is not None:
        parts["text"] = _to_transformers_text(text, siglip)
    if isinstance(config, CLIPConfig):
        own = {"model_type": family.lower(), "architectures": [f"{family}Model"]}
        if not siglip:
            own |= {"projection_dim": config.text.projection_dim, "logit_scale_init_value": config.logit_scale_init}
        for name, part in parts.items():
            own[f"{name}_config"] = {**(metadata.get(f"{name}_config") or {}), **part}
        kept = {key: value for key, value in metadata.items() if not key.endswith("_config_dict")}
        return {**kept, **own, "dtype": dtype}
    ((name, part),) = parts.items()
    projects = "WithProjection" if not siglip and config.projection_dim else ""
    architecture = f"{family}{name.title()}Model{projects}"
    return {**metadata, **part, "architectures": [architecture], "dtype": dtype}


def _to_transformers_text(c: TextConfig, siglip: bool) -> dict[str, Any]:
    if (not siglip and not c.causal) or (siglip and c.pool != "last"):
        raise ValueError(f"transformers has no such text tower: causal={c.causal}, pool={c.pool!r}")
    part = {
        "model_type": "siglip_text_model" if siglip else "clip_text_model",
        "hidden_size": c.width,
        "num_hidden_layers": c.depth,
        "num_attention_heads": c.num_heads,
        "intermediate_size": c.mlp_dim,
        "vocab_size": c.vocab_size,
        "max_position_embeddings": c.context_length,
        "hidden_act": _ACTIVATIONS.get(c.activation, c.activation),
        "layer_norm_eps": c.eps,
    }
    if siglip:
        return part | {"projection_size": c.projection_dim}
    end = {"eos_token_id": 2 if c.pool == "argmax" else c.eos_id}
    return part | end | ({"projection_dim": c.projection_dim} if c.projection_dim else {})


def _to_transformers_image(c: ImageConfig, siglip: bool) -> dict[str, Any]:
    trunk = c.trunk
    if isinstance(trunk, EvaConfig) or trunk.pre_norm == siglip or c.projection_bias:
        raise ValueError(f"transformers has no such image tower: {type(trunk).__name__}, pre_norm={trunk.pre_norm}")
    part = {
        "model_type": "siglip_vision_model" if siglip else "clip_vision_model",
        "hidden_size": trunk.width,
        "num_hidden_layers": trunk.depth,
        "num_attention_heads": trunk.num_heads,
        "intermediate_size": trunk.mlp_dim,
        "num_channels": trunk.num_channels,
        "image_size": _one(trunk.image_size),
        "patch_size": _one(trunk.patch_size),
        "hidden_act": _ACTIVATIONS.get(trunk.activation, trunk.activation),
        "layer_norm_eps": trunk.eps,
    }
    return part | ({"projection_dim": c.projection_dim} if c.projection_dim else {})


_ACTIVATIONS = {"gelu_tanh": "gelu_pytorch_tanh"}


def from_open_clip(file: TensorFile, metadata: Metadata, overrides: Metadata) -> CLIPConfig:
    """`file` with the text tower under `text.`; `metadata` is `open_clip_config.json`, {} for OpenAI's archives.

    Without it the activation is OpenAI's quick_gelu, but for the sizes that OpenAI never published (heads of 80, 88 or
    104 channels) and timm's towers.
    """
    model = metadata.get("model_cfg") or {}
    image_part, text_part = model.get("vision_cfg") or {}, model.get("text_cfg") or {}
    timm = "visual.conv1.weight" not in file
    if timm:
        image = _timm_image(file, image_part, overrides)
        activation = "gelu"
    else:
        width = file.shape("visual.conv1.weight")[0]
        quick = model.get("quick_gelu", False) if metadata else width not in _HEAD_WIDTHS
        activation = "quick_gelu" if quick else "gelu"
        image = _open_clip_image(file, image_part, activation, overrides)
    text = _open_clip_text(file, text_part, activation)
    bias = model.get("init_logit_bias", 0.0) if "logit_bias" in file else None
    return CLIPConfig(image, text, model.get("init_logit_scale", 2.6592600), bias)


_HEAD_WIDTHS = {1280: 80, 1408: 88, 1664: 104}  # ViT-H, g and bigG; all others: 64


def _open_clip_image(file: TensorFile, part: Metadata, activation: str, overrides: Metadata) -> ImageConfig:
    width, channels, *patch = file.shape("visual.conv1.weight")
    patch_size, positions = as_pair(patch), file.shape("visual.positional_embedding")[0]
    image_size = _image_size(file, positions, patch_size, [part.get("image_size"), overrides.get("image_size")])
    block = "visual.transformer.resblocks"
    return ImageConfig(
        ViTConfig(
            width=width,
            depth=_depth(file, block),
            num_heads=overrides.get("num_heads") or width // (part.get("head_width") or _HEAD_WIDTHS.get(width, 64)),
            mlp_dim=file.shape(f"{block}.0.mlp.c_fc.weight")[0],
            patch_size=patch_size,
            image_size=image_size,
            num_channels=channels,
            num_classes=0,
            patch_bias=False,
            pre_norm=True,
            pos_interpolation="bicubic_antialias",
            activation=activation,
            eps=(part.get("norm_kwargs") or {}).get("eps", 1e-5),
            init="openai",
        ),
        projection_dim=file.shape("visual.proj")[1],
    )


def _timm_image(file: TensorFile, part: Metadata, overrides: Metadata) -> ImageConfig:
    metadata: dict[str, Any] = {}
    if part.get("timm_model_name"):
        arguments = {"img_size": part["image_size"]} if part.get("image_size") else {}
        metadata = {"architecture": part["timm_model_name"], "model_args": arguments}
    trunk = file.renamed([(r"^visual\.trunk\.", "")])
    return from_timm(trunk, metadata, overrides, projection=_timm_projection(file))


def _timm_projection(file: TensorFile) -> tuple[int, bool]:
    for layer in ("visual.trunk.head", "visual.head.proj"):
        if f"{layer}.weight" in file:
            return file.shape(f"{layer}.weight")[0], f"{layer}.bias" in file
    return 0, False


def from_timm(
    file: TensorFile,
    metadata: Metadata,
    overrides: Overrides,
    where: str = "config.json",
    projection: tuple[int, bool] | None = None,
    **arguments: Any,
) -> ImageConfig:
    """An image tower of timm's: an EVA or a ViT trunk and its head, which is the projection."""
    if projection is None:
        projection = (file.shape("head.weight")[0], "head.bias" in file) if "head.weight" in file else (0, False)
    if not metadata and timm.is_eva(file):
        return ImageConfig(_bare_eva(file, overrides), *projection)
    trunk = timm.read(file, metadata, overrides, where, **arguments)
    return ImageConfig(dataclasses.replace(trunk, num_classes=0), *projection)


# Width -> heads of the published trunks; heads cannot be seen in tensors.
_EVA_HEADS = {768: 12, 1024: 16, 1408: 16, 1792: 16}


def _bare_eva(file: TensorFile, overrides: Overrides) -> EvaConfig:
    """Of a file without a config: tensors tell the generation, but for the norms' place in EVA02-E: the width does."""
    width, channels, *patch = file.shape("patch_embed.proj.weight")
    patch_size = as_pair(patch)
    gated = "blocks.0.mlp.fc1_g.weight" in file
    enormous = width == 1792 or overrides.get("post_norm", False)
    generation = GENERATIONS["eva02" if gated else "eva02_enormous" if enormous else "eva01"]
    image_size = _image_size(file, file.shape("pos_embed")[1], patch_size, [overrides.get("image_size")])
    heads = overrides.get("num_heads") or _EVA_HEADS.get(width)
    if not heads:
        raise ValueError(f"{file.path}: cannot tell the number of heads of width {width}; give num_heads=")
    return EvaConfig(
        width=width,
        depth=_depth(file, "blocks"),
        num_heads=heads,
        mlp_dim=file.shape("blocks.0.mlp.fc2.weight")[1],
        patch_size=patch_size,
        image_size=image_size,
        num_channels=channels,
        num_classes=0,
        activation="gelu",
        eps=1e-6,
        pos_interpolation="bicubic",
        init="timm",
        **generation,
    )


def _open_clip_text(file: TensorFile, part: Metadata, activation: str) -> TextConfig:
    context_length, width = file.shape("text.positional_embedding")
    block = "text.transformer.resblocks"
    linear = "text.text_projection.weight" in file
    if (part.get("act_kwargs") or {}).get("approximate") == "tanh":
        activation = "gelu_tanh"
    return TextConfig(
        width=width,
        depth=_depth(file, block),
        num_heads=part.get("heads") or max(width // 64, 1),
        mlp_dim=file.shape(f"{block}.0.mlp.c_fc.weight")[0],
        vocab_size=file.shape("text.token_embedding.weight")[0],
        context_length=context_length,
        activation=activation,
        eps=(part.get("norm_kwargs") or {}).get("eps", 1e-5),
        causal=not part.get("no_causal_mask", False),
        pool=part.get("pool_type", "argmax"),
        eos_id=part.get("eos_id", 49407),
        projection_dim=file.shape("text.text_projection.weight")[0]
        if linear
        else file.shape("text.text_projection")[1],
        projection_bias="text.text_projection.bias" in file,
    )


# timm's names of the towers that open_clip builds through timm, by kind and width.
_TIMM_NAMES = {
    ("eva", 768, 16, 224): "eva02_base_patch16_clip_224",
    ("eva", 1024, 14, 224): "eva02_large_patch14_clip_224",
    ("eva", 1024, 14, 336): "eva02_large_patch14_clip_336",
    ("eva", 1408, 14, 224): "eva_giant_patch14_224",
    ("eva", 1792, 14, 224): "eva02_enormous_patch14_clip_224",
    ("siglip", 768, 16, 224): "vit_base_patch16_siglip_224",
    ("siglip", 1152, 14, 378): "vit_so400m_patch14_siglip_378",
}


def to_open_clip(config: CLIPConfig, preprocessing: Metadata, metadata: Metadata) -> dict[str, Any]:
    """The `open_clip_config.json`; what `metadata` (the file that was loaded) says beyond the config is kept."""
    image, text, trunk = config.image, config.text, config.image.trunk
    known = metadata.get("model_cfg") or {}
    vision: dict[str, Any] = {"image_size": _one(trunk.image_size)}
    model: dict[str, Any] = {"embed_dim": text.projection_dim}
    if trunk.pre_norm:
        model["quick_gelu"] = trunk.activation == "quick_gelu"
        vision |= {"layers": trunk.depth, "width": trunk.width, "head_width": trunk.width // trunk.num_heads}
        vision |= {"patch_size": _one(trunk.patch_size), "mlp_ratio": _ratio(trunk.mlp_dim, trunk.width)}
    else:
        model["custom_text"] = True
        eva = isinstance(trunk, EvaConfig)
        key = ("eva" if eva else "siglip", trunk.width, trunk.patch_size[0], trunk.image_size[0])
        name = (known.get("vision_cfg") or {}).get("timm_model_name") or _TIMM_NAMES.get(key)
        if name is None:
            raise ValueError(
                f"timm has no tower for (kind, width, patch, image size) {key}: give format='transformers'"
            )
        vision |= {"timm_model_name": name, "timm_model_pretrained": False, "timm_pool": "token" if eva else "map"}
        vision["timm_proj"] = None if image.projection_dim else "none"
    if config.logit_bias_init is not None:
        model["init_logit_bias"] = config.logit_bias_init
    model["vision_cfg"] = {**(known.get("vision_cfg") or {}), **vision}
    model["text_cfg"] = {**(known.get("text_cfg") or {}), **_to_open_clip_text(text)}
    return {**metadata, "model_cfg": {**known, **model}, "preprocess_cfg": dict(preprocessing)}


def _to_open_clip_text(c: TextConfig) -> dict[str, Any]:
    part: dict[str, Any] = {"context_length": c.context_length, "vocab_size": c.vocab_size, "width": c.width}
    part |= {"heads": c.num_heads, "layers": c.depth, "mlp_ratio": _ratio(c.mlp_dim, c.width)}
    # open_clip's "eos" takes another id rule; for CLIP's vocabulary both rules find the end of text.
    part["pool_type"] = "argmax" if c.pool == "eos" else c.pool
    if not c.causal:
        part["no_causal_mask"] = True
    if c.projection_bias:  # SigLIP
        part |= {"proj_bias": True, "tokenizer_kwargs": {"clean": "canonicalize"}}
    if c.eps != 1e-5:
        part["norm_kwargs"] = {"eps": c.eps}
    if c.activation in ("gelu_tanh", "gelu_pytorch_tanh"):
        part["act_kwargs"] = {"approximate": "tanh"}
    return part


def _ratio(mlp_dim: int, width: int) -> float:
    """A decimal that open_clip's int(width · ratio) turns back into `mlp_dim`."""
    ratio = round(mlp_dim / width, 4)
    return ratio if int(width * ratio) == mlp_dim else (mlp_dim + 0.5) / width


def _depth(file: TensorFile, block: str) -> int:
    """Layers counted by the highest number, so that a gap shows as missing tensors."""
    pattern = re.compile(re.escape(block) + r"\.(\d+)\.")
    return 1 + max((int(match[1]) for name in file if (match := pattern.match(name))), default=-1)


def _image_size(file: TensorFile, rows: int, patch_size: tuple[int, int], hints: Sequence[Any]) -> tuple[int, int]:
    """The image size whose patches, with the class token, have `rows` positions: one of the hints, else a square."""
    side = math.isqrt(rows - 1)
    for size in map(as_pair, [*filter(None, hints), (side * patch_size[0], side * patch_size[1])]):
        grid = [length // patch for length, patch in zip(size, patch_size, strict=True)]
        if math.prod(grid) == rows - 1:
            return grid[0] * patch_size[0], grid[1] * patch_size[1]
    raise ValueError(f"{file.path}: {rows} positions do not make a square grid beside a class token; give image_size=")


def _one(size: tuple[int, int]) -> int | list[int]:
    return size[0] if size[0] == size[1] else list(size)
