"""Files that appear whole or not at all, on a disk and in a bucket."""

import contextlib
import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

from .paths import absolute, client_of, is_local

_SECONDS = 30.0  # between writings of an object that grows


@contextlib.contextmanager
def staged(path: Path) -> Iterator[Path]:
    """A local path for a new file or folder, which becomes `path` when the block ends well and vanishes when it fails.

    A folder that exists already keeps its other files; each new one replaces its namesake whole. What goes to a bucket
    is written to this machine's temporary folder first. Objects appear one by one there: the JSON files of a folder,
    without which nobody reads the others, are removed first and come last.
    """
    path = absolute(path)
    if is_local(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.parent if is_local(path) else None  # on the same disk, so that the last step is a rename
    with tempfile.TemporaryDirectory(prefix=f".{path.name}-", dir=beside) as scratch:
        stage = Path(scratch) / path.name
        yield stage
        if stage.is_dir() != path.is_dir() and path.exists():
            kinds = ("file", "directory") if stage.is_dir() else ("directory", "file name")
            raise ValueError(f"{path} is an existing {kinds[0]}, expected a {kinds[1]} to save to")
        if not is_local(path):
            _upload(stage, path)
        elif path.is_dir():
            _merge(stage, path, Path(scratch))
        else:
            os.replace(stage, path)


def _merge(stage: Path, folder: Path, scratch: Path) -> None:
    for file in sorted(stage.iterdir()):
        if file.is_dir() and (folder / file.name).exists():  # a folder cannot be replaced in one step
            os.replace(folder / file.name, scratch / f"replaced {file.name}")
        os.replace(file, folder / file.name)


def _upload(stage: Path, target: Path) -> None:
    if stage.is_file():
        return _put({stage: target})
    files = [file.relative_to(stage) for file in sorted(stage.rglob("*")) if file.is_file()]
    documents = sorted((name for name in files if name.suffix == ".json"), key=lambda name: -len(name.parts))
    for name in reversed(documents):
        (target / name).unlink(missing_ok=True)
    _put({stage / name: target / name for name in files if name not in documents})
    for name in documents:
        _put({stage / name: target / name})


def _put(files: Mapping[Path, Path]) -> None:
    """Copies local files to the objects named, several at a time."""
    if files:
        system = client_of(next(iter(files.values())))[0]
        system.put([str(file) for file in files], [client_of(target)[1] for target in files.values()])


def write_whole(path: Path, data: bytes) -> None:
    """All or nothing; for readers that look at any time. Objects of a bucket are so by themselves."""
    if not is_local(path):
        system, name = client_of(path)
        system.pipe_file(name, data)
        return
    unfinished = path.with_name(f"{path.name}.unfinished")
    unfinished.write_bytes(data)
    os.replace(unfinished, path)


class Lines:
    """A file to which lines are added. An object cannot grow: in a bucket it is written anew, at `sync` and now and
    then; what is not written yet is lost with the process."""

    def __init__(self, path: Path, text: str) -> None:
        self._path, self._text = path, [text]
        write_whole(path, text.encode())
        self._file = path.open("a", buffering=1) if is_local(path) else None
        self._written = time.monotonic()

    def add(self, line: str) -> None:
        if self._file:
            self._file.write(line)
            return
        self._text.append(line)
        if time.monotonic() - self._written > _SECONDS:
            self.sync()

    def sync(self) -> None:
        """Returns when all lines are where a later run finds them."""
        if not self._file:
            write_whole(self._path, "".join(self._text).encode())
            self._written = time.monotonic()

    def close(self) -> None:
        self.sync()
        if self._file:
            self._file.close()


def remove_tree(folder: Path) -> None:
    """A folder with all that is in it; nothing where there is none."""
    if is_local(folder):
        shutil.rmtree(folder, ignore_errors=True)
    else:
        cast(Any, folder).rmtree(missing_ok=True)


def check_output(path: Path, folder: bool = False) -> None:
    """ValueError, before any work, for a place where no file (or folder) can be written; makes the folders above it."""
    path = absolute(path)
    if path.exists() and path.is_dir() != folder:
        kinds = ("a file", "a folder") if folder else ("a folder", "a file name")
        raise ValueError(f"cannot write {path}: it is {kinds[0]}, expected {kinds[1]}")
    inside = path if folder and path.exists() else path.parent
    try:
        if is_local(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=inside):
                pass
        else:
            probe = inside / f".omnax-{os.getpid()}"
            probe.write_bytes(b"")
            probe.unlink()
    except OSError as error:
        reason = f"{error.strerror} ({error.filename})" if error.strerror else str(error)[:200]
        raise ValueError(f"cannot write {path}: {reason}") from error
