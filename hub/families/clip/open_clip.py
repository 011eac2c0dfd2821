"""What a CLIP checkpoint of open_clip's is, read from `open_clip_config.json` and the shapes of its tensors; and back.

Every key of `model_cfg`, `vision_cfg` and `text_cfg` (open_clip/model.py at 3.3.0) has its fate in a table; keys that
are absent are what open_clip takes them to be. Image towers of timm's are read as in `hub.families.vit.timm`. Files
without a config (OpenAI's archives, training checkpoints, EVA-CLIP's own) show in their tensors what they are.
"""

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from ....models.clip import CLIPConfig, ImageConfig, TextConfig
from ....models.eva import GENERATIONS, EvaConfig
from ....models.vit import ViTConfig
from ...files.tensors import TensorFile
from ...keys import Key, Section, brief, harmless, nested, only, required, used
from ..vit import timm
from ..vit.architectures import architectures
from ..vit.timm import as_pair, refuse
from .configs import one

Metadata = Mapping[str, Any]
Overrides = Mapping[str, Any]

# Blocks of another kind than the published one: none of them stands in open_clip's own list of models.
_BLOCKS: dict[str, Key] = {"block_type": only(None, "default")}
_BLOCKS |= dict.fromkeys(
    ("qk_norm", "scaled_cosine_attn", "scale_heads", "scale_attn_inner", "scale_attn", "scale_fc"), only(False)
)
VISION = Section(
    {
        "layers": used("count", 12),
        "width": used("count", 768),
        "head_width": used("count", 64),
        "mlp_ratio": used("positive", 4.0),
        "patch_size": used("size", 16, null=True),
        "image_size": used("size", 224),
        "ls_init_value": used("number", None),
        "patch_dropout": harmless("training"),
        "attentional_pool": only(False),
        "attn_pooler_queries": harmless("ignored"),  # without attentional_pool
        "attn_pooler_heads": harmless("ignored"),
        "no_ln_pre": used("flag", False),
        "pos_embed_type": harmless("training"),  # the fixed table stands in the file as the learned one does
        "final_ln_after_pool": used("flag", False),
        "pool_type": used("text", "tok", choices=("tok", "avg")),
        "output_tokens": only(False),
        "act_kwargs": used("object", None),
        "norm_kwargs": used("object", None),
        **_BLOCKS,
        "timm_model_name": used("text", None),
        "timm_model_pretrained": harmless("training"),
        "timm_pool": used("text", "avg", choices=("avg", "token", "map", "")),
        "timm_proj": used("text", "linear", null=True, choices=("linear", "none", "")),
        "timm_proj_bias": used("flag", False),
        "timm_drop": harmless("training"),
        "timm_drop_path": harmless("training"),
    },
    "vision_cfg",
)
TEXT = Section(
    {
        "context_length": used("count", 77),
        "vocab_size": used("count", 49408),
        "hf_tokenizer_name": harmless("tokens"),
        "tokenizer_mode": harmless("tokens"),
        "tokenizer_kwargs": harmless("tokens"),
        "width": used("count", 512),
        "heads": used("count", 8),
        "layers": used("count", 12),
        "mlp_ratio": used("positive", 4.0),
        "ls_init_value": used("number", None),
        "embed_cls": only(False),
        "pad_id": harmless("ignored"),  # without embed_cls
        "eos_id": used("integer", 2),
        "no_causal_mask": used("flag", False),
        "final_ln_after_pool": harmless("ignored"),
        "pool_type": used("text", "argmax", choices=("argmax", "eos", "last", "first")),
        "proj_bias": used("flag", False),
        "proj_type": used("text", "linear", choices=("linear", "none")),
        "output_tokens": only(False),
        "act_kwargs": used("object", None),
        "norm_kwargs": used("object", None),
        **_BLOCKS,
        "hf_model_name": only(None),
        "hf_model_pretrained": harmless("ignored"),  # without hf_model_name
        "hf_proj_type": harmless("ignored"),
        "hf_pooler_type": harmless("ignored"),
    },
    "text_cfg",
)
MODEL = Section(
    {
        "embed_dim": required("count"),
        "vision_cfg": nested(VISION),
        "text_cfg": nested(TEXT),
        "quick_gelu": used("flag", False),
        "custom_text": harmless("runtime"),  # the same towers under other names
        "init_logit_scale": used("number", 2.6592600),
        "init_logit_bias": used("number", None),
        "nonscalar_logit_scale": harmless("runtime"),
        "multimodal_cfg": only(None),
        "cast_dtype": harmless("runtime"),
        "output_dict": harmless("outputs"),
    },
    "model_cfg",
)


