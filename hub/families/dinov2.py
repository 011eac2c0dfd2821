"""DINO, iBOT and DINOv2 backbones: the official files, transformers' directories and timm's files, both ways.

The official names (facebookresearch/dinov2, dino, ibot) cover `*_pretrain.pth` (format "official"), and, with heads,
the `teacher_checkpoint.pth` of a training run and full DINO / iBOT checkpoints, of which the teacher is taken ("run").
Heads are `bundle.variables["heads"]`: {"dino_head", "ibot_head"}; DINO's and iBOT's only head is the "dino_head".
"""

import dataclasses
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from ...kernels.interpolation import resize_positions
from ...models.dinov2 import SIZES, Dinov2, Dinov2Config, Head, HeadConfig
from ...models.vit import ViTConfig
from .. import processor as processors
from ..bundle import Bundle
from ..family import Checkpoint, Family, Options, Overrides
from ..files.placement import Tree
from ..files.source import Source
from ..files.tensors import TensorFile, rename
from ..files.writers import MAX_SHARD_SIZE, write_directory, write_file, write_safetensors
from ..keys import Key, Section, harmless, used
from ..mapping import Row, Table, save_tensors
from ..rows import QKV, conv, dense, heads, merge_heads, norm, packed_heads
from .transformers_keys import COMMON, HIDDEN_ACT, labels_of, names_of, num_classes
from .vit import timm as vit_timm

_MODEL_TYPES = ("dinov2", "dinov2_with_registers")
_FIELDS = {field.name for field in dataclasses.fields(Dinov2Config)}
# Around the official names: FSDP's and multi-crop wrappers, checkpoints of whole runs, chunks of blocks (their second
# index counts through), iBOT's name for the mask token.
_OFFICIAL_RENAMES = (
    (r"_fsdp_wrapped_module\.", ""),
    (r"^teacher\.", ""),
    (r"^(module\.)?(backbone\.)?", ""),
    (r"^blocks\.\d+\.(\d+)\.", r"blocks.\1."),
    (r"^masked_embed$", "mask_token"),
    (r"^head\.(mlp|last_layer)\.", r"dino_head.\1."),
    (r"last_layer\.parametrizations\.weight\.original0$", "last_layer.weight_g"),
    (r"last_layer\.parametrizations\.weight\.original1$", "last_layer.weight_v"),
)
_HEADS = ("dino_head", "ibot_head")
_OTHERS = r"(student|optimizer|dino_loss|ibot_loss|fp16_scaler)\..*"  # what else files of whole runs hold
_TRANSFORMERS_RENAMES = (
    (r"^(dinov2|dinov2_with_registers)\.", ""),
    *((rf"attention\.{name[0]}_proj\.", f"attention.attention.{name}.") for name in QKV),  # transformers >= 5
    (r"attention\.o_proj\.", "attention.output.dense."),
    (r"mlp\.down_proj\.", "mlp.weights_out."),
)
_IMAGENET_MEAN, _IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

BLOCK = "encoder/blocks_{i}"


def _shared(c: Dinov2Config, block: str) -> tuple[Row, ...]:
    """Rows on which the official and timm's names agree."""
    scales = [Row(f"{block}.ls{n}.gamma", f"{BLOCK}/scale{n}/gamma") for n in (1, 2) if c.layer_scale is not None]
    return (
        Row("cls_token", "embed/cls_token"),
        Row("pos_embed", "embed/pos_embed"),
        *conv("patch_embed.proj", "patch_embed"),
        *norm(f"{block}.norm1", f"{BLOCK}/norm1"),
        *norm(f"{block}.norm2", f"{BLOCK}/norm2"),
        *packed_heads(f"{block}.attn.qkv", f"{BLOCK}/attn"),
        *merge_heads(f"{block}.attn.proj", f"{BLOCK}/attn/out"),
        *scales,
        *norm("norm", "norm"),
    )


