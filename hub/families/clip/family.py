"""CLIP, OpenCLIP, EVA-CLIP and SigLIP weights: recognised, loaded, saved.

"transformers" is a directory of `CLIPModel`, `SiglipModel` or of one of their towers; "open_clip" a directory with
`open_clip_config.json`, or a bare file: OpenAI's archives, training checkpoints, EVA-CLIP's. "timm" is an EVA image
tower alone (timm's CLIP ViTs are plain ViTs to `hub.vit`).
"""

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import traverse_util
from jax.typing import DTypeLike

from ....kernels.interpolation import resize_grid, resize_positions
from ....models.clip import CLIP, CLIPConfig, ImageConfig, ImageTower, TextConfig, TextTower
from ....models.eva import EvaConfig
from ....models.vit import ViTConfig
from ....storage.paths import read_whole
from ... import processor as processors
from ...bundle import Bundle
from ...family import Checkpoint, Family, Overrides, fields_of
from ...files.documents import read_json
from ...files.placement import Tree
from ...files.source import Source
from ...files.tensors import LazyTensor
from ...files.writers import MAX_SHARD_SIZE, follow, staged, write_directory, write_json, write_safetensors
from ...mapping import Table, save_tensors
from ..vit import timm
from . import configs, formats, open_clip

AnyConfig = CLIPConfig | ImageConfig | TextConfig
_OPEN_CLIP_CONFIG = "open_clip_config.json"
TOKENIZER_FILES = (
    "vocab.json",
    "merges.txt",
    "tokenizer.json",
    "spiece.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    _OPEN_CLIP_CONFIG,  # how open_clip cleans text for other tokenisers than CLIP's
)
_OPEN_CLIP = r"visual\.(conv1|class_embedding|transformer|trunk|blocks|cls_token|patch_embed)\b.*"


@dataclasses.dataclass(frozen=True)
class CLIPProcessor:
    """How images and texts become inputs; `data.bpe.tokenizer_of(processor.tokenizer)` makes the tokeniser."""

    image: processors.ImageProcessor | None
    tokenizer: Mapping[str, bytes] = dataclasses.field(default_factory=dict)  # its files; none: OpenAI's vocabulary
    context_length: int = 77


def recognise(source: Source) -> str | None:
    """The format of a CLIP checkpoint; None if it is not one."""
    if "model_type" in source.config:
        return "transformers" if source.config["model_type"] in configs.MODEL_TYPES else None
    if any(re.fullmatch(_OPEN_CLIP, name) for name in source.tensors):
        return "open_clip"
    return "timm" if timm.is_eva(source.tensors) else None


def read(source: Source, format: str, overrides: Overrides) -> AnyConfig:
    """The config that the file was made with, and the overrides that do not resize anything."""
    metadata = _metadata(source, format)
    if format == "transformers":
        config: AnyConfig = configs.from_transformers(metadata, source.where)
    elif format == "timm":
        config = open_clip.from_timm(source.tensors, metadata, overrides, source.where)
    else:
        renames = [*(formats.EVA_RENAMES if _timm_trunk(source) else []), *formats.text_prefix(True)]
        where = str(source.directory / _OPEN_CLIP_CONFIG)
        config = open_clip.from_open_clip(source.tensors.renamed(renames), metadata, overrides, where)
    return _override(config, {k: v for k, v in overrides.items() if k not in ("image_size", "context_length")})


def table(source: Source, format: str, config: AnyConfig) -> Table:
    """The table that reads a file of this format."""
    if format == "transformers":
        return formats.transformers_table(config)
    if isinstance(config, ImageConfig):
        return formats.eva_table(config)
    assert isinstance(config, CLIPConfig)
    return formats.open_clip_table(config, custom_text=True, timm_trunk=_timm_trunk(source))


def _timm_trunk(source: Source) -> bool:
    return "visual.conv1.weight" not in source.tensors


def bundle(checkpoint: Checkpoint, params: Tree) -> Bundle:
    """The model; another `image_size` or `context_length` resizes the positions of its tower."""
    source, format, published = checkpoint.source, checkpoint.format, checkpoint.config
    metadata, options = _metadata(source, format), checkpoint.options
    config = _override(published, options.overrides)
    return Bundle(
        model=build(config, options.compute_dtype),
        params=options.cast(_resized_positions(params, published, config, options.placed(abstract_params(config)))),
        config=config,
        processor=_processor(source, format, metadata, published, config),
        format=format,
        metadata=metadata,
    )


