"""Checksums of data whose formats have none: `SHA256SUMS`, as `sha256sum` writes it, in the folder of a data set.

    cd FOLDER && find . -type f ! -name SHA256SUMS -print0 | xargs -0 sha256sum > SHA256SUMS

What such a list, in a file's folder or in one above it, has of the file is checked when the file is read. Without a
list nothing can be: a JPEG, a caption or a recording with a flipped bit is other data to every reader. Buckets check
what they store by themselves: there no list is looked for.
"""

import errno
import functools
import hashlib
import os
import re
from collections.abc import Collection, Iterator
from pathlib import Path

from ..storage.paths import as_path, is_local

LIST = "SHA256SUMS"
_LINE = re.compile(r"(\\?)([0-9a-fA-F]{64}) [ *](.+)")


def check_data(path: str | Path, data: bytes) -> None:
    """OSError where the bytes of a file are not those that a list has of it."""
    expected = _expected(path)
    if expected and hashlib.sha256(data).hexdigest() != expected:
        raise OSError(errno.EIO, f"its SHA-256 is not the one in {LIST}", str(path))


@functools.lru_cache(maxsize=100_000)
def check_file(path: str | Path) -> None:
    """The same for a file that is too large to be read at once; a sound one is read once in a process."""
    expected = _expected(path)
    if expected:
        with open(path, "rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != expected:
                raise OSError(errno.EIO, f"its SHA-256 is not the one in {LIST}", str(path))


def missing(root: str | Path, suffixes: Collection[str]) -> Iterator[str]:
    """The listed files below `root` with one of these suffixes that are not there."""
    own = os.path.abspath(root)
    folder = _list_above(own) if is_local(as_path(root)) else ""
    for name in _listed(folder) if folder else ():
        path = os.path.join(folder, name)
        below = os.path.commonpath([own, path]) == own
        if below and os.path.splitext(name)[1].lower() in suffixes and not os.path.lexists(path):
            yield path


def _expected(path: str | Path) -> str | None:
    own = os.path.abspath(path)
    folder = _list_above(os.path.dirname(own)) if is_local(as_path(path)) else ""
    return _listed(folder).get(os.path.relpath(own, folder)) if folder else None


@functools.lru_cache(maxsize=100_000)
def _list_above(folder: str) -> str:
    """The nearest folder with a list, from `folder` upwards; "" where there is none."""
    above = os.path.dirname(folder)
    if os.path.isfile(os.path.join(folder, LIST)):
        return folder
    return _list_above(above) if above != folder else ""


@functools.lru_cache(maxsize=8)
def _listed(folder: str) -> dict[str, str]:
    """SHA-256 by name relative to the folder; ValueError for a line that is none of `sha256sum`."""
    path = os.path.join(folder, LIST)
    found = {}
    with open(path, encoding="utf-8", errors="surrogateescape", newline="\n") as file:
        for number, line in enumerate(file, 1):
            match = _LINE.fullmatch(line.rstrip("\n"))
            if match is None:
                raise ValueError(f"{path}, line {number} is damaged, expected a SHA-256 and a name, got {line[:80]!a}")
            name = re.sub(r"\\(.)", lambda c: {"n": "\n"}.get(c[1], c[1]), match[3]) if match[1] else match[3]
            found[os.path.normpath(name)] = match[2].lower()
    return found
