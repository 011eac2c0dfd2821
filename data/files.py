"""Folders and files as people have them: one walk over folders, one reading of text by lines.

What a walk cannot use is named and passed over: pipes, sockets and devices, links to nowhere, links that lead back to a
folder already read, folders that may not be entered. Hidden files and folders (".git", "._a.jpg") are none of the data.
"""

import codecs
import errno
import json
import logging
import os
import stat
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from ..models.messages import bounded
from ..storage.paths import as_path, client_of, files_below, folder_names, is_local, read_whole
from . import checksums

logger = logging.getLogger(__name__)

_LONGEST = 300  # characters of a name or reason in a message
_KINDS = {stat.S_IFIFO: "pipe", stat.S_IFSOCK: "socket", stat.S_IFBLK: "device", stat.S_IFCHR: "device"}


def printable(value: object, longest: int = _LONGEST) -> str:
    """One line for messages: control characters, bytes of a name that are no UTF-8 and lone surrogates as escapes,
    and of a long text its beginning and end."""
    text = bounded(str(value), longest)
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def walk(root: Path, suffixes: Collection[str]) -> list[str]:
    """The files below `root` whose names end in one of `suffixes` (any case), in the order of their paths.

    Links to files and folders are followed, each folder once: real folders first, then linked ones. What has such a
    name and is no file, and what cannot be entered, is logged by name.
    """
    if not is_local(root):
        names = (name for name in files_below(root) if not any(part.startswith(".") for part in name.split("/")))
        wanted = (name for name in names if os.path.splitext(name)[1].lower() in suffixes)
        return [f"{root}/{name}" for name in sorted(wanted, key=lambda name: name.split("/"))]
    found: list[str] = []
    skipped: dict[str, str] = {}
    seen: set[tuple[int, int]] = set()
    waiting, linked = [str(root)], list[str]()
    while waiting or linked:
        folder = waiting.pop() if waiting else linked.pop(0)
        try:
            status = os.stat(folder)
            entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
        except OSError as error:
            skipped[folder] = f"cannot be read ({error.strerror})"
            continue
        if (status.st_dev, status.st_ino) in seen:
            skipped[folder] = "is a link to a folder that is read already"
            continue
        seen.add((status.st_dev, status.st_ino))
        for entry in entries:
            if entry.name.startswith("."):
                continue
            wanted = os.path.splitext(entry.name)[1].lower() in suffixes
            try:
                if entry.is_dir():
                    (linked if entry.is_symlink() else waiting).append(entry.path)
                elif wanted and entry.is_file():
                    found.append(entry.path)
                elif wanted:
                    skipped[entry.path] = _odd(entry.path)
            except OSError as error:  # a link that leads to itself
                skipped[entry.path] = f"cannot be read ({error.strerror})"
    skipped |= dict.fromkeys(checksums.missing(root, suffixes), f"is listed in {checksums.LIST} and missing")
    for path, reason in skipped.items():
        logger.warning("skipped %s: %s", printable(path), reason)
    return sorted(found, key=lambda path: path.split(os.sep))


def _odd(path: str) -> str:
    try:
        mode = os.stat(path).st_mode
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    return f"is a {_KINDS.get(stat.S_IFMT(mode), 'thing of another kind')}, no file"


def subfolders(root: Path) -> list[str]:
    """Names of the folders in `root`, sorted; hidden ones are none."""
    return [name for name in folder_names(root) if not name.startswith(".")]


def read_file(path: str | Path) -> bytes:
    """All of a regular file; OSError for everything else (see `check_file`), and where a list of checksums says so."""
    place = as_path(path)
    data = check_file(place).read_bytes() if is_local(place) else read_whole(place)
    checksums.check_data(path, data)
    return data


def check_file(path: str | Path) -> Path:
    """The path of a regular file; OSError for everything else, so that nobody waits for a pipe's other end.

    Also for names that no file can have: with a NUL, or half of a surrogate pair.
    """
    if not is_local(place := as_path(path)):
        system, name = client_of(place)
        if not system.isfile(name):
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(place))
        return place
    try:
        mode = os.stat(path).st_mode
    except ValueError as error:
        raise OSError(errno.EINVAL, f"no name of a file: {error}") from error
    if not stat.S_ISREG(mode):
        kind = "a folder" if stat.S_ISDIR(mode) else f"a {_KINDS.get(stat.S_IFMT(mode), 'thing of another kind')}"
        raise OSError(errno.EINVAL, f"it is {kind}, no file")
    return place


def lines_of(data: bytes) -> Iterator[tuple[int, bytes]]:
    """(number from 1, line) of every line that is not blank. Lines end at LF or CR LF, never at U+2028 or the like."""
    for number, line in enumerate(data.removeprefix(codecs.BOM_UTF8).split(b"\n"), 1):
        if line.strip():
            yield number, line.removesuffix(b"\r")


def text_lines(path: Path) -> list[tuple[int, str]]:
    """`lines_of` a text file, decoded; lines that are no UTF-8 are logged and passed over. ValueError for no file."""
    try:
        data = read_file(path)
    except OSError as error:
        raise ValueError(f"{printable(path)} cannot be read: {error.strerror}") from error
    check_encoding(data, path)
    found = []
    for number, line in lines_of(data):
        try:
            found.append((number, line.decode()))
        except UnicodeDecodeError as error:
            logger.warning("skipped %s, line %d: it is no UTF-8 (%s)", printable(path), number, error.reason)
    return found


def check_encoding(data: bytes, path: Path) -> None:
    """ValueError for text that begins with the mark of UTF-16 or UTF-32."""
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE, codecs.BOM_UTF32_BE)):
        raise ValueError(f"{printable(path)} is UTF-16 or UTF-32 by its byte order mark, expected UTF-8")


def read_json(data: bytes | str) -> Any:
    """`json.loads`, of which every failure is a ValueError: also nesting too deep and numbers too long."""
    try:
        return json.loads(data.removeprefix(codecs.BOM_UTF8) if isinstance(data, bytes) else data)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