def _mlp(c: Dinov2Config, block: str, gated: tuple[str, str]) -> tuple[Row, ...]:
    """fc1 and fc2, or for gated MLPs one packed input layer (the gate first) and the output layer named by `gated`."""
    if not c.gated:
        return (*dense(f"{block}.mlp.fc1", f"{BLOCK}/mlp/fc1"), *dense(f"{block}.mlp.fc2", f"{BLOCK}/mlp/fc2"))
    packed, out = gated
    return (
        Row(f"{block}.mlp.{packed}.weight", (f"{BLOCK}/mlp/gate/kernel", f"{BLOCK}/mlp/fc1/kernel"), "F D -> D F"),
        Row(f"{block}.mlp.{packed}.bias", (f"{BLOCK}/mlp/gate/bias", f"{BLOCK}/mlp/fc1/bias")),
        *dense(f"{block}.mlp.{out}", f"{BLOCK}/mlp/fc2"),
    )


def official(c: Dinov2Config) -> Table:
    """Names of facebookresearch/dinov2, dino and ibot (same names; the latter two have neither ls nor mask_token)."""
    return Table(
        rows=(
            *_shared(c, "blocks.{i}"),
            *_mlp(c, "blocks.{i}", ("w12", "w3")),
            Row("mask_token", "embed/mask_token"),
            Row("register_tokens", "embed/register_tokens"),
        ),
        renames=_OFFICIAL_RENAMES,
        ignore=(_OTHERS, r"(head|dino_head|ibot_head)\..*"),
    )


def official_heads(layers: int = 3) -> Table:
    """Names of the heads of a run (dinov2:dinov2/layers/dino_head.py): MLPs of so many layers, weight-normed last."""
    rows = [
        row
        for head in _HEADS
        for row in (
            *(row for i in range(layers) for row in dense(f"{head}.mlp.{2 * i}", f"{head}/fc{i + 1}")),
            Row(f"{head}.last_layer.weight_g", f"{head}/last_layer/gain", "V 1 -> V"),
            Row(f"{head}.last_layer.weight_v", f"{head}/last_layer/direction", "V F -> F V"),
        )
    ]
    return Table(
        rows=rows, renames=_OFFICIAL_RENAMES, ignore=(_OTHERS, r"(?!(dino|ibot)_head\.).*", r".*last_layer2\..*")
    )


def timm(c: Dinov2Config) -> Table:
    """timm's `vit_*_patch14[_reg4]_dinov2`; with registers, its class token has absorbed its position."""
    return Table(
        rows=(
            *_shared(c, "blocks.{i}"),
            *_mlp(c, "blocks.{i}", ("fc1", "fc2")),
            Row("reg_token", "embed/register_tokens"),
        ),
        ignore=(r"head\..*", "mask_token"),
    )


def transformers(c: Dinov2Config) -> Table:
    """Dinov2Model, Dinov2WithRegistersModel and their ForImageClassification, in either era's names."""
    layer = "encoder.layer.{i}"
    attention = [heads(f"{layer}.attention.attention.{name}", f"{BLOCK}/attn/{name}") for name in QKV]
    return Table(
        rows=(
            Row("embeddings.cls_token", "embed/cls_token"),
            Row("embeddings.position_embeddings", "embed/pos_embed"),
            Row("embeddings.mask_token", "embed/mask_token"),
            Row("embeddings.register_tokens", "embed/register_tokens"),
            *conv("embeddings.patch_embeddings.projection", "patch_embed"),
            *norm(f"{layer}.norm1", f"{BLOCK}/norm1"),
            *norm(f"{layer}.norm2", f"{BLOCK}/norm2"),
            *(row for rows in attention for row in rows),
            *merge_heads(f"{layer}.attention.output.dense", f"{BLOCK}/attn/out"),
            *(Row(f"{layer}.layer_scale{n}.lambda1", f"{BLOCK}/scale{n}/gamma") for n in (1, 2)),
            *_mlp(c, layer, ("weights_in", "weights_out")),
            *(dense(f"{layer}.mlp.gate_proj", f"{BLOCK}/mlp/gate") if c.gated else ()),
            *(dense(f"{layer}.mlp.up_proj", f"{BLOCK}/mlp/fc1") if c.gated else ()),
            *norm("layernorm", "norm"),
            *dense("classifier", "head"),
        ),
        renames=_TRANSFORMERS_RENAMES,
    )


_TABLES = {"official": official, "run": official, "timm": timm, "transformers": transformers}


