"""Processes that read examples for the pipeline and hold nothing else: no JAX, no program of the parent's.

A worker is a fresh interpreter that imports this module and what the pickled streams name. Requests and examples go
through socket pairs, two to a worker, so that it reads one example while another is on its way. Workers end with their
parent: the kernel kills them (Linux), and a closed socket ends them everywhere. One that is killed or stopped is a
`WorkerLost` for the reader that waits, never a hang.
"""

import contextlib
import ctypes
import json
import os
import pickle
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
import weakref
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import cloudpickle

from .examples import Stream, read_example
from .images.transforms import Example

CONNECTIONS = 2  # to each worker
_PATIENCE = 600.0  # seconds that one example may take
_STOPPED = 5.0  # seconds after which a stopped worker counts as lost; Ctrl-Z and fg stop and start it with its parent
_KILL_WITH_PARENT = 1  # PR_SET_PDEATHSIG in linux/prctl.h
_START = (
    "import json, sys; path, *rest = json.loads(sys.argv[1]); sys.path[:] = path; "
    "from omnax.data.workers import serve; serve(*rest)"
)
# The kernel kills a worker when the *thread* that started it ends, so one thread that outlives them starts them all.
_STARTER = ThreadPoolExecutor(1, "omnax-start-workers")


class WorkerLost(RuntimeError):
    """A worker process died, was stopped, or took longer over an example than any should."""


class Workers:
    """`count` processes; `read` is called from up to `CONNECTIONS * count` threads at once."""

    def __init__(self, streams: Sequence[Stream], count: int):
        payload = cloudpickle.dumps(list(streams))
        self._free: queue.SimpleQueue[tuple[subprocess.Popen, Connection]] = queue.SimpleQueue()
        self._lost: dict[int, str] = {}  # process -> why it was given up
        started = [_STARTER.submit(_start).result() for _ in range(count)]
        self._processes = [process for process, _ in started]
        self._end = weakref.finalize(self, _kill, self._processes, [c for _, pair in started for c in pair])
        for process, connections in started:
            with contextlib.suppress(OSError):  # a worker that died already is named by the first read
                connections[0].send_bytes(payload)
            for connection in connections:
                self._free.put((process, connection))

    @property
    def pids(self) -> list[int]:
        """The processes, for measurements."""
        return [process.pid for process in self._processes]

    def read(self, number: int, index: int, seed: tuple[int, int]) -> Example:
        """`read_example(streams[number], index, seed)` in a worker; raises what it raises there, or WorkerLost."""
        process, connection = self._free.get()
        try:
            connection.send((number, index, seed))
            _wait(process, connection)
            example, error = connection.recv()
        except WorkerLost as lost:
            self._lost[process.pid] = str(lost)
            process.kill()  # no reader may take a late answer for its own
            raise
        except (OSError, EOFError) as broken:
            fate = self._lost.get(process.pid) or f"a data worker {_fate(process)}, while it read example {index}"
            raise WorkerLost(fate) from broken
        finally:
            self._free.put((process, connection))  # also a lost one, so that nobody waits for it in vain
        if error is not None:
            raise error
        return example

    def close(self) -> None:
        """Ends the processes; reads that wait are WorkerLost."""
        self._end()


def _start() -> tuple[subprocess.Popen, list[Connection]]:
    pairs = [socket.socketpair() for _ in range(CONNECTIONS)]
    theirs = [other.fileno() for _, other in pairs]
    command = [sys.executable, "-c", _START, json.dumps([sys.path, os.getpid(), theirs])]
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, pass_fds=theirs)
    for _, other in pairs:
        other.close()
    return process, [Connection(own.detach()) for own, _ in pairs]


def _kill(processes: Sequence[subprocess.Popen], connections: Sequence[Connection]) -> None:
    for process in processes:
        process.kill()
    for process in processes:
        process.wait()
    for connection in connections:
        # Threads may wait on it: they see the end of the stream, and the descriptor is freed with the connection.
        with contextlib.suppress(OSError), socket.socket(fileno=os.dup(connection.fileno())) as stream:
            stream.shutdown(socket.SHUT_RDWR)


def _wait(process: subprocess.Popen, connection: Connection) -> None:
    """Returns when there is an answer; WorkerLost where none is to be expected any more."""
    begun = time.monotonic()
    stopped: float | None = None
    while not connection.poll(1.0):
        now = time.monotonic()
        stopped = (stopped or now) if _state(process) == "T" else None
        if stopped and now - stopped > _STOPPED:
            raise WorkerLost(f"the data worker {process.pid} was stopped (SIGSTOP?) and reads no more")
        if now - begun > _PATIENCE:
            raise WorkerLost(f"the data worker {process.pid} has read one example for {_PATIENCE:.0f} s")


def _state(process: subprocess.Popen) -> str:
    """Linux's letter for what a process does, T: stopped; "" where there is none."""
    try:
        return Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        return ""


def _fate(process: subprocess.Popen) -> str:
    try:
        code = process.wait(timeout=5)
    except subprocess.TimeoutExpired:
        return f"({process.pid}) closed its connection"
    if code >= 0:
        return f"({process.pid}) ended with code {code}"
    hint = " (out of memory?)" if code == -signal.SIGKILL else ""
    return f"({process.pid}) was killed by {signal.Signals(-code).name}{hint}"


def serve(parent: int, descriptors: Sequence[int]) -> None:
    """What a worker does: takes the pickled streams from the first connection, then answers each until it closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent decides when to end
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_KILL_WITH_PARENT, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:  # it died before that
        os._exit(1)
    connections = [Connection(descriptor) for descriptor in descriptors]
    streams = _attempt(lambda: pickle.loads(connections[0].recv_bytes()))
    for connection in connections[1:]:
        threading.Thread(target=_answer, args=(connection, streams), daemon=True).start()
    _answer(connections[0], streams)


def _answer(connection: Connection, streams: tuple[Any, Exception | None]) -> None:
    loaded, failure = streams
    while True:
        try:
            number, index, seed = connection.recv()
        except (OSError, EOFError):
            os._exit(0)
        read = lambda: read_example(loaded[number], index, seed)  # noqa: B023, E731  (called at once)
        answer = (None, failure) if failure else _attempt(read)
        with contextlib.suppress(OSError):  # the parent closed: the next request says so too
            connection.send(answer)


def _attempt(action: Any) -> tuple[Any, Exception | None]:
    """(what the action gives, None), or (None, its error with where it was raised), which can be pickled."""
    try:
        return action(), None
    except EOFError:
        os._exit(0)
    except Exception as error:
        where = traceback.format_exc()
        try:
            pickle.loads(pickle.dumps(error))
        except Exception:
            error = RuntimeError(f"{type(error).__name__}: {error}")
        error.add_note(f"in a data worker:\n{where}")
        return None, error
