"""Qwen2.5-VL and Qwen3-VL checkpoints: recognised, loaded, saved, with tokenizer and settings beside the weights."""

import dataclasses
import functools
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from ....models.qwen_vl.language import TextConfig
from ....models.qwen_vl.model import QwenVL, QwenVLConfig, init_params
from ....storage.paths import read_whole
from ...bundle import Bundle
from ...family import Checkpoint, Family, Overrides, differences
from ...files.placement import Tree
from ...files.source import Source
from ...files.writers import MAX_SHARD_SIZE, write_directory
from ...mapping import Table, save_tensors
from . import formats, preprocessing, qwen3

SETTINGS = ("scan", "remat")  # what may be overridden
# What turns text and images into the model's input; data/conversations/qwen_vl.py reads it, saving writes it back.
DOCUMENTS = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
    "processor_config.json",
    "generation_config.json",
)


def recognise(source: Source) -> str | None:
    """The format of a Qwen-VL checkpoint; None if it is not one."""
    kind = source.config.get("model_type")
    if kind in (qwen3.DENSE, qwen3.EXPERTS):
        text = source.config.get("text_config")
        return qwen3.layout(source.tensors, text.get("hidden_size") if isinstance(text, dict) else None)
    if kind is not None:
        return "transformers" if kind == "qwen2_5_vl" else None
    own = re.compile(r"(model\.)?visual\.(merger\.ln_q|deepstack_merger_list\.0\.norm)\.weight")
    return "transformers" if any(own.fullmatch(name) for name in source.tensors) else None


def read(source: Source, format: str, overrides: Overrides) -> QwenVLConfig:
    """What config.json says; `overrides` are `scan` and `remat`, for both towers."""
    if not source.config:
        raise ValueError(f"{source.tensors.path}: a Qwen-VL checkpoint needs its config.json beside the weights")
    published = from_json(source.config, source.where)
    known = {name: value for name, value in overrides.items() if name in SETTINGS}
    text, vision = (dataclasses.replace(tower, **known) for tower in (published.text, published.vision))
    return dataclasses.replace(published, text=text, vision=vision)


def bundle(checkpoint: Checkpoint, params: Tree) -> Bundle:
    """The model with its processor's files."""
    return Bundle(
        model=QwenVL(checkpoint.config, dtype=checkpoint.options.compute_dtype),
        params=params,
        config=checkpoint.config,
        processor=read_documents(checkpoint.source.directory),
        format=checkpoint.format,
        metadata=checkpoint.source.config,
    )


def save(bundle: Bundle, path: Path, format: str, max_shard_size: int = MAX_SHARD_SIZE) -> None:
    """Writes a directory as the releases are. See `omnax.hub.save`."""
    # Entries that the config does not speak about stay as they were read, if they still say the same function.
    config, published = bundle.config, bundle.metadata
    if not published or differences(from_json(published), config):
        published = (qwen3 if config.timestamps else formats).config_to_json(config)
    documents = {"config.json": published, **(bundle.processor or {})}
    write_directory(path, save_tensors(bundle.params, table(config, format)), documents, max_shard_size)


def from_json(published: Mapping[str, Any], where: str = "config.json") -> QwenVLConfig:
    """The config of either generation's config.json."""
    generation = qwen3 if published.get("model_type") in (qwen3.DENSE, qwen3.EXPERTS) else formats
    return generation.config_from_json(published, where)


def table(config: QwenVLConfig, format: str = qwen3.RELEASED) -> Table:
    """The rows of a config's tensors."""
    return qwen3.table(config, format) if config.timestamps else formats.table(config)


def abstract(config: QwenVLConfig) -> Tree:
    """Shapes of the parameters."""
    return jax.eval_shape(functools.partial(init_params, QwenVL(config)), jax.random.key(0))


def read_documents(directory: Path) -> dict[str, Any]:
    """File name -> content of the processor's files: JSON objects as such, other text as bytes."""
    documents: dict[str, Any] = {}
    templates = sorted(directory.glob("additional_chat_templates/*.jinja"))
    for name in (*DOCUMENTS, *(f"additional_chat_templates/{path.name}" for path in templates)):
        if (path := directory / name).is_file():
            data = read_whole(path)
            try:
                documents[name] = json.loads(data) if name.endswith(".json") else data
            except ValueError as error:
                raise ValueError(f"{path} is not JSON: {error}") from error
    return documents


def _stored(config: QwenVLConfig, format: str) -> QwenVLConfig:
    """Without what has no meaning, which no file says: the scale of absent low-rank terms, time beside timestamps."""
    if config.timestamps:
        config = dataclasses.replace(config, tokens_per_second=QwenVLConfig.tokens_per_second)
    if config.text.lora_rank:
        return config
    return dataclasses.replace(config, text=dataclasses.replace(config.text, lora_alpha=TextConfig.lora_alpha))


FAMILY = Family(
    name="Qwen-VL",
    config=QwenVLConfig,
    formats=qwen3.FORMATS,
    recognise=recognise,
    read=read,
    table=lambda source, format, config: table(config, format),
    shapes=lambda source, config: abstract(config),
    bundle=bundle,
    save=save,
    stored=_stored,
    settings=lambda config: SETTINGS,
    keys={
        "transformers: Qwen2_5_VLConfig": formats.NESTED,
        "transformers: Qwen2_5_VLTextConfig (or at the root, in releases)": formats.TEXT,
        "transformers: Qwen2_5_VLTextConfig, rope_parameters": formats.ROPE,
        "transformers: Qwen2_5_VLVisionConfig": formats.VISION,
        "transformers: Qwen2_5_VLVisionConfig, rope_parameters": formats.VISION_ROPE,
        "transformers: Qwen3VLConfig, Qwen3VLMoeConfig": qwen3.ROOT,
        "transformers: Qwen3VLTextConfig": qwen3.TEXT,
        "transformers: Qwen3VLMoeTextConfig": qwen3.TEXT_EXPERTS,
        "transformers: Qwen3VLTextConfig, Qwen3VLMoeTextConfig, rope_parameters": qwen3.ROPE,
        "transformers: Qwen3VLVisionConfig, Qwen3VLMoeVisionConfig": qwen3.VISION,
        **preprocessing.TABLES,
    },
)
