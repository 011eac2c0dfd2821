"""Random-access sources of raw examples: digits and textures, any TFDS data set, folders of images.

A source has `len`, `source[i]` and `class_names`. An example is a dict with the encoded "image" (bytes), the "label"
(int) and whatever else the data set holds, and a "name" for messages. Sources are picklable and safe to read from
threads.
"""

import functools
import importlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .examples import Source
from .images.decode import CorruptExample
from .images.transforms import Example

# Name -> (module of data/drawn, its builder): the wing stands above this file and is read when one is asked for.
EMBEDDED = {"digits": ("digits", "Digits"), "shapes": ("shapes", "Shapes"), "textures": ("textures", "Textures")}
IMAGE_SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"}


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
    from .tfds_sets import TfdsSource, builder_of, prepared  # not above: workers that read a folder do without TFDS

    directory = Path(config.get("data_dir") or data_dir()).expanduser()
    if name in EMBEDDED:
        module, builder = EMBEDDED[name]
        cls = getattr(importlib.import_module(f".drawn.{module}", __package__), builder)
        make = functools.partial(cls, data_dir=directory, file_format="array_record")
        return TfdsSource(prepared(make, directory), split)
    return TfdsSource(builder_of(name, directory, config.get("download", False)), split)


def data_dir() -> Path:
    """$OMNAX_DATA_DIR, else ~/.cache/omnax/tfds."""
    return Path(os.environ.get("OMNAX_DATA_DIR", "~/.cache/omnax/tfds")).expanduser()


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
