"""Latents and text states that were computed once: a folder of shards, each a folder of arrays that are read by row.

    FOLDER/latents.json           what they were made with; every shard but the last has `rows` rows
    FOLDER/empty.npz              the text states of an empty caption
    FOLDER/00000/moments.npy      mean and logarithm of variance of the autoencoder's latents [N, X, Y, 2 C]
    FOLDER/00000/context.npy      text states [N, T, D]; of SDXL also pooled.npy [N, P]
    FOLDER/00000/condition.npy    condition images uint8 [N, 8 X, 8 Y, 3], where there are any
    FOLDER/00000/index.npy        the rows' places in the data set they were made of

A shard is written beside its place and then renamed, so that what stands there is whole: a job that was stopped goes on
with the shards that are missing.
"""

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from .files import printable, read_json
from .images.transforms import Example

SETTINGS, EMPTY = "latents.json", "empty.npz"
Arrays = Mapping[str, np.ndarray]


class LatentFolder:
    """A source of rows; every example also has the row of the empty caption, as "empty_context", "empty_pooled".

    ValueError for a folder that holds none, or that a job has not finished.
    """

    def __init__(self, path: Path):
        settings, self.class_names = read_settings(path), list[str]()
        self._path, self._rows = path, settings["rows"]
        shards = [path / f"{i:05d}" for i in range(settings["shards"])]
        if missing := [shard.name for shard in shards if not shard.is_dir()]:
            raise ValueError(
                f"{path} lacks {len(missing)} of {len(shards)} shards, {missing[0]} first: the job goes on"
            )
        self._shards = [{file.stem: np.load(file, mmap_mode="r") for file in shard.glob("*.npy")} for shard in shards]
        self._length = sum(len(shard["index"]) for shard in self._shards)
        with np.load(path / EMPTY) as empty:
            self._empty = {f"empty_{name}": empty[name] for name in empty.files}

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Example:
        number, row = self._place(index)
        shard = self._shards[number]
        found = {name: np.asarray(array[row]) for name, array in shard.items() if name != "index"}
        return {**found, **self._empty, "name": f"{self._path}/{number:05d}[{row}]"}

    def _place(self, index: int) -> tuple[int, int]:
        """Shard and row; examples that could not be read have left shards of fewer rows."""
        for number, shard in enumerate(self._shards):
            if index < len(shard["index"]):
                return number, index
            index -= len(shard["index"])
        raise IndexError(index)


def read_settings(path: Path) -> dict[str, Any]:
    """What a folder's latents were made with; ValueError where it has none."""
    file = path / SETTINGS
    if not file.is_file():
        raise ValueError(f"{printable(path)} has no {SETTINGS}, expected a folder that `infer cache-latents` made")
    return read_json(file.read_bytes())


def write_shards(
    path: Path, settings: dict[str, Any], empty: Arrays, make: Callable[[int], Arrays | None]
) -> Iterator[int]:
    """Writes the shards that are missing, `make(number)` giving the arrays of one, and yields their numbers.

    ValueError for a folder of latents that were made with other settings.
    """
    path.mkdir(parents=True, exist_ok=True)
    file = path / SETTINGS
    if file.is_file() and (old := read_settings(path)) != settings:
        different = sorted(key for key in old.keys() | settings.keys() if old.get(key) != settings.get(key))
        said = [f"{key} {printable(old.get(key))}, not {printable(settings.get(key))}" for key in different]
        raise ValueError(f"{path} holds latents that were made with {'; '.join(said)}: give another folder")
    np.savez(path / EMPTY, allow_pickle=False, **empty)
    file.write_text(json.dumps(settings, indent=2) + "\n")
    for number in range(settings["shards"]):
        target, part = path / f"{number:05d}", path / f"{number:05d}.part"
        if target.is_dir():
            continue
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir()
        for name, array in (make(number) or {"index": np.zeros(0, np.int32)}).items():
            np.save(part / f"{name}.npy", array)
        part.rename(target)
        yield number
