"""Tensors out of torch files without torch and without running anything that is in them.

A torch file is a pickle of nested containers whose tensors point into raw storages: members of a zip archive (torch >=
1.6, and TorchScript), or byte ranges behind the pickle (before 1.6). Pickles are programs; they are read by the machine
of pickles.py, and of the objects that they name only those listed here stand for anything: all others are refused.
"""

import functools
import io
import re
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from ...storage.paths import size_of
from .pickles import Inert, Machine, Name, set_items
from .tensors import LazyTensor, TensorFileError, map_bytes, num_bytes, zip_member

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
_MAX_RANK = 32
_MAX_NAME = 1000  # characters
_MAX_OBJECTS = 1_000_000
_MAX_SHARING = 16  # places that an average object of a file may stand in
_MAX_EXPANSION = 1024  # elements that one stored element may stand for, on average
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


def read_zip(path: Path, archive: zipfile.ZipFile) -> dict[str, LazyTensor]:
    """The tensors of a torch zip file or TorchScript archive (the archive's data.pkl and data/<key> members)."""
    members = {info.filename: info for info in archive.infolist()}
    pickled = next(name for name in members if name.endswith("/data.pkl"))
    root = pickled.removesuffix("data.pkl")
    order = members.get(root + "byteorder")
    if order and zip_member(path, order)().tobytes() != b"little":
        raise TensorFileError(f"{path} holds big-endian tensors, expected little-endian")
    unpickler = _Unpickler(path)
    loaded = unpickler.load(io.BytesIO(zip_member(path, members[pickled])().tobytes()))
    storages = {
        name.removeprefix(root + "data/"): _Bytes(info.file_size, zip_member(path, info))
        for name, info in members.items()
    }
    return _tensors(path, loaded, storages, unpickler.instructions)


def read_legacy(path: Path) -> dict[str, LazyTensor]:
    """The tensors of a file that torch wrote before 1.6: five pickles, then `int64 numel, elements` per storage."""
    storages: dict[str, _Bytes] = {}
    with path.open("rb") as file:
        magic, _, system = (_Unpickler(path).load(file) for _ in range(3))
        if magic != _LEGACY_MAGIC or not system.get("little_endian", True):
            raise TensorFileError(f"{path} is not a little-endian legacy torch file")
        unpickler = _Unpickler(path)
        loaded = unpickler.load(file)
        for key in _Unpickler(path).load(file):
            start = file.tell() + 8
            size = int.from_bytes(file.read(8), "little") * unpickler.dtypes[key].itemsize
            storages[key] = _Bytes(size, functools.partial(map_bytes, path, start, size))
            if file.seek(start + size) > size_of(path):
                raise TensorFileError(
                    f"{path} is truncated: got {size_of(path)} bytes, expected at least {start + size}"
                )
    return _tensors(path, loaded, storages, unpickler.instructions)


class _Unpickler(Machine):
    """Builds containers of `_Tensor` and `Inert`; `dtypes` collects the element type of every storage it meets."""

    def __init__(self, path: Path):
        super().__init__(self._known, self._storage)
        self.path = path
        self.dtypes: dict[str, np.dtype] = {}

    def _known(self, name: Name, arguments: tuple[Any, ...] | None) -> Any:
        """What a name stands for (without arguments), and what calling it gives."""
        key = (name.module, name.name)
        if (key[0] in ("torch", "torch.storage") and key[1] in STORAGES) or (key[0] == "torch" and key[1] in _DTYPES):
            return key[1]
        inert = key in _INERT or key[0].split(".")[0] == "__torch__"  # the latter: a TorchScript module
        if not inert and key not in _REBUILDERS and key != ("collections", "OrderedDict"):
            raise TensorFileError(
                f"{self.path} names the Python object {key[0]}.{key[1]}, which is not on the list of what may stand "
                "in a tensor file; nothing was executed. Expected a plain state dict"
            )
        if arguments is None:
            return name
        if inert:
            return Inert()
        return _REBUILDERS[key](*arguments) if key in _REBUILDERS else _ordered(*arguments)

    def _storage(self, reference: Any) -> _Storage:
        _, storage, key, _, _, *view = reference
        self.dtypes[key] = STORAGES[storage]
        # The view of legacy files: (its own key, offset in elements, size).
        return _Storage(key, STORAGES[storage], view[0][1] if view and view[0] else 0)


def _ordered(items: Any = ()) -> dict[Any, Any]:
    result: dict[Any, Any] = {}
    set_items(result, items)
    return result


