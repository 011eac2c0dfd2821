"""A reader of GGUF files (ggml, docs/gguf.md): metadata, and tensors of types F32, Q4_1 and Q8_0 as float32."""

import struct

import numpy as np

_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}


class _Reader:
    def __init__(self, data):
        self.data, self.place = data, 0

    def number(self, kind):
        (value,) = struct.unpack_from(f"<{kind}", self.data, self.place)
        self.place += struct.calcsize(f"<{kind}")
        return value

    def text(self):
        length = self.number("Q")
        self.place += length
        return bytes(self.data[self.place - length : self.place]).decode()

    def value(self, kind):
        if kind == 8:
            return self.text()
        if kind == 9:
            inner, count = self.number("I"), self.number("Q")
            return [self.value(inner) for _ in range(count)]
        return self.number(_NUMBERS[kind])


def read(path):
    """(metadata, {name: function that gives the tensor}); shapes as NumPy has them, the last axis contiguous."""
    data = np.memmap(path, np.uint8, mode="r")
    reader = _Reader(data)
    assert bytes(data[:4]) == b"GGUF"
    reader.place = 8
    tensors, entries = reader.number("Q"), reader.number("Q")
    metadata = {reader.text(): reader.value(reader.number("I")) for _ in range(entries)}
    places = {}
    for _ in range(tensors):
        name = reader.text()
        shape = tuple(reader.number("Q") for _ in range(reader.number("I")))[::-1]
        places[name] = shape, reader.number("I"), reader.number("Q")
    begin = -(-reader.place // 32) * 32

    def tensor(shape, kind, offset):
        count = int(np.prod(shape))
        size = {0: 4 * count, 3: 20 * count // 32, 8: 34 * count // 32}[kind]
        return _DECODE[kind](data[begin + offset : begin + offset + size]).reshape(shape)

    return metadata, {name: lambda place=place: tensor(*place) for name, place in places.items()}


def _q4_1(data):
    """Blocks of 32: scale and minimum in half precision, then low nibbles of the first 16 and high ones of the rest."""
    blocks = data.reshape(-1, 20)
    scale, least = (np.ascontiguousarray(blocks[:, i : i + 2]).view(np.float16).astype(np.float32) for i in (0, 2))
    nibbles = np.concatenate([blocks[:, 4:] & 15, blocks[:, 4:] >> 4], axis=1)
    return nibbles * scale + least


def _q8_0(data):
    """Blocks of 32: scale in half precision, then signed bytes."""
    blocks = data.reshape(-1, 34)
    scale = np.ascontiguousarray(blocks[:, :2]).view(np.float16).astype(np.float32)
    return np.ascontiguousarray(blocks[:, 2:]).view(np.int8) * scale


_DECODE = {0: lambda data: np.ascontiguousarray(data).view(np.float32).copy(), 3: _q4_1, 8: _q8_0}
