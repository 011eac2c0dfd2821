"""One run at a time in a working directory."""

import contextlib
import fcntl
import json
import logging
import os
import signal
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from ..storage.paths import client_of, is_local
from .processes import on_first

LOCK = "run.lock"
_LEASE = 120.0  # seconds after which a run that says nothing any more has lost a bucket's lock
_BEAT = 20.0  # seconds between the times it says so

logger = logging.getLogger(__name__)


@contextlib.contextmanager
def locked(workdir: Path) -> Iterator[None]:
    """Holds the lock of `workdir` (process 0 does); ValueError, on every process, naming the run that
    has it already.

    The system drops the lock with its process, however that ends, so that a dead run's is taken over by the next. No
    store does so: in a bucket the lock is a lease (`_Lease`).
    """
    path, held = workdir / LOCK, list[TextIO | _Lease]()

    def acquire() -> None:
        if not is_local(workdir):
            held.append(_Lease(path))
            return
        workdir.mkdir(parents=True, exist_ok=True)
        file = _acquire(path)
        file.truncate(0)
        file.write(json.dumps(_self()) + "\n")
        file.flush()
        held.append(file)

    on_first(acquire)  # refused on one process is refused on all
    try:
        yield
    finally:
        for file in held:
            path.unlink(missing_ok=True)
            file.close()


def _self() -> dict[str, str | int]:
    return {"host": socket.gethostname(), "process": os.getpid(), "since": time.strftime("%Y-%m-%d %H:%M:%S %z")}


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


class _Lease:
    """The lock of a bucket: an object that one run alone can create, and renews as long as it lives.

    A dead run's is taken over at once on its own machine and after `_LEASE` seconds on others. A run that slept so
    long that another has taken its place ends where it stands: it may write nothing any more.
    """

    def __init__(self, path: Path) -> None:
        self._path, self._holder = path, _self() | {"machine": _machine(), "token": uuid.uuid4().hex}
        while not self._created():
            if not self._abandoned():
                free = f"a killed run's is free after {_LEASE:.0f} s"
                raise ValueError(f"{path.parent} is in use by another run: {_holder(path)} ({free})")
            path.unlink(missing_ok=True)
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._renew, daemon=True)
        self._thread.start()

    def _created(self) -> bool:
        try:
            self._write("create")
        except FileExistsError:
            return False
        return True

    def _write(self, mode: str) -> None:
        system, name = client_of(self._path)
        system.pipe_file(name, json.dumps(self._holder).encode(), mode=mode)

    def _abandoned(self) -> bool:
        try:
            holder, age = _read(self._path), time.time() - self._path.stat().mtime  # type: ignore[attr-defined]
        except FileNotFoundError:
            return True
        here = holder.get("machine") == self._holder["machine"]
        return age > _LEASE or (here and not os.path.exists(f"/proc/{holder.get('process')}"))

    def _renew(self) -> None:
        while not self._closed.wait(_BEAT):
            try:
                if _read(self._path).get("token") == self._holder["token"]:
                    self._write("overwrite")
                    continue
                logger.error("%s was taken over by another run: this one ends", self._path.parent)
                os.kill(os.getpid(), signal.SIGKILL)
            except Exception as error:  # the network is away for a moment; whoever is away for long loses the lock
                logger.warning("%s cannot be renewed: %s", self._path, error)

    def close(self) -> None:
        self._closed.set()
        self._thread.join()
        self._path.unlink(missing_ok=True)  # it may have been renewed meanwhile


def _read(path: Path) -> dict[str, str | int]:
    try:
        return dict(json.loads(path.read_bytes()))
    except (ValueError, TypeError):  # no holder's
        return {}


def _machine() -> str:
    """Tells machines and containers apart in which process numbers mean different things; new at each boot."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    return f"{boot.read_text().strip()} {os.readlink('/proc/self/ns/pid')}" if boot.exists() else uuid.uuid4().hex
