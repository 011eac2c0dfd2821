"""ViT weights: recognised, loaded, adapted to other images and classes, saved.

A checkpoint is loaded as it was published and then adapted: positions are resized by the rule of the library it comes
from (`ViTConfig.pos_interpolation`), patch kernels by FlexiViT's, and a head for another number of classes starts at
zero.
"""

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import traverse_util

from ....kernels.interpolation import resample_patch_kernel, resize_positions
from ....models.eva import EvaConfig
from ....models.vit import PositionEmbedding, ViT, ViTConfig
from ... import processor as processors
from ...bundle import Bundle
from ...family import Checkpoint, Family, Overrides
from ...files.placement import Tree
from ...files.source import Source
from ...files.tensors import TensorFile
from ...files.writers import MAX_SHARD_SIZE, write_directory, write_file, write_npz
from ...mapping import Table, save_tensors
from ..transformers_keys import labels_of
from . import configs, formats, timm

# Parameters that a change of pooling or classes may leave behind.
_HEAD = re.compile(r"(head|pre_logits|map_head|fc_norm)/.*")
# Overrides about the checkpoint itself: what files without a config cannot say, and the layout in memory.
_UNSEEN = ("num_heads", "qkv_bias", "scan")
_UNSEEN += ("rope", "rope_grid", "rope_offset", "rope_xy", "rope_theta")
_LABELS = ("id2label", "label2id", "label_names", "label_descriptions")


def recognise(source: Source) -> str | None:
    """The format of a ViT checkpoint; None if it is not one. Any tensor of a block tells, lest one missing hide it."""
    names = [
        (r"(vit\.)?(encoder\.layer|layers)\.\d+\.layernorm_(before|after)\..*", "transformers"),
        (r"blocks\.\d+\.attn\.(qkv|k_proj)\..*", "timm"),
        (r"(\w+/)*Transformer/encoderblock(_\d+)?/.*", "npz"),
    ]
    found = (format for regex, format in names if any(re.fullmatch(regex, name) for name in source.tensors))
    model_type = source.config.get("model_type", "vit")  # BEiT, DPT and others have names like ViT's
    return next((format for format in found if format != "transformers" or model_type == "vit"), None)


def read(source: Source, format: str, overrides: Overrides) -> ViTConfig:
    """The config that the file was made with; `overrides` tell what files without a config cannot say."""
    file, metadata = source.tensors, _metadata(source, format)
    if format == "transformers":
        renamed = file.renamed(formats.TRANSFORMERS_RENAMES)
        config = configs.from_transformers(renamed, metadata, overrides, source.where)
    elif format == "timm":
        config = _timm_vit(file, metadata, overrides, source.where)
    else:
        config = configs.from_npz(file.renamed(formats.NPZ_RENAMES), metadata["generation"], overrides)
    return dataclasses.replace(config, **{name: overrides[name] for name in _UNSEEN if name in overrides})


def _timm_vit(file: TensorFile, metadata: Mapping[str, Any], overrides: Overrides, where: str) -> ViTConfig:
    """A ViT of timm's; EVA's own attention belongs to the image towers of CLIP."""
    config = timm.read(file, metadata, overrides, where)
    if isinstance(config, EvaConfig):
        raise ValueError(f"{file.path}: its config.json describes an EVA tower, its tensors a ViT")
    return config


def table(source: Source, format: str, config: ViTConfig) -> Table:
    """The table that reads a file of this format."""
    if format == "npz":
        return formats.npz_table(_metadata(source, format)["generation"])
    return formats.transformers_table(config) if format == "transformers" else formats.timm_table(config)


def bundle(checkpoint: Checkpoint, params: Tree) -> Bundle:
    """The model as it was published, or adapted to what the overrides ask for."""
    source, format, published = checkpoint.source, checkpoint.format, checkpoint.config
    metadata, overrides = _metadata(source, format), checkpoint.options.overrides
    config = _adapted_config(published, overrides)
    if config != published:
        options = checkpoint.options
        params = options.cast(_adapt(params, published, config, options.placed(abstract(config))))
    processor = _processor(source, format, metadata, published)
    labels = _labels(metadata) if config.num_classes else None
    if config.num_classes != published.num_classes:
        labels, metadata = None, {key: value for key, value in metadata.items() if key not in _LABELS}
    return Bundle(
        model=ViT(config, dtype=checkpoint.options.compute_dtype),
        params=params,
        config=config,
        processor=processor.fitted(config.image_size, published.image_size, source.where),
        format=format,
        labels=labels,
        metadata=metadata,
    )


def save(bundle: Bundle, path: Path, format: str, max_shard_size: int = MAX_SHARD_SIZE) -> None:
    """Writes a directory ("transformers", "timm") or an .npz file. See `omnax.hub.save`."""
    params, config = _with_stored_positions(bundle.params, bundle.config, format)
    metadata = bundle.metadata if format == bundle.format else {}
    if format == "npz":
        generation = "old" if config.class_token and config.class_position else "new"
        generation = metadata.get("generation", generation)
        return write_file(path, save_tensors(params, formats.npz_table(generation)), write_npz)
    documents: dict[str, Any] = {}
    if format == "transformers":
        dtype = str(jax.tree.leaves(params)[0].dtype)
        documents["config.json"] = configs.to_transformers(config, dtype, bundle.labels, metadata)
        if bundle.processor:
            documents |= processors.to_transformers(bundle.processor)
        table = formats.transformers_table(config)
    else:
        pretrained = metadata.get("pretrained_cfg") or {}
        if bundle.processor:
            pretrained = processors.to_timm(bundle.processor, pretrained)
        document = timm.document(config, config.num_classes, pretrained, metadata, bundle.labels)
        documents["config.json"] = document
        table = formats.timm_table(config)
    write_directory(path, save_tensors(params, table), documents, max_shard_size)


