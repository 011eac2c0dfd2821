"""The one place that makes a path of what a user gives: `pathlib` for this machine, `etils.epath` for buckets.

Both have one interface, so that nothing else asks where a file lies, except where an object store differs: these few
functions. Objects are read by ranges and appear whole; there are no folders of their own, renames, appending and maps
into memory. Nothing here imports a client, or anything else of size, before there is a bucket to read.
"""

import contextlib
import errno
import functools
import importlib.util
import os
import shutil
import tempfile
from argparse import ArgumentTypeError
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import numpy as np

# Scheme -> the module of its client, and what installs it.
CLIENTS = {"gs": ("gcsfs", "omnax[gcs]"), "s3": ("s3fs", "s3fs"), "az": ("adlfs", "adlfs")}


class PathError(ValueError, ArgumentTypeError):
    """A place that is none; as the `type` of a command line's argument, its message is what argparse prints."""


def as_path(place: str | os.PathLike[str]) -> Path:
    """A path, or the URL of a bucket as "gs://bucket/folder", whose path has the interface of `pathlib.Path`.

    ValueError in one line for a scheme that is not known, or whose client is not installed.
    """
    if isinstance(place, Path):
        return place
    scheme, mark, rest = os.fspath(place).partition("://")
    if not mark:
        return Path(place)
    if scheme not in CLIENTS:
        known = ", ".join(f"{name}://" for name in CLIENTS)
        raise PathError(f"{os.fspath(place)[:200]!r} begins with {scheme[:20]}://, expected a local path or {known}")
    if not rest.strip("/"):
        raise PathError(f"{os.fspath(place)!r} names no bucket")
    _check_client(scheme)
    from etils import epath

    return cast(Path, epath.Path(os.fspath(place)))


@functools.cache
def _check_client(scheme: str) -> None:
    module, package = CLIENTS[scheme]
    if importlib.util.find_spec(module) is None:
        raise PathError(f"{scheme}:// needs the package {module}: pip install '{package}'")
    from fsspec.config import conf

    # Others write too (TensorStore, other hosts): a listing is asked for each time, never remembered.
    conf.setdefault(scheme, {}).setdefault("use_listings_cache", False)


def is_local(path: os.PathLike[str]) -> bool:
    """Whether a path of `as_path` is one of this machine."""
    return isinstance(path, Path)


def client_of(path: os.PathLike[str]) -> tuple[Any, str]:
    """The fsspec file system of a bucket's path, and the path's name in it."""
    from fsspec.core import url_to_fs

    return url_to_fs(os.fspath(path))


def absolute(path: Path) -> Path:
    """A path that stays the same in another working directory; buckets' are."""
    return path.absolute() if is_local(path) else path


def size_of(path: Path) -> int:
    """The bytes of a file."""
    status: Any = path.stat()
    return status.st_size if is_local(path) else status.length


def read_whole(path: Path) -> bytes:
    """All of a file; of a bucket's, in one request. OSError, with its reason, where there is none."""
    return path.read_bytes() if is_local(path) else _cat(path)


def read_range(path: Path, offset: int, size: int) -> bytes:
    """`size` bytes from `offset`, fewer where the file ends before; of a bucket's, in one request."""
    if not is_local(path):
        return _cat(path, offset, offset + size) if size else b""
    with path.open("rb") as file:
        file.seek(offset)
        return file.read(size)


def _cat(path: Path, start: int | None = None, stop: int | None = None) -> bytes:
    system, name = client_of(path)
    try:
        return system.cat_file(name, start=start, end=stop)
    except FileNotFoundError as error:  # the clients' have no text
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), os.fspath(path)) from error


def map_range(path: Path, offset: int, size: int) -> np.ndarray:
    """`size` bytes [size] uint8 from `offset`, read-only: a map into memory of a local file, a bucket's are read."""
    if size == 0:
        return np.empty(0, np.uint8)  # an empty range cannot be mapped
    if is_local(path):
        return np.asarray(np.memmap(path, np.uint8, mode="r", offset=offset, shape=(size,)))
    return np.frombuffer(read_range(path, offset, size), np.uint8)


def file_names(folder: Path) -> list[str]:
    """The names of the files in a folder, sorted; of a bucket's, in one request."""
    if is_local(folder):
        return sorted(file.name for file in folder.iterdir() if file.is_file())
    return _listed(folder, "file")


def folder_names(folder: Path) -> list[str]:
    """The names of the folders in a folder, sorted."""
    if is_local(folder):
        with os.scandir(folder) as entries:
            return sorted(entry.name for entry in entries if entry.is_dir())
    return _listed(folder, "directory")


def _listed(folder: Path, kind: str) -> list[str]:
    system, name = client_of(folder)
    entries = system.ls(name, detail=True) if system.exists(name) else []
    names = (entry["name"].rstrip("/").rpartition("/")[2] for entry in entries if entry["type"] == kind)
    return sorted(found for found in names if found != folder.name)  # consoles mark a folder by an object of its name


def files_below(folder: Path) -> dict[str, dict[str, Any]]:
    """Relative name -> what the store says of it, for every object below a bucket's folder; one request a thousand."""
    system, name = client_of(folder)
    found = system.find(name, detail=True) if system.exists(name) else {}
    return {key.removeprefix(name).lstrip("/"): entry for key, entry in found.items() if key.rstrip("/") != name}


def glob(pattern: Path) -> list[Path]:
    """What a pattern in the last part of a path finds, sorted."""
    return sorted(pattern.parent.glob(pattern.name))


@contextlib.contextmanager
def local_copy(path: Path) -> Iterator[Path]:
    """A file for libraries that open files of this machine alone: itself, or a copy that is gone at the end."""
    if is_local(path):
        yield path
        return
    with tempfile.TemporaryDirectory(prefix="omnax-") as scratch:
        copy = Path(scratch) / path.name
        with path.open("rb") as source, copy.open("wb") as target:
            shutil.copyfileobj(source, target, 1 << 22)
        yield copy
