"""How one example is read, apart from order and batches: all that a worker process runs of the pipeline.

Everything imported from here on downwards stays free of JAX (tests/data/test_workers.py): a worker holds NumPy, Pillow
and the source alone.
"""

import dataclasses
import os
from pathlib import Path
from typing import Protocol

import numpy as np

from .images.transforms import Example, Transform


class Source(Protocol):
    """What the pipeline reads from; see sources.py."""

    class_names: list[str]

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Example: ...


@dataclasses.dataclass(frozen=True)
class Stream:
    """A source with its preprocessing and, for training on several, its relative weight."""

    source: Source
    preprocess: Transform
    weight: float = 1.0


def read_example(stream: Stream, index: int, seed: tuple[int, int]) -> Example:
    """`source[index]` preprocessed with the random numbers of `seed`, (that of the run, position in its order)."""
    example = stream.preprocess({**stream.source[index], "position": seed[1]}, np.random.default_rng(seed))
    kept = {key: value for key, value in example.items() if key != "position"}
    return {**kept, "index": np.int32(index), "mask": np.True_}


def usable_cores() -> int:
    """Cores this process may run on: its affinity, and no more than the quota of its control group (containers)."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = Path("/sys/fs/cgroup/cpu.max")
    allowed, _, period = quota.read_text().partition(" ") if quota.is_file() else ("max", "", "")
    return cores if allowed == "max" else max(1, min(cores, -(-int(allowed) // int(period))))
