"""Tensors out of torch files without torch and without running anything that is in them.

A torch file is a pickle of nested containers whose tensors point into raw storages: members of a zip archive (torch >=
1.6, and TorchScript), or byte ranges behind the pickle (before 1.6). Pickles are programs; the unpickler here knows
only the names listed in `_Unpickler`, all of which build inert data, and refuses every other.
"""

import collections
import functools
import io
import pickle
import re
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import ml_dtypes
import numpy as np

from .tensors import LazyTensor, TensorFileError, map_bytes, zip_member

STORAGES: dict[str, np.dtype] = {
    "DoubleStorage": np.dtype(np.float64),
    "FloatStorage": np.dtype(np.float32),
    "HalfStorage": np.dtype(np.float16),
    "BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
    "LongStorage": np.dtype(np.int64),
    "IntStorage": np.dtype(np.int32),
    "ShortStorage": np.dtype(np.int16),
    "CharStorage": np.dtype(np.int8),
    "ByteStorage": np.dtype(np.uint8),
    "BoolStorage": np.dtype(np.bool_),
    "ComplexFloatStorage": np.dtype(np.complex64),
    "ComplexDoubleStorage": np.dtype(np.complex128),
    "UntypedStorage": np.dtype(np.uint8),
}
_DTYPES: dict[str, np.dtype] = {
    **{name: np.dtype(name) for name in ("float64", "float32", "float16", "bool", "complex64", "complex128")},
    **{f"{sign}int{bits}": np.dtype(f"{sign}int{bits}") for sign in ("", "u") for bits in (8, 16, 32, 64)},
    **{name: np.dtype(getattr(ml_dtypes, name)) for name in ("bfloat16", "float8_e4m3fn", "float8_e5m2")},
}
# Where training scripts keep the weights among optimiser states and arguments; tried in this order, repeatedly.
_WRAPPERS = ("model_ema", "state_dict_ema", "model", "module", "state_dict")
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
LEGACY_PREFIX = b"\x80\x02\x8a\x0a" + _LEGACY_MAGIC.to_bytes(10, "little")  # protocol 2, LONG1 of 10 bytes


@dataclass(frozen=True)
class _Bytes:
    """A raw run of elements in the file: how many bytes, and how to get them [bytes] uint8."""

    size: int
    open: Callable[[], np.ndarray]


@dataclass(frozen=True)
class _Storage:
    """A pickled reference to such a run; `offset` counts elements (views of legacy files)."""

    key: str
    dtype: np.dtype
    offset: int


@dataclass(frozen=True)
class _Tensor:
    """A pickled strided window into a storage; offset and strides count elements."""

    storage: str
    dtype: np.dtype
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class _Inert:
    """Stands for a harmless object that is not a tensor: takes any arguments and state, keeps the state only."""

    state: dict[str, Any]

    def __new__(cls, *arguments: Any) -> "_Inert":
        self = super().__new__(cls)
        self.state = {}
        return self

    def __init__(self, *arguments: Any):
        pass

    def __setstate__(self, state: Any) -> None:
        self.state = state if isinstance(state, dict) else {}


def read_zip(path: Path, archive: zipfile.ZipFile) -> dict[str, LazyTensor]:
    """The tensors of a torch zip file or TorchScript archive (the archive's data.pkl and data/<key> members)."""
    members = {info.filename: info for info in archive.infolist()}
    pickled = next(name for name in members if name.endswith("/data.pkl"))
    root = pickled.removesuffix("data.pkl")
    order = members.get(root + "byteorder")
    if order and zip_member(path, order)().tobytes() != b"little":
        raise TensorFileError(f"{path} holds big-endian tensors, expected little-endian")
    loaded = _Unpickler(path, io.BytesIO(zip_member(path, members[pickled])().tobytes())).load()
    storages = {
        name.removeprefix(root + "data/"): _Bytes(info.file_size, zip_member(path, info))
        for name, info in members.items()
    }
    return _tensors(path, loaded, storages)


def read_legacy(path: Path) -> dict[str, LazyTensor]:
    """The tensors of a file that torch wrote before 1.6: five pickles, then `int64 numel, elements` per storage."""
    storages: dict[str, _Bytes] = {}
    with path.open("rb") as file:
        magic, _, system = (_Unpickler(path, file).load() for _ in range(3))
        if magic != _LEGACY_MAGIC or not system.get("little_endian", True):
            raise TensorFileError(f"{path} is not a little-endian legacy torch file")
        unpickler = _Unpickler(path, file)
        loaded = unpickler.load()
        for key in _Unpickler(path, file).load():
            start = file.tell() + 8
            size = int.from_bytes(file.read(8), "little") * unpickler.dtypes[key].itemsize
            storages[key] = _Bytes(size, functools.partial(map_bytes, path, start, size))
            if file.seek(start + size) > path.stat().st_size:
                raise TensorFileError(
                    f"{path} is truncated: got {path.stat().st_size} bytes, expected at least {start + size}"
                )
    return _tensors(path, loaded, storages)


