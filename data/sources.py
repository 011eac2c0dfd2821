"""Random-access sources of raw examples: digits and textures, any TFDS data set, folders of images.

A source has `len`, `source[i]` and `class_names`. An example is a dict with the encoded "image" (bytes), the "label"
(int) and whatever else the data set holds, and a "name" for messages. Sources are picklable and safe to read from
threads.
"""

import functools
import importlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..models.messages import bounded_errors
from ..storage.paths import as_path, is_local
from .examples import Source
from .files import printable, read_file, subfolders, walk
from .images.decode import CorruptExample
from .images.transforms import Example

# Name -> (module of data/drawn, its builder): the wing stands above this file and is read when one is asked for.
EMBEDDED = {
    "control_shapes": ("control_shapes", "ControlShapes"),
    "digits": ("digits", "Digits"),
    "shapes": ("shapes", "Shapes"),
    "textures": ("textures", "Textures"),
    "tiles": ("tiles", "Tiles"),
}
IMAGE_SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"}


@bounded_errors()
def source(config: Mapping[str, Any], split: str) -> Source:
    """Opens the data set that a config names.

    `config.name` is one of `EMBEDDED`, "folder" (with `config.path`, the folder that holds one folder per split), or
    the name of a TFDS data set (`name[/config][:version]`). TFDS data sets live in `config.data_dir` (default
    `data_dir()`); all but the embedded ones must be there already unless `config.download` is true. `split` may be a
    slice in TFDS syntax, "train[:90%]", but for folders. ValueError for everything that does not exist or is empty.
    """
    name = config["name"]
    if name == "folder":
        return ImageFolder(as_path(config["path"]) / split)
    from .tfds_sets import TfdsSource, builder_of, prepared  # not above: workers that read a folder do without TFDS

    directory = as_path(config.get("data_dir") or data_dir())
    if not is_local(directory):
        raise ValueError(f"data_dir is {directory}, expected a local folder: TFDS's records are read from there alone")
    directory = directory.expanduser()
    if name in EMBEDDED:
        module, builder = EMBEDDED[name]
        cls = getattr(importlib.import_module(f".drawn.{module}", __package__), builder)
        make = functools.partial(cls, data_dir=directory, file_format="array_record")
        return TfdsSource(prepared(make, directory), split)
    return TfdsSource(builder_of(name, directory, config.get("download", False)), split)


def data_dir() -> Path:
    """$OMNAX_DATA_DIR, else ~/.cache/omnax/tfds."""
    return as_path(os.environ.get("OMNAX_DATA_DIR", "~/.cache/omnax/tfds")).expanduser()


class ImageFolder:
    """Images in one folder per class, in the order of their paths; files of other kinds are passed over.

    Hidden folders are no classes. What is named like an image and is none (pipes, dead links) is logged by name.
    """

    def __init__(self, path: Path):
        if not path.is_dir():
            raise ValueError(f"{path} is not a folder, expected one that holds a folder of images per class")
        self.class_names: list[str] = subfolders(path)
        numbers = {name: label for label, name in enumerate(self.class_names)}
        self._root = str(path)
        inner = [os.path.relpath(file, path) for file in walk(path, IMAGE_SUFFIXES)]
        inner = [name for name in inner if os.sep in name]  # those in no class are passed over
        if not inner:
            kinds = ", ".join(sorted(IMAGE_SUFFIXES))
            raise ValueError(f"no images in {path}, expected one folder per class with {kinds} files")
        self._labels = np.array([numbers[name.partition(os.sep)[0]] for name in inner], np.int32)
        # End to end: worker processes hold a copy, and a million Python strings would be 100 MB in each.
        encoded = [os.fsencode(name) for name in inner]
        self._names, self._ends = b"".join(encoded), np.cumsum([len(name) for name in encoded])

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, index: int) -> Example:
        start = self._ends[index - 1] if index else 0
        file = os.path.join(self._root, os.fsdecode(self._names[start : self._ends[index]]))
        try:
            return {"image": read_file(file), "label": int(self._labels[index]), "name": file}
        except OSError as error:
            raise CorruptExample(file, f"cannot be read ({error.strerror})") from error


def check_classes(what: str, names: Sequence[str], num_classes: int, train_names: Sequence[str] = ()) -> None:
    """ValueError where the classes of a split are not those of the model's head, or of the training split.

    `names` are those of the data, `train_names` of the split that trains. Without names there is nothing to check.
    """
    if train_names and names and list(names) != list(train_names):
        extra, lacking = (sorted(set(a) - set(b)) for a, b in ((names, train_names), (train_names, names)))
        raise ValueError(
            f"{what} has other classes than the training data ({len(names)} and {len(train_names)}): "
            f"{_some(extra)} are new, {_some(lacking)} are missing; labels are numbers in the order of the names"
        )
    if names and num_classes and len(names) != num_classes:
        raise ValueError(f"{what} has {len(names)} classes ({_some(names)}), the model's head {num_classes}")


def _some(names: Sequence[str]) -> str:
    return printable(", ".join(map(repr, names[:4])) + (", …" if len(names) > 4 else "") or "none")
