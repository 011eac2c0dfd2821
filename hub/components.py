"""Directories of several models, as diffusers writes its pipelines: a `model_index.json` and one folder a component.

Components with weights are loaded, sharded and saved each by its own family; those without (schedulers, tokenizers,
processors) are kept as the files they are.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from ..storage.paths import file_names, read_whole
from .bundle import Bundle, assemble
from .family import Options
from .files.documents import read_json
from .files.source import Source
from .files.tensors import nearest
from .files.writers import staged, write_json

INDEX = "model_index.json"
FORMAT = "diffusers"
_UNUSED = {"StableDiffusionSafetyChecker"}  # looks at finished images: nothing here runs it, copies are without it


@dataclasses.dataclass(frozen=True)
class Index:
    """The components that a `model_index.json` names, in its order; entries of other kinds are its settings."""

    directory: Path
    document: dict[str, Any]

    @property
    def folders(self) -> list[str]:
        """The names of components that are there: [library, class], neither of them null."""
        entries = self.kept.items()
        return [name for name, entry in entries if isinstance(entry, list) and len(entry) == 2 and None not in entry]

    @property
    def kept(self) -> dict[str, Any]:
        """The document, the components that nothing runs being absent."""
        named = {name: entry for name, entry in self.document.items() if isinstance(entry, list)}
        unused = [name for name, entry in named.items() if _UNUSED.intersection(map(str, entry))]
        return self.document | {name: [None, None] for name in unused}

    def has_weights(self, name: str) -> bool:
        """Whether a component is a model; ValueError where its folder is missing."""
        folder = self.directory / name
        if Path(name).name != name or not folder.is_dir():
            raise ValueError(f"{self.directory / INDEX} names the component {name!r}, and there is no such folder")
        return any(name.endswith((".safetensors", ".bin", ".pth")) for name in file_names(folder))


def open_index(path: Path) -> Index | None:
    """The index of a directory of components; None for everything else."""
    document = read_json(path / INDEX) if path.is_dir() else {}
    return Index(path, document) if document else None


@dataclasses.dataclass(frozen=True)
class Parts:
    """A single file of several models, taken apart as a directory of components would have them."""

    document: dict[str, Any]  # what that directory's index would say
    sources: dict[str, Source]
    documents: dict[str, dict[str, bytes]]  # files of components without weights


def load_components(index: Index, options: Options, load: Callable[[Path, Options], Bundle]) -> Bundle:
    """A bundle of the components with weights; `processor` holds the files of the others, by folder and name.

    An override is named as a component and holds the overrides of its config. ValueError names the component whose
    folder is missing, or whose weights or overrides are at fault.
    """
    models = [name for name in index.folders if index.has_weights(name)]

    def load_one(name: str, own: Options) -> Bundle:
        component = load(index.directory / name, own)
        # Inputs are prepared by components of their own: a model's folder without such files has no processor.
        alone = not any(map(_is_processor, file_names(index.directory / name)))
        return dataclasses.replace(component, processor=None) if alone else component

    components = _load_each(models, options, load_one, index.directory)
    others = [name for name in index.folders if name not in models]
    documents = {name: _documents(index.directory / name) for name in others}
    return assemble(components, FORMAT, index.kept, documents)


def load_parts(parts: Parts, options: Options, load: Callable[[Source, Options], Bundle]) -> Bundle:
    """The same of a single file; where it holds one model alone, that model's bundle."""
    sources = list(parts.sources.values())
    if len(sources) == 1:
        return dataclasses.replace(load(sources[0], options), processor=None)

    def load_one(name: str, own: Options) -> Bundle:
        return dataclasses.replace(load(parts.sources[name], own), processor=None)

    components = _load_each(list(parts.sources), options, load_one, sources[0].tensors.path)
    return assemble(components, FORMAT, parts.document, parts.documents)


def _load_each(
    models: list[str], options: Options, load: Callable[[str, Options], Bundle], where: Path
) -> dict[str, Bundle]:
    for name in options.overrides:
        if name not in models:
            raise ValueError(f"unknown component {name!r} of {where}{nearest(name, models)}; it has {models}")
    components: dict[str, Bundle] = {}
    for name in models:
        try:
            components[name] = load(name, dataclasses.replace(options, overrides=options.overrides.get(name, {})))
        except ValueError as error:
            raise ValueError(f"component {name!r}: {error}") from error
    return components


def save_components(
    bundle: Bundle,
    path: Path,
    format: str,
    max_shard_size: int,
    save: Callable[[Bundle, Path, str, int], None],
) -> None:
    """The directory of components, each in the format it came in."""
    if format != FORMAT:
        raise ValueError(f"unknown format {format!r} of several components, expected {FORMAT!r}")
    if jax.process_index() > 0:  # takes part in gathering; nothing is written here
        for name, component in bundle.components.items():
            save(component, path / name, component.format, max_shard_size)
        return
    with staged(path) as stage:
        stage.mkdir()
        for name, component in bundle.components.items():
            save(component, stage / name, component.format, max_shard_size)
        for name, files in bundle.processor.items():
            (stage / name).mkdir()
            for file, content in files.items():
                (stage / name / file).write_bytes(content)
        write_json(stage / INDEX, bundle.metadata)


def _is_processor(file: str) -> bool:
    """Whether a file beside weights prepares inputs: a tokeniser's, or the settings of images."""
    config = file == "config.json" or file.endswith(".index.json")
    return file.endswith((".json", ".txt", ".model", ".jinja")) and not config


def _documents(folder: Path) -> dict[str, bytes]:
    return {name: read_whole(folder / name) for name in file_names(folder)}