def save(bundle: Bundle, path: Path, format: str, max_shard_size: int = MAX_SHARD_SIZE) -> None:
    """Writes a directory: weights, configs, and the tokeniser it came with. See `omnax.hub.save`."""
    config, processor = bundle.config, bundle.processor
    metadata = bundle.metadata if format == bundle.format else {}
    documents: dict[str, Any] = dict(processor.tokenizer) if processor and format != "timm" else {}
    documents.pop(_OPEN_CLIP_CONFIG, None)
    if format == "open_clip":
        tensors, document = _open_clip_document(bundle, metadata)
        if follow(tensors):
            return
        with staged(path) as stage:
            stage.mkdir()
            write_safetensors(stage / "open_clip_model.safetensors", tensors)
            write_json(stage / _OPEN_CLIP_CONFIG, document)
            for name, content in documents.items():
                (stage / name).write_bytes(content)
        return
    if format == "timm":
        if not isinstance(config, ImageConfig) or not isinstance(config.trunk, EvaConfig):
            raise ValueError("the timm format holds an EVA image tower alone, expected format 'open_clip'")
        table = formats.eva_table(config)
        if config.projection_dim and not config.projection_bias:
            raise ValueError("timm's heads have a bias, this projection has none: give format='open_clip'")
        pretrained = metadata.get("pretrained_cfg") or {}
        if processor and processor.image:
            pretrained = processors.to_timm(processor.image, pretrained)
        documents["config.json"] = timm.document(config.trunk, config.projection_dim, pretrained, metadata)
    else:
        dtype = str(jax.tree.leaves(bundle.params)[0].dtype)
        documents["config.json"] = configs.to_transformers(config, dtype, metadata)
        table = formats.transformers_table(config)
        if processor and processor.image:
            documents |= processors.to_transformers(processor.image)
    write_directory(path, save_tensors(bundle.params, table), documents, max_shard_size)


def build(config: AnyConfig, dtype: DTypeLike = jnp.float32) -> nn.Module:
    """The model of a config."""
    if isinstance(config, CLIPConfig):
        return CLIP(config, dtype)
    return ImageTower(config, dtype) if isinstance(config, ImageConfig) else TextTower(config, dtype)


def abstract_params(config: AnyConfig) -> Tree:
    """Shapes and dtypes of the parameters."""
    inputs: list[jax.ShapeDtypeStruct] = []
    if not isinstance(config, TextConfig):
        trunk = config.trunk if isinstance(config, ImageConfig) else config.image.trunk
        inputs.append(jax.ShapeDtypeStruct((1, *trunk.image_size, trunk.num_channels), jnp.float32))
    if not isinstance(config, ImageConfig):
        inputs.append(jax.ShapeDtypeStruct((1, 2), jnp.int32))
    return jax.eval_shape(build(config).init, jax.random.key(0), *inputs)["params"]


def _metadata(source: Source, format: str) -> dict[str, Any]:
    if format == "open_clip":
        return read_json(source.directory / _OPEN_CLIP_CONFIG)
    return source.config if "model_type" in source.config or "architecture" in source.config else {}


def settings(config: AnyConfig) -> set[str]:
    """The fields of the towers that a config has; `num_heads` is the image tower's."""
    towers: list[Any] = [TextConfig] if isinstance(config, TextConfig) else [EvaConfig]
    if isinstance(config, CLIPConfig):
        towers.append(TextConfig)
    return {name for tower in towers for name in fields_of(tower)}


def _override(config: AnyConfig, overrides: Mapping[str, Any]) -> AnyConfig:
    """The config with the fields replaced in every tower that has them."""

    def replaced(tower: Any) -> Any:
        fields = {f.name for f in dataclasses.fields(tower)}
        if isinstance(tower, TextConfig) and isinstance(config, CLIPConfig):
            fields -= {"num_heads"}
        return dataclasses.replace(tower, **{k: v for k, v in overrides.items() if k in fields})

    if isinstance(config, TextConfig):
        return replaced(config)
    if isinstance(config, ImageConfig):
        return dataclasses.replace(config, trunk=replaced(config.trunk))
    image = dataclasses.replace(config.image, trunk=replaced(config.image.trunk))
    return dataclasses.replace(config, image=image, text=replaced(config.text))


def _trunk(config: AnyConfig) -> tuple[ViTConfig | None, str]:
    """The image trunk's config, if there is one, and where its parameters lie."""
    if isinstance(config, TextConfig):
        return None, ""
    return (config.trunk, "trunk") if isinstance(config, ImageConfig) else (config.image.trunk, "image/trunk")