def from_open_clip(
    file: TensorFile, metadata: Metadata, overrides: Overrides, where: str = "open_clip_config.json"
) -> CLIPConfig:
    """`file` with the text tower under `text.`; `metadata` is `open_clip_config.json`, {} for files without one.

    Without it the activation is OpenAI's quick_gelu, but for the sizes that OpenAI never published (heads of 80, 88 or
    104 channels) and timm's towers.
    """
    model = metadata.get("model_cfg") or {}
    _name_strangers(file, model, where)
    if not metadata:
        return _bare(file, overrides)
    c = MODEL.read(model, where)
    vision = c["vision_cfg"]
    if vision["timm_model_name"]:
        image = _timm_tower(file, c, overrides, where)
    else:
        image = _image(c, where)
        _check_sizes(file, c, where)
        rows, patch = file.shape("visual.positional_embedding")[0], image.trunk.patch_size
        size = _image_size(file, rows, patch, [image.trunk.image_size, overrides.get("image_size")])
        trunk = dataclasses.replace(image.trunk, image_size=size)
        if "num_heads" in overrides:
            trunk = dataclasses.replace(trunk, num_heads=overrides["num_heads"])
        image = dataclasses.replace(image, trunk=trunk)
    text = _text(c, where)
    if "text.positional_embedding" in file:
        text = dataclasses.replace(text, context_length=file.shape("text.positional_embedding")[0])
    bias = (c["init_logit_bias"] or 0.0) if "logit_bias" in file else None
    return CLIPConfig(image, text, c["init_logit_scale"], bias)


def _name_strangers(file: TensorFile, model: Metadata, where: str) -> None:
    """ValueError that says what a model is whose towers are of another kind than those known here."""
    vision, text = model.get("vision_cfg") or {}, model.get("text_cfg") or {}
    known = "expected a ViT or EVA image tower and a text tower of open_clip's own"
    kinds = [
        (model.get("multimodal_cfg"), "multimodal_cfg", "a CoCa model", r"text_decoder\..*"),
        (text.get("hf_model_name"), "hf_model_name", "a text tower of transformers", r"text\.transformer\.(?!resbl).*"),
        (isinstance(vision.get("layers"), list) and vision["layers"], "layers", "a ResNet", r"visual\.layer1\..*"),
    ]
    for value, key, kind, pattern in kinds:
        if value:
            raise ValueError(f"{where}: {key!r} is {brief(value)}: {kind}, {known}")
        if not model and any(re.fullmatch(pattern, name) for name in file):
            raise ValueError(f"{file.path}: {kind}, {known}")
    name = str(vision.get("timm_model_name") or "")
    if name and name.partition(".")[0] not in architectures():
        raise ValueError(f"{where}: 'timm_model_name' is {brief(name)}: an image tower of timm's, {known}")


def _check_sizes(file: TensorFile, c: Metadata, where: str) -> None:
    """ValueError naming the key whose size the tensors do not have."""
    width, _, *patch = file.shape("visual.conv1.weight")
    vision, text, block = c["vision_cfg"], c["text_cfg"], "transformer.resblocks"
    got: list[tuple[str, Metadata, str, Any]] = [
        ("vision_cfg", vision, "width", width),
        ("vision_cfg", vision, "layers", _depth(file, f"visual.{block}")),
        ("vision_cfg", vision, "patch_size", tuple(patch)),
        ("text_cfg", text, "width", file.shape("text.token_embedding.weight")[1]),
        ("text_cfg", text, "layers", _depth(file, f"text.{block}")),
        ("text_cfg", text, "vocab_size", file.shape("text.token_embedding.weight")[0]),
    ]
    for section, part, key, size in got:
        wanted = as_pair(part[key]) if key == "patch_size" else part[key]
        if wanted != size:
            refuse(f"{where}, {section}", key, part[key], f"the tensors have {size}")


def _activation(quick: bool, part: Metadata, where: str) -> str:
    options = dict(part["act_kwargs"] or {})
    approximate = options.pop("approximate", "none")
    if options or approximate not in ("none", "tanh") or (quick and part["act_kwargs"]):
        refuse(where, "act_kwargs", part["act_kwargs"], "expected {'approximate': 'tanh'} without quick_gelu")
    return "quick_gelu" if quick else "gelu_tanh" if approximate == "tanh" else "gelu"


