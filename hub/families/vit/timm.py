"""timm's `config.json`: the model that timm would make of it, as a `ViTConfig` or `EvaConfig`, and back.

Every argument of timm's VisionTransformer, VisionTransformerDistilled and Eva has its fate in a table. One that the
file leaves out is the one registered under the architecture's name, then the default of the class
(timm/models/vision_transformer.py, deit.py, eva.py at 1.0.31). Files without a config show in their tensors what they
are, but for what overrides have to tell: heads, where no published size has them.
"""

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from ....models.eva import EvaConfig
from ....models.vit import SIZES, ViTConfig
from ...files.tensors import TensorFile, nearest
from ...keys import Section, brief, harmless, only, used
from .architectures import architectures

Metadata = Mapping[str, Any]
Pair = tuple[int, int]

_POOLS = {"token": "token", "avg": "gap", "map": "map", "": "none"}
_ACTIVATIONS = {"gelu": "gelu", "gelu_tanh": "gelu_tanh", "quick_gelu": "quick_gelu", "silu": "silu", "swish": "silu"}
_ACTIVATIONS |= {"relu": "relu", "mish": "mish", "sigmoid": "sigmoid", "tanh": "tanh"}
_SHARED = {
    "img_size": used("size", 224),
    "patch_size": used("size", 16),
    "in_chans": used("count", 3),
    "num_classes": used("whole", 1000),
    "embed_dim": used("count", 768),
    "depth": used("count", 12),
    "num_heads": used("count", 12),
    "mlp_ratio": used("positive", 4.0),
    "qkv_bias": used("flag", True),
    "qk_norm": used("flag", False),
    "init_values": used("number", None),
    "class_token": used("flag", True),
    "no_embed_class": used("flag", False),
    "dynamic_img_pad": only(False),
    "dynamic_img_size": harmless("runtime"),
    "strict_img_size": harmless("runtime"),
    "device": harmless("runtime"),
    "dtype": harmless("runtime"),
    "drop_rate": harmless("training"),
    "pos_drop_rate": harmless("training"),
    "patch_drop_rate": harmless("training"),
    "proj_drop_rate": harmless("training"),
    "attn_drop_rate": harmless("training"),
    "drop_path_rate": harmless("training"),
}
VISION_TRANSFORMER = Section(
    {
        **_SHARED,
        "global_pool": used("text", "token", choices=_POOLS),
        "scale_attn_norm": only(False),
        "scale_mlp_norm": only(False),
        "proj_bias": used("flag", True),
        "pos_embed": used("text", "learn", choices=("learn", "none", "")),
        "reg_tokens": used("whole", 0),
        "pre_norm": used("flag", False),
        "final_norm": used("flag", True),
        "fc_norm": used("flag", None),
        "pool_include_prefix": used("flag", False),
        "weight_init": harmless("training"),
        "fix_init": harmless("training"),
        "embed_layer": only(None),
        "embed_norm_layer": only(None),
        "norm_layer": used("text", None, choices=("layernorm", "layernormfp32")),
        "act_layer": used("text", "gelu", choices=_ACTIVATIONS),
        "block_fn": only(None),
        "mlp_layer": only(None),
        "attn_layer": only("attn"),
    },
    "model_args",
)
EVA = Section(
    {
        **_SHARED,
        "global_pool": used("text", "avg", choices=_POOLS),
        "num_kv_heads": used("any", None),
        "qkv_fused": used("flag", True),
        "swiglu_mlp": used("flag", False),
        "swiglu_align_to": only(0),
        "scale_mlp": used("flag", False),
        "scale_attn_inner": used("flag", False),
        "attn_type": used("text", "eva", choices=("eva", "rope")),
        "norm_layer": only(None),
        "attn_only_layer_scale": only(False),
        "num_reg_tokens": used("whole", 0),
        "use_abs_pos_emb": used("flag", True),
        "use_rot_pos_emb": used("flag", False),
        "rope_type": only("cat"),
        "rope_grid_offset": used("number", 0.0),
        "rope_grid_indexing": used("text", "ij", choices=("ij", "xy")),
        "rope_temperature": used("positive", 10000.0),
        "rope_rotate_half": only(False),
        "rope_shift_coords": harmless("training"),
        "rope_jitter_coords": harmless("training"),
        "rope_rescale_coords": harmless("training"),
        "rope_mrope_section": only(None),
        "use_post_norm": used("flag", False),
        "use_pre_transformer_norm": used("flag", False),
        "use_post_transformer_norm": used("flag", None),
        "use_fc_norm": used("flag", None),
        "attn_pool_num_heads": used("count", None),
        "attn_pool_mlp_ratio": used("positive", None),
        "ref_feat_shape": used("size", None),
        "head_init_scale": harmless("training"),
    },
    "model_args",
)
_SECTIONS = {"vit": VISION_TRANSFORMER, "distilled": VISION_TRANSFORMER, "eva": EVA}
_INSIDE = {"class": "vit", "eps": 1e-6, "gated": False}  # what the architecture alone says, see architectures.py
# One architecture of each class and eps, any of whose arguments can be set: what `document` saves other models as.
_BASES = ("vit_base_patch16_224", "vit_base_patch16_clip_224", "deit_base_distilled_patch16_224")
_BASES += ("eva_giant_patch14_224", "vit_pe_spatial_base_patch16_512", "vit_giant_patch14_dinov2")


