"""Images with captions: any TFDS set, webdataset tar shards, a folder with captions.jsonl, labelled images by template.

A caption source gives examples with the encoded "image" (bytes), "captions" (a tuple of texts that all describe it), a
"name" for messages and, where there is one, the class "label". Examples without a usable caption are `CorruptExample`s,
which the pipeline skips, counts and names.
"""

import logging
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from ..models.messages import bounded_errors
from ..storage.paths import as_path, glob, read_range, size_of
from . import checksums, sources
from .files import check_encoding, lines_of, printable, read_file, read_json
from .images.decode import CorruptExample
from .images.transforms import Example, Transform
from .sources import IMAGE_SUFFIXES, Source
from .text.bpe import TextTokenizer
from .text.tokens import Overflow

logger = logging.getLogger(__name__)

_CAPTION_KEYS = ("caption", "captions", "text", "texts")
_DEEPEST = 8  # lists and objects in each other around a caption


@bounded_errors()
def caption_source(config: Mapping[str, Any], split: str) -> Source:
    """Opens the captioned images that a config names.

    `config["name"]` is "captions" (a folder `config["path"]`, or its sub-folder `split`, with captions.jsonl), "tar"
    (shards `config["path"]/split*.tar`, or all of a path with a * in it), or anything that `sources.source` opens.
    There, captions are the field `caption_key` (default: the first of caption, captions, text, texts), or with
    `templates` made from the class names, which `class_names` replaces. `pictures` names further pictures of every
    example: fields of a TFDS data set, or of the lines of captions.jsonl, where they are paths. ValueError for what is
    missing or empty.
    """
    name, pictures = config["name"], tuple(config.get("pictures") or ())
    if name == "captions":
        path = as_path(config["path"])
        if (path / split).is_dir():
            return CaptionFolder(path / split, pictures)
        if split != config.get("train_split", "train"):
            logger.warning("%s has no folder %r: this test is one on its training data", path, split)
        return CaptionFolder(path, pictures)
    if name == "tar":
        if pictures:
            raise ValueError(f"tar shards have one picture an example, expected no pictures {pictures}")
        return TarShards(_shards(str(config["path"]), split))
    opened = sources.source(config, split)
    templates = tuple(config.get("templates") or ())
    names = tuple(config.get("class_names") or opened.class_names)
    if templates and len(names) != len(opened.class_names):
        raise ValueError(f"got {len(names)} class_names, data set {name!r} has {len(opened.class_names)} classes")
    return Captioned(opened, names, templates, config.get("caption_key") or "", pictures)


class Captioned:
    """Captions from a field of another source's examples, or from its labels by templates as "a photo of a {}"."""

    def __init__(
        self, source: Source, names: Sequence[str], templates: Sequence[str], key: str, pictures: Sequence[str] = ()
    ):
        self.source, self.templates, self.key, self.pictures = source, tuple(templates), key, tuple(pictures)
        self.class_names: list[str] = list(names)

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Example:
        example = self.source[index]
        if self.templates:
            captions = {"text": [template.format(self.class_names[example["label"]]) for template in self.templates]}
        else:
            captions = example
        key = "" if self.templates else self.key
        further = _further(example, self.pictures, example["name"])
        return {**_plain(example), **further, "captions": _checked(captions, key, example["name"])}