def recognise(source: Source) -> str | None:
    """The format of a DINOv2 checkpoint, or of a DINO or iBOT run; None if it is not one.

    A bare DINO backbone has exactly the tensors of a ViT without head, and is read as that (hub/families/vit).
    """
    if model_type := source.config.get("model_type"):
        return "transformers" if model_type in _MODEL_TYPES else None
    if "architecture" in source.config:
        named = "dinov2" in str(source.config["architecture"])
        return "timm" if named and _is_backbone(vit_timm.read(source.tensors, source.config, {})) else None
    names = list(source.tensors)
    if any(re.fullmatch(r"(dinov2(_with_registers)?\.)?embeddings\.mask_token", name) for name in names):
        return "transformers"
    scaled = any(re.search(r"blocks\.(\d+\.)?\d+\.ls1\.gamma$", name) for name in names)
    if {"reg_token", "cls_token"} <= set(names) and scaled:
        return "timm"
    run = any(re.match(r"(teacher\.)?(module\.)?backbone\.blocks\.", name) for name in names)
    masked = any(name.endswith("mask_token") for name in names)
    if run and _head_names(source.tensors):
        return "run"
    return "official" if run or (scaled and masked) else None


def bundle(checkpoint: Checkpoint, params: Tree) -> Bundle:
    """The model; another `image_size` resizes the stored positions (images of any size work without it)."""
    source, format, published = checkpoint.source, checkpoint.format, checkpoint.config
    options = checkpoint.options
    config = dataclasses.replace(published, **options.overrides)
    return Bundle(
        model=Dinov2(config, dtype=options.compute_dtype),
        params=options.cast(_resized(params, published, config, source.tensors)),
        config=config,
        processor=_processor(source, format, published),
        format=format,
        labels=labels_of(source.config.get("id2label")) if config.num_classes else None,
        metadata=source.config,
        variables={"heads": _load_heads(source.tensors, options)} if format == "run" else {},
    )


def save(bundle: Bundle, path: Path, format: str, max_shard_size: int = MAX_SHARD_SIZE) -> None:
    """Writes a directory ("transformers", "timm") or one safetensors file ("official", "run"). See `omnax.hub.save`."""
    c: Dinov2Config = bundle.config
    metadata = bundle.metadata if format == bundle.format else {}
    if c.num_classes and format != "transformers":
        raise ValueError(f"format {format!r} has no classifier, the model has {c.num_classes} classes")
    tensors = save_tensors(_stored_params(bundle.params, c, format), _TABLES[format](_stored(c, format)))
    if format == "run":
        heads = bundle.variables.get("heads")
        if not heads:
            raise ValueError("format 'run' holds heads, and this bundle has none; 'official' is the backbone alone")
        table = official_heads(sum(name.startswith("fc") for name in heads["dino_head"]))
        tensors = {f"backbone.{name}": tensor for name, tensor in tensors.items()} | save_tensors(heads, table)
    if format in ("official", "run"):
        return write_file(path, tensors, write_safetensors)
    if format == "timm":
        published = metadata.get("pretrained_cfg") or {}
        if bundle.processor:
            published = processors.to_timm(bundle.processor, published)
        return write_directory(
            path, tensors, {"config.json": _timm_document(_stored(c, format), published, metadata)}, max_shard_size
        )
    documents = {"config.json": _transformers_metadata(c, bundle, metadata)}
    if bundle.processor:
        documents |= processors.to_transformers(bundle.processor, "BitImageProcessor")
    return write_directory(path, tensors, documents, max_shard_size)


def _stored(c: Dinov2Config, format: str) -> Dinov2Config:
    """The config as the format stores it: with registers, timm's class token has absorbed its position."""
    return dataclasses.replace(c, class_position=format != "timm" or c.num_registers == 0)


