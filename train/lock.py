"""One run at a time in a working directory."""

import contextlib
import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from .processes import on_first

LOCK = "run.lock"


@contextlib.contextmanager
def locked(workdir: Path) -> Iterator[None]:
    """Holds the lock of `workdir` (process 0 does); ValueError, on every process, naming the run that
    has it already.

    The system drops the lock with its process, however that ends, so that a dead run's is taken over by the next.
    """
    path, held = workdir / LOCK, []

    def acquire() -> None:
        workdir.mkdir(parents=True, exist_ok=True)
        file = _acquire(path)
        file.truncate(0)
        since = time.strftime("%Y-%m-%d %H:%M:%S %z")
        file.write(json.dumps({"host": socket.gethostname(), "process": os.getpid(), "since": since}) + "\n")
        file.flush()
        held.append(file)

    on_first(acquire)  # refused on one process is refused on all
    try:
        yield
    finally:
        for file in held:
            path.unlink(missing_ok=True)
            file.close()


def _acquire(path: Path) -> TextIO:
    while True:
        file = path.open("a+")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.exists(path) and os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
                return file
            file.close()  # the file of a run that has just ended, removed between opening and locking
        except OSError as error:
            file.close()
            raise ValueError(f"{path.parent} is in use by another run: {_holder(path)}") from error


def _holder(path: Path) -> str:
    try:
        holder = json.loads(path.read_text())
        return f"process {holder['process']} on {holder['host']}, since {holder['since']}"
    except (OSError, ValueError, LookupError, TypeError):
        return f"{path} does not say whose"
