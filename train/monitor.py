"""The side of the loop that a person sees: metrics written and shown, evaluations, the stop signal, the summary."""

import json
import logging
import math
import signal
import time
from collections.abc import Mapping
from pathlib import Path
from types import FrameType
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jaxtyping import Array

from ..storage.writing import write_whole
from .checkpoint import find_sound
from .metrics import MetricWriter, ProgressBar, Speedometer
from .recipe import Recipe
from .settings import RunConfig
from .start import CHECKPOINTS
from .state import TrainState

SUMMARY = "summary.json"

logger = logging.getLogger(__name__)


class Monitor:
    """Receives each step's metrics as device arrays and reads them one step late, so that the device never waits."""

    def __init__(self, config: RunConfig, recipe: Recipe, workdir: Path, step: int) -> None:
        self._config, self._recipe, self._workdir = config, recipe, workdir
        self._pending: list[tuple[int, Mapping[str, Array]]] = []
        self._results: dict[str, Any] = {}
        self._updates = self._skipped = 0
        self._writer = MetricWriter(workdir, step)
        self._bar = ProgressBar(config.total_steps, step)
        self._speed = Speedometer(config.batch_size, recipe.flops_per_step)
        self._begin = time.perf_counter()
        self.print(f"{jax.device_count()} × {jax.devices()[0].device_kind}, MFU against {self._speed.peak_text}")

    def __enter__(self) -> "Monitor":
        self._speed.reset(self._bar.first)
        return self

    def __exit__(self, *exception: object) -> None:
        self._bar.close()
        self._writer.close()

    def print(self, text: str) -> None:
        """A line for the person, on process 0."""
        self._bar.print(text)

    def write(self, step: int, metrics: Mapping[str, Array]) -> None:
        """Takes the metrics of the update that led to `step`; every `log_every` steps they are written and shown."""
        self._pending.append((step, metrics))
        if step == self._bar.first + 1:  # wait once, so that compilation does not count as step time
            self.flush()
            self._speed.reset(step)
        elif (step - 1) % self._config.log_every == 0:
            self.flush(keep=1)

    def flush(self, keep: int = 0, final: bool = False) -> None:
        """Reads all but the last `keep` pending metrics; FloatingPointError for one that is not finite.

        Likewise at the end, `final`, where every update was skipped: nothing was learnt.
        """
        ready, self._pending = self._pending[: len(self._pending) - keep], self._pending[len(self._pending) - keep :]
        for step, metrics in jax.device_get(ready):
            metrics = {name: float(value) for name, value in metrics.items()}
            self._check(step, metrics)
            if step % self._config.log_every == 0:
                line = {f"train/{name}": value for name, value in metrics.items()} | self._speed.read(step)
                self._writer.write(step, line)
                self._bar.update(step, line)
        if not keep:
            self._writer.sync()
        if final and 0 < self._updates == self._skipped:
            raise FloatingPointError(f"all {self._skipped} updates were skipped: no loss and gradient was finite")

    def _check(self, step: int, metrics: Mapping[str, float]) -> None:
        bad = ", ".join(f"{name} is {value}" for name, value in metrics.items() if not math.isfinite(value))
        self._updates += 1
        self._skipped += metrics.get("skipped", 0.0) > 0
        if bad and not self._config.skip_non_finite:
            raise FloatingPointError(f"at step {step} {bad}")
        if bad:
            logger.warning("update %d skipped: %s", step, bad)

    def evaluate(self, step: int, state: TrainState) -> dict[str, dict[str, float]]:
        """Runs the evaluators, writes and shows their numbers, and returns them by evaluator."""
        self.flush()
        results = {}
        for evaluator in self._recipe.evaluators:
            result = evaluator(state)
            self._results[evaluator.name] = result
            results[evaluator.name] = {k: float(v) for k, v in result.items() if np.ndim(v) == 0}
            numbers = {f"{evaluator.name}/{k}": v for k, v in results[evaluator.name].items()}
            self._writer.write(step, numbers)
            self.print(f"step {step}: " + ", ".join(f"{name} {value:.4f}" for name, value in numbers.items()))
        self._speed.reset(step)
        return results

    def finish(self, step: int, settings: dict[str, Any]) -> None:
        """Draws the pictures and leaves the summary that makes a second start a no-op."""
        if jax.process_index() != 0:
            return
        pictures = self._recipe.pictures(self._workdir, self._results) if self._recipe.pictures else []
        numbers = {name: {k: v for k, v in r.items() if np.ndim(v) == 0} for name, r in self._results.items()}
        summary = {
            "step": step,
            "seconds": round(time.perf_counter() - self._begin, 1),
            "results": numbers,
            "files": [str(self._workdir / CHECKPOINTS / str(step)), *map(str, pictures)],
            "config": settings,
        }
        write_whole(self._workdir / SUMMARY, json.dumps(summary, indent=1).encode())
        self.print(describe(summary))


def read_summary(workdir: Path, settings: dict[str, Any]) -> dict[str, Any] | None:
    """The summary of a finished run; None where there is still something to do for this config."""
    path = workdir / SUMMARY
    if not path.exists():
        return None
    try:
        summary = json.loads(path.read_text())
        step, _, _ = summary["step"], dict(summary["results"]), dict(summary["config"])
        describe(summary)
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is damaged ({error}); without it the run goes on from its checkpoints") from error
    saved, _ = find_sound(workdir / CHECKPOINTS)
    return summary if step == settings["total_steps"] == saved else None


def describe(summary: dict[str, Any]) -> str:
    """What a finished run achieved and where its files are."""
    results = [f"{name}/{k} {v:.4f}" for name, numbers in summary["results"].items() for k, v in numbers.items()]
    return f"{summary['step']} steps, {', '.join(results)}; written: {', '.join(summary['files'])}"


class StopSignal:
    """Whether to save and stop; a context manager that takes over SIGTERM and Ctrl-C. A second Ctrl-C ends at once.

    With several processes the signal may reach one of them, or all at different steps: jax.distributed's preemption
    service then catches SIGTERM and agrees on one step for all.
    """

    def __init__(self) -> None:
        self._received = False

    def __enter__(self) -> "StopSignal":
        numbers = [signal.SIGINT] if jax.process_count() > 1 else [signal.SIGTERM, signal.SIGINT]
        self._previous = {number: signal.signal(number, self._receive) for number in numbers}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, previous in self._previous.items():
            signal.signal(number, previous)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            if self._received:
                raise KeyboardInterrupt
            logger.warning("Ctrl-C: saving after this step; once more ends at once, without")
            if jax.process_count() > 1:
                signal.raise_signal(signal.SIGTERM)
        self._received = True

    def __call__(self, step: int) -> bool:
        """To be called by every process at every step."""
        if jax.process_count() > 1:
            return multihost_utils.reached_preemption_sync_point(step)
        return self._received