class CaptionFolder:
    """A folder with captions.jsonl: lines {"image": path in the folder, "text": caption or list of captions}.

    Further `pictures` are paths in the same lines: {"image": "a.jpg", "condition": "a_edges.png", "text": "a cat"}.
    """

    def __init__(self, path: Path, pictures: Sequence[str] = ()):
        file = path / "captions.jsonl"
        if not file.is_file():
            raise ValueError(f"{path} has no captions.jsonl, expected lines as {{'image': 'a.jpg', 'text': 'a cat'}}")
        self.class_names: list[str] = []
        self._path, self._pictures = path, tuple(pictures)
        data = _read(file)
        check_encoding(data, file)
        self._lines = list(lines_of(data))
        if not self._lines:
            raise ValueError(f"{file} is empty")

    def __len__(self) -> int:
        return len(self._lines)

    def __getitem__(self, index: int) -> Example:
        number, line = self._lines[index]
        where = f"{self._path / 'captions.jsonl'}, line {number}"
        try:
            entry = read_json(line)
            files = {name: self._path / entry[name] for name in ("image", *self._pictures)}
        except (ValueError, KeyError, TypeError) as error:
            raise CorruptExample(where, f"no JSON object with an image ({error})") from error
        captions = _checked(entry, "", where)
        found: Example = {"captions": captions, "name": str(files["image"])}
        for name, file in files.items():
            try:
                found[name] = read_file(file)
            except OSError as error:
                raise CorruptExample(str(file), f"cannot be read ({error.strerror})") from error
        return found


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

        def read(suffix: str) -> bytes:
            return read_range(as_path(shard), *members[suffix])

        entry: Any = {"text": read("txt")} if "txt" in members else {}
        if not entry and "json" in members:
            try:
                entry = read_json(read("json"))
            except ValueError as error:
                raise CorruptExample(name, f"its json is damaged ({error})") from error
        return {"image": read(image), "captions": _checked(entry, "", name), "name": name}

    def _index(self, shard: Path) -> None:
        passed: list[str] = []
        for member in tar_members(shard):
            folder, _, file = member.name.rpartition("/")
            if file.startswith("._"):  # macOS puts these beside files; their stem is that of no example
                passed.append(member.name)
                continue
            stem, _, suffix = file.partition(".")  # webdataset: the suffix begins at the first dot
            stem = f"{folder}/{stem}" if folder else stem
            if not self._examples or self._examples[-1][:2] != (str(shard), stem):
                self._examples.append((str(shard), stem, {}))
            self._examples[-1][2][suffix.lower()] = (member.offset_data, member.size)
        if passed:
            logger.warning("%s: passed over %d members as %s", shard, len(passed), printable(passed[0]))


def _read(file: Path) -> bytes:
    try:
        return read_file(file)
    except OSError as error:
        raise ValueError(f"{file} cannot be read: {error.strerror}") from error


def tar_members(shard: Path) -> Iterator[tarfile.TarInfo]:
    """The files of an uncompressed tar; ValueError, with shard and offset, for any damage to its headers or its end.

    Python's reader takes a header that it cannot read for the end of the archive, and so loses all that follows.
    """
    archive: tarfile.TarFile | None = None
    try:
        checksums.check_file(shard)
        with shard.open("rb") as file, tarfile.open(fileobj=file, mode="r:") as archive:
            size = size_of(shard)
            while member := archive.next():
                if member.offset_data + member.size > size:
                    raise tarfile.ReadError(f"it has {size} bytes, {printable(member.name)} ends behind them")
                if member.isfile():
                    yield member
            if not _ends_here(file, archive.offset):
                raise tarfile.ReadError("there is neither a header nor the end of the archive (two blocks of zeros)")
    except (tarfile.TarError, OSError, ValueError) as error:
        offset = f" at offset {archive.offset}" if archive else ""
        message = f"{shard} is not an uncompressed tar shard, or is damaged{offset}: {error}"
        raise ValueError(message) from error


def _ends_here(file: IO[bytes], offset: int) -> bool:
    """Whether there are zeros only from `offset` on, and at least the two blocks that end an archive."""
    file.seek(offset)
    count = 0
    while block := file.read(1 << 20):
        if block.count(0) != len(block):
            return False
        count += len(block)
    return count >= 2 * tarfile.BLOCKSIZE


def all_captions(source: Source, limit: int | None = None) -> Iterator[tuple[int, tuple[str, ...]]]:
    """(index, captions) of the first `limit` examples; those that cannot be read are logged and passed over."""
    for index in range(min(len(source), limit or len(source))):
        try:
            yield index, source[index]["captions"]
        except CorruptExample as error:
            logger.warning("skipped unreadable example %s: %s", printable(error.name), printable(error.reason))