def _eps(part: Metadata, where: str) -> float:
    options = part["norm_kwargs"] or {}
    if set(options) - {"eps"}:
        refuse(where, "norm_kwargs", options, "expected 'eps' alone")
    return options.get("eps", 1e-5)


def _image(c: Metadata, where: str) -> ImageConfig:
    """open_clip's own image tower."""
    part = c["vision_cfg"]
    if part["patch_size"] is None:
        refuse(where, "patch_size", None, "expected the size of the patches")
    return ImageConfig(
        ViTConfig(
            width=part["width"],
            depth=part["layers"],
            num_heads=part["width"] // part["head_width"],
            mlp_dim=int(part["width"] * part["mlp_ratio"]),
            patch_size=as_pair(part["patch_size"]),
            image_size=as_pair(part["image_size"]),
            num_classes=0,
            pool={"tok": "token", "avg": "gap"}[part["pool_type"]],
            norm_after_pool=part["final_ln_after_pool"],
            patch_bias=False,
            pre_norm=not part["no_ln_pre"],
            layer_scale=part["ls_init_value"],
            pos_interpolation="bicubic_antialias",
            activation=_activation(c["quick_gelu"], part, f"{where}, vision_cfg"),
            eps=_eps(part, f"{where}, vision_cfg"),
            init="openai",
        ),
        projection_dim=c["embed_dim"],
    )


def _text(c: Metadata, where: str) -> TextConfig:
    part, where = c["text_cfg"], f"{where}, text_cfg"
    return TextConfig(
        width=part["width"],
        depth=part["layers"],
        num_heads=part["heads"],
        mlp_dim=int(part["width"] * part["mlp_ratio"]),
        vocab_size=part["vocab_size"],
        context_length=part["context_length"],
        activation=_activation(c["quick_gelu"], part, where),
        eps=_eps(part, where),
        causal=not part["no_causal_mask"],
        pool=part["pool_type"],
        eos_id=part["eos_id"],
        projection_dim=c["embed_dim"] if part["proj_type"] == "linear" else 0,
        projection_bias=part["proj_bias"] and part["proj_type"] == "linear",
        layer_scale=part["ls_init_value"],
    )


def _timm_arguments(part: Metadata, where: str) -> dict[str, Any]:
    """The arguments of timm's tower in open_clip: its pool, and norms where timm puts them.

    With a projection of open_clip's own the tower is built as registered, and then only its pool is exchanged.
    """
    where = f"{where}, vision_cfg"
    arguments = timm.arguments_of(where, {"architecture": part["timm_model_name"]})
    pool = part["timm_pool"]
    if not pool and part["timm_proj"] != "linear":
        refuse(where, "timm_pool", pool, "expected a pooled output")
    if part["timm_proj"] == "linear":
        name = "use_fc_norm" if arguments["class"] == "eva" else "fc_norm"
        if arguments[name] is None:
            arguments[name] = arguments["global_pool"] == "avg"
    return arguments | {"global_pool": pool or arguments["global_pool"], "num_classes": 0}


def _timm_projection(c: Metadata) -> tuple[int, bool]:
    part = c["vision_cfg"]
    if part["timm_proj"] == "none":
        return 0, False
    return c["embed_dim"], part["timm_proj_bias"] if part["timm_proj"] == "linear" else True


def _timm_tower(file: TensorFile, c: Metadata, overrides: Overrides, where: str) -> ImageConfig:
    part = c["vision_cfg"]
    trunk = file.renamed([(r"^visual\.trunk\.", "")])
    arguments = _timm_arguments(part, where)
    more = {key: arguments[key] for key in ("global_pool", "fc_norm", "use_fc_norm") if key in arguments}
    metadata = {"architecture": part["timm_model_name"], "model_args": {"img_size": part["image_size"]}}
    return from_timm(trunk, metadata, overrides, where, _timm_projection(c), **more)


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


