"""Opens published checkpoints, recognised by their content: safetensors, torch, TorchScript, npz, Keras, dlib, shards.

Nothing is read before it is asked for: an open file costs its table of contents. Formats: safetensors (a header of
JSON, then raw elements), torch files (torch_files.py), NumPy archives, and the `*.index.json` of sharded checkpoints.
"""

import json
import zipfile
import zlib
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from ...models.messages import bounded_errors
from ...storage.paths import as_path, file_names, read_range, size_of
from . import dlib_files, keras_files, torch_files
from .documents import read_json
from .tensors import (
    CHECKSUMS,
    SAFETENSORS_DTYPES,
    LazyTensor,
    TensorFile,
    TensorFileError,
    check_expansion,
    checked_bytes,
    checked_shape,
    index_checksum,
    map_bytes,
    num_bytes,
    zip_member,
)

# The weights' names in published directories, preferred first: no pickle where there is a choice.
_STEMS = ("model", "diffusion_pytorch_model", "open_clip_model", "pytorch_model", "open_clip_pytorch_model")
_SUFFIXES = (".safetensors.index.json", ".safetensors", ".bin.index.json", ".bin")
_MAX_HEADER = 100_000_000  # the limit that the safetensors library sets


@bounded_errors()
def open_tensors(path: str | Path) -> TensorFile:
    """The tensors of a checkpoint file, of a shard index (`*.index.json`), or of a directory that holds either.

    Raises ValueError, naming the file, for what is missing, damaged, truncated, unknown or not to be trusted.
    """
    path = as_path(path)
    if path.is_dir():
        path = _weights_in(path)
    if not path.is_file():
        raise TensorFileError(f"no such checkpoint file: {path}")
    try:
        tensors = _read_index(path) if path.name.endswith(".index.json") else _read(path)
    except TensorFileError:
        raise
    except Exception as error:  # damaged files make their parsers fail in every way
        raise TensorFileError(f"{path} is damaged: {type(error).__name__}: {str(error)[:500]}") from error
    return TensorFile(path, tensors)


def read_metadata(path: Path) -> dict[str, Any]:
    """What a safetensors file says beside its tensors; nothing for files of other kinds."""
    if not path.is_file() or _recognise(path) != "safetensors":
        return {}
    length = int.from_bytes(map_bytes(path, 0, 8).tobytes(), "little")
    metadata = json.loads(map_bytes(path, 8, length).tobytes()).get("__metadata__")
    return metadata if isinstance(metadata, dict) else {}


def _weights_in(directory: Path) -> Path:
    names = set(file_names(directory))
    published = (stem + suffix for suffix in _SUFFIXES for stem in _STEMS)
    if name := next((name for name in published if name in names), None):
        return directory / name
    found = [name for name in sorted(names) if _recognise(directory / name)]
    if len(found) != 1:
        got = f"several checkpoints ({found})" if found else f"no checkpoint, only {sorted(names)}"
        raise TensorFileError(f"{directory} holds {got}; expected one file of tensors, or one named model.safetensors")
    return directory / found[0]


def _recognise(path: Path) -> str | None:
    """The kind of tensor file by its first bytes; None if it is none."""
    start = read_range(path, 0, 16)
    if start.startswith(b"PK\x03\x04"):
        return "zip"
    if start.startswith(keras_files.PREFIX):
        return "keras"
    if dlib_files.PREFIX.match(start):
        return "dlib"
    if start.startswith(torch_files.LEGACY_PREFIX):
        return "legacy"
    return "safetensors" if start[8:9] == b"{" and int.from_bytes(start[:8], "little") <= _MAX_HEADER else None


def _read(path: Path) -> dict[str, LazyTensor]:
    match _recognise(path):
        case "zip":
            return _read_zip(path)
        case "legacy":
            return torch_files.read_legacy(path)
        case "keras":
            return keras_files.read_keras(path)
        case "dlib":
            return dlib_files.read_dlib(path)
        case "safetensors":
            return _read_safetensors(path)
    start = read_range(path, 0, 40)
    hint = " (a Git LFS pointer: fetch the file itself)" if start.startswith(b"version https://git-lfs") else ""
    raise TensorFileError(
        f"{path} is not a tensor file{hint}: got {size_of(path)} bytes that start with {start[:16]!r}, "
        "expected safetensors, a torch file, npz, Keras weights or a dlib network"
    )


def _read_index(path: Path) -> dict[str, LazyTensor]:
    """The shards of a `*.index.json`; a shard is any tensor file beside it."""
    document = read_json(path)
    locations, metadata = document.get("weight_map"), document.get("metadata")
    if not isinstance(locations, dict) or not all(isinstance(name, str) for name in locations.values()):
        raise TensorFileError(f"{path} has no weight_map of tensors to the names of shards")
    shards: dict[str, TensorFile] = {}
    for name in sorted(set(locations.values())):
        shard = path.parent / name
        if Path(name).name != name or name.endswith(".index.json") or shard.is_dir():
            raise TensorFileError(f"{path} points to shard {name[:200]!r}, expected the name of a file beside it")
        shards[name] = open_tensors(shard)
    expected = metadata.get(CHECKSUMS) if isinstance(metadata, dict) else None
    if expected is not None and expected != index_checksum(locations):
        raise TensorFileError(
            f"{path} is damaged, or was edited: its weight_map has another CRC than {str(expected)[:20]!r}"
        )
    return {key: shards[name][key] for key, name in locations.items()}


