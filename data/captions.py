"""Images with captions: any TFDS set, webdataset tar shards, a folder with captions.jsonl, labelled images by template.

A caption source gives examples with the encoded "image" (bytes), "captions" (a tuple of texts that all describe it), a
"name" for messages and, where there is one, the class "label". Examples without a usable caption are `CorruptExample`s,
which the pipeline skips, counts and names.
"""

import json
import tarfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from . import sources
from .images.decode import CorruptExample
from .images.transforms import Example, Transform
from .sources import IMAGE_SUFFIXES, Source
from .text.bpe import TextTokenizer
from .text.tokens import Overflow

_CAPTION_KEYS = ("caption", "captions", "text", "texts")


def caption_source(config: Mapping[str, Any], split: str) -> Source:
    """Opens the captioned images that a config names.

    `config["name"]` is "captions" (a folder `config["path"]`, or its sub-folder `split`, with captions.jsonl), "tar"
    (shards `config["path"]/split*.tar`, or all of a path with a * in it), or anything that `sources.source` opens.
    There, captions are the field `caption_key` (default: the first of caption, captions, text, texts), or with
    `templates` made from the class names, which `class_names` replaces. ValueError for what is missing or empty.
    """
    name = config["name"]
    if name == "captions":
        path = Path(config["path"])
        return CaptionFolder(path / split if (path / split).is_dir() else path)
    if name == "tar":
        return TarShards(_shards(str(config["path"]), split))
    opened = sources.source(config, split)
    templates = tuple(config.get("templates") or ())
    names = tuple(config.get("class_names") or opened.class_names)
    if templates and len(names) != len(opened.class_names):
        raise ValueError(f"got {len(names)} class_names, data set {name!r} has {len(opened.class_names)} classes")
    return Captioned(opened, names, templates, config.get("caption_key") or "")


class Captioned:
    """Captions from a field of another source's examples, or from its labels by templates as "a photo of a {}"."""

    def __init__(self, source: Source, names: Sequence[str], templates: Sequence[str], key: str):
        self.source, self.templates, self.key = source, tuple(templates), key
        self.class_names: list[str] = list(names)

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Example:
        example = self.source[index]
        if self.templates:
            captions = [template.format(self.class_names[example["label"]]) for template in self.templates]
        else:
            captions = _texts(example, self.key)
        return {**_plain(example), "captions": _checked(captions, example["name"])}


class CaptionFolder:
    """A folder with captions.jsonl: lines {"image": path in the folder, "text": caption or list of captions}."""

    def __init__(self, path: Path):
        file = path / "captions.jsonl"
        if not file.is_file():
            raise ValueError(f"{path} has no captions.jsonl, expected lines as {{'image': 'a.jpg', 'text': 'a cat'}}")
        self.class_names: list[str] = []
        self._path = path
        self._lines = [line for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
        if not self._lines:
            raise ValueError(f"{file} is empty")

    def __len__(self) -> int:
        return len(self._lines)

    def __getitem__(self, index: int) -> Example:
        where = f"{self._path / 'captions.jsonl'}, line {index + 1}"
        try:
            entry = json.loads(self._lines[index])
            image = self._path / entry["image"]
        except (ValueError, KeyError, TypeError) as error:
            raise CorruptExample(where, f"no JSON object with an image ({error})") from error
        captions = _checked(_texts(entry, ""), str(image))
        try:
            return {"image": image.read_bytes(), "captions": captions, "name": str(image)}
        except OSError as error:
            raise CorruptExample(str(image), f"cannot be read ({error.strerror})") from error


class TarShards:
    """webdataset shards: neighbouring members of one stem are one example (000.jpg with 000.txt or 000.json).

    Opening reads the members' headers only; examples are then read by position in any order.
    """

    def __init__(self, shards: Sequence[Path]):
        self.class_names: list[str] = []
        self._examples: list[tuple[str, str, dict[str, tuple[int, int]]]] = []  # shard, stem, suffix -> (offset, size)
        for shard in shards:
            self._index(shard)
        if not self._examples:
            raise ValueError(f"no examples in {[str(shard) for shard in shards][:4]}")

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, index: int) -> Example:
        shard, stem, members = self._examples[index]
        name = f"{shard}/{stem}"
        image = next((suffix for suffix in members if f".{suffix}" in IMAGE_SUFFIXES), None)
        if image is None:
            raise CorruptExample(name, f"no image among members {sorted(members)}")
        with Path(shard).open("rb") as file:

            def read(suffix: str) -> bytes:
                offset, size = members[suffix]
                file.seek(offset)
                return file.read(size)

            entry: Mapping[str, Any] = {"text": read("txt")} if "txt" in members else {}
            if not entry and "json" in members:
                try:
                    entry = json.loads(read("json"))
                except ValueError as error:
                    raise CorruptExample(name, f"its json is damaged ({error})") from error
            return {"image": read(image), "captions": _checked(_texts(entry, ""), name), "name": name}

    def _index(self, shard: Path) -> None:
        try:
            with tarfile.open(shard, "r:") as archive:
                for member in archive:
                    if not member.isfile():
                        continue
                    folder, _, file = member.name.rpartition("/")
                    stem, _, suffix = file.partition(".")  # webdataset: the suffix begins at the first dot
                    stem = f"{folder}/{stem}" if folder else stem
                    if not self._examples or self._examples[-1][:2] != (str(shard), stem):
                        self._examples.append((str(shard), stem, {}))
                    self._examples[-1][2][suffix.lower()] = (member.offset_data, member.size)
        except (tarfile.TarError, OSError) as error:
            raise ValueError(f"{shard} is not an uncompressed tar shard, or is damaged: {error}") from error


