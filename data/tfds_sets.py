"""Data sets of tensorflow-datasets, without TensorFlow: opened by index, prepared once however many processes ask."""

import contextlib
import fcntl
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds
from google.protobuf import json_format

from .files import printable
from .images.transforms import Example


def builder_of(name: str, directory: Path, download: bool) -> tfds.core.DatasetBuilder:
    def make() -> tfds.core.DatasetBuilder:
        # the default format, TFRecord, can be neither written nor read by index without TensorFlow
        with _damage_named(directory / name):
            return tfds.builder(name, data_dir=directory, file_format="array_record")

    if download:
        return prepared(make, directory)
    builder = make()
    if not builder.is_prepared():
        raise ValueError(f"TFDS data set {name!r} is not prepared in {directory}; download=True prepares it there")
    return builder


def prepared(make: Callable[[], tfds.core.DatasetBuilder], directory: Path) -> tfds.core.DatasetBuilder:
    """The builder after preparation, which happens once even if several processes ask at the same time.

    TFDS prepares in a folder of its own and renames it when it is complete. The lock, which the system drops with the
    process, keeps others out meanwhile and so proves that a folder left by a killed process is nobody's.
    """
    with _damage_named(directory):
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
def _damage_named(where: object) -> Iterator[None]:
    """What TFDS and array_record raise on damaged files, as one line that names them."""
    try:
        yield
    except (json_format.ParseError, UnicodeDecodeError) as error:
        raise ValueError(f"the data set {where} is damaged: dataset_info.json: {printable(error)}") from error
    except RuntimeError as error:  # of the record reader, which names its file where it can
        raise ValueError(f"the data set {where} is damaged: {printable(error)}") from error


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


class TfdsSource:
    """One split of a prepared TFDS data set; top-level images stay encoded."""

    def __init__(self, builder: tfds.core.DatasetBuilder, split: str):
        self._name = f"{builder.name}/{split}"
        self._files = f"{builder.data_path}/{builder.name}-{split.partition('[')[0]}.array_record*"
        if not builder.info.splits:
            raise ValueError(f"the data set {builder.data_path} is damaged: no dataset_info.json names its splits")
        if not builder.info.splits[split].num_examples:
            raise ValueError(f"{self._name} holds no examples")
        features: Any = builder.info.features
        images = [key for key, feature in features.items() if isinstance(feature, tfds.features.Image)]
        encoded = {key: tfds.decode.SkipDecoding() for key in images}
        open_split: Any = builder.as_data_source  # TFDS's decorators hide its signature from type checkers
        with _damage_named(self._files):
            self._records: Sequence[Example] = open_split(split, decoders=encoded)
            _ = self._records[0]  # opens the files
        self.class_names: list[str] = list(getattr(features["label"], "names", [])) if "label" in features else []

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> Example:
        with _damage_named(self._files):
            return {**self._records[index], "name": f"{self._name}[{index}]"}
