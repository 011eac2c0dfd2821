"""Loading and saving of every published format: the two functions that users call."""

from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from jax.typing import DTypeLike

from ..models.messages import bounded_errors
from ..storage.paths import as_path
from .bundle import Bundle
from .components import load_components, load_parts, open_index, save_components
from .families import FAMILIES
from .families.stable_diffusion import ldm
from .family import Family, Options, differences
from .files.placement import Layout
from .files.source import Source, fetch, open_source
from .files.writers import MAX_SHARD_SIZE, follow, staged, write_safetensors

# What reading a config raises whose values have other types than its library writes.
_UNREADABLE = (TypeError, AttributeError, LookupError, ArithmeticError, RecursionError)


@bounded_errors()
def load(
    path_or_repo_id: str | Path,
    *,
    dtype: DTypeLike | None = None,
    mesh: Mesh | None = None,
    rules: Layout | None = None,
    **config_overrides: Any,
) -> Bundle:
    """Loads a published checkpoint: a directory, a file of tensors (both also as gs://…), or a hub repository's id.

    What it is shows in its content, never in its name. Parameters keep the dtype of the file unless `dtype` is given,
    which is then also what the model computes in (else float32). With a mesh every parameter is read straight into
    its shards; `rules` says where they lie, from abstract parameters and mesh to specs by path (default: everything
    but vectors split over the fsdp axis). Further keywords override fields of the model's config: another
    `image_size` resizes the positions as the format's own library does, another `num_classes` gives a fresh head.
    A directory of components (`model_index.json`), or a single file of them, is a bundle of bundles; a keyword named as
    one of them holds the overrides of its config.

    Raises ValueError, naming file and tensor, for a path that does not exist, an unknown or damaged file, and for
    tensors that are missing, unexpected or misshapen.
    """
    path = fetch(path_or_repo_id)
    if index := open_index(path):
        return load_components(index, Options(dtype, mesh, rules, config_overrides), _load)
    return _load(path, Options(dtype, mesh, rules, config_overrides))


def _load(path: Path, options: Options) -> Bundle:
    source = open_source(path)
    try:
        parts = ldm.split(source)
        return load_parts(parts, options, _load_source) if parts else _load_source(source, options)
    except _UNREADABLE as error:  # a text where a number is expected, a list for a section, a size of zero
        text = f"{source.where} is none that can be read: {type(error).__name__}: {error}"
        raise ValueError(text) from error


def _load_source(source: Source, options: Options) -> Bundle:
    family, format = recognise(source)
    return family.load(source, format, options)


def recognise(source: Source) -> tuple[Family, str]:
    """The family and the format of a checkpoint; ValueError where no family knows it."""
    for family in FAMILIES:
        if format := family.recognise(source):
            return family, format
    model_type = source.config.get("model_type", source.config.get("architecture"))
    raise ValueError(
        f"{source.tensors.path} is none of the known models ({', '.join(family.name for family in FAMILIES)}): "
        f"its config names {model_type!r}, its tensors begin with {sorted(source.tensors)[:3]}"
    )


@bounded_errors()
def save(bundle: Bundle, path: str | Path, format: str | None = None, *, max_shard_size: int = MAX_SHARD_SIZE) -> None:
    """Writes the published format back, by default the one it was loaded from, tensor for tensor.

    "ldm" is a single file of a Stable Diffusion pipeline or a ControlNet ("ckpt", "pth" and "pt" are torch's).
    "transformers" and "timm" are directories (safetensors, in shards beyond `max_shard_size` bytes, and their JSON
    files), "npz" is a file. Nothing half-written ever stands under `path`, and nothing that says another function: what
    is written is read back before it takes its place. Raises ValueError for an unknown format and for a model that the
    format cannot express, naming the fields of its config.
    """
    failure: Exception | None = None
    try:
        if format == ldm.FORMAT:
            _save_single_file(bundle, as_path(path))
        elif bundle.components:
            save_components(bundle, as_path(path), format or bundle.format, max_shard_size, _save)
        else:
            _save(bundle, as_path(path), format or bundle.format, max_shard_size)
    except Exception as error:
        failure = error
    if jax.process_count() > 1:  # nobody reads before the first has written, or goes on where it could not
        written = multihost_utils.broadcast_one_to_all(np.bool_(failure is None))
        if failure is None and not written:
            failure = ValueError(f"{path} was not written: the first process says why")
    if failure is not None:
        raise failure


def _save_single_file(bundle: Bundle, path: Path) -> None:
    """A pipeline, or a ControlNet, as one file: it holds no configs, so that only published models can be said so."""
    tensors = ldm.joined(bundle)
    if follow(tensors):
        return
    with staged(path) as stage:
        write = ldm.write_checkpoint if path.suffix in ldm.TORCH_SUFFIXES else write_safetensors
        write(stage, tensors)
        parts = ldm.split(open_source(stage))
        sources = parts.sources if parts else {}
        for name, component in (bundle.components or {"controlnet": bundle}).items():
            if name not in sources:
                raise ValueError(f"{path}: an ldm file has no place for {name!r}, only for {list(sources)}")
            family = _family(component.config)
            _check_read_back(family, component.config, component.format, sources[name], path)
        ldm.check_schedule(bundle, parts.documents if parts else {}, path)


def _save(bundle: Bundle, path: Path, format: str, max_shard_size: int) -> None:
    family = _family(bundle.config)
    if format not in family.formats:
        raise ValueError(f"unknown format {format!r}, expected one of {family.formats}")
    if jax.process_index() > 0:  # takes part in gathering; nothing is written here
        return family.save(bundle, path, format, max_shard_size)
    with staged(path) as stage:
        family.save(bundle, stage, format, max_shard_size)
        _check_read_back(family, bundle.config, format, open_source(stage), path)


def _family(config: Any) -> Family:
    family = next((family for family in FAMILIES if isinstance(config, family.config)), None)
    if family is None:
        raise ValueError(f"no format is known for a model with a {type(config).__name__}")
    return family


def _check_read_back(family: Family, config: Any, format: str, source: Source, path: Path) -> None:
    """ValueError where the written files do not say the function that `config` is, naming the fields that differ."""
    expected = family.stored(config, format)
    try:
        found, read_format = recognise(source)
        got = found.read(source, read_format, family.unsaid(expected, format))
    except ValueError as error:
        raise ValueError(f"{path}: format {format!r} cannot hold this {family.name}: {error}") from error
    if found is not family:
        raise ValueError(f"{path}: format {format!r} of {family.name} reads as {read_format!r} of {found.name}")
    got = family.stored(got, format)
    if problems := differences(expected, got):
        raise ValueError(f"{path}: format {format!r} cannot say {'; '.join(problems)}")
