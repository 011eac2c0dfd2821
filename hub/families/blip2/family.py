"""BLIP-2 checkpoints: recognised, loaded, saved, with the tokenizer and image settings that lie beside the weights."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import traverse_util

from ....models.blip2.model import Blip2, Blip2Config, init_params, scanned
from ...bundle import Bundle
from ...family import Checkpoint, Family, Overrides
from ...files.placement import Tree
from ...files.source import Source
from ...files.tensors import LazyTensor
from ...files.torch_writer import write_torch
from ...files.writers import follow, write_directory
from ...mapping import Table, save_tensors
from ...processor import ImageProcessor, from_transformers, to_transformers
from . import formats

TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "vocab.txt", "merges.txt", "spiece.model", "generation_config.json"),
)
_LAVIS = "Qformer.bert.encoder.layer.0.crossattention.self.key.weight"


@dataclasses.dataclass(frozen=True)
class Blip2Processor:
    """How images and texts become inputs: the image's settings, and the files of the tokenizer by name."""

    image: ImageProcessor | None
    tokenizer: Mapping[str, bytes] = dataclasses.field(default_factory=dict)


def recognise(source: Source) -> str | None:
    """The format of a BLIP-2 checkpoint; None if it is not one."""
    if source.config.get("model_type") == "blip-2":
        return "transformers"
    return "lavis" if _LAVIS in source.tensors and "query_tokens" in source.tensors else None


def read(source: Source, format: str, overrides: Overrides) -> Blip2Config:
    """What config.json says, or of a `.pth` the shapes; see `settings`."""
    if format == "lavis":
        config = formats.from_lavis(source.tensors, overrides)
    else:
        config = formats.from_transformers(source.config, source.tensors, source.where)
    if "scan" in overrides or "remat" in overrides:
        return scanned(config, overrides.get("scan", False), overrides.get("remat", "none"))
    return config


def table(source: Source, format: str, config: Blip2Config) -> Table:
    """The table that reads a file of this format."""
    if format == "transformers":
        return formats.transformers_table(config)
    return formats.lavis_table(config, formats.projection_of(source.tensors))


def bundle(checkpoint: Checkpoint, params: Tree) -> Bundle:
    """The model with its processor's files."""
    source, config = checkpoint.source, checkpoint.config
    lavis = checkpoint.format == "lavis"
    return Bundle(
        model=Blip2(config, dtype=checkpoint.options.compute_dtype),
        params=params,
        config=config,
        processor=_processor(source, config),
        format=checkpoint.format,
        metadata={"projection": formats.projection_of(source.tensors)} if lavis else source.config,
    )


def _processor(source: Source, c: Blip2Config) -> Blip2Processor:
    said = source.preprocessor.get("processor_config.json", {}).get("num_query_tokens")
    if said not in (None, c.num_queries):
        raise ValueError(
            f"{source.directory / 'processor_config.json'}: 'num_query_tokens' is {str(said)[:60]}, expected "
            f"{c.num_queries} as config.json has it"
        )
    files = {name: source.directory / name for name in TOKENIZER_FILES}
    documents = {name: path.read_bytes() for name, path in files.items() if path.is_file()}
    image = from_transformers(source.preprocessor, c.vision.image_size, "BlipImageProcessor") if c.vision else None
    return Blip2Processor(image, documents)


def save(bundle: Bundle, path: Path, format: str, max_shard_size: int) -> None:
    """Writes a directory as transformers does, or a `.pth` as LAVIS does. See `omnax.hub.save`."""
    if format == "lavis":
        return _save_lavis(bundle, path)
    documents: dict[str, Any] = {"config.json": formats.to_transformers(bundle.config, bundle.metadata)}
    if bundle.processor is not None:
        image = bundle.processor.image
        documents |= to_transformers(image, "BlipImageProcessor") if image else {}
        documents |= bundle.processor.tokenizer
    tensors = save_tensors(bundle.params, formats.transformers_table(bundle.config))
    write_directory(path, tensors, documents, max_shard_size)


def _save_lavis(bundle: Bundle, path: Path) -> None:
    c = bundle.config
    projection = bundle.metadata.get("projection") or ("t5_proj" if c.t5 else "opt_proj")
    params = traverse_util.flatten_dict(bundle.params, sep="/")
    if c.vision is not None and not c.vision.pre_norm:  # its keys' biases change nothing, and have no name there
        params = {k: x for k, x in params.items() if not (k.startswith("vision/") and k.endswith("key/bias"))}
    tensors = save_tensors(traverse_util.unflatten_dict(params, sep="/"), formats.lavis_table(c, projection))
    if c.qformer.vocab_size:
        positions = np.arange(c.qformer.max_positions)[None]
        tensors["Qformer.bert.embeddings.position_ids"] = LazyTensor(
            positions.shape, positions.dtype, lambda: positions
        )
    if c.qformer.lm_head:  # tied, and named twice in a state dict
        tensors["Qformer.cls.predictions.decoder.weight"] = tensors["Qformer.bert.embeddings.word_embeddings.weight"]
        tensors["Qformer.cls.predictions.decoder.bias"] = tensors["Qformer.cls.predictions.bias"]
    if not follow(tensors):
        write_torch(path, {"model": tensors})


def abstract(config: Blip2Config) -> Tree:
    """Shapes of the parameters."""
    return jax.eval_shape(lambda: init_params(Blip2(config), jax.random.key(0)))


def _settings(config: Blip2Config) -> tuple[str, ...]:
    return ("scan", "remat", "vision", "qformer")


FAMILY = Family(
    name="BLIP-2",
    config=Blip2Config,
    formats=("transformers", "lavis"),
    recognise=recognise,
    read=read,
    table=table,
    shapes=lambda source, config: abstract(config),
    bundle=bundle,
    save=save,
    settings=_settings,
    unsaid=lambda config, format: (
        {name: getattr(config, name) for name in ("vision", "qformer")} if format == "lavis" else {}
    ),
    keys={
        "transformers: Blip2Config": formats.ROOT,
        "transformers: Blip2Config, vision_config": formats.VISION,
    },
)