def _stored_params(params: Tree, c: Dinov2Config, format: str) -> Tree:
    """The same function as the format stores it.

    timm has no mask token, the official files have one, and transformers' registers go with one.
    """
    embed: Tree = dict(params["embed"])
    if c.class_position and not _stored(c, format).class_position:
        position = embed["pos_embed"][:, :1].astype(jnp.float32)
        embed["cls_token"] = embed["cls_token"] + position  # float32 also where the file is half
        embed["pos_embed"] = embed["pos_embed"][:, 1:]
    elif not c.class_position and _stored(c, format).class_position:
        embed["pos_embed"] = jnp.concatenate([jnp.zeros_like(embed["pos_embed"][:, :1]), embed["pos_embed"]], axis=1)
    if format == "timm":
        embed.pop("mask_token", None)
    elif c.layer_scale is not None if format in ("official", "run") else c.num_registers:
        embed.setdefault("mask_token", jnp.zeros_like(embed["cls_token"][0]))
    return {**params, "embed": embed}


def _head_names(file: TensorFile) -> list[str]:
    """The heads of which the file holds the last layer."""
    names = {rename(name, _OFFICIAL_RENAMES) for name in file}
    return [head for head in _HEADS if f"{head}.last_layer.weight_v" in names]


def _load_heads(file: TensorFile, options: Options) -> Tree:
    """{"dino_head", "ibot_head"} as far as the file has them."""
    renamed, shapes, layers = file.renamed(_OFFICIAL_RENAMES), {}, 0
    for head in _head_names(file):
        layers = len([name for name in renamed if re.fullmatch(rf"{head}\.mlp\.\d+\.weight", name)])
        hidden, width = renamed.shape(f"{head}.mlp.0.weight")
        prototypes, bottleneck = renamed.shape(f"{head}.last_layer.weight_v")
        config = HeadConfig(prototypes=prototypes, hidden=hidden, bottleneck=bottleneck, layers=layers)
        token = jax.ShapeDtypeStruct((1, width), jnp.float32)
        shapes[head] = jax.eval_shape(Head(config).init, jax.random.key(0), token)["params"]
    return options.read(file, official_heads(layers), shapes)


def abstract(config: Dinov2Config) -> Tree:
    """The parameters of a backbone as shapes."""
    image = jax.ShapeDtypeStruct((1, config.image_size, config.image_size, config.num_channels), jnp.float32)
    return jax.eval_shape(Dinov2(config).init, jax.random.key(0), image)["params"]


def read(source: Source, format: str, overrides: Overrides) -> Dinov2Config:
    """The config the file was made with: transformers' from config.json, the others' from the shapes of the tensors."""
    if format == "timm":
        return _of_timm(vit_timm.read(source.tensors, source.config, overrides, source.where), overrides)
    if format == "transformers":
        return _read_transformers(source, overrides)
    file = source.tensors.renamed(_OFFICIAL_RENAMES)
    width, channels, patch_size, _ = file.shape("patch_embed.proj.weight")
    gated = any(".mlp.w12." in name for name in file)
    num_registers = file.shape("register_tokens")[1] if "register_tokens" in file else 0
    return Dinov2Config(
        width=width,
        depth=_depth(file, r"blocks\.(\d+)\."),
        num_heads=_num_heads(file, width, overrides),
        mlp_dim=_mlp_dim(file, format, gated),
        patch_size=patch_size,
        image_size=_side(file, "pos_embed") * patch_size,
        num_channels=channels,
        num_registers=num_registers,
        gated=gated,
        layer_scale=1.0 if "blocks.0.ls1.gamma" in file else None,
        mask_token="mask_token" in file,
        pos_interpolation=_interpolation(format, num_registers > 0),
        qkv_bias="blocks.0.attn.qkv.bias" in file,
        scan=overrides.get("scan", False),
    )


def _section(**own: Key) -> Section:
    return Section(
        {
            **COMMON,
            "hidden_size": used("count", 768),
            "num_hidden_layers": used("count", 12),
            "num_attention_heads": used("count", 12),
            "mlp_ratio": used("positive", 4),
            "hidden_act": used("text", "gelu", choices=HIDDEN_ACT),
            "layer_norm_eps": used("number", 1e-6),
            "image_size": used("size", 224),
            "num_channels": used("count", 3),
            "qkv_bias": used("flag", True),
            "layerscale_value": used("number", 1.0),
            "use_swiglu_ffn": used("flag", False),
            "id2label": used("object", None),
            "num_labels": used("count", None),
            **own,
            **dict.fromkeys(
                ("hidden_dropout_prob", "attention_probs_dropout_prob", "drop_path_rate"), harmless("training")
            ),
            **dict.fromkeys(  # of the backbones of detectors
                ("out_features", "out_indices", "_out_features", "_out_indices", "stage_names"), harmless("outputs")
            ),
            **dict.fromkeys(("apply_layernorm", "reshape_hidden_states"), harmless("outputs")),
        }
    )


