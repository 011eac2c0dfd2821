"""What a CLIP checkpoint of transformers is, read from its `config.json`; and back."""

from collections.abc import Mapping
from typing import Any

from ....models.clip import CLIPConfig, ImageConfig, TextConfig
from ....models.eva import EvaConfig
from ....models.vit import ViTConfig
from ...keys import Key, Section, harmless, nested, used
from ..transformers_keys import COMMON, HIDDEN_ACT
from ..vit.timm import as_pair

Metadata = Mapping[str, Any]
_SIGLIP = {"siglip", "siglip_text_model", "siglip_vision_model"}
MODEL_TYPES = {"clip", "clip_text_model", "clip_vision_model"} | _SIGLIP
_TRAINING = dict.fromkeys(("attention_dropout", "dropout", "initializer_factor"), harmless("training"))


def _tower(sizes: Mapping[str, int], activation: str, eps: float, **own: Key) -> dict[str, Key]:
    return {
        **COMMON,
        **_TRAINING,
        **{name: used("count", size) for name, size in sizes.items()},
        "hidden_act": used("text", activation, choices=HIDDEN_ACT),
        "layer_norm_eps": used("number", eps),
        **own,
    }


def _sizes(width: int, mlp: int, depth: int, heads: int) -> dict[str, int]:
    return {
        "hidden_size": width,
        "intermediate_size": mlp,
        "num_hidden_layers": depth,
        "num_attention_heads": heads,
    }


# transformers' CLIPTextConfig, CLIPVisionConfig, CLIPConfig and their SigLIP counterparts.
CLIP_TEXT = Section(
    _tower(
        {**_sizes(512, 2048, 12, 8), "vocab_size": 49408, "max_position_embeddings": 77},
        "quick_gelu",
        1e-5,
        projection_dim=used("count", 512),
        eos_token_id=used("integer", 49407),
    ),
    "text_config",
)
CLIP_IMAGE = Section(
    _tower(
        {**_sizes(768, 3072, 12, 12), "num_channels": 3},
        "quick_gelu",
        1e-5,
        projection_dim=used("count", 512),
        image_size=used("size", 224),
        patch_size=used("size", 32),
    ),
    "vision_config",
)
SIGLIP_TEXT = Section(
    _tower(
        {**_sizes(768, 3072, 12, 12), "vocab_size": 32000, "max_position_embeddings": 64},
        "gelu_pytorch_tanh",
        1e-6,
        projection_size=used("count", None),
    ),
    "text_config",
)
SIGLIP_IMAGE = Section(
    _tower(
        {**_sizes(768, 3072, 12, 12), "num_channels": 3},
        "gelu_pytorch_tanh",
        1e-6,
        image_size=used("size", 224),
        patch_size=used("size", 16),
        vision_use_head=used("flag", True),
    ),
    "vision_config",
)
CLIP = Section(
    {
        **COMMON,
        **_TRAINING,
        "text_config": nested(CLIP_TEXT),
        "vision_config": nested(CLIP_IMAGE),
        # What old files were written with: transformers lets them win, with the defaults for what they leave out.
        "text_config_dict": nested(CLIP_TEXT),
        "vision_config_dict": nested(CLIP_IMAGE),
        "projection_dim": used("count", 512),
        "logit_scale_init_value": used("number", 2.6592),
    }
)
SIGLIP = Section(
    {
        **COMMON,
        **_TRAINING,
        "text_config": nested(SIGLIP_TEXT),
        "vision_config": nested(SIGLIP_IMAGE),
        "text_config_dict": harmless("ignored"),
        "vision_config_dict": harmless("ignored"),
    }
)


