"""From batches of one process to global arrays on its devices, ahead of their use."""

from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Protocol

import jax
import numpy as np
from jax.sharding import NamedSharding

from .pipeline import Batch


class StatefulBatches(Protocol):
    """`pipeline.Batches`, or anything that behaves like it."""

    def __next__(self) -> Batch: ...
    def get_state(self) -> dict[str, Any]: ...
    def set_state(self, state: dict[str, Any]) -> None: ...


def process_shard(sharding: NamedSharding, batch_size: int) -> tuple[int, int]:
    """(index, count): this process holds rows [index B / count, (index + 1) B / count) of a batch of B.

    Processes that only split other axes (a tensor axis across hosts) share an index and read the same rows. ValueError
    where the rows of a process are not one such range.
    """
    slices = sharding.devices_indices_map((batch_size,))
    mine = {
        range(batch_size)[rows] for device, (rows,) in slices.items() if device.process_index == jax.process_index()
    }
    start, stop = min(rows.start for rows in mine), max(rows.stop for rows in mine)
    length = stop - start
    if sum(map(len, mine)) != length or batch_size % length or start % length:
        raise ValueError(
            f"process {jax.process_index()} holds {sorted(map(str, mine))} of {batch_size} rows, not one even share: "
            "order the mesh so that the devices of a process are neighbours along the batch"
        )
    return start // length, batch_size // length


def to_devices(batch: Mapping[str, np.ndarray], sharding: NamedSharding) -> dict[str, jax.Array]:
    """Global arrays whose leading axis is split by `sharding`, made from this process's rows."""
    return {key: jax.make_array_from_process_local_data(sharding, value) for key, value in batch.items()}


class Prefetch(Iterator[dict[str, jax.Array]]):
    """Puts the next `depth` batches on the devices from a thread while the current one is in use.

    `get_state` is the state after the batch that was handed out last, whatever has been read ahead. An error in the
    pipeline is raised by the `next` that would have given the batch.
    """

    def __init__(self, batches: StatefulBatches, sharding: NamedSharding, depth: int = 2):
        if depth < 1:
            raise ValueError(f"prefetch depth must be at least 1, got {depth}")
        self._batches, self._sharding, self._depth = batches, sharding, depth
        self._state = batches.get_state()
        self._executor: ThreadPoolExecutor | None = None
        self._ahead: deque[Future] = deque()

    def __next__(self) -> dict[str, jax.Array]:
        if self._executor is None:
            self._executor = ThreadPoolExecutor(1, "omnax-prefetch")
            self._ahead.extend(self._executor.submit(self._load) for _ in range(self._depth))
        batch, self._state = self._ahead.popleft().result()
        self._ahead.append(self._executor.submit(self._load))
        return batch

    def get_state(self) -> dict[str, Any]:
        """State after the batch handed out last."""
        return self._state

    def set_state(self, state: dict[str, Any]) -> None:
        """Throws away what was read ahead and continues from `state`."""
        self.close()
        self._batches.set_state(state)
        self._state = state

    def close(self) -> None:
        """Stops the thread and the pipeline; a later `next` continues after the batch handed out last."""
        if self._executor is not None:
            self._executor.shutdown(cancel_futures=True)
            self._executor = None
            self._ahead.clear()
        self._batches.set_state(self._state)

    def _load(self) -> tuple[dict[str, jax.Array], dict[str, Any]]:
        batch = to_devices(next(self._batches), self._sharding)
        return batch, self._batches.get_state()