class _Unpickler(pickle.Unpickler):
    """Builds containers of `_Tensor` and `_Inert`; `dtypes` collects the element type of every storage it meets."""

    def __init__(self, path: Path, file: IO[bytes]):
        super().__init__(file, encoding="utf-8")
        self.path = path
        self.dtypes: dict[str, np.dtype] = {}

    def find_class(self, module: str, name: str) -> Any:
        """What a pickled name stands for: always something of this call's own, since pickles may set attributes."""
        if (module in ("torch", "torch.storage") and name in STORAGES) or (module == "torch" and name in _DTYPES):
            return name
        if (module, name) in _REBUILDERS:
            return functools.partial(_REBUILDERS[module, name])
        if (module, name) == ("collections", "OrderedDict"):
            return collections.OrderedDict
        if (module, name) in _INERT or module.split(".")[0] == "__torch__":  # the latter: a TorchScript module
            return type(name, (_Inert,), {})
        raise TensorFileError(
            f"{self.path} names the Python object {module}.{name}, which is not on the list of what may stand in a "
            "tensor file; nothing was executed. Expected a plain state dict"
        )

    def persistent_load(self, pid: Any) -> _Storage:
        _, storage, key, _, _, *view = pid
        self.dtypes[key] = STORAGES[storage]
        # The view of legacy files: (its own key, offset in elements, size).
        return _Storage(key, STORAGES[storage], view[0][1] if view and view[0] else 0)


def _rebuild_tensor(storage: _Storage, offset: int, shape: Any, strides: Any, *_: Any) -> _Tensor:
    return _Tensor(storage.key, storage.dtype, storage.offset + offset, tuple(shape), tuple(strides))


def _rebuild_typed_tensor(
    storage: _Storage, offset: int, shape: Any, strides: Any, requires_grad: Any, hooks: Any, dtype: str, *_: Any
) -> _Tensor:
    return _Tensor(storage.key, _DTYPES[dtype], offset, tuple(shape), tuple(strides))


_REBUILDERS: dict[tuple[str, str], Callable[..., Any]] = {
    ("torch._utils", "_rebuild_tensor"): _rebuild_tensor,
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
    ("torch._utils", "_rebuild_tensor_v3"): _rebuild_typed_tensor,
    ("torch._utils", "_rebuild_parameter"): lambda data, *_: data,
    ("torch._utils", "_rebuild_parameter_with_state"): lambda data, *_: data,
    ("torch._tensor", "_rebuild_from_type_v2"): lambda rebuild, kind, arguments, state: rebuild(*arguments),
    ("torch.serialization", "_get_layout"): lambda name: name,
    ("torch.jit._pickle", "build_intlist"): list,
    ("torch.jit._pickle", "build_doublelist"): list,
    ("torch.jit._pickle", "build_boollist"): list,
    ("torch.jit._pickle", "build_tensorlist"): list,
    ("torch.jit._pickle", "restore_type_tag"): lambda value, tag: value,
}
# What training scripts leave beside the weights: arguments, sizes, NumPy scalars of logged losses.
_INERT = {
    ("argparse", "Namespace"),
    ("torch", "Size"),
    ("torch", "Tensor"),
    ("torch", "device"),
    ("torch.nn.parameter", "Parameter"),
    ("numpy", "dtype"),
    ("numpy.core.multiarray", "scalar"),
    ("numpy._core.multiarray", "scalar"),
    ("_codecs", "encode"),
}


def _tensors(path: Path, loaded: Any, storages: dict[str, _Bytes]) -> dict[str, LazyTensor]:
    """Peels the wrappers of training scripts and names every tensor by the dotted path to it."""
    if isinstance(loaded, dict):
        for _ in _WRAPPERS:
            loaded = next((loaded[name] for name in _WRAPPERS if isinstance(loaded.get(name), dict)), loaded)
        loaded = {re.sub(r"^((module|_orig_mod)\.)+", "", str(key)): value for key, value in loaded.items()}
    return {".".join(names): _lazy(path, ".".join(names), tensor, storages) for names, tensor in _walk(loaded, ())}


def _walk(node: Any, names: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], _Tensor]]:
    if isinstance(node, _Tensor):
        yield names, node
    children = node.state if isinstance(node, _Inert) else node
    if isinstance(children, dict):
        for name, child in children.items():
            yield from _walk(child, (*names, str(name)))


def _lazy(path: Path, name: str, tensor: _Tensor, storages: dict[str, _Bytes]) -> LazyTensor:
    """The window as a lazy tensor, after checking that it lies inside its storage."""
    numbers = (tensor.offset, *tensor.shape, *tensor.strides)
    extents = list(zip(tensor.shape, tensor.strides, strict=True))
    if not all(isinstance(number, int) and number >= 0 for number in numbers):
        raise TensorFileError(f"{path} is damaged: tensor {name!r} has offset, shape and strides {numbers}")
    itemsize = tensor.dtype.itemsize
    end = 0 if 0 in tensor.shape else (tensor.offset + sum((n - 1) * stride for n, stride in extents) + 1) * itemsize
    storage = storages.get(tensor.storage, _Bytes(0, lambda: np.empty(0, np.uint8)))
    if storage.size < end:
        raise TensorFileError(
            f"{path} is damaged: the storage of tensor {name!r} has {storage.size} bytes, expected at least {end}"
        )

    def view() -> np.ndarray:
        if end == 0:
            return np.empty(tensor.shape, tensor.dtype)
        elements = storage.open()[tensor.offset * itemsize : end].view(tensor.dtype)
        strides = [stride * itemsize for stride in tensor.strides]
        return np.lib.stride_tricks.as_strided(elements, tensor.shape, strides, writeable=False)

    return LazyTensor(tensor.shape, tensor.dtype, view)
