"""dlib's serialised networks (`*.dat`): the parameters of convolutions, per-channel gains and dense layers, in order.

Integers are a control byte (its low half the number of bytes, bit 7 the sign) and a little-endian magnitude; a tensor
is its version 2, four lengths, and raw float32 (dlib/dnn/{core,layers,tensor}.h, dlib/serialize.h). What lies between
the tensors, the whole network's description, is kept as it is for writing (`skeleton`).
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from ...storage.paths import read_whole
from .tensors import LazyTensor, TensorFileError, map_bytes

# Anything serialised as a loss layer: version strings are length-prefixed.
PREFIX = re.compile(rb"\x01\x01\x01.loss_")
_TAG = re.compile(rb"\x01\x05con_4|\x01\x07affine_|\x01\x04fc_2")
_FLOAT = np.dtype("<f4")


def read_dlib(path: Path) -> dict[str, LazyTensor]:
    """Tensors "con_3.filters" [D, C, X, Y], "con_3.biases", "affine_3.gamma", "affine_3.beta", "fc_0.weights" [C, D].

    ValueError for a file that is cut or damaged.
    """
    data = read_whole(path)
    counts: dict[str, int] = {}
    tensors: dict[str, LazyTensor] = {}
    for kind, start, end, sizes in _blocks(path, data):
        name = f"{kind}_{counts.setdefault(kind, 0)}"
        counts[kind] += 1
        total = (end - start) // _FLOAT.itemsize
        offset = start
        for part, shape in _parts(path, name, kind, total, sizes):
            tensors[f"{name}.{part}"] = _tensor(path, offset, shape)
            offset += _FLOAT.itemsize * int(np.prod(shape))
    return tensors


def skeleton(path: Path) -> tuple[bytes, ...]:
    """What stands before, between and behind the tensors of a file."""
    data = read_whole(path)
    ends, starts = [0], []
    for _, start, end, _ in _blocks(path, data):
        starts.append(start)
        ends.append(end)
    return tuple(data[end:start] for end, start in zip(ends, [*starts, len(data)], strict=True))


def write_dlib(path: Path, tensors: Mapping[str, LazyTensor], bones: Sequence[bytes]) -> None:
    """The file that `bones` is the skeleton of, with these tensors in the order in which it was read."""
    blocks: dict[str, list[LazyTensor]] = {}
    for name, tensor in tensors.items():
        blocks.setdefault(name.partition(".")[0], []).append(tensor)
    if len(blocks) + 1 != len(bones):
        raise ValueError(f"{path}: {len(blocks)} layers for a file of {len(bones) - 1}")
    with path.open("wb") as file:
        for bone, block in zip(bones, [*blocks.values(), []], strict=True):
            file.write(bone)
            for tensor in block:
                file.write(np.ascontiguousarray(tensor.view(), _FLOAT).tobytes())


def _blocks(path: Path, data: bytes) -> Iterator[tuple[str, int, int, tuple[int, ...]]]:
    """(kind, first byte of its numbers, byte behind them, sizes that its description gives) of every layer."""
    position = 0
    while match := _TAG.search(data, position):
        kind, at = match.group()[2:].decode().split("_")[0], match.end()
        sizes: tuple[int, ...] = ()
        if kind == "fc":
            outputs, at = _integer(path, data, at)
            inputs, at = _integer(path, data, at)
            sizes = inputs, outputs
        shape = []
        for _ in range(5):
            value, at = _integer(path, data, at)
            shape.append(value)
        version, *lengths = shape
        count = np.prod([float(length) for length in lengths])
        end = at + _FLOAT.itemsize * int(count) if 0 < count <= len(data) else len(data) + 1
        if version != 2 or end > len(data):
            raise TensorFileError(f"{path} is truncated or damaged: layer {kind!r} at byte {match.start()} has {shape}")
        if kind == "con":
            behind, sizes = end, ()
            for _ in range(3):
                value, behind = _integer(path, data, behind)
                sizes = *sizes, value
        yield kind, at, end, sizes
        position = end


def _parts(path: Path, name: str, kind: str, total: int, sizes: tuple[int, ...]) -> list[tuple[str, tuple[int, ...]]]:
    match kind:
        case "con":
            filters, rows, columns = sizes
            inputs, rest = divmod(total - filters, max(filters * rows * columns, 1))
            if rest == 0 and inputs > 0:
                return [("filters", (filters, inputs, rows, columns)), ("biases", (filters,))]
        case "affine":
            if total % 2 == 0:
                return [("gamma", (total // 2,)), ("beta", (total // 2,))]
        case _:
            if sizes[0] * sizes[1] == total:
                return [("weights", (sizes[0], sizes[1]))]
    raise TensorFileError(f"{path} is damaged: layer {name} has {total} numbers for sizes {sizes}")


def _tensor(path: Path, offset: int, shape: tuple[int, ...]) -> LazyTensor:
    size = _FLOAT.itemsize * int(np.prod(shape))
    return LazyTensor(shape, _FLOAT, lambda: map_bytes(path, offset, size).view(_FLOAT).reshape(shape))


def _integer(path: Path, data: bytes, at: int) -> tuple[int, int]:
    """The integer at a byte, and the byte behind it."""
    length = data[at] & 15 if at < len(data) else 0
    if not 0 < length <= 8 or at + length >= len(data):
        raise TensorFileError(f"{path} is truncated or damaged: no integer at byte {at}")
    value = int.from_bytes(data[at + 1 : at + 1 + length], "little")
    return (-value if data[at] & 128 else value), at + 1 + length