def _bare(file: TensorFile, overrides: Overrides) -> CLIPConfig:
    """Both towers of a file without a config."""
    if "visual.conv1.weight" in file:
        width = file.shape("visual.conv1.weight")[0]
        activation = "gelu" if width in _HEAD_WIDTHS else "quick_gelu"
        image = _bare_image(file, activation, overrides)
    else:
        activation, layers = "gelu", ("visual.trunk.head", "visual.head.proj")
        found = (layer for layer in layers if f"{layer}.weight" in file)
        projection = next(((file.shape(f"{x}.weight")[0], f"{x}.bias" in file) for x in found), (0, False))
        trunk = file.renamed([(r"^visual\.trunk\.", "")])
        image = from_timm(trunk, {}, overrides, projection=projection)
    return CLIPConfig(image, _bare_text(file, activation), logit_bias_init=0.0 if "logit_bias" in file else None)


_HEAD_WIDTHS = {1280: 80, 1408: 88, 1664: 104}  # ViT-H, g and bigG; all others: 64


def _bare_image(file: TensorFile, activation: str, overrides: Metadata) -> ImageConfig:
    width, channels, *patch = file.shape("visual.conv1.weight")
    patch_size, positions = as_pair(patch), file.shape("visual.positional_embedding")[0]
    image_size = _image_size(file, positions, patch_size, [overrides.get("image_size")])
    block = "visual.transformer.resblocks"
    return ImageConfig(
        ViTConfig(
            width=width,
            depth=_depth(file, block),
            num_heads=overrides.get("num_heads") or width // _HEAD_WIDTHS.get(width, 64),
            mlp_dim=file.shape(f"{block}.0.mlp.c_fc.weight")[0],
            patch_size=patch_size,
            image_size=image_size,
            num_channels=channels,
            num_classes=0,
            patch_bias=False,
            pre_norm=True,
            pos_interpolation="bicubic_antialias",
            activation=activation,
            eps=1e-5,
            init="openai",
        ),
        projection_dim=file.shape("visual.proj")[1],
    )