def _read_safetensors(path: Path) -> dict[str, LazyTensor]:
    size = size_of(path)
    length = int.from_bytes(map_bytes(path, 0, 8).tobytes(), "little")
    if 8 + length > size:
        raise TensorFileError(f"{path} is truncated: got {size} bytes, expected a header of {length} bytes after 8")
    text = map_bytes(path, 8, length).tobytes()
    header: dict[str, Any] = json.loads(text)
    metadata = header.pop("__metadata__", None) or {}
    entries = sorted(header.items(), key=lambda item: item[1]["data_offsets"])
    checksums = _checksums(path, text, metadata.get(CHECKSUMS), len(entries))
    tensors: dict[str, LazyTensor] = {}
    end = 0
    for (name, entry), checksum in zip(entries, checksums, strict=True):
        if entry["dtype"] not in SAFETENSORS_DTYPES:
            raise TensorFileError(f"{path}: tensor {name!r} has unknown dtype {entry['dtype']!r}")
        dtype, (begin, stop) = SAFETENSORS_DTYPES[entry["dtype"]], entry["data_offsets"]
        shape = checked_shape(path, name, entry["shape"])
        if begin != end or stop - begin != num_bytes(shape, dtype):
            raise TensorFileError(
                f"{path} is damaged: tensor {name!r} has bytes {begin} to {stop}, "
                f"expected {num_bytes(shape, dtype)} bytes from {end} for {dtype} {shape}"
            )
        end = stop
        tensors[name] = _dense(path, name, 8 + length + begin, dtype, shape, checksum)
    if size != 8 + length + end:
        raise TensorFileError(f"{path} is truncated or damaged: got {size} bytes, expected {8 + length + end}")
    return tensors


def _checksums(path: Path, text: bytes, digits: str | None, count: int) -> list[int | None]:
    """The CRC of every tensor, None where the file holds none (see CHECKSUMS); checks that of the header."""
    if digits is None:
        return [None] * count
    header, *tensors = (int(digits[i : i + 8], 16) for i in range(0, len(digits), 8))
    if zlib.crc32(text.replace(digits.encode(), b"0" * len(digits), 1)) != header or len(tensors) != count:
        raise TensorFileError(f"{path} is damaged: its header has another CRC than {header:08x}")
    return [*tensors]


def _dense(
    path: Path, name: str, offset: int, dtype: np.dtype, shape: tuple[int, ...], checksum: int | None
) -> LazyTensor:
    """Elements as they lie in the file; the first time they are checked against the checksum, where there is one."""
    size, checked = num_bytes(shape, dtype), checksum is None

    def view() -> np.ndarray:
        nonlocal checked
        whole = (path, offset, size)
        data = map_bytes(*whole) if checked else checked_bytes(*whole, checksum or 0, f"tensor {name!r}")
        checked = True
        return data.view(dtype).reshape(shape)

    return LazyTensor(shape, dtype, view)


def _read_zip(path: Path) -> dict[str, LazyTensor]:
    try:
        with path.open("rb") as file, zipfile.ZipFile(file) as archive:
            check_expansion(path, archive)
            names = archive.namelist()
            if any(name.endswith("/data.pkl") for name in names):
                return torch_files.read_zip(path, archive)
            if names and all(name.endswith(".npy") for name in names):
                return {info.filename[:-4]: _npy(path, archive, info) for info in archive.infolist()}
    except zipfile.BadZipFile as error:
        raise TensorFileError(
            f"{path} is truncated or damaged: got {size_of(path)} bytes, expected a whole zip archive ({error})"
        ) from error
    raise TensorFileError(f"{path} is a zip archive but neither a torch file nor npz: it holds {names[:5]}")


def _npy(path: Path, archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> LazyTensor:
    """One array of an npz archive (numpy.lib.format); bfloat16 is the nameless type `|V2` there."""
    with archive.open(info) as file:
        version = np.lib.format.read_magic(file)
        read_header = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
        shape, fortran, stored = read_header[version](file)
        start = file.tell()
    dtype = np.dtype(ml_dtypes.bfloat16) if stored == np.dtype("V2") else stored
    if dtype is stored and (stored.kind not in "biufc" or not stored.isnative):
        raise TensorFileError(f"{path}: array {info.filename!r} has dtype {stored}, expected plain native numbers")
    if info.file_size - start != num_bytes(shape, dtype):
        raise TensorFileError(
            f"{path} is damaged: array {info.filename!r} has {info.file_size - start} bytes, "
            f"expected {num_bytes(shape, dtype)}"
        )

    member = zip_member(path, info)

    def view() -> np.ndarray:
        return member()[start:].view(dtype).reshape(shape, order="F" if fortran else "C")

    return LazyTensor(shape, dtype, view)