def _metadata(source: Source, format: str) -> dict[str, Any]:
    """What lies beside the tensors, if it is this format's: a file may share its directory with others."""
    if format == "npz":
        return {"generation": "old" if any("MlpBlock_3" in name for name in source.tensors) else "new"}
    if format == "timm":
        return timm.flat(source.config) if "architecture" in source.config else {}
    return source.config if "model_type" in source.config else {}


def abstract(config: ViTConfig) -> Tree:
    """The parameters as shapes."""
    image = jax.ShapeDtypeStruct((1, *config.image_size, config.num_channels), jnp.float32)
    return jax.eval_shape(ViT(config).init, jax.random.key(0), image)["params"]


def _adapted_config(published: ViTConfig, overrides: Mapping[str, Any]) -> ViTConfig:
    config = dataclasses.replace(published, **overrides)
    if config.num_classes not in (0, published.num_classes) and "pre_logits_dim" not in overrides:
        # A new head goes without the representation layer of the old one (vision_transformer, checkpoint.py).
        config = dataclasses.replace(config, pre_logits_dim=0)
    return config


def _adapt(params: Tree, published: ViTConfig, config: ViTConfig, target: Tree) -> Tree:
    """The parameters of `config`, made from those of `published`: see the module's docstring."""
    old: dict[str, Any] = traverse_util.flatten_dict(params, sep="/")
    new: dict[str, Any] = traverse_util.flatten_dict(target, sep="/")
    if lost := [path for path in old if path not in new and not _HEAD.fullmatch(path)]:
        raise ValueError(f"the config leaves out the checkpoint's parameters {lost}")
    adapted: dict[str, Any] = {}
    for path, leaf in new.items():
        if path in old and old[path].shape == leaf.shape and path != "embed/pos_embed":
            adapted[path] = old[path]
        elif path.startswith("head/"):
            value = config.head_bias_init if path == "head/bias" else 0.0
            adapted[path] = jnp.full(leaf.shape, value, jax.tree.leaves(params)[0].dtype)
        elif path == "embed/pos_embed" and path in old:
            adapted[path] = resize_positions(old[path], published.grid, config.grid, config.pos_interpolation)
        elif path == "patch_embed/kernel" and leaf.shape[2:] == old[path].shape[2:]:
            adapted[path] = resample_patch_kernel(old[path], config.patch_size)
        else:
            got = f"shape {old[path].shape}" if path in old else "none"
            raise ValueError(f"the config wants parameter {path!r} of shape {leaf.shape}, the checkpoint has {got}")
        if leaf.sharding is not None:
            adapted[path] = jax.device_put(adapted[path], leaf.sharding)
    return traverse_util.unflatten_dict(adapted, sep="/")


def _with_stored_positions(params: Tree, config: ViTConfig, format: str) -> tuple[Tree, ViTConfig]:
    """The same function with positions as the format stores them: a learned table, of all tokens in transformers."""
    stored = _stored(config, format)
    if config.pos_embed == stored.pos_embed and (config.class_position or not stored.class_position):
        return params, config
    patches = jnp.zeros((1, *config.grid, config.width))
    embed: Tree = params.get("embed", {})
    tokens = PositionEmbedding(config).apply({"params": embed}, patches)  # 1 T D
    assert isinstance(tokens, jax.Array)
    table = {"pos_embed": tokens}
    if config.class_token:  # its position is in it
        table = {"cls_token": tokens[:, :1], "pos_embed": tokens.at[:, 0].set(0.0)}
    return {**params, "embed": table}, stored  # float32: sums of what may lie in half precision


def _stored(config: ViTConfig, format: str) -> ViTConfig:
    """The config as the format stores it: learned positions, in transformers those of all tokens; pooled there."""
    pool = "token" if format == "transformers" and config.pool == "none" else config.pool
    pool = "gap" if pool == "gap_all" and config.num_prefix_tokens == 0 else pool
    config = dataclasses.replace(config, pool=pool)
    if config.pos_embed == "none" or config.num_prefix_tokens > config.class_token:
        return config
    full = config.class_position or config.pos_embed != "learn" or format == "transformers"
    return dataclasses.replace(config, pos_embed="learn", class_position=config.class_token and full)


def _processor(
    source: Source, format: str, metadata: Mapping[str, Any], config: ViTConfig
) -> processors.ImageProcessor:
    if format == "transformers":
        return processors.from_transformers(source.preprocessor, config.image_size, "ViTImageProcessor")
    if format == "timm":
        return processors.from_timm(processors.timm_preprocessing(metadata), config.image_size)
    return processors.from_google(config.image_size, resize_directly=config.class_position)


def _labels(metadata: Mapping[str, Any]) -> tuple[str, ...] | None:
    """Class names in order, from HF's `id2label` or timm's `label_names`."""
    if labels := labels_of(metadata.get("id2label")):
        return labels
    names = metadata.get("label_names") or (metadata.get("pretrained_cfg") or {}).get("label_names")
    return tuple(names) if names else None


FAMILY = Family(
    name="ViT",
    config=ViTConfig,
    formats=("transformers", "timm", "npz"),
    recognise=recognise,
    read=read,
    table=table,
    shapes=lambda source, config: abstract(config),
    bundle=bundle,
    save=save,
    stored=_stored,
    keys={
        "transformers: ViTConfig": configs.TRANSFORMERS,
        "timm: VisionTransformer": timm.VISION_TRANSFORMER,
        "timm: Eva": timm.EVA,
    },
)