def _bare_text(file: TensorFile, activation: str) -> TextConfig:
    context_length, width = file.shape("text.positional_embedding")
    block = "text.transformer.resblocks"
    linear = "text.text_projection.weight" in file
    return TextConfig(
        width=width,
        depth=_depth(file, block),
        num_heads=max(width // 64, 1),
        mlp_dim=file.shape(f"{block}.0.mlp.c_fc.weight")[0],
        vocab_size=file.shape("text.token_embedding.weight")[0],
        context_length=context_length,
        activation=activation,
        eps=1e-5,
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
    ("siglip", 1152, 14, 384): "vit_so400m_patch14_siglip_384",
}


def to_open_clip(config: CLIPConfig, preprocessing: Metadata, metadata: Metadata) -> dict[str, Any]:
    """The `open_clip_config.json`; what `metadata` (the file that was loaded) says beyond the config is kept.

    ValueError naming what differs if open_clip would not read the same model back.
    """
    image, text, trunk = config.image, config.text, config.image.trunk
    known = metadata.get("model_cfg") or {}
    old_vision, old_text = (dict(known.get(name) or {}) for name in ("vision_cfg", "text_cfg"))
    width = text.projection_dim or image.projection_dim or trunk.width
    model: dict[str, Any] = {"embed_dim": width, "quick_gelu": text.activation == "quick_gelu"}
    own = not isinstance(trunk, EvaConfig) and not trunk.patch_bias and trunk.class_token and not trunk.rope
    if own and not old_vision.get("timm_model_name"):
        vision = _to_image(trunk)
    else:
        model["custom_text"] = True
        eva = isinstance(trunk, EvaConfig)
        key = ("eva" if eva else "siglip", trunk.width, trunk.patch_size[0], trunk.image_size[0])
        name = old_vision.get("timm_model_name") or _TIMM_NAMES.get(key)
        if name is None:
            raise ValueError(
                f"timm has no tower for (kind, width, patch, image size) {key}: give format='transformers'"
            )
        pools = {"token": "token", "gap": "avg", "map": "map", "map_all": "map"}
        vision = {"image_size": one(trunk.image_size), "timm_model_name": name, "timm_model_pretrained": False}
        vision |= {"timm_pool": pools.get(trunk.pool, trunk.pool)}
        if not image.projection_dim:
            vision["timm_proj"] = "none"
        elif image.projection_bias and not old_vision.get("timm_proj"):
            vision["timm_proj"] = None
        else:
            vision |= {"timm_proj": "linear", "timm_proj_bias": image.projection_bias}
    model["init_logit_bias"] = config.logit_bias_init
    model["vision_cfg"] = old_vision | vision
    model["text_cfg"] = old_text | _to_text(text, old_text)
    made = {key: value for key, value in (dict(known) | model).items() if key != "init_logit_bias" or value is not None}
    _check_written(config, made)
    return {**metadata, "model_cfg": made, "preprocess_cfg": dict(preprocessing)}


def _to_image(trunk: ViTConfig) -> dict[str, Any]:
    pools = {"token": "tok", "gap": "avg"}
    return {
        "image_size": one(trunk.image_size),
        "layers": trunk.depth,
        "width": trunk.width,
        "head_width": trunk.width // trunk.num_heads,
        "patch_size": one(trunk.patch_size),
        "mlp_ratio": _ratio(trunk.mlp_dim, trunk.width),
        **_spoken("ls_init_value", trunk.layer_scale),
        **_spoken("no_ln_pre", not trunk.pre_norm),
        **_spoken("final_ln_after_pool", trunk.norm_after_pool),
        **_spoken("pool_type", pools.get(trunk.pool, trunk.pool), "tok"),
        **_spoken("norm_kwargs", {"eps": trunk.eps}, {"eps": 1e-5}),
        **_spoken("act_kwargs", {"approximate": "tanh"} if "tanh" in trunk.activation else None),
    }


def _to_text(c: TextConfig, old: Metadata) -> dict[str, Any]:
    siglip = c.projection_bias and "tokenizer_kwargs" not in old
    return {
        "context_length": c.context_length,
        "vocab_size": c.vocab_size,
        "width": c.width,
        "heads": c.num_heads,
        "layers": c.depth,
        "mlp_ratio": _ratio(c.mlp_dim, c.width),
        "pool_type": c.pool,
        **({"eos_id": c.eos_id} if c.pool == "eos" else {}),
        **_spoken("no_causal_mask", not c.causal),
        **_spoken("proj_bias", c.projection_bias),
        **_spoken("proj_type", "linear" if c.projection_dim else "none", "linear"),
        **({"tokenizer_kwargs": {"clean": "canonicalize"}} if siglip else {}),
        **_spoken("ls_init_value", c.layer_scale),
        **_spoken("norm_kwargs", {"eps": c.eps}, {"eps": 1e-5}),
        **_spoken("act_kwargs", {"approximate": "tanh"} if "tanh" in c.activation else None),
    }


def _spoken(key: str, value: Any, default: Any = None) -> dict[str, Any]:
    """The entry, unless it is what open_clip takes its absence to be."""
    return {} if value == default or (default is None and not value) else {key: value}


def _check_written(config: CLIPConfig, model: Metadata) -> None:
    """ValueError naming the fields in which open_clip's reading of `model` differs from the config."""
    where = "open_clip"
    c = MODEL.read(model, where)
    trunk = config.image.trunk
    if c["vision_cfg"]["timm_model_name"]:
        sizes = {"embed_dim": trunk.width, "depth": trunk.depth, "mlp_dim": trunk.mlp_dim}
        sizes |= {"patch_size": trunk.patch_size, "in_chans": trunk.num_channels, "img_size": trunk.image_size}
        # open_clip builds the tower with the heads of its architecture; sizes are those of the weights.
        again = ImageConfig(
            timm.config_of(where, _timm_arguments(c["vision_cfg"], where) | sizes), *_timm_projection(c)
        )
    else:
        again = _image(c, where)
    pairs = [
        (timm.comparable(trunk), timm.comparable(again.trunk)),
        (_comparable(config.text), _comparable(_text(c, where))),
    ]
    pairs.append((_projection(config.image), _projection(again)))
    differing = [
        f"{key}={value!r}" for ours, theirs in pairs for key, value in ours.items() if theirs.get(key) != value
    ]
    if differing:
        raise ValueError(f"open_clip has no model with {', '.join(differing)}")


def _projection(c: ImageConfig) -> dict[str, Any]:
    return {"projection_dim": c.projection_dim, "projection_bias": c.projection_bias and c.projection_dim > 0}


def _comparable(c: TextConfig) -> dict[str, Any]:
    fields = dataclasses.asdict(c) | {"layer_scale": c.layer_scale is not None}
    fields["activation"] = "gelu_tanh" if c.activation in ("gelu_new", "gelu_pytorch_tanh") else c.activation
    unread = ["scan", "remat", *([] if c.pool == "eos" else ["eos_id"])]
    return {key: value for key, value in fields.items() if key not in unread}


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
