"""The labelled images a recipe trains and evaluates on, opened from its config."""

import dataclasses
import functools
import logging
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from ..data import pipeline, preprocess, sources
from ..data.prefetch import process_shard
from ..models.ranges import Count, Workers
from .sharding import batch_sharding

logger = logging.getLogger(__name__)

Steps = tuple[str | tuple[str, dict[str, Any]], ...]  # see data/preprocess.py


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """A data set (see data/sources.py), its two splits and the preprocessing of each."""

    name: str
    path: str = ""  # of "folder"
    data_dir: str = ""  # of TFDS data sets
    download: bool = False
    train_split: str = "train"
    test_split: str = "test"
    preprocess: Steps
    preprocess_test: Steps
    threads: Count = 8  # readers per process; worker processes instead where decoding is heavy
    workers: Workers = 0  # -1: one for each core this process may use

    def open(self, split: str) -> sources.Source:
        """The examples of a split."""
        return sources.source({name: value for name, value in dataclasses.asdict(self).items() if value != ""}, split)

    def describe(self, split: str) -> str:
        """A split as messages name it."""
        return f"data {self.path or self.name!r}, split {split!r}"


def normalization(steps: Steps, channels: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """The mean and deviation of a preprocessing, as of pixels / 255: of "normalize", or those of "value_range"."""
    named = dict(step if isinstance(step, tuple) else (step, {}) for step in steps)
    if "normalize" in named:
        return tuple(named["normalize"]["mean"]), tuple(named["normalize"]["std"])
    if "value_range" not in named:
        return (0.0,) * channels, (1.0 / 255,) * channels
    low, high = (named["value_range"].get(key, default) for key, default in (("low", -1.0), ("high", 1.0)))
    return (-low / (high - low),) * channels, (1 / (high - low),) * channels


def warn_normalization(path: str, processor: Any, mean: Sequence[float], std: Sequence[float]) -> None:
    """A warning where published weights saw pixels of another mean or deviation than the pipeline gives."""
    published = getattr(processor, "image", processor)  # CLIP's has one for images and one for texts
    if published is None:
        return
    pairs = ((published.mean, mean), (published.std, std))
    if any(len(a) != len(b) or not np.allclose(a, b, atol=1e-3) for a, b in pairs):
        logger.warning(
            "%s was trained on pixels of mean %s and std %s, this run's pipeline gives mean %s and std %s",
            path,
            *(tuple(round(float(x), 4) for x in values) for values in (published.mean, published.std, mean, std)),
        )


def train_batches(
    config: DataConfig, batch_size: int, seed: int, num_classes: int
) -> Callable[[Any], pipeline.Batches]:
    """`open(shard)` for a recipe's `data`: endless shuffled batches of the training split."""

    def open_shard(shard: tuple[int, int]) -> pipeline.Batches:
        source = config.open(config.train_split)
        sources.check_classes(config.describe(config.train_split), source.class_names, num_classes)
        stream = pipeline.Stream(source, preprocess.build(config.preprocess))
        reading = pipeline.Reading(shard, config.threads, config.workers)
        return pipeline.train([stream], batch_size=batch_size, seed=seed, reading=reading)

    return open_shard


def open_checked(config: DataConfig, split: str, num_classes: int = 0) -> sources.Source:
    """A split whose classes are those of the training split, and of a head with `num_classes`; else ValueError."""
    source = config.open(split)
    # The splits of a TFDS data set share one list of names; folders need not.
    train = config.open(config.train_split).class_names if config.name == "folder" else ()
    sources.check_classes(config.describe(split), source.class_names, num_classes, train)
    return source


def evaluation_batches(
    config: DataConfig, split: str, batch_size: int, num_classes: int = 0
) -> Callable[[], pipeline.Batches]:
    """One pass over a split, preprocessed as for testing, in this process's share of batches of `batch_size`.

    The first pass opens the split, and checks that its classes are those of the training split, and of a head with
    `num_classes` where there is one.
    """

    @functools.cache
    def opened() -> pipeline.Stream:
        return pipeline.Stream(open_checked(config, split, num_classes), preprocess.build(config.preprocess_test))

    def open_pass() -> pipeline.Batches:
        stream = opened()
        shard = process_shard(batch_sharding(jax.sharding.get_mesh()), batch_size)
        reading = pipeline.Reading(shard, config.threads, config.workers)
        return pipeline.evaluate(stream, batch_size=batch_size, reading=reading)

    return open_pass