def flat(metadata: Metadata) -> dict[str, Any]:
    """A `config.json` with its `pretrained_cfg`; files of 2022 are one without the entries around it."""
    if not metadata or "pretrained_cfg" in metadata:
        return dict(metadata)
    around = ("architecture", "num_features", "model_args", "num_classes", "global_pool", "label_names")
    names = {"label_names": metadata["labels"]} if "labels" in metadata else {}
    return {**names, **{key: metadata[key] for key in around if key in metadata}, "pretrained_cfg": dict(metadata)}


def arguments_of(where: str, metadata: Metadata) -> dict[str, Any]:
    """Every argument of the model that timm makes of a `config.json`; ValueError names the first not understood."""
    metadata = flat(metadata)
    architecture = str(metadata["architecture"]).partition(".")[0]
    registered = architectures().get(architecture)
    if registered is None:
        raise ValueError(f"{where}: unknown architecture {architecture!r}{nearest(architecture, architectures())}")
    published = metadata.get("pretrained_cfg") or {}
    given = {key: value for key, value in (metadata.get("model_args") or {}).items() if value is not None}
    inputs: dict[str, Any] = {}
    if size := published.get("input_size"):
        inputs["in_chans"] = size[0]
        if published.get("fixed_input_size", True):
            inputs["img_size"] = list(size[1:])
    for source in (published, metadata):
        if source.get("num_classes") is not None and source["num_classes"] >= 0:
            inputs["num_classes"] = source["num_classes"]
    if published.get("global_pool") is not None:
        inputs["global_pool"] = published["global_pool"]
    if published.get("label_offset"):
        refuse(where, "label_offset", published["label_offset"], "expected 0")
    inside = _INSIDE | {key: value for key, value in registered.items() if key in _INSIDE}
    own = {key: value for key, value in registered.items() if key not in _INSIDE}
    arguments = _SECTIONS[inside["class"]].read({**inputs, **own, **given}, where) | inside
    if arguments.get("norm_layer"):
        arguments["eps"] = 1e-6  # timm's own default, whatever the architecture's
    if arguments.get("num_kv_heads") not in (None, arguments["num_heads"]):
        refuse(where, "num_kv_heads", arguments["num_kv_heads"], f"expected num_heads {arguments['num_heads']}")
    if inside["class"] == "distilled":
        for key, choice in (
            ("class_token", True),
            ("reg_tokens", 0),
            ("global_pool", "token"),
            ("no_embed_class", False),
        ):
            if arguments[key] != choice:
                refuse(where, key, arguments[key], f"expected {choice!r} in a distilled model")
    return arguments


def read(
    file: TensorFile, metadata: Metadata, overrides: Metadata, where: str = "config.json", **more: Any
) -> ViTConfig:
    """The config of a file of timm's; `more` arguments win over those of the file."""
    if not metadata:
        return _bare(file, overrides)
    arguments = arguments_of(where, metadata) | more
    measured, given = _measured(file), flat(metadata).get("model_args") or {}
    for key in ("embed_dim", "depth", "in_chans", "patch_size"):
        if given.get(key) is not None and _plain(given[key]) != _plain(measured[key]):
            refuse(where, key, given[key], f"the tensors have {measured[key]!r}")
    if given.get("mlp_ratio") is not None and _mlp_dim({**arguments, **measured}) != measured["mlp_dim"]:
        refuse(where, "mlp_ratio", given["mlp_ratio"], f"the tensors have an MLP of {measured['mlp_dim']}")
    if not any(key in source for key in ("num_classes",) for source in (given, flat(metadata), more)):
        published = flat(metadata).get("pretrained_cfg") or {}
        arguments["num_classes"] = published.get("num_classes", _head_rows(file))
    arguments |= measured
    if "num_heads" in overrides:
        arguments["num_heads"] = overrides["num_heads"]
    size = (flat(metadata).get("pretrained_cfg") or {}).get("input_size")
    hints = [arguments["img_size"], size and size[1:], overrides.get("image_size")]
    return config_of(where, arguments | {"img_size": _image_size(file, arguments, hints)})