def _window(key: str, dtype: np.dtype, offset: int, shape: Any, strides: Any) -> _Tensor:
    if len(shape) > _MAX_RANK or len(strides) != len(shape):
        raise ValueError(f"a tensor has {len(shape)} dimensions and {len(strides)} strides")
    return _Tensor(key, dtype, offset, tuple(shape), tuple(strides))


def _rebuild_tensor(storage: _Storage, offset: int, shape: Any, strides: Any, *_: Any) -> _Tensor:
    return _window(storage.key, storage.dtype, storage.offset + offset, shape, strides)


def _rebuild_typed_tensor(
    storage: _Storage, offset: int, shape: Any, strides: Any, requires_grad: Any, hooks: Any, dtype: str, *_: Any
) -> _Tensor:
    return _window(storage.key, _DTYPES[dtype], offset, shape, strides)


_REBUILDERS: dict[tuple[str, str], Callable[..., Any]] = {
    ("torch._utils", "_rebuild_tensor"): _rebuild_tensor,
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
    ("torch._utils", "_rebuild_tensor_v3"): _rebuild_typed_tensor,
    ("torch._utils", "_rebuild_parameter"): lambda data, *_: data,
    ("torch._utils", "_rebuild_parameter_with_state"): lambda data, *_: data,
    ("torch._tensor", "_rebuild_from_type_v2"): lambda rebuild, kind, arguments, state: _REBUILDERS[
        rebuild.module, rebuild.name
    ](*arguments),
    ("torch.serialization", "_get_layout"): lambda name: name,
    ("torch.jit._pickle", "build_intlist"): lambda values: values,
    ("torch.jit._pickle", "build_doublelist"): lambda values: values,
    ("torch.jit._pickle", "build_boollist"): lambda values: values,
    ("torch.jit._pickle", "build_tensorlist"): lambda values: values,
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


def _tensors(path: Path, loaded: Any, storages: dict[str, _Bytes], instructions: int) -> dict[str, LazyTensor]:
    """Peels the wrappers of training scripts and names every tensor by the dotted path to it.

    A pickle may hold one dict in many places, and dicts of such dicts: their number is bounded by `instructions`.
    """
    if isinstance(loaded, dict):
        for _ in _WRAPPERS:
            loaded = next((loaded[name] for name in _WRAPPERS if isinstance(loaded.get(name), dict)), loaded)
        loaded = {re.sub(r"^((module|_orig_mod)\.)+", "", _printable(key)): value for key, value in loaded.items()}
    tensors: dict[str, LazyTensor] = {}
    for visited, (name, node) in enumerate(_walk(loaded)):
        if visited > min(_MAX_SHARING * instructions, _MAX_OBJECTS):
            raise TensorFileError(f"{path} unfolds into more than {visited} objects from {instructions} instructions")
        if isinstance(node, _Tensor):
            tensors[name] = _lazy(path, name, node, storages)
    return tensors


def _walk(root: Any) -> Iterator[tuple[str, Any]]:
    """Everything in nested dicts, in order, by dotted path; ValueError where a path has no end."""
    yield "", root
    ahead = [("", _children(root))]
    while ahead:
        prefix, children = ahead[-1]
        if (item := next(children, None)) is None:
            ahead.pop()
            continue
        name = prefix + _printable(item[0])
        if len(name) > _MAX_NAME:
            raise ValueError(f"a name in it has more than {_MAX_NAME} characters: {name[:60]!r}...")
        yield name, item[1]
        ahead.append((f"{name}.", _children(item[1])))


def _children(node: Any) -> Iterator[tuple[Any, Any]]:
    children = node.state if isinstance(node, Inert) else node
    return iter(children.items() if isinstance(children, dict) else ())


def _printable(key: Any) -> str:
    return str(key)[: _MAX_NAME + 1]


def _lazy(path: Path, name: str, tensor: _Tensor, storages: dict[str, _Bytes]) -> LazyTensor:
    """The window as a lazy tensor, after checking that it lies inside its storage."""
    numbers = (tensor.offset, *tensor.shape, *tensor.strides)
    extents = list(zip(tensor.shape, tensor.strides, strict=True))
    if not all(isinstance(number, int) and number >= 0 for number in numbers):
        raise TensorFileError(f"{path} is damaged: tensor {name!r} has offset, shape and strides {numbers}")
    itemsize = tensor.dtype.itemsize
    end = 0 if 0 in tensor.shape else (tensor.offset + sum((n - 1) * stride for n, stride in extents) + 1) * itemsize
    storage = storages.get(tensor.storage, _Bytes(0, lambda: np.empty(0, np.uint8)))
    if num_bytes(tensor.shape, tensor.dtype) > _MAX_EXPANSION * (end + 1024):
        raise TensorFileError(f"{path}: tensor {name!r} of {end} bytes stands for one of shape {tensor.shape}")
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
