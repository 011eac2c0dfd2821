"""How long WAV, AVI and MP3 files say they are: FFmpeg reads those to where they end, however early, without a word."""

from pathlib import Path
from typing import IO

from ...storage.paths import size_of

_UNKNOWN = 0x7FFF_F000  # programs that write into a pipe leave such lengths, or 0: the true one is never known to them


def check_length(path: Path) -> None:
    """ValueError where a WAV, AVI or MP3 file has fewer bytes than its header declares; anything else passes."""
    size = size_of(path)
    with path.open("rb") as file:
        start = file.read(10)
        file.seek(0)
        expected = _riff_end(file) if start[:4] == b"RIFF" else _mp3_end(file, start)
    tolerance = 0 if start[:4] == b"RIFF" else expected // 20  # tags of MP3 files change without the count
    if size + tolerance < expected:
        raise ValueError(f"{path} is damaged: it has {size} bytes, expected {expected} as its header says")


def _riff_end(file: IO[bytes]) -> int:
    """Where the last chunk of sound or pictures ends; 0: there is none, or its length is not known."""
    position = end = 0
    while len(head := file.read(12)) >= 8 and any(head):  # zeros: room that was taken and never written to
        name, length = head[:4], int.from_bytes(head[4:8], "little")
        if name == b"RIFF":  # AVI files above a gigabyte hold several
            position += 12
        else:
            if name == b"data" or (name, head[8:]) == (b"LIST", b"movi"):
                if not 0 < length < _UNKNOWN:
                    return 0
                end = position + 8 + length
            position += 8 + length + length % 2
        file.seek(position)
    return end


def _mp3_end(file: IO[bytes], start: bytes) -> int:
    """As the Xing or Info header in an MP3 file's first frame counts its bytes; 0 where there is none."""
    tag = 0
    if start[:3] == b"ID3":
        tag = 10 + int("".join(f"{byte & 0x7F:07b}" for byte in start[6:]), 2)
    file.seek(tag)
    frame = file.read(64)
    at = max(frame.find(b"Xing"), frame.find(b"Info"))
    flags = frame[at + 7 : at + 8]
    if frame[:1] != b"\xff" or at < 0 or not flags or not flags[0] & 2:
        return 0
    count = at + 8 + 4 * (flags[0] & 1)  # behind the number of frames, where that is given
    return tag + int.from_bytes(frame[count : count + 4], "big")