def config_of(where: str, arguments: Metadata) -> ViTConfig:
    """The config that complete arguments stand for; "mlp_dim" counts before the ratio."""
    a = dict(arguments)
    eva, distilled = a["class"] == "eva", a["class"] == "distilled"
    pool = a["global_pool"]
    if pool == "" and a["num_classes"]:
        refuse(where, "global_pool", pool, "with a classifier of every token")
    registers = a["num_reg_tokens"] if eva else a["reg_tokens"]
    prefix = bool(a["class_token"]) + distilled + registers
    everything = (eva and pool == "map") or (not eva and a["pool_include_prefix"] and pool in ("avg", "map"))
    positions = a["use_abs_pos_emb"] if eva else a["pos_embed"] == "learn"
    config = ViTConfig(
        width=a["embed_dim"],
        depth=a["depth"],
        num_heads=a["num_heads"],
        mlp_dim=a.get("mlp_dim") or _mlp_dim(a),
        patch_size=as_pair(a["patch_size"]),
        image_size=as_pair(a["img_size"]),
        num_channels=a["in_chans"],
        num_classes=a["num_classes"],
        pool=_POOLS[pool] + "_all" if everything else _POOLS[pool],
        class_token=bool(a["class_token"]),
        distilled=distilled,
        num_registers=registers,
        class_position=bool(positions and prefix and not a["no_embed_class"]),
        pos_embed="learn" if positions else "none",
        pos_interpolation="bicubic_antialias",
        qkv_bias=a["qkv_bias"],
        qk_norm=a["qk_norm"],
        layer_scale=a["init_values"],
        eps=a["eps"],
        init="timm",
    )
    return _eva_of(where, a, config) if eva else dataclasses.replace(config, **_vit_fields(where, a))


def _vit_fields(where: str, a: Mapping[str, Any]) -> dict[str, Any]:
    """What a VisionTransformer has besides."""
    after = a["global_pool"] in ("avg", "avgmax", "max") if a["fc_norm"] is None else bool(a["fc_norm"])
    if (after and a["final_norm"] and a["global_pool"] == "") or (after and a["class"] == "distilled"):
        refuse(where, "fc_norm", a["fc_norm"], f"with global_pool {a['global_pool']!r}")
    return {
        "norm_after_pool": bool(after and a["final_norm"]),
        "final_norm": bool(a["final_norm"]),
        "pre_norm": a["pre_norm"],
        "patch_bias": not a["pre_norm"],
        "proj_bias": a["proj_bias"],
        "activation": _ACTIVATIONS[a["act_layer"]],
        "gated": a["gated"],
    }


