"""`python -m omnax.benchmarks.kill_loop [recipe ...] [--kills 6] [--seed 0]`: a killed run ends as an unkilled one.

Trains each recipe's default config (the small one) for a few steps, once undisturbed and once killed at random times:
SIGKILL, SIGTERM and Ctrl-C by turns; the seed decides whether that falls into a step, a save, an evaluation or the end.
Afterwards the final parameters and the lines of metrics.jsonl (but for speeds) must be equal, no process may be left,
no temporary file or lock may stand in the working directory. The exit code is 1 where they are not.
"""

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from ..train.checkpoint import find_sound
from ..train.metrics import read_metrics
from ..train.monitor import SUMMARY
from ..train.start import CHECKPOINTS

CONFIGS = {
    "vit": "configs/vit.py",
    "clip": "configs/clip.py",
    "dinov2": "configs/dinov2.py",
    "qwen_vl": "configs/qwen_vl.py",
    "wav2lip": "configs/wav2lip.py",
}
STEPS = 8
SETTINGS = {"total_steps": STEPS, "log_every": 1, "save_every": 2, "evaluate_every": 4, "keep_checkpoints": 2}
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)


def command(recipe: str, workdir: Path, overrides: dict[str, Any]) -> list[str]:
    """The training command of a recipe with few steps."""
    settings = [f"--config.{key}={value}" for key, value in (SETTINGS | overrides).items()]
    return [sys.executable, "-m", "omnax.train", "--config", CONFIGS[recipe], "--workdir", str(workdir), *settings]


def launch(arguments: list[str]) -> subprocess.Popen[str]:
    """A process group of its own, as a terminal makes one."""
    return subprocess.Popen(
        arguments, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )


def finish(arguments: list[str]) -> float:
    """Runs to the end; seconds. RuntimeError with the end of stderr where it fails."""
    start = time.monotonic()
    process = launch(arguments)
    _, error = process.communicate()
    if process.returncode:
        raise RuntimeError(f"exit code {process.returncode}: {error[-2000:]}")
    return time.monotonic() - start


def kill(arguments: list[str], number: signal.Signals, delay: float) -> str:
    """Starts the run, sends the signal after `delay` seconds; what came of it. RuntimeError for what must not."""
    process = launch(arguments)
    try:
        process.communicate(timeout=delay)
        return "had ended before"
    except subprocess.TimeoutExpired:
        # Ctrl-C reaches the whole group; the others only the process they are sent to.
        (os.killpg if number == signal.SIGINT else os.kill)(process.pid, number)
    _, error = process.communicate()
    if "Traceback" in error:
        raise RuntimeError(f"{number.name} after {delay:.1f} s: {error[-2000:]}")
    if left_over(process.pid):
        raise RuntimeError(f"{number.name} after {delay:.1f} s left a process behind")
    return f"exit code {process.returncode}"


def left_over(group: int) -> bool:
    """Whether a process of the group is still there, after a moment to end in."""
    for _ in range(100):
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return False
        time.sleep(0.1)
    return True


def lines(workdir: Path) -> list[dict[str, Any]]:
    """metrics.jsonl without speeds."""
    return [{k: v for k, v in line.items() if not k.startswith("speed/")} for line in read_metrics(workdir)]


def parameters(workdir: Path) -> Any:
    """The final parameters as the checkpoint holds them."""
    step, _ = find_sound(workdir / CHECKPOINTS)
    path = (workdir / CHECKPOINTS / str(step) / "state").resolve()
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
        tree: Any = reader.metadata(path).item_metadata.tree
        restore = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
        return reader.restore(path, args=ocp.args.PyTreeRestore(restore_args=restore))["params"]


def differences(found: Path, expected: Path) -> list[str]:
    """What two finished working directories do not have in common, and what should not be there."""
    problems = []
    if lines(found) != lines(expected):
        problems.append("metrics.jsonl differs")
    if not jax.tree.all(jax.tree.map(np.array_equal, parameters(found), parameters(expected))):
        problems.append("final parameters differ")
    if not (found / SUMMARY).exists():
        problems.append("no summary")
    stray = [path for path in found.rglob("*") if "tmp" in path.name or path.suffix in (".lock", ".damaged")]
    return [*problems, *(f"left behind: {path.relative_to(found)}" for path in stray)]


def run(recipe: str, kills: int, seed: int, overrides: dict[str, Any] | None = None) -> list[str]:
    """Kills one recipe's run `kills` times; the problems found."""
    rng = random.Random(seed)
    with tempfile.TemporaryDirectory(prefix="omnax-kill-") as scratch:
        straight, killed = Path(scratch) / "straight", Path(scratch) / "killed"
        finish(command(recipe, straight, overrides or {}))  # also fills the compilation cache and the data's
        second = Path(scratch) / "again"
        seconds = finish(command(recipe, second, overrides or {}))
        problems = [f"twice the same: {problem}" for problem in differences(second, straight)]
        for i in range(kills):
            number = SIGNALS[i % len(SIGNALS)]
            delay = seconds * rng.uniform(0.3, 1.0)  # imports come before
            outcome = kill(command(recipe, killed, overrides or {}), number, delay)
            print(f"{recipe}: {number.name} after {delay:.1f} of {seconds:.1f} s: {outcome}", flush=True)
        finish(command(recipe, killed, overrides or {}))
        return problems + differences(killed, straight)


def main(arguments: list[str] | None = None) -> int:
    """Prints what was done and found; returns the exit code."""
    parser = argparse.ArgumentParser("python -m omnax.benchmarks.kill_loop")
    parser.add_argument("recipes", nargs="*", help=f"of {', '.join(CONFIGS)}; default: all")
    parser.add_argument("--kills", type=int, default=6)
    parser.add_argument("--seed", type=int, default=0)
    flags = parser.parse_args(arguments)
    if unknown := set(flags.recipes) - CONFIGS.keys():
        parser.error(f"unknown recipes {sorted(unknown)}, expected some of {[*CONFIGS]}")
    failed = 0
    for recipe in flags.recipes or CONFIGS:
        problems = run(recipe, flags.kills, flags.seed)
        print(f"{recipe}: {'; '.join(problems) or 'equal to the uninterrupted run, nothing left behind'}", flush=True)
        failed += bool(problems)
    return min(failed, 1)


if __name__ == "__main__":
    sys.exit(main())