# transformers' Dinov2Config and Dinov2WithRegistersConfig.
TRANSFORMERS = _section(patch_size=used("size", 14), use_mask_token=used("flag", True))
TRANSFORMERS_REGISTERS = _section(patch_size=used("size", 16), num_register_tokens=used("whole", 4))


def _read_transformers(source: Source, overrides: Overrides) -> Dinov2Config:
    file = source.tensors.renamed(_TRANSFORMERS_RENAMES)
    metadata = source.config or _unwritten_metadata(file, overrides)
    section = TRANSFORMERS_REGISTERS if metadata["model_type"] == _MODEL_TYPES[1] else TRANSFORMERS
    c = section.read(metadata, source.where)
    gated = c["use_swiglu_ffn"]
    architectures = c["architectures"]
    classifies = "ForImageClassification" in architectures[0] if architectures else "classifier.weight" in file
    return Dinov2Config(
        width=c["hidden_size"],
        depth=c["num_hidden_layers"],
        num_heads=c["num_attention_heads"],
        mlp_dim=_hidden(c["hidden_size"], c["mlp_ratio"], gated),
        patch_size=_square(c, "patch_size", source.where),
        image_size=_square(c, "image_size", source.where),
        num_channels=c["num_channels"],
        num_classes=num_classes(c) if classifies else 0,
        num_registers=c.get("num_register_tokens", 0),
        gated=gated,
        activation=HIDDEN_ACT["gelu" if gated else c["hidden_act"]],
        layer_scale=c["layerscale_value"],
        mask_token=c.get("use_mask_token", True) and "embeddings.mask_token" in file,
        pos_interpolation=_interpolation("transformers", section is TRANSFORMERS_REGISTERS),
        qkv_bias=c["qkv_bias"],
        eps=c["layer_norm_eps"],
        scan=overrides.get("scan", False),
    )


def _hidden(width: int, ratio: float, gated: bool) -> int:
    """The MLP's hidden size in transformers; a gated one has two thirds, rounded up to a multiple of 8."""
    hidden = int(width * ratio)
    return (int(hidden * 2 / 3) + 7) // 8 * 8 if gated else hidden


def _unwritten_metadata(file: TensorFile, overrides: Overrides) -> dict[str, Any]:
    """The `config.json` of a bare file of tensors."""
    width, channels, patch_size, _ = file.shape("embeddings.patch_embeddings.projection.weight")
    gated = any(f".mlp.{name}." in key for key in file for name in ("weights_in", "gate_proj"))
    registers = file.shape("embeddings.register_tokens")[1] if "embeddings.register_tokens" in file else 0
    return {
        "model_type": _MODEL_TYPES[registers > 0],
        "hidden_size": width,
        "num_hidden_layers": _depth(file, r"encoder\.layer\.(\d+)\."),
        "num_attention_heads": _num_heads(file, width, overrides),
        "mlp_ratio": 4 if gated else _mlp_dim(file, "transformers", gated) / width,
        "image_size": _side(file, "embeddings.position_embeddings") * patch_size,
        "patch_size": patch_size,
        "num_channels": channels,
        "qkv_bias": "encoder.layer.0.attention.attention.query.bias" in file,
        "use_swiglu_ffn": gated,
        "num_labels": file.shape("classifier.weight")[0] if "classifier.weight" in file else None,
    } | ({"num_register_tokens": registers} if registers else {})


def _square(values: Mapping[str, Any], key: str, where: str) -> int:
    sides = values[key] if isinstance(values[key], list | tuple) else [values[key]] * 2
    if sides[0] != sides[1]:
        raise ValueError(f"{where}: {key!r} is {list(sides)}, expected a square")
    return sides[0]


def _depth(file: TensorFile, layer: str) -> int:
    """Layers counted by the highest number, so that a gap shows as missing tensors."""
    return 1 + max((int(match[1]) for name in file if (match := re.match(layer, name))), default=-1)


