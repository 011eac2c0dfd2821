"""Tensors that stay on disk until they are asked for: the common currency of readers, mapping tables and writers."""

import difflib
import json
import re
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes
import numpy as np

from ...storage.paths import is_local, map_range, size_of

# The spellings of element types in safetensors headers (github.com/huggingface/safetensors, README "Format").
SAFETENSORS_DTYPES: dict[str, np.dtype] = {
    "BOOL": np.dtype(np.bool_),
    "U8": np.dtype(np.uint8),
    "I8": np.dtype(np.int8),
    "U16": np.dtype(np.uint16),
    "I16": np.dtype(np.int16),
    "U32": np.dtype(np.uint32),
    "I32": np.dtype(np.int32),
    "U64": np.dtype(np.uint64),
    "I64": np.dtype(np.int64),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F32": np.dtype(np.float32),
    "F64": np.dtype(np.float64),
    "C64": np.dtype(np.complex64),
}

# Entry of a safetensors file's metadata: CRC-32 in 8 hexadecimal digits each, of the header with these digits as zeros,
# then of every tensor in the order of the file. Other readers pass over it, other writers leave it out.
CHECKSUMS = "omnax_crc32"
MAX_EXPANSION = 100  # bytes that one byte of a compressed archive may stand for, beyond 256 MiB
_BLOCK = 1 << 20  # bytes that are checked at a time
Renames = Sequence[tuple[str, str]]


class TensorFileError(ValueError):
    """A checkpoint that is damaged, of an unknown kind, or not to be trusted; the message names the file."""


@dataclass(frozen=True)
class LazyTensor:
    """A tensor's shape and dtype, and how to get at its values.

    `view()` opens them: where the file allows it, as a read-only memory map of just this tensor, so that slicing reads
    only the pages of the slice and dropping the view gives the memory back. Out of a bucket they are read whole.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    view: Callable[[], np.ndarray]

    def read(self) -> np.ndarray:
        """The values in memory of their own, C-contiguous."""
        return np.array(self.view(), order="C", copy=True)


class TensorFile(Mapping[str, LazyTensor]):
    """The named tensors of one checkpoint (a file, or a directory of shards); reading happens tensor by tensor."""

    def __init__(self, path: Path, tensors: Mapping[str, LazyTensor]):
        self.path = path
        self._tensors = dict(tensors)

    def __getitem__(self, key: str) -> LazyTensor:
        if key not in self._tensors:
            raise TensorFileError(f"{self.path} has no tensor {key!r}{nearest(key, self._tensors)}")
        return self._tensors[key]

    def __contains__(self, key: object) -> bool:
        return key in self._tensors

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def shape(self, key: str) -> tuple[int, ...]:
        return self[key].shape

    def dtype(self, key: str) -> np.dtype:
        return self[key].dtype

    def read(self, key: str) -> np.ndarray:
        return self[key].read()

    def renamed(self, renames: Renames) -> "TensorFile":
        """The same tensors under the names that `rename` makes of theirs."""
        return TensorFile(self.path, {rename(key, renames): tensor for key, tensor in self._tensors.items()})


def rename(name: str, renames: Renames) -> str:
    """Applies (regex, replacement) pairs one after the other."""
    for pattern, replacement in renames:
        name = re.sub(pattern, replacement, name)
    return name


def map_bytes(path: Path, offset: int, size: int) -> np.ndarray:
    """`size` bytes of the file from `offset`, read-only [size] uint8; a local file's as a memory map."""
    if (length := size_of(path)) < offset + size or offset < 0:
        raise TensorFileError(f"{path} is truncated or damaged: got {length} bytes, expected {offset + size} or more")
    return map_range(path, offset, size)


