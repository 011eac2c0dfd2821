"""What a person sees of a run: metrics as JSON lines and in TensorBoard, a progress bar, speed and FLOP utilisation."""

import json
import math
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from tensorboardX import SummaryWriter

from ..storage.writing import Lines

# Dense bfloat16 FLOP/s of one JAX device, by a part of its device_kind (vendors' data sheets).
PEAK_FLOPS = {
    "TPU v2": 22.5e12,  # a JAX device is one core, half a chip
    "TPU v3": 61.5e12,
    "TPU v4 lite": 138e12,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
    "TPU7x": 1153.5e12,  # one of the two cores of a chip
    "V100": 125e12,  # float16
    "A100": 312e12,
    "H100": 989e12,
    "H200": 989e12,
    "B200": 2250e12,
}

SHOWN = ("loss", "accuracy", "step_seconds", "mfu")  # endings of the metrics beside the progress bar


def peak_flops(device: Any) -> tuple[float, str]:
    """Peak FLOP/s of a device and where the number comes from: the table, or a measured matrix product."""
    for kind in sorted(PEAK_FLOPS, key=len, reverse=True):
        if kind in device.device_kind:
            return PEAK_FLOPS[kind], f"{kind} data sheet, bfloat16"
    return _measured_flops(), f"float32 matrix product measured on this {device.device_kind}"


def _measured_flops(size: int = 1024, repeats: int = 5) -> float:
    """Of one device while all of the mesh do the same: the virtual devices of a CPU share its cores."""
    multiply = jax.jit(jnp.matmul)
    x = multiply(jnp.ones((size, size)), jnp.eye(size))
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        multiply(x, x).block_until_ready()
        times.append(time.perf_counter() - start)
    return 2 * size**3 / min(times)


class Speedometer:
    """Step time, examples/s/device and model FLOP utilisation since the last reading."""

    def __init__(self, batch_size: int, flops_per_step: float) -> None:
        self._batch_size, self._flops = batch_size, flops_per_step
        self._peak, source = peak_flops(jax.local_devices()[0])
        self.peak_text = f"{self._peak / 1e12:.3g} TFLOP/s per device ({source})"
        self.reset(0)

    def reset(self, step: int) -> None:
        """Starts a new interval at `step`, for example after an evaluation."""
        self._step, self._time = step, time.perf_counter()

    def read(self, step: int) -> dict[str, float]:
        """The speed over the steps since the last reading; {} where there were none."""
        steps, seconds = step - self._step, time.perf_counter() - self._time
        self.reset(step)
        if not steps:
            return {}
        per_step, devices = seconds / steps, jax.device_count()
        return {
            "speed/step_seconds": per_step,
            "speed/examples_per_second_per_device": self._batch_size / per_step / devices,
            "speed/mfu": self._flops / per_step / devices / self._peak,
        }


class MetricWriter:
    """Appends `{"step": ..., "name": value, ...}` lines to metrics.jsonl, and to TensorBoard, on process 0.

    Lines after `step`, written by a run that was killed before its next checkpoint, are dropped, since they will be
    written again; so are the evaluations of `step` itself, which come after its checkpoint. Values that are not finite
    become null.
    """

    def __init__(self, workdir: Path, step: int) -> None:
        self._active = jax.process_index() == 0
        if not self._active:
            return
        path = workdir / "metrics.jsonl"
        kept = [line for line in read_metrics(workdir) if line["step"] < step or _of_update(line, step)]
        self._file = Lines(path, "".join(json.dumps(line) + "\n" for line in kept))
        self._board = SummaryWriter(str(workdir / "tensorboard"), purge_step=step + 1)

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """One line for `step`."""
        if not self._active:
            return
        line = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
        self._file.add(json.dumps({"step": step} | line) + "\n")
        for name, value in metrics.items():
            self._board.add_scalar(name, value, step)

    def sync(self) -> None:
        """Returns when the lines are where a resumed run finds them: before the checkpoint that follows them."""
        if self._active:
            self._file.sync()

    def close(self) -> None:
        """Flushes and closes the files."""
        if self._active:
            self._file.close()
            self._board.close()


def read_metrics(workdir: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl; a last line that a killed run left unfinished is ignored."""
    path = workdir / "metrics.jsonl"
    if not path.exists():
        return []
    return list(_parse(path, path.read_bytes().split(b"\n")))


def _of_update(line: Mapping[str, Any], step: int) -> bool:
    return line["step"] == step and any(name.startswith("train/") for name in line)


def _parse(path: Path, lines: list[bytes]) -> Iterator[dict[str, Any]]:
    """ValueError naming the line that holds something else than metrics; the last may be cut."""
    for number, text in enumerate(lines, 1):
        try:
            line = json.loads(text) if text.strip() else None
            if line is not None:
                yield {"step": int(line["step"])} | line
        except (ValueError, LookupError, TypeError) as error:
            if number < len(lines):
                raise ValueError(f"{path}, line {number} is damaged ({error}), got {text[:60]!r}") from error


class ProgressBar:
    """Steps done, time left and a few numbers, on process 0; plain lines where the output is no terminal."""

    def __init__(self, total: int, done: int) -> None:
        self._console = Console(stderr=True, quiet=jax.process_index() != 0)
        columns = (TextColumn("train"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
        self._progress = Progress(*columns, TextColumn("{task.description}"), console=self._console)
        self._task = self._progress.add_task("", total=total, completed=done)
        self._start, self.first, self._total = time.perf_counter(), done, total
        if self._console.is_terminal:
            self._progress.start()

    def update(self, step: int, metrics: Mapping[str, float]) -> None:
        """Shows the state after `step` steps."""
        shown = {name.split("/", 1)[1]: value for name, value in metrics.items() if name.endswith(SHOWN)}
        text = "  ".join(f"{name} {value:.4g}" for name, value in shown.items())
        if self._console.is_terminal:
            self._progress.update(self._task, completed=step, description=text)
        else:
            seconds = (time.perf_counter() - self._start) / max(step - self.first, 1) * (self._total - step)
            self.print(f"step {step}/{self._total}  {text}  about {seconds:.0f} s left")

    def print(self, text: str) -> None:
        """A line above the bar."""
        self._progress.print(text, highlight=False, soft_wrap=True, markup=False)

    def close(self) -> None:
        """Leaves the bar as it stands."""
        self._progress.stop()
