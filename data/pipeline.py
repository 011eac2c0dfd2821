"""Batches for training and evaluation.

Each row is a pure function of the seed and its position in the endless global order of examples:

    position = step * batch_size + row
    row      = preprocess(source[order[position]], rng(seed, position))

where preprocessing also sees "position" (for draws that several rows share) and the order shuffles every source anew in
each epoch and interleaves sources by weight. So the global batch of a step does not depend on how many processes,
threads or worker processes there are, and the whole state of an iterator is the number of steps taken. Process p of n
makes rows [p B / n, (p + 1) B / n). Grain shuffles, mixes, reads ahead in threads and batches; where there are worker
processes (workers.py), its threads wait for theirs.
"""

import dataclasses
import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import grain
import numpy as np

from .examples import Stream, read_example, usable_cores
from .files import printable
from .images.decode import CorruptExample
from .images.transforms import Example
from .workers import CONNECTIONS, Workers

Batch = dict[str, np.ndarray]
Skipped = dict[str, str]  # name of an unreadable example -> why
Fetch = Callable[[int, int, tuple[int, int]], Example]  # (stream, index in it, seed and position) -> the example
logger = logging.getLogger(__name__)

_ATTEMPTS = 100  # unreadable examples in a row before training gives up


@dataclasses.dataclass(frozen=True)
class Reading:
    """How batches are made, never which: row shard (index, count), threads of this process, worker processes.

    `workers` 0: the threads read; -1: one for each core this process may use.
    """

    shard: tuple[int, int] = (0, 1)
    threads: int = 8
    workers: int = 0

    def __post_init__(self) -> None:
        if self.workers < -1 or self.threads < 1:
            raise ValueError(
                f"workers is {self.workers}, threads {self.threads}: expected -1 (one for each core), 0 or more "
                "workers, and 1 or more threads"
            )


class Batches(Iterator[Batch]):
    """Iterator over this process's rows of each global batch, stacked field by field.

    Fields are those the preprocessing leaves (arrays or numbers of one shape), "index" int32 (in its source) and
    "mask" bool. `skipped` names the unreadable examples met so far in these rows. `get_state` gives a small JSON
    dict for `set_state` of an iterator over the same data on any number of processes.
    """

    def __init__(
        self,
        streams: Sequence[Stream],
        read: Callable[[Fetch, int], tuple[Example, Skipped]],
        *,
        batch_size: int,
        steps: int,
        identity: dict[str, Any],
        reading: Reading,
    ):
        index, count = reading.shard
        if batch_size < 1 or batch_size % count or not 0 <= index < count:
            raise ValueError(f"batch size {batch_size} cannot be divided into rows for process {index} of {count}")
        self.skipped: Skipped = {}
        self._streams, self._read, self._steps, self._reading = streams, read, steps, reading
        self._batch_size, self._rows = batch_size, batch_size // count
        self._identity = {**identity, "batch_size": batch_size}
        self._step = 0
        self._batches: grain.DatasetIterator[tuple[Batch, Skipped]] | None = None
        self._workers: Workers | None = None

    def __len__(self) -> int:
        """Batches in all, `sys.maxsize` when training."""
        return self._steps

    def __next__(self) -> Batch:
        if self._step == self._steps:
            self.close()
            raise StopIteration
        if self._batches is None:
            self._batches = iter(self._from(self._step))
        batch, skipped = next(self._batches)
        self._step += 1
        for name, reason in skipped.items():
            if name not in self.skipped:
                self.skipped[name] = reason
                logger.warning(
                    "skipped unreadable example %d, %s: %s", len(self.skipped), printable(name), printable(reason)
                )
        return batch

    def get_state(self) -> dict[str, Any]:
        """Steps taken, and what the data are known by."""
        return {"step": self._step, **self._identity}

    def set_state(self, state: dict[str, Any]) -> None:
        """Continues after `state["step"]` batches; ValueError if the state is that of other data."""
        for key, expected in self._identity.items():
            if state.get(key) != expected:
                raise ValueError(f"data iterator: the state has {key} = {state.get(key)}, this run {expected}")
        self.close()
        self._step = state["step"]

    def close(self) -> None:
        """Stops reading ahead; the next batch starts it again."""
        if self._workers is not None:
            self._workers.close()  # first: threads that wait for one go on
            self._workers = None
        if self._batches is not None:
            self._batches.close()
            self._batches = None

    def _from(self, step: int) -> grain.IterDataset:
        rows, batch_size, first = self._rows, self._batch_size, self._reading.shard[0] * self._rows
        count = usable_cores() if self._reading.workers < 0 else self._reading.workers
        self._workers = Workers(self._streams, count) if count else None
        fetch = self._workers.read if self._workers else _reader(self._streams)
        read = self._read  # threads get this and never `self`, so that batches nobody holds are freed

        def example_at(local: int) -> tuple[Example, Skipped]:
            step, row = divmod(local, rows)
            return read(fetch, step * batch_size + first + row)

        positions = grain.MapDataset.range(step * rows, min(self._steps * rows, sys.maxsize))
        threads = CONNECTIONS * count or self._reading.threads
        options = grain.ReadOptions(threads, prefetch_buffer_size=max(2 * rows, threads))
        return positions.map(example_at).to_iter_dataset(options).batch(rows, batch_fn=_collate)