def _eva_of(where: str, a: Mapping[str, Any], config: ViTConfig) -> ViTConfig:
    """timm's Eva: with `attn_type="rope"` a ViT with rotary positions, else with EVA's attention without key biases."""
    after = a["global_pool"] == "avg" if a["use_fc_norm"] is None else bool(a["use_fc_norm"])
    final = not after if a["use_post_transformer_norm"] is None else bool(a["use_post_transformer_norm"])
    if after and final:
        refuse(where, "use_post_transformer_norm", True, "beside use_fc_norm")
    if after and a["global_pool"] == "":
        refuse(where, "use_fc_norm", True, "without pooling")
    ratio = a["attn_pool_mlp_ratio"]
    pooled = a["global_pool"] == "map"
    fields: dict[str, Any] = {
        "norm_after_pool": after,
        "final_norm": after or final,
        "pre_norm": bool(a["use_pre_transformer_norm"]),
        "patch_bias": not a["use_pre_transformer_norm"],
        "activation": "silu" if a["swiglu_mlp"] else "gelu",
        "gated": a["swiglu_mlp"],
        "map_heads": (a["attn_pool_num_heads"] or 0) if pooled else 0,
        "map_mlp_dim": int(a["embed_dim"] * ratio) if pooled and ratio else 0,
    }
    if a["use_rot_pos_emb"]:
        reference = a["ref_feat_shape"]
        fields |= {"rope": True, "rope_grid": None if reference is None else as_pair(reference)}
        fields |= {"rope_offset": float(a["rope_grid_offset"]), "rope_xy": a["rope_grid_indexing"] == "xy"}
        fields |= {"rope_theta": float(a["rope_temperature"])}
    own = {key: a[key] for key in ("swiglu_mlp", "scale_mlp", "scale_attn_inner", "use_post_norm")}
    plain = a["attn_type"] == "rope" or (a["attn_type"] == "eva" and not a["qkv_bias"])
    for key, value in own.items():
        if value and plain:
            refuse(where, key, value, f"with attn_type {a['attn_type']!r} and qkv_bias {a['qkv_bias']!r}")
    if pooled and a["swiglu_mlp"]:
        refuse(where, "global_pool", "map", "with swiglu_mlp")
    if plain:
        return dataclasses.replace(config, **fields)
    own_fields = {"sub_norm": a["scale_attn_inner"], "mlp_norm": a["scale_mlp"], "post_norm": a["use_post_norm"]}
    if a["use_post_norm"]:
        fields["layer_scale"] = None  # timm's post-norm block has none
        if a["qk_norm"]:
            refuse(where, "qk_norm", True, "with use_post_norm")
    return EvaConfig(**{**dataclasses.asdict(config), **fields, **own_fields})


def document(
    config: ViTConfig, num_classes: int, published: Metadata, metadata: Metadata, labels: Sequence[str] | None = None
) -> dict[str, Any]:
    """The `config.json` of a model, under the architecture it came from or another of its class.

    ValueError if timm would not read it back as the same: it has no such model.
    """
    metadata = flat(metadata)
    origin = str(metadata.get("architecture", ""))
    best: list[str] | None = None
    for name in (origin, *_BASES):
        registered = architectures().get(name.partition(".")[0])
        if registered is None:
            continue
        kind = registered.get("class", "vit")
        old = dict(metadata.get("model_args") or {}) if name == origin else {}
        arguments = {key: value for key, value in (old | _arguments(config, kind)).items() if value is not None}
        defaults = {"first_conv": "patch_embed.proj", "classifier": "head", "fixed_input_size": True}
        made = dict(metadata) | {
            "architecture": name,
            "num_classes": num_classes,
            "num_features": config.width,
            "global_pool": arguments["global_pool"],
            "model_args": arguments | {"num_classes": num_classes},
            "pretrained_cfg": defaults | dict(published) | {"num_classes": num_classes},
        }
        if labels:
            made["label_names"] = list(labels)
        try:
            again = config_of(name, arguments_of(name, made))
        except ValueError:
            continue
        wanted = comparable(dataclasses.replace(config, num_classes=num_classes))
        differing = [key for key, value in wanted.items() if comparable(again)[key] != value]
        if not differing:
            return made
        best = differing if best is None or len(differing) < len(best) else best
    named = ", ".join(f"{key}={getattr(config, key, None)!r}" for key in best or ["pool"])
    raise ValueError(f"timm has no ViT with {named}")


# Fields that do not change what a trained model computes, or only at another image size.
_TRAINING = ("init", "head_bias_init", "dropout", "drop_path", "patch_dropout", "scan", "remat", "pos_interpolation")


def comparable(config: ViTConfig) -> dict[str, Any]:
    """What has to be the same in two configs of one function."""
    fields = dataclasses.asdict(config) | {"kind": type(config).__name__}
    if not config.num_prefix_tokens or config.pos_embed == "none":
        fields["class_position"] = False
    if not config.rope:
        fields |= {key: None for key in fields if key.startswith("rope_")}
    fields["map_heads"] = config.map_heads or config.num_heads
    fields["map_mlp_dim"] = config.map_mlp_dim or config.mlp_dim
    fields["layer_scale"] = config.layer_scale is not None
    fields["activation"] = {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "swish": "silu"}.get(
        config.activation, config.activation
    )
    return {key: value for key, value in fields.items() if key not in _TRAINING}