def checked_bytes(path: Path, offset: int, size: int, expected: int, what: str) -> np.ndarray:
    """`map_bytes`, and ValueError where they have another CRC-32 than expected.

    A local file is read block by block for it, so that its map takes no memory yet; a bucket's bytes are here anyway.
    """
    data, got = map_bytes(path, offset, size), 0
    if is_local(path):
        with path.open("rb") as file:
            file.seek(offset)
            for begin in range(0, size, _BLOCK):
                got = zlib.crc32(file.read(min(_BLOCK, size - begin)), got)
    else:
        got = zlib.crc32(data.data)
    if got != expected:
        raise TensorFileError(f"{path} is damaged: {what} has CRC {got:08x}, expected {expected:08x}")
    return data


def index_checksum(locations: Mapping[str, str]) -> str:
    """CRC-32 of an index's map of tensors to shards, in 8 hexadecimal digits."""
    return f"{zlib.crc32(json.dumps(locations, sort_keys=True).encode()):08x}"


def checked_shape(path: Path, name: str, shape: Sequence[int]) -> tuple[int, ...]:
    """A shape out of a header; ValueError where it is none that an array can have."""
    if len(shape) > 32 or not all(type(length) is int and 0 <= length < 2**48 for length in shape):
        raise TensorFileError(f"{path} is damaged: tensor {name[:200]!r} has shape {str(shape)[:200]}")
    if num_bytes(tuple(length or 1 for length in shape), np.dtype(np.float64)) >= 2**63:
        raise TensorFileError(f"{path} is damaged: tensor {name[:200]!r} has shape {tuple(shape)}")
    return tuple(shape)


def check_expansion(path: Path, archive: zipfile.ZipFile) -> None:
    """ValueError for an archive of which a small file would fill the memory."""
    members, size = archive.infolist(), size_of(path)
    expanded = sum(info.file_size for info in members if info.compress_type != zipfile.ZIP_STORED)
    if expanded > MAX_EXPANSION * size + 2**28:
        raise TensorFileError(f"{path} of {size} bytes would expand to {expanded} bytes, which no weights do")


def zip_member(path: Path, info: zipfile.ZipInfo) -> Callable[[], np.ndarray]:
    """Opens a zip member's bytes [size] uint8: as a memory map if it is stored as it is, else decompressed.

    The first time the bytes are checked against the archive's checksum.
    """
    checked = False

    def mapped() -> np.ndarray:
        nonlocal checked
        header = map_bytes(path, info.header_offset, 30).tobytes()
        name_length, extra_length = (int.from_bytes(header[i : i + 2], "little") for i in (26, 28))
        data = map_bytes(path, info.header_offset + 30 + name_length + extra_length, info.file_size)
        # Zero stands for none: torch can be told to save time on the checksum.
        if not checked and info.CRC and (got := zlib.crc32(data.data)) != info.CRC:
            raise TensorFileError(
                f"{path} is damaged: member {info.filename!r} has CRC {got:08x}, expected {info.CRC:08x}"
            )
        checked = True
        return data

    def decompressed() -> np.ndarray:
        try:
            with path.open("rb") as file, zipfile.ZipFile(file) as archive:
                return np.frombuffer(archive.read(info), np.uint8)
        except Exception as error:  # decompressors fail in many ways
            raise TensorFileError(f"{path} is damaged: member {info.filename!r} is unreadable ({error})") from error

    return mapped if info.compress_type == zipfile.ZIP_STORED else decompressed


def num_bytes(shape: tuple[int, ...], dtype: np.dtype) -> int:
    """The size of a dense tensor; exact Python integers, so absurd shapes of damaged files do not wrap around."""
    size = dtype.itemsize
    for length in shape:
        size *= length
    return size


def nearest(key: str, candidates: Iterable[str]) -> str:
    """`; nearest: 'a', 'b'`, the candidates most like `key`, as the tail of an error message ("" if there are none)."""
    matches = difflib.get_close_matches(key, list(candidates), n=3, cutoff=0.5)
    return f"; nearest: {', '.join(map(repr, matches))}" if matches else ""
