"""Writes the zip files of torch >= 1.6 without torch: a pickle of nested dicts whose tensors point to raw members."""

import pickle
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .tensors import LazyTensor
from .torch_files import STORAGES
from .writers import staged

_ROOT = "archive"
_STORAGE_NAMES = {dtype: name for name, dtype in STORAGES.items() if name != "UntypedStorage"}


def write_torch(path: Path, document: Mapping[str, Any]) -> None:
    """What `torch.save(document, path)` writes, for nested dicts of strings, numbers, None and tensors.

    Each tensor becomes a contiguous storage of its own, read only when its turn comes.
    """
    with staged(path) as stage, zipfile.ZipFile(stage, "w") as archive:
        tensors: list[LazyTensor] = []
        program = b"\x80\x02" + _encode(document, tensors) + pickle.STOP
        archive.writestr(f"{_ROOT}/data.pkl", program)
        archive.writestr(f"{_ROOT}/byteorder", "little")
        for i, tensor in enumerate(tensors):
            with archive.open(f"{_ROOT}/data/{i}", "w", force_zip64=True) as member:
                member.write(np.ascontiguousarray(tensor.view()).tobytes())
        archive.writestr(f"{_ROOT}/version", "3\n")


def in_order(tensors: Mapping[str, LazyTensor], names: Sequence[str]) -> dict[str, LazyTensor]:
    """The tensors in the order of `names`, others behind."""
    position = {name: i for i, name in enumerate(names)}
    return dict(sorted(tensors.items(), key=lambda item: position.get(item[0], len(position))))


def _encode(value: Any, tensors: list[LazyTensor]) -> bytes:
    """Opcodes (pickle protocol 2) that leave `value` on the stack; tensors are collected in order of appearance."""
    if isinstance(value, Mapping):
        items = b"".join(_encode(key, tensors) + _encode(item, tensors) for key, item in value.items())
        return pickle.EMPTY_DICT + pickle.MARK + items + pickle.SETITEMS
    if isinstance(value, LazyTensor):
        tensors.append(value)
        return _encode_tensor(value, len(tensors) - 1)
    return pickle.dumps(value, protocol=2)[2:-1]  # without the protocol mark and the final STOP


def _encode_tensor(tensor: LazyTensor, index: int) -> bytes:
    """`_rebuild_tensor_v2(storage index, offset 0, shape, strides, requires_grad False, no hooks)`."""
    size = int(np.prod(tensor.shape))
    strides = tuple(int(np.prod(tensor.shape[i + 1 :])) for i in range(len(tensor.shape)))
    storage = (
        pickle.MARK
        + _encode("storage", [])
        + _global("torch", _STORAGE_NAMES[tensor.dtype])
        + b"".join(_encode(value, []) for value in (str(index), "cpu", size))
        + pickle.TUPLE
        + pickle.BINPERSID
    )
    hooks = _global("collections", "OrderedDict") + pickle.EMPTY_TUPLE + pickle.REDUCE
    arguments = storage + b"".join(_encode(value, []) for value in (0, tensor.shape, strides, False)) + hooks
    return _global("torch._utils", "_rebuild_tensor_v2") + pickle.MARK + arguments + pickle.TUPLE + pickle.REDUCE


def _global(module: str, name: str) -> bytes:
    return pickle.GLOBAL + f"{module}\n{name}\n".encode()
