"""Keras' HDF5 weights (`*.h5`, of layers or inside a whole model): tensors in the order of their layers.

Keras loads by order, names change between versions. A tensor is called "12.0 conv2d_5/kernel:0 of conv2d_5":
layer 12 of those with weights, its first array. Files of h5py are data: nothing in them is executed.
"""

import contextlib
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ...storage.paths import is_local
from .tensors import LazyTensor, TensorFileError, checked_shape

PREFIX = b"\x89HDF\r\n\x1a\n"
ORDER = ((r"^(\d+\.\d+) .*", r"\1"),)  # renames to the numbers alone
_MAX_LAYERS = 10_000


def read_keras(path: Path) -> dict[str, LazyTensor]:
    """The tensors of a file; ValueError where it holds no layers, or links out of itself."""
    tensors: dict[str, LazyTensor] = {}
    with _opened(path) as file:
        root = file.get("model_weights", file)
        layers = [
            name for name in _names(root.attrs, "layer_names", path) if _names(root[name].attrs, "weight_names", path)
        ]
        for i, layer in enumerate(layers):
            for j, weight in enumerate(_names(root[layer].attrs, "weight_names", path)):
                tensors[f"{i}.{j} {weight} of {layer}"] = _tensor(path, root[layer][weight])
    return tensors


def write_keras(path: Path, tensors: Mapping[str, LazyTensor], layers: Mapping[str, list[str]]) -> None:
    """A file of tensors "12.0" (layer 12, its first array) as Keras 2 writes weights; `layers` names them, in order."""
    h5py = _h5py(path)
    with h5py.File(path, "w") as file:
        file.attrs["layer_names"] = [name.encode() for name in layers]
        file.attrs["backend"], file.attrs["keras_version"] = b"tensorflow", b"2.19.0"
        for i, (layer, weights) in enumerate(layers.items()):
            group = file.create_group(layer)
            group.attrs["weight_names"] = [name.encode() for name in weights]
            for j, name in enumerate(weights):
                group.create_dataset(name, data=tensors[f"{i}.{j}"].view())


def _tensor(path: Path, dataset: Any) -> LazyTensor:
    name, external = dataset.name, dataset.external
    if external or dataset.is_virtual:
        raise TensorFileError(f"{path}: {name!r} lies in another file, which is not read")
    if dataset.dtype.kind not in "fiu":
        raise TensorFileError(f"{path}: {name!r} holds {dataset.dtype}, expected numbers")

    def view() -> np.ndarray:
        with _opened(path) as file:
            return file[name][()]

    return LazyTensor(checked_shape(path, name, [int(n) for n in dataset.shape]), dataset.dtype, view)


def _names(attributes: Any, key: str, path: Path) -> list[str]:
    """A list of names; long ones are split over key0, key1, …"""
    parts = [attributes[key]] if key in attributes else []
    while f"{key}{len(parts)}" in attributes and key not in attributes:
        parts.append(attributes[f"{key}{len(parts)}"])
    names = [name.decode() if isinstance(name, bytes) else str(name) for part in parts for name in part]
    if key == "layer_names" and not 0 < len(names) <= _MAX_LAYERS:
        raise TensorFileError(f"{path} names {len(names)} layers, expected a file of Keras weights")
    if len(set(names)) != len(names) or any(re.search(r"(^|/)\.\.(/|$)", name) for name in names):
        raise TensorFileError(f"{path}: {key} holds a name twice, or one that leads out of its layer")
    return names


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Any]:
    h5py = _h5py(path)
    with contextlib.ExitStack() as stack:
        file = path if is_local(path) else stack.enter_context(path.open("rb"))
        yield stack.enter_context(h5py.File(file, "r"))


def _h5py(path: Path) -> Any:
    try:
        import h5py
    except ImportError as error:
        raise TensorFileError(f"{path} is an HDF5 file: pip install 'omnax[faces]' to read it") from error
    return h5py