def _arguments(config: ViTConfig, kind: str) -> dict[str, Any]:
    """The arguments by which a class of timm's comes nearest to a config."""
    c = config
    pools = {"gap": "avg", "gap_all": "avg", "map": "map", "map_all": "map", "none": "", "token": "token"}
    hidden = 2 * c.mlp_dim if c.gated and kind != "eva" else c.mlp_dim
    arguments = {
        "img_size": list(c.image_size),
        "patch_size": c.patch_size[0] if c.patch_size[0] == c.patch_size[1] else list(c.patch_size),
        "in_chans": c.num_channels,
        "global_pool": pools[c.pool],
        "embed_dim": c.width,
        "depth": c.depth,
        "num_heads": c.num_heads,
        "mlp_ratio": _ratio(hidden, c.width),
        "qkv_bias": c.qkv_bias,
        "qk_norm": c.qk_norm,
        "init_values": c.layer_scale,
        "class_token": c.class_token,
        "no_embed_class": bool(c.num_prefix_tokens) and not c.class_position,
    }
    if kind != "eva":
        names = {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh"}
        return arguments | {
            "reg_tokens": c.num_registers,
            "pos_embed": "learn" if c.pos_embed == "learn" else "none",
            "pre_norm": c.pre_norm,
            "final_norm": c.final_norm,
            "fc_norm": c.norm_after_pool,
            "pool_include_prefix": c.pool.endswith("_all"),
            "proj_bias": c.proj_bias,
            "act_layer": names.get(c.activation, c.activation),
        }
    own = isinstance(c, EvaConfig)
    arguments |= {
        "num_reg_tokens": c.num_registers,
        "attn_type": "eva" if own else "rope",
        "qkv_fused": not (own and c.gated),
        "swiglu_mlp": c.gated,
        "scale_mlp": own and c.mlp_norm,
        "scale_attn_inner": own and c.sub_norm,
        "use_post_norm": own and c.post_norm,
        "use_abs_pos_emb": c.pos_embed == "learn",
        "use_rot_pos_emb": c.rope,
        "use_pre_transformer_norm": c.pre_norm,
        "use_post_transformer_norm": c.final_norm and not c.norm_after_pool,
        "use_fc_norm": c.norm_after_pool,
    }
    if c.rope:
        arguments |= {"rope_type": "cat", "rope_grid_offset": c.rope_offset, "rope_temperature": c.rope_theta}
        arguments |= {"rope_grid_indexing": "xy" if c.rope_xy else "ij", "rope_rotate_half": False}
        arguments |= {"ref_feat_shape": None if c.rope_grid is None else list(c.rope_grid)}
    if c.pool == "map_all":
        arguments |= {"attn_pool_num_heads": c.map_heads or c.num_heads}
        arguments |= {"attn_pool_mlp_ratio": _ratio(c.map_mlp_dim or c.mlp_dim, c.width)}
    return arguments


def is_eva(file: TensorFile) -> bool:
    """EVA's blocks have biases for queries and values alone."""
    names = [name for name in file if re.match(r"blocks\.\d+\.attn\.", name)]
    if any(name.endswith(".attn.k_proj.bias") for name in names):
        return False
    return any(re.search(r"\.(q_bias|v_bias|q_proj\.weight|v_proj\.bias)$", name) for name in names)


def refuse(where: str, key: str, value: Any, why: str) -> NoReturn:
    raise ValueError(f"{where}: {key!r} is {brief(value)}, {why}")


def _measured(file: TensorFile) -> dict[str, Any]:
    """The arguments that tensors show; "mlp_dim" are the inputs of the MLP's last layer."""
    width, channels, *patch_size = file.shape("patch_embed.proj.weight")
    depth = 1 + max((int(match[1]) for name in file if (match := re.match(r"blocks\.(\d+)\.", name))), default=-1)
    shape = {"embed_dim": width, "in_chans": channels, "patch_size": patch_size, "depth": depth}
    return shape | {"mlp_dim": file.shape("blocks.0.mlp.fc2.weight")[1]}


def _mlp_dim(a: Mapping[str, Any]) -> int:
    hidden = int(a["embed_dim"] * a["mlp_ratio"])
    return hidden // 2 if a["gated"] and a["class"] != "eva" else hidden


def _ratio(hidden: int, width: int) -> float:
    """What timm's int(width · ratio) turns back into `hidden`."""
    ratio = hidden / width
    return ratio if int(ratio * width) == hidden else (hidden + 0.5) / width


def _head_rows(file: TensorFile) -> int:
    """Classes of the head, from whatever of it the file has; 0 without it."""
    present = (name for name in ("head.weight", "head.bias") if name in file)
    return next((file.shape(name)[0] for name in present), 0)


def _image_size(file: TensorFile, a: Mapping[str, Any], hints: Sequence[Any]) -> Pair:
    """The size of the images that the table of positions was made for: one of the hints, else a square."""
    if "pos_embed" not in file:
        return as_pair(hints[0])
    tokens = a["num_reg_tokens"] if a["class"] == "eva" else a["reg_tokens"]
    prefix = 0 if a["no_embed_class"] else bool(a["class_token"]) + (a["class"] == "distilled") + tokens
    patches, patch_size = file.shape("pos_embed")[1] - prefix, as_pair(a["patch_size"])
    side = math.isqrt(max(patches, 0))
    for size in [*filter(None, hints), [side * patch_size[0], side * patch_size[1]]]:
        if math.prod(length // patch for length, patch in zip(as_pair(size), patch_size, strict=True)) == patches:
            return as_pair(size)
    return as_pair(hints[0])  # what the table then says of the positions' shape


def _bare(file: TensorFile, overrides: Metadata) -> ViTConfig:
    """The config of a file that came without one."""
    measured, names = _measured(file), set(file)
    width, mlp_dim, pre_norm = measured["embed_dim"], measured["mlp_dim"], "norm_pre.weight" in names
    registers, distilled = (file.shape("reg_token")[1] if "reg_token" in names else 0), "dist_token" in names
    image_size, class_token, class_position = _positions(file, registers + distilled, measured["patch_size"], overrides)
    if "rope" not in overrides and ((pre_norm and "attn_pool.latent" in names) or "blocks.0.gamma_1" in names):
        raise ValueError(f"{file.path}: cannot tell whether this model has rotary positions; give rope= or its config")
    after = "fc_norm.weight" in names
    scaled = any(name in names for name in ("blocks.0.ls1.gamma", "blocks.0.gamma_1"))
    gated = file.shape("blocks.0.mlp.fc1.weight")[0] == 2 * mlp_dim
    return ViTConfig(
        width=width,
        depth=measured["depth"],
        num_heads=published_heads(file, width, mlp_dim, overrides),
        mlp_dim=mlp_dim,
        patch_size=as_pair(measured["patch_size"]),
        image_size=image_size,
        num_channels=measured["in_chans"],
        num_classes=_head_rows(file),
        pool="map" if "attn_pool.latent" in names else "gap" if after or not class_token else "token",
        class_token=class_token,
        distilled=distilled,
        num_registers=registers,
        class_position=class_position,
        pos_interpolation="bicubic_antialias",
        norm_after_pool=after,
        patch_bias=not pre_norm,
        pre_norm=pre_norm,
        qk_norm="blocks.0.attn.q_norm.weight" in names,
        layer_scale=1.0 if scaled else None,
        activation="silu" if gated else "gelu",
        gated=gated,
        eps=1e-5 if pre_norm else 1e-6,  # those with a norm before the blocks are CLIP's
        init="timm",
    )


def published_heads(file: TensorFile, width: int, mlp_dim: int, overrides: Metadata) -> int:
    """The heads of the published size; ValueError where none, or two with different heads, have these widths."""
    published = {(size[0], size[2]): size[3] for name, size in SIZES.items() if name not in ("mu", "g-opt", "G-opt")}
    heads = overrides.get("num_heads") or published.get((width, mlp_dim))
    if not heads or width % heads:
        raise ValueError(f"{file.path}: cannot tell the number of heads of width {width}; give num_heads=")
    return heads


def _positions(
    file: TensorFile, others: int, patch_size: Sequence[int], overrides: Metadata
) -> tuple[Pair, bool, bool]:
    """Of a file without a config: the image size of its table of positions, whether there is a class token, and a
    position for it. One row beyond a square tells of a class token even if the file lacks it: that is damage.
    """
    rows, has_token = file.shape("pos_embed")[1], "cls_token" in file
    for prefix, token in ((has_token + others, has_token), (0, has_token), (1 + others, True)):
        patches = rows - prefix
        side = math.isqrt(max(patches, 0))
        for size in ((side * patch_size[0], side * patch_size[1]), overrides.get("image_size")):
            grid = [length // patch for length, patch in zip(as_pair(size), patch_size, strict=True)] if size else [0]
            if patches > 0 and math.prod(grid) == patches:
                return as_pair(size), token, prefix > 0
    raise ValueError(
        f"{file.path}: the {rows} rows of 'pos_embed' are no square grid; give the image_size= they were made for"
    )


def _plain(value: Any) -> Any:
    return list(as_pair(value)) if isinstance(value, (list, tuple)) or value is None else [value, value]


def as_pair(size: Any) -> Pair:
    return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))