class DistinctCaptions:
    """A source regrouped by caption: example i is one of those with caption i, drawn anew each time it is read.

    Every epoch of the pipeline then shows every caption once, so that a batch whose size divides their number holds no
    caption twice (a second one would be a false negative). Reads all captions once, so it is for small sets.
    """

    def __init__(self, source: Source):
        self.source, self.class_names = source, source.class_names
        groups: dict[tuple[str, ...], list[int]] = {}
        for index in range(len(source)):
            groups.setdefault(source[index]["captions"], []).append(index)
        self._groups = list(groups.values())

    def __len__(self) -> int:
        return len(self._groups)

    def __getitem__(self, index: int) -> Example:
        return {"group": self._groups[index]}

    def draw(self, example: Example, rng: np.random.Generator) -> Example:
        """The transform that goes before all others."""
        return {**example, **self.source[int(rng.choice(example["group"]))]}


@dataclass(frozen=True)
class Tokenize:
    """The transform that turns "captions" into "tokens" [T] int32: one caption at random, or with `first` the first.

    A caption that is too long loses its tail, or with `overflow="error"` stops the run, naming the example.
    """

    tokenizer: TextTokenizer
    context_length: int
    first: bool = False
    overflow: Overflow = "truncate"

    def __call__(self, example: Example, rng: np.random.Generator) -> Example:
        captions = example["captions"]
        caption = captions[0 if self.first or len(captions) == 1 else int(rng.integers(len(captions)))]
        try:
            rows = self.tokenizer(caption, context_length=self.context_length, overflow=self.overflow)
        except ValueError as error:
            raise ValueError(f"caption of {example['name']}: {error}") from error
        return {**example, "tokens": rows[0]}


def chain(*transforms: Transform) -> Transform:
    """One transform after the other."""

    def apply(example: Example, rng: np.random.Generator) -> Example:
        for transform in transforms:
            example = transform(example, rng)
        return example

    return apply


def _shards(path: str, split: str) -> list[Path]:
    pattern = Path(path) if "*" in path else Path(path) / f"{split}*.tar"
    shards = sorted(pattern.parent.glob(pattern.name))
    if not shards:
        raise ValueError(f"no tar shards match {str(pattern)!r}")
    return shards


def _texts(example: Mapping[str, Any], key: str) -> list[Any]:
    """The caption field as a list: text, several texts, or (TFDS's coco_captions) a dict or list of dicts of them."""
    keys = (key,) if key else _CAPTION_KEYS
    value = next((example[name] for name in keys if name in example), [])
    if isinstance(value, Mapping):
        return _texts(value, "")
    if isinstance(value, str | bytes):
        return [value]
    return [text for item in value for text in (_texts(item, "") if isinstance(item, Mapping) else [item])]


def _checked(captions: Sequence[Any], name: str) -> tuple[str, ...]:
    """The captions that are not empty; CorruptExample if none is left."""
    texts = (text.decode("utf-8", "replace") if isinstance(text, bytes) else str(text) for text in captions)
    kept = tuple(text for text in texts if text.strip())
    if not kept:
        raise CorruptExample(name, "its caption is empty" if captions else "it has no caption")
    return kept


def _plain(example: Example) -> Example:
    return {key: example[key] for key in ("image", "label", "name") if key in example}