class DistinctCaptions:
    """A source regrouped by caption: example i is one of those with caption i, drawn anew each time it is read.

    Every epoch of the pipeline then shows every caption once, so that a batch whose size divides their number holds no
    caption twice (a second one would be a false negative). Reads all captions once, so it is for small sets.
    """

    def __init__(self, source: Source):
        self.source, self.class_names = source, source.class_names
        groups: dict[tuple[str, ...], list[int]] = {}
        for index, captions in all_captions(source):
            groups.setdefault(captions, []).append(index)
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


@dataclass(frozen=True)
class TokenizeAll:
    """The transform that turns "captions" into "tokens" [count, T] int32: all of them, then rows of -1."""

    tokenizer: TextTokenizer
    context_length: int
    count: int

    def __call__(self, example: Example, rng: np.random.Generator) -> Example:
        rows = self.tokenizer(list(example["captions"]), context_length=self.context_length)
        return {**example, "tokens": np.pad(rows, ((0, self.count - len(rows)), (0, 0)), constant_values=-1)}


def most_captions(source: Source) -> int:
    """The largest number of captions of an example that can be read; reads them all."""
    return max((len(found) for _, found in all_captions(source)), default=1)


def chain(*transforms: Transform) -> Transform:
    """One transform after the other."""

    def apply(example: Example, rng: np.random.Generator) -> Example:
        for transform in transforms:
            example = transform(example, rng)
        return example

    return apply


def _shards(path: str, split: str) -> list[Path]:
    pattern = as_path(path) if "*" in path else as_path(path) / f"{split}*.tar"
    shards = glob(pattern)
    for lost in checksums.missing(pattern.parent, {".tar"}):
        if Path(lost).match(pattern.name):
            raise ValueError(f"{lost} is listed in {checksums.LIST} and missing")
    if not shards:
        raise ValueError(f"no tar shards match {str(pattern)!r}")
    return shards


def _texts(value: Any, depth: int = 0) -> Iterator[str | bytes]:
    """The texts of a caption field: text, several texts, or (TFDS's coco_captions) a dict or list of dicts of them."""
    if depth > _DEEPEST:
        raise ValueError("its caption is nested too deeply")
    if isinstance(value, Mapping):
        yield from _texts(_field(value, ""), depth + 1)
    elif isinstance(value, str | bytes):
        yield value
    elif isinstance(value, list | tuple | np.ndarray):
        for item in value:
            yield from _texts(item, depth + 1)
    elif value is not None:
        raise ValueError(f"its caption is {printable(repr(value))}, expected a text")


def _field(example: Mapping[str, Any], key: str) -> Any:
    keys = (key,) if key else _CAPTION_KEYS
    return next((example[name] for name in keys if name in example), None)


def _checked(entry: Any, key: str, name: str) -> tuple[str, ...]:
    """The captions of an entry that are not empty; CorruptExample if none is left, or one is no text."""
    if not isinstance(entry, Mapping):
        raise CorruptExample(name, f"expected an object with a caption, got {type(entry).__name__}")
    try:
        found = [text.decode("utf-8-sig") if isinstance(text, bytes) else text for text in _texts(_field(entry, key))]
        for text in found:
            text.encode()
    except UnicodeEncodeError as error:
        raise CorruptExample(name, f"its caption holds half of a surrogate pair ({error.reason})") from error
    except UnicodeDecodeError as error:
        raise CorruptExample(name, f"its caption is no UTF-8 ({error.reason})") from error
    except ValueError as error:
        raise CorruptExample(name, str(error)) from error
    kept = tuple(text for text in found if text.strip())
    if not kept:
        raise CorruptExample(name, "its caption is empty" if found else "it has no caption")
    return kept


def _further(example: Mapping[str, Any], pictures: Sequence[str], name: str) -> Example:
    """The named pictures of an example; CorruptExample where one is missing."""
    if missing := [picture for picture in pictures if picture not in example]:
        raise CorruptExample(name, f"it has no {missing[0]!r}")
    return {picture: example[picture] for picture in pictures}


def _plain(example: Example) -> Example:
    return {key: example[key] for key in ("image", "label", "name") if key in example}