def _resized_positions(params: Tree, published: AnyConfig, config: AnyConfig, target: Tree) -> Tree:
    """Positions for images of another size, or texts of another length, by the rule of the format's own library.

    For texts only open_clip has one. The new tables lie as those of `target`.
    """
    leaves: dict[str, Any] = traverse_util.flatten_dict(params, sep="/")
    wanted: dict[str, Any] = traverse_util.flatten_dict(target, sep="/")
    (old, trunk), (new, _) = _trunk(published), _trunk(config)
    resized: dict[str, jax.Array] = {}
    if old is not None and new is not None and old.grid != new.grid:
        path = f"{trunk}/embed/pos_embed"
        resized[path] = resize_positions(leaves[path], old.grid, new.grid, new.pos_interpolation)
    path = "pos_embed" if isinstance(config, TextConfig) else "text/pos_embed"
    if path in leaves and leaves[path].shape != wanted[path].shape:
        resized[path] = resize_grid(leaves[path][None], (1, wanted[path].shape[0]), "bilinear")[0]
    for path, table in resized.items():
        leaves[path] = jax.device_put(table, wanted[path].sharding) if wanted[path].sharding else table
    return traverse_util.unflatten_dict(leaves, sep="/")


def _processor(
    source: Source, format: str, metadata: Mapping[str, Any], published: AnyConfig, config: AnyConfig
) -> CLIPProcessor:
    files = (source.directory / name for name in TOKENIZER_FILES)
    tokenizer = {file.name: read_whole(file) for file in files if file.is_file()}
    text = config if isinstance(config, TextConfig) else config.text if isinstance(config, CLIPConfig) else None
    trunk, _ = _trunk(published)
    image = None
    if trunk is not None and format == "timm":
        image = processors.from_timm(processors.timm_preprocessing(metadata), trunk.image_size)
    elif trunk is not None and format == "transformers":
        image = processors.from_transformers(source.preprocessor, trunk.image_size, _image_class(trunk))
    elif trunk is not None:
        image = processors.from_open_clip(metadata.get("preprocess_cfg") or {}, trunk.image_size)
    wanted, _ = _trunk(config)
    if image is not None and trunk is not None and wanted is not None:
        image = image.fitted(wanted.image_size, trunk.image_size, source.where)
    return CLIPProcessor(image, tokenizer, text.context_length if text else 77)


def _image_class(trunk: ViTConfig) -> str:
    """What transformers preprocesses the images of such a tower with, where no file says so."""
    return "CLIPImageProcessor" if trunk.class_token else "SiglipImageProcessor"


def _open_clip_document(bundle: Bundle, metadata: Mapping[str, Any]) -> tuple[dict[str, LazyTensor], dict[str, Any]]:
    """Tensors and `open_clip_config.json`."""
    config, processor = bundle.config, bundle.processor
    if not isinstance(config, CLIPConfig):
        raise ValueError(f"open_clip holds both towers, got {type(config).__name__}: give format='transformers'")
    preprocessing = dict(metadata.get("preprocess_cfg") or {})
    if processor and processor.image:
        size = config.image.trunk.image_size
        if not preprocessing or processors.from_open_clip(preprocessing, size) != processor.image:
            preprocessing = processors.to_open_clip(processor.image)
    document = open_clip.to_open_clip(config, preprocessing, metadata)
    timm_trunk = bool(document["model_cfg"]["vision_cfg"].get("timm_model_name"))
    custom_text = document["model_cfg"].get("custom_text", False)
    return save_tensors(bundle.params, formats.open_clip_table(config, custom_text, timm_trunk)), document


def _stored(config: AnyConfig, format: str) -> AnyConfig:
    """The config without the id of the end of text where the pooling does not ask for it."""
    if isinstance(config, CLIPConfig):
        text = _stored(config.text, format)
        assert isinstance(text, TextConfig)
        return dataclasses.replace(config, text=text)
    pooled = isinstance(config, ImageConfig) or config.pool == "eos"
    return config if pooled else dataclasses.replace(config, eos_id=TextConfig.eos_id)


def _unsaid(config: AnyConfig, format: str) -> Overrides:
    """The heads of EVA trunks, which only timm's name of a published size stands for."""
    trunk, _ = _trunk(config)
    return {"num_heads": trunk.num_heads} if isinstance(trunk, EvaConfig) else {}


FAMILY = Family(
    name="CLIP",
    config=(CLIPConfig, ImageConfig, TextConfig),
    formats=("transformers", "open_clip", "timm"),
    recognise=recognise,
    read=read,
    table=table,
    shapes=lambda source, config: abstract_params(config),
    bundle=bundle,
    save=save,
    settings=settings,
    stored=_stored,
    unsaid=_unsaid,
    keys={
        "transformers: CLIPConfig": configs.CLIP,
        "transformers: CLIPTextConfig": configs.CLIP_TEXT,
        "transformers: CLIPVisionConfig": configs.CLIP_IMAGE,
        "transformers: SiglipConfig": configs.SIGLIP,
        "transformers: SiglipTextConfig": configs.SIGLIP_TEXT,
        "transformers: SiglipVisionConfig": configs.SIGLIP_IMAGE,
        "open_clip: model_cfg": open_clip.MODEL,
        "open_clip: vision_cfg": open_clip.VISION,
        "open_clip: text_cfg": open_clip.TEXT,
    },
)
