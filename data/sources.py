"""Random-access sources of raw examples: digits and textures, any TFDS data set, folders of images.

A source has `len`, `source[i]` and `class_names`. An example is a dict with the encoded "image" (bytes), the "label"
(int) and whatever else the data set holds, and a "name" for messages. Sources are picklable and safe to read from
threads.
"""

import contextlib
import fcntl
import functools
import importlib
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import tensorflow_datasets as tfds

from .images.decode import CorruptExample
from .images.transforms import Example

# Name -> (module of data/drawn, its builder): the wing stands above this file and is read when one is asked for.
EMBEDDED = {"digits": ("digits", "Digits"), "shapes": ("shapes", "Shapes"), "textures": ("textures", "Textures")}
IMAGE_SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"}


class Source(Protocol):
    """What the pipeline reads from."""

    class_names: list[str]

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Example: ...


def source(config: Mapping[str, Any], split: str) -> Source:
    """Opens the data set that a config names.

    `config.name` is one of `EMBEDDED`, "folder" (with `config.path`, the folder that holds one folder per split), or
    the name of a TFDS data set (`name[/config][:version]`). TFDS data sets live in `config.data_dir` (default
    `data_dir()`); all but the embedded ones must be there already unless `config.download` is true. `split` may be a
    slice in TFDS syntax, "train[:90%]", but for folders. ValueError for everything that does not exist or is empty.
    """
    name = config["name"]
    if name == "folder":
        return ImageFolder(Path(config["path"]) / split)
    directory = Path(config.get("data_dir") or data_dir()).expanduser()
    if name in EMBEDDED:
        module, builder = EMBEDDED[name]
        cls = getattr(importlib.import_module(f".drawn.{module}", __package__), builder)
        make = functools.partial(cls, data_dir=directory, file_format="array_record")
        return TfdsSource(_prepared(make, directory), split)
    return TfdsSource(_tfds_builder(name, directory, config.get("download", False)), split)


def data_dir() -> Path:
    """$OMNAX_DATA_DIR, else ~/.cache/omnax/tfds."""
    return Path(os.environ.get("OMNAX_DATA_DIR", "~/.cache/omnax/tfds")).expanduser()


class TfdsSource:
    """One split of a prepared TFDS data set; top-level images stay encoded."""

    def __init__(self, builder: tfds.core.DatasetBuilder, split: str):
        self._name = f"{builder.name}/{split}"
        if not builder.info.splits[split].num_examples:
            raise ValueError(f"{self._name} holds no examples")
        features: Any = builder.info.features
        images = [key for key, feature in features.items() if isinstance(feature, tfds.features.Image)]
        encoded = {key: tfds.decode.SkipDecoding() for key in images}
        open_split: Any = builder.as_data_source  # TFDS's decorators hide its signature from type checkers
        self._records: Sequence[Example] = open_split(split, decoders=encoded)
        self.class_names: list[str] = list(getattr(features["label"], "names", [])) if "label" in features else []

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> Example:
        return {**self._records[index], "name": f"{self._name}[{index}]"}


class ImageFolder:
    """Images in one folder per class, in the order of their paths; files of other kinds are passed over."""

    def __init__(self, path: Path):
        if not path.is_dir():
            raise ValueError(f"{path} is not a folder, expected one that holds a folder of images per class")
        self.class_names: list[str] = sorted(entry.name for entry in path.iterdir() if entry.is_dir())
        self._files = [
            (str(file), label)
            for label, name in enumerate(self.class_names)
            for file in sorted((path / name).rglob("*"))
            if file.suffix.lower() in IMAGE_SUFFIXES
        ]
        if not self._files:
            kinds = ", ".join(sorted(IMAGE_SUFFIXES))
            raise ValueError(f"no images in {path}, expected one folder per class with {kinds} files")

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> Example:
        file, label = self._files[index]
        try:
            return {"image": Path(file).read_bytes(), "label": label, "name": file}
        except OSError as error:
            raise CorruptExample(file, f"cannot be read ({error.strerror})") from error


def _tfds_builder(name: str, directory: Path, download: bool) -> tfds.core.DatasetBuilder:
    def make() -> tfds.core.DatasetBuilder:
        # the default format, TFRecord, can be neither written nor read by index without TensorFlow
        return tfds.builder(name, data_dir=directory, file_format="array_record")

    if download:
        return _prepared(make, directory)
    builder = make()
    if not builder.is_prepared():
        raise ValueError(f"TFDS data set {name!r} is not prepared in {directory}; download=True prepares it there")
    return builder


def _prepared(make: Callable[[], tfds.core.DatasetBuilder], directory: Path) -> tfds.core.DatasetBuilder:
    """The builder after preparation, which happens once even if several processes ask at the same time.

    TFDS prepares in a folder of its own and renames it when it is complete. The lock, which the system drops with the
    process, keeps others out meanwhile and so proves that a folder left by a killed process is nobody's.
    """
    builder = make()
    if builder.is_prepared():
        return builder
    with _locked(directory / f"{builder.name}.lock"):
        builder = make()
        if not builder.is_prepared():
            for remains in builder.data_path.parent.glob("incomplete.*"):
                shutil.rmtree(remains)
            builder.download_and_prepare()
    return builder


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