def _num_heads(file: TensorFile, width: int, overrides: Overrides) -> int:
    """Torch tensors do not show the heads: those of the published size, else the caller has to say."""
    heads = overrides.get("num_heads") or {size[0]: size[2] for size in SIZES.values()}.get(width)
    if not heads or width % heads:
        raise ValueError(f"{file.path}: cannot tell the number of heads of width {width}; give num_heads=")
    return heads


def _side(file: TensorFile, table: str) -> int:
    """Patches a side of the square grid that a table of positions was made for."""
    rows = file.shape(table)[1]
    side = math.isqrt(rows - 1)
    if side**2 + 1 != rows:
        raise ValueError(f"{file.path}: {rows} positions are no square grid beside a class token")
    return side


def _is_backbone(vit: ViTConfig) -> bool:
    """Whether a ViT of timm's is what `Dinov2Config` can say; others, with a classifier say, are read as ViTs."""
    c, side = vit, vit.grid[0] * vit.patch_size[0]
    plain = ViTConfig(
        width=c.width,
        depth=c.depth,
        num_heads=c.num_heads,
        mlp_dim=c.mlp_dim,
        patch_size=(c.patch_size[0], c.patch_size[0]),
        image_size=(side, side),
        num_channels=c.num_channels,
        num_classes=0,
        num_registers=c.num_registers,
        class_position=c.num_registers == 0,
        pos_interpolation=c.pos_interpolation,
        qkv_bias=c.qkv_bias,
        layer_scale=c.layer_scale,
        gated=c.gated,
        activation="silu" if c.gated else "gelu",
        eps=c.eps,
        init=c.init,
    )
    return c == plain


def _of_timm(vit: ViTConfig, overrides: Overrides) -> Dinov2Config:
    return Dinov2Config(
        width=vit.width,
        depth=vit.depth,
        num_heads=vit.num_heads,
        mlp_dim=vit.mlp_dim,
        patch_size=vit.patch_size[0],
        image_size=vit.image_size[0],
        num_channels=vit.num_channels,
        num_registers=vit.num_registers,
        gated=vit.gated,
        layer_scale=vit.layer_scale,
        mask_token=False,
        class_position=vit.class_position,
        pos_interpolation=vit.pos_interpolation,
        qkv_bias=vit.qkv_bias,
        eps=vit.eps,
        scan=overrides.get("scan", False),
    )


def _mlp_dim(file: TensorFile, format: str, gated: bool) -> int:
    """The inputs of the MLP's last layer."""
    names = ("fc2", "weights_out") if format == "transformers" else ("fc2", "w3")
    block = "encoder.layer.0" if format == "transformers" else "blocks.0"
    return file.shape(f"{block}.mlp.{names[gated]}.weight")[1]


def _interpolation(format: str, registers: bool) -> str:
    """Each library's rule for positions at other image sizes; it changed with the registers, be there none of them."""
    if format == "timm" or registers:
        return "bicubic_antialias"
    return "bicubic" if format == "transformers" else "bicubic_offset"


