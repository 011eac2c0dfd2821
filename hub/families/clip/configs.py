"""What a CLIP checkpoint of transformers is, read from its `config.json`; and back."""

from collections.abc import Mapping
from typing import Any

from ....models.clip import CLIPConfig, ImageConfig, TextConfig
from ....models.eva import EvaConfig
from ....models.vit import ViTConfig
from ..vit.timm import as_pair

Metadata = Mapping[str, Any]
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
        image_size=size,
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
        "image_size": one(trunk.image_size),
        "patch_size": one(trunk.patch_size),
        "hidden_act": _ACTIVATIONS.get(trunk.activation, trunk.activation),
        "layer_norm_eps": trunk.eps,
    }
    return part | ({"projection_dim": c.projection_dim} if c.projection_dim else {})


_ACTIVATIONS = {"gelu_tanh": "gelu_pytorch_tanh"}


def one(size: tuple[int, int]) -> int | list[int]:
    return size[0] if size[0] == size[1] else list(size)
