"""Writes checkpoints tensor by tensor, so that nothing half-written is ever seen under the final name."""

import contextlib
import json
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np

from ...storage import writing
from .progress import shown
from .tensors import CHECKSUMS, SAFETENSORS_DTYPES, LazyTensor, index_checksum, num_bytes

MAX_SHARD_SIZE = 5 * 10**9  # bytes of tensors in one file of a directory
STEMS = ("model", "diffusion_pytorch_model")  # of a directory's weights: transformers' and diffusers' name
_DTYPE_NAMES = {dtype: name for name, dtype in SAFETENSORS_DTYPES.items()}


@contextlib.contextmanager
def staged(path: Path) -> Iterator[Path]:
    """As `storage.writing.staged`; safetensors left by an earlier save go: readers would mix them with the new ones."""
    with writing.staged(path) as stage:
        yield stage
        names = {file.name for file in stage.iterdir()} if stage.is_dir() else set()
    for stem in STEMS if names else ():
        for old in [*path.glob(f"{stem}*.safetensors"), *path.glob(f"{stem}*.safetensors.index.json")]:
            if old.name not in names:
                old.unlink()


def follow(tensors: Mapping[str, LazyTensor]) -> bool:
    """False on the first process, which writes; every other takes part in gathering the tensors, and is done: True."""
    if jax.process_index() == 0:
        return False
    for tensor in tensors.values():
        tensor.view()
    return True


def write_file(
    path: Path, tensors: Mapping[str, LazyTensor], write: Callable[[Path, Mapping[str, LazyTensor]], None]
) -> None:
    """One file of tensors, by one of the functions below. Called by all processes, written by the first."""
    if follow(tensors):
        return
    with staged(path) as stage:
        write(stage, tensors)


def write_directory(
    path: Path,
    tensors: Mapping[str, LazyTensor],
    documents: Mapping[str, Any],
    max_shard_size: int = MAX_SHARD_SIZE,
    stem: str = STEMS[0],
) -> None:
    """A directory with the tensors as safetensors and the documents (file name -> JSON object, or bytes as they are).

    Called by all processes, written by the first.
    """
    if follow(tensors):
        return
    with staged(path) as stage:
        stage.mkdir()
        write_sharded(stage, tensors, max_shard_size, stem)
        for name, content in documents.items():
            (stage / name).parent.mkdir(exist_ok=True)  # chat templates lie in a folder of their own
            if isinstance(content, bytes):
                (stage / name).write_bytes(content)
            else:
                write_json(stage / name, content)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")


def write_sharded(
    directory: Path, tensors: Mapping[str, LazyTensor], max_shard_size: int = MAX_SHARD_SIZE, stem: str = STEMS[0]
) -> None:
    """`{stem}.safetensors`, or where that would exceed `max_shard_size`, numbered shards and their index."""
    shards: list[dict[str, LazyTensor]] = [{}]
    total = filled = 0
    for name, tensor in tensors.items():
        size = num_bytes(tensor.shape, tensor.dtype)
        if filled + size > max_shard_size and shards[-1]:
            shards.append({})
            filled = 0
        shards[-1][name] = tensor
        filled, total = filled + size, total + size
    if len(shards) == 1:
        return write_safetensors(directory / f"{stem}.safetensors", shards[0])
    locations: dict[str, str] = {}
    for i, shard in enumerate(shards, 1):
        file = f"{stem}-{i:05d}-of-{len(shards):05d}.safetensors"
        write_safetensors(directory / file, shard)
        locations |= dict.fromkeys(shard, file)
    metadata = {"total_size": total, CHECKSUMS: index_checksum(locations)}
    index = {"metadata": metadata, "weight_map": locations}
    write_json(directory / f"{stem}.safetensors.index.json", index)


def write_safetensors(path: Path, tensors: Mapping[str, LazyTensor]) -> None:
    """One safetensors file, read tensor by tensor; torch libraries insist on the `format` entry.

    The format has no checksums: they stand among the metadata (see CHECKSUMS), and are filled in at the end.
    """
    digits = "0" * 8 * (1 + len(tensors))
    header: dict[str, Any] = {"__metadata__": {"format": "pt", CHECKSUMS: digits}}
    end = 0
    for name, tensor in tensors.items():
        begin, end = end, end + num_bytes(tensor.shape, tensor.dtype)
        dtype = _DTYPE_NAMES[tensor.dtype]
        header[name] = {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    checksums = [zlib.crc32(text)]
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in shown(list(tensors.values()), f"Writing {path.name}", end):
            elements = np.ascontiguousarray(tensor.view()).reshape(-1).view(np.uint8).data
            checksums.append(zlib.crc32(elements))
            file.write(elements)
        file.seek(8 + text.index(digits.encode()))
        file.write("".join(f"{checksum:08x}" for checksum in checksums).encode())


def write_npz(path: Path, tensors: Mapping[str, LazyTensor]) -> None:
    """One uncompressed npz file, read tensor by tensor; bfloat16 becomes the nameless `|V2`, as NumPy writes it."""
    with zipfile.ZipFile(path, "w") as archive:
        for name, tensor in tensors.items():
            array = tensor.view()
            array = array.view("V2") if array.dtype == ml_dtypes.bfloat16 else array
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array(member, array, allow_pickle=False)