def _resized(params: Tree, published: Dinov2Config, config: Dinov2Config, file: TensorFile) -> Tree:
    """The parameters with positions for the config's image size; ValueError for any other change of shape."""
    if config.image_size != published.image_size and config.patch_size == published.patch_size:
        old, new = (c.image_size // c.patch_size for c in (published, config))
        table = resize_positions(params["embed"]["pos_embed"], (old, old), (new, new), config.pos_interpolation)
        params = params | {"embed": params["embed"] | {"pos_embed": table}}
    shapes = [jax.tree.map(jnp.shape, tree) for tree in (params, abstract(config))]
    if shapes[0] != shapes[1]:
        changed = [n for n in sorted(_FIELDS) if getattr(config, n) != getattr(published, n)]
        fields = ", ".join(f"{n}={getattr(published, n)!r}, not {getattr(config, n)!r}" for n in changed)
        raise ValueError(f"{file.path} does not fit the model asked for: it has {fields}")
    return params


def _processor(source: Source, format: str, config: Dinov2Config) -> processors.ImageProcessor:
    size = (config.image_size, config.image_size)
    if format == "transformers" and source.preprocessor:
        return processors.from_transformers(source.preprocessor, size, "BitImageProcessor")
    if format == "timm" and source.config:
        return processors.from_timm(processors.timm_preprocessing(source.config), size)
    colours = {"mean": _IMAGENET_MEAN, "std": _IMAGENET_STD, "alpha": "drop"}
    return processors.ImageProcessor((224, 224), 256, "pil_bicubic", origin="official", **colours)


def _transformers_metadata(c: Dinov2Config, bundle: Bundle, metadata: Mapping[str, Any]) -> dict[str, Any]:
    """The `config.json`; ValueError if transformers has no such model."""
    if c.layer_scale is None:
        raise ValueError("transformers' Dinov2Model needs layer scale: layer_scale is None")
    family = "Dinov2WithRegisters" if c.num_registers else "Dinov2"
    ratio = next((ratio for ratio in range(1, 65) if _hidden(c.width, ratio, c.gated) == c.mlp_dim), None)
    if ratio is None:
        raise ValueError(f"transformers' Dinov2Model has no MLP of {c.mlp_dim} at width {c.width}: mlp_ratio is whole")
    others = ("use_mask_token",) if c.num_registers else ("num_register_tokens",)  # of the other class
    document = {key: value for key, value in metadata.items() if key not in others} | {
        "architectures": [f"{family}ForImageClassification" if c.num_classes else f"{family}Model"],
        "model_type": _MODEL_TYPES[c.num_registers > 0],
        "hidden_size": c.width,
        "num_hidden_layers": c.depth,
        "num_attention_heads": c.num_heads,
        "mlp_ratio": ratio,
        "hidden_act": {"gelu_tanh": "gelu_pytorch_tanh"}.get(c.activation, c.activation),
        "layer_norm_eps": c.eps,
        "image_size": c.image_size,
        "patch_size": c.patch_size,
        "num_channels": c.num_channels,
        "qkv_bias": c.qkv_bias,
        "layerscale_value": c.layer_scale,
        "use_swiglu_ffn": c.gated,
        "dtype": str(jax.tree.leaves(bundle.params)[0].dtype),
    }
    if c.num_registers:
        document["num_register_tokens"] = c.num_registers
    else:
        document["use_mask_token"] = c.mask_token
    if c.num_classes:
        document |= names_of(bundle.labels or [f"LABEL_{i}" for i in range(c.num_classes)])
    return document


def _timm_document(c: Dinov2Config, published: Mapping[str, Any], metadata: Mapping[str, Any]) -> dict[str, Any]:
    """The `config.json` in timm's words."""
    names = {384: "small", 768: "base", 1024: "large", 1536: "giant"}
    registers = "_reg4" if c.num_registers else ""
    size = "giant" if c.gated else names.get(c.width, "small")
    origin = {"architecture": f"vit_{size}_patch14{registers}_dinov2"} if c.layer_scale is not None else {}
    vit = ViTConfig(
        width=c.width,
        depth=c.depth,
        num_heads=c.num_heads,
        mlp_dim=c.mlp_dim,
        patch_size=(c.patch_size, c.patch_size),
        image_size=(c.image_size, c.image_size),
        num_channels=c.num_channels,
        num_classes=0,
        num_registers=c.num_registers,
        class_position=c.class_position,
        qkv_bias=c.qkv_bias,
        layer_scale=c.layer_scale,
        gated=c.gated,
        activation="silu" if c.gated else "gelu",
        eps=c.eps,
    )
    return vit_timm.document(vit, 0, published, dict(metadata) or {**origin, "pretrained_cfg": {}})


FAMILY = Family(
    name="DINOv2",
    config=Dinov2Config,
    formats=("transformers", "official", "run", "timm"),
    recognise=recognise,
    read=read,
    table=lambda source, format, config: _TABLES[format](config),
    shapes=lambda source, config: abstract(config),
    bundle=bundle,
    save=save,
    stored=_stored,
    unsaid=lambda config, format: {"num_heads": config.num_heads} if format in ("official", "run") else {},
    keys={
        "transformers: Dinov2Config": TRANSFORMERS,
        "transformers: Dinov2WithRegistersConfig": TRANSFORMERS_REGISTERS,
    },
)