def _reader(streams: Sequence[Stream]) -> Fetch:
    return lambda number, index, seed: read_example(streams[number], index, seed)


def train(streams: Sequence[Stream], *, batch_size: int, seed: int, reading: Reading = Reading()) -> Batches:
    """Endless shuffled batches of one stream or a mixture.

    Where an example cannot be read, the next position's takes its place (with the random numbers of this one), so that
    everything stays a function of seed and position. Mixtures interleave by weight, to within a percent of it.
    """
    if not streams or any(not stream.weight > 0 for stream in streams):
        raise ValueError(f"need streams with positive weights, got {[stream.weight for stream in streams]}")
    sizes = [len(stream.source) for stream in streams]
    order = shuffled(sizes, [stream.weight for stream in streams], seed)

    def read(fetch: Fetch, position: int) -> tuple[Example, Skipped]:
        skipped: Skipped = {}
        for attempt in range(_ATTEMPTS):
            number, index = order(position + attempt)
            try:
                return fetch(number, index, (seed, position)), skipped
            except CorruptExample as error:
                skipped[error.name] = error.reason
        some = [(printable(name), printable(reason)) for name, reason in list(skipped.items())[:3]]
        raise ValueError(f"{_ATTEMPTS} examples in a row cannot be read, among them {some}")

    identity = {"seed": seed, "examples": sizes}
    return Batches(streams, read, batch_size=batch_size, steps=sys.maxsize, identity=identity, reading=reading)


def evaluate(stream: Stream, *, batch_size: int, reading: Reading = Reading()) -> Batches:
    """One pass in order. Rows past the end, and examples that cannot be read, are zeros with mask False."""
    size = len(stream.source)
    padding = _padding(stream)

    def read(fetch: Fetch, position: int) -> tuple[Example, Skipped]:
        if position >= size:
            return padding, {}
        try:
            return fetch(0, position, (0, position)), {}
        except CorruptExample as error:
            return {**padding, "index": np.int32(position)}, {error.name: error.reason}

    steps = -(-size // batch_size)
    return Batches([stream], read, batch_size=batch_size, steps=steps, identity={"examples": [size]}, reading=reading)


def shuffled(sizes: Sequence[int], weights: Sequence[float], seed: int) -> Callable[[int], tuple[int, int]]:
    """Position -> (stream, index), without end. Each stream has a seed of its own, to which Grain adds the epoch."""
    orders = [
        grain.MapDataset.range(size)
        .shuffle(seed=int(np.random.SeedSequence((seed, number)).generate_state(1)[0]))
        .repeat()
        .map(lambda index, number=number: (number, index))
        for number, size in enumerate(sizes)
    ]
    mixture: Any = grain.MapDataset.mix(orders, weights)
    return mixture.__getitem__


def _padding(stream: Stream) -> Example:
    """An example of zeros with the shapes of the first one that can be read; index -1."""
    for index in range(len(stream.source)):
        try:
            example = read_example(stream, index, (0, index))
        except CorruptExample:
            continue
        return {**{key: np.zeros_like(value) for key, value in example.items()}, "index": np.int32(-1)}
    raise ValueError(f"none of the {len(stream.source)} examples can be read")


def _collate(examples: Sequence[tuple[Example, Skipped]]) -> tuple[Batch, Skipped]:
    """Stacks the examples and merges what was skipped."""
    first, _ = examples[0]
    for example, _ in examples:
        if example.keys() != first.keys():
            raise ValueError(f"cannot batch examples with fields {sorted(first)} and {sorted(example)}")
    batch = {key: _stack(key, [example[key] for example, _ in examples]) for key in first}
    skipped = {name: reason for _, skipped in examples for name, reason in skipped.items()}
    return batch, skipped


def _stack(key: str, values: Sequence[Any]) -> np.ndarray:
    arrays = [np.asarray(value) for value in values]
    shapes = {array.shape for array in arrays}
    if len(shapes) > 1:
        raise ValueError(f"cannot batch {key!r}: examples have shapes {sorted(shapes)[:4]}; resize or crop to one")
    if arrays[0].dtype.kind not in "biuf":
        raise ValueError(f"cannot batch {key!r} of type {type(values[0]).__name__}; drop it with the transform 'keep'")
    stacked = np.stack(arrays)
    return stacked.astype(np.int32) if stacked.dtype.kind in "iu" and stacked.dtype.itemsize == 8 else stacked