def from_transformers(metadata: Metadata, where: str = "config.json") -> CLIPConfig | ImageConfig | TextConfig:
    """Of a `config.json` whose model_type is one of MODEL_TYPES."""
    kind = metadata["model_type"]
    siglip = kind in _SIGLIP
    if kind.endswith("text_model"):
        c = (SIGLIP_TEXT if siglip else CLIP_TEXT).read(metadata, where)
        return _transformers_text(c, siglip, c["projection_dim"] if _projects(c) else 0)
    if kind.endswith("vision_model"):
        c = (SIGLIP_IMAGE if siglip else CLIP_IMAGE).read(metadata, where)
        return _transformers_image(c, siglip, c["projection_dim"] if _projects(c) else 0)
    c = (SIGLIP if siglip else CLIP).read(metadata, where)
    image, text = (
        c[f"{name}_dict" if not siglip and metadata.get(f"{name}_dict") is not None else name]
        for name in ("vision_config", "text_config")
    )
    if siglip and not image["vision_use_head"]:
        raise ValueError(f"{where}, vision_config: 'vision_use_head' is False, expected True beside a text tower")
    shared = 0 if siglip else c["projection_dim"]
    return CLIPConfig(
        _transformers_image(image, siglip, shared),
        _transformers_text(text, siglip, shared),
        logit_scale_init=2.6592 if siglip else c["logit_scale_init_value"],
        logit_bias_init=-10.0 if siglip else None,
    )


def _projects(c: Metadata) -> bool:
    return "WithProjection" in (c["architectures"] or [""])[0]


def _transformers_text(c: Metadata, siglip: bool, projection_dim: int) -> TextConfig:
    if siglip:
        projection_dim = c["projection_size"] or c["hidden_size"]
    # 2 is what old configs say by mistake: then the largest id is the end of text (transformers, modeling_clip.py).
    pool = "last" if siglip else "argmax" if c["eos_token_id"] == 2 else "eos"
    return TextConfig(
        width=c["hidden_size"],
        depth=c["num_hidden_layers"],
        num_heads=c["num_attention_heads"],
        mlp_dim=c["intermediate_size"],
        vocab_size=c["vocab_size"],
        context_length=c["max_position_embeddings"],
        activation=HIDDEN_ACT[c["hidden_act"]],
        eps=c["layer_norm_eps"],
        causal=not siglip,
        pool=pool,
        eos_id=c["eos_token_id"] if pool == "eos" else 49407,
        projection_dim=projection_dim,
        projection_bias=siglip,
    )


def _transformers_image(c: Metadata, siglip: bool, projection_dim: int) -> ImageConfig:
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
        pool="token" if not siglip else "map" if c["vision_use_head"] else "none",
        class_token=not siglip,
        class_position=not siglip,
        patch_bias=siglip,
        pre_norm=not siglip,
        pos_interpolation="bicubic",
        activation=HIDDEN_ACT[c["hidden_act"]],
        eps=c["layer_norm_eps"],
        init="openai",
    )
    return ImageConfig(trunk, projection_dim)


def to_transformers(config: CLIPConfig | ImageConfig | TextConfig, dtype: str, metadata: Metadata) -> dict[str, Any]:
    """The `config.json`, with what `metadata` says beyond the config; ValueError if transformers has no such model."""
    image = config if isinstance(config, ImageConfig) else config.image if isinstance(config, CLIPConfig) else None
    text = config if isinstance(config, TextConfig) else config.text if isinstance(config, CLIPConfig) else None
    siglip = text.projection_bias if text else image is not None and not image.trunk.class_token
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
    if isinstance(trunk, EvaConfig) or trunk.pre_norm == siglip or c.projection_bias or trunk.norm_after_pool:
        said = f"{type(trunk).__name__}, pre_norm={trunk.pre_norm}, norm_after_pool={trunk.norm_after_pool}"
        raise ValueError(f"transformers has no such image tower: {said}")
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
    if siglip:
        return part | {"vision_use_head": trunk.pool == "map"}
    return part | ({"projection_dim": c.projection_dim} if c.projection_dim else {})


_ACTIVATIONS = {"gelu_tanh": "gelu_pytorch_tanh"}


def one(size: tuple[int, int]) -> int | list[int]:
    return size[0] if size[0] == size[1] else list(size)
