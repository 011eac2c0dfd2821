"""`python -m omnax.benchmarks.kill_loop [recipe ...] [--brief] [--seed 0]`: a killed run ends as an unkilled one.

Trains each recipe's smoke config, made tiny, for a few steps: undisturbed twice, and in four more working directories
killed and continued. In three of them, one for SIGKILL, SIGTERM and Ctrl-C each, the signal comes in the first step, in
a save, in an evaluation and at the end; in the fourth all three come at random times. `--brief` has one such directory,
in which the signals take turns over the moments. Afterwards the final parameters
and the lines of metrics.jsonl (but for speeds) must be equal, no process may be left, and neither the working directory
nor the system's folder of temporary files may hold one. The exit code is 1 where that is not so.
"""

import argparse
import contextlib
import functools
import itertools
import json
import logging
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from ..train import checkpoint
from ..train import main as train
from ..train.checkpoint import Checkpointer, find_sound
from ..train.metrics import read_metrics
from ..train.monitor import SUMMARY, Monitor
from ..train.recipe import Evaluator
from ..train.start import CHECKPOINTS

STEPS = 8
SETTINGS = {"total_steps": STEPS, "log_every": 1, "save_every": 3, "evaluate_every": 4, "keep_checkpoints": 2}
ONE_BLOCK = {"model.depth": 1, "model.width": 32, "model.mlp_dim": 64}
# Recipe -> its config and what makes it tiny.
RUNS: dict[str, tuple[str, dict[str, Any]]] = {
    "vit": ("configs/vit.py", ONE_BLOCK | {"batch_size": 32, "evaluators": ("accuracy",), "data.workers": 1}),
    "clip": (
        "configs/clip.py",
        {"model.image.trunk.depth": 1, "model.text.depth": 1, "batch_size": 16, "data.merges": 60},
    ),
    "dinov2": ("configs/dinov2.py", ONE_BLOCK | {"evaluators": ("knn",)}),
    "qwen_vl": (
        "configs/qwen_vl.py",
        {"model.text.depth": 1, "data.tests": ({"name": "drawn", "task": "position", "size": 8},)},
    ),
    "wav2lip": (
        "configs/wav2lip.py:data=one,stage=gan",
        {
            "model.width_mult": 0.0625,
            "data.train_clips": 4,
            "data.test_clips": 2,
            "data.windows_per_clip": 1,
            "sync_below": 1e9,  # the evaluation moves the state
            "init_from.skip": (".*",),
            "init_from.required": (),
        },
    ),
}
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
MOMENTS = ("first step", "save", "evaluation", "end")
Run = Callable[[list[str]], None]  # trains to the end with these arguments
AIMED = "signal in the "  # what a child says before it sends itself one
CHILD = "import sys; from omnax.benchmarks import kill_loop; sys.exit(kill_loop.die_in(sys.argv[1]))"


def arguments_of(recipe: str, workdir: Path) -> list[str]:
    """What `python -m omnax.train` is given."""
    config, tiny = RUNS[recipe]
    settings = [f"--config.{key}={value}" for key, value in (SETTINGS | tiny).items()]
    return ["--config", config, "--workdir", str(workdir), *settings]


def die_in(text: str) -> int:
    """In a child: trains, and sends this process a signal when the moment comes; the exit code where it lives on."""
    arguments, number, moment, seed = json.loads(text)
    rng, sent = random.Random(seed), threading.Event()

    def send() -> None:
        if not sent.is_set():
            sent.set()
            os.write(2, f"{AIMED}{moment}\n".encode())
            # Ctrl-C reaches the whole group; the others only the process they are sent to.
            (os.killpg if number == signal.SIGINT else os.kill)(os.getpid(), number)

    if moment == "first step":
        instead(Monitor, "write", lambda write: (send(), write()))  # the update has been started
    elif moment == "evaluation":
        instead(Evaluator, "__call__", lambda evaluate: (evaluate(), send())[0])
    elif moment == "end":
        instead(Monitor, "finish", lambda finish: (send(), finish()))
    elif number != signal.SIGKILL:  # the run goes on for a step: not beyond the next moment
        instead(Checkpointer, "save", lambda save: (save(), send()))
    elif rng.random() < 0.5:  # the checkpoint is there but for its name
        instead(checkpoint, "write_inventory", lambda write: (send(), write()))
    else:
        instead(Checkpointer, "save", lambda save: (threading.Timer(rng.uniform(0, 0.2), send).start(), save()))
    return train.main(arguments)


def instead(owner: Any, name: str, act: Callable[[Callable[[], Any]], Any]) -> None:
    """Has a function of a class or module replaced by `act`, which is given the call that would have been made."""
    original = getattr(owner, name)
    setattr(owner, name, lambda *args, **kwargs: act(functools.partial(original, *args, **kwargs)))


def launch(program: list[str]) -> subprocess.Popen[str]:
    """A process group of its own, as a terminal makes one."""
    return subprocess.Popen(
        [sys.executable, *program], start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )


def finish(arguments: list[str]) -> None:
    """Trains to the end in a process of its own. RuntimeError with the end of stderr where it fails."""
    process = launch(["-m", "omnax.train", *arguments])
    _, error = process.communicate()
    if process.returncode:
        raise RuntimeError(f"exit code {process.returncode}: {error[-2000:]}")


def kill_at(arguments: list[str], number: signal.Signals, moment: str, seed: int) -> str:
    """Trains until the moment at which it is sent the signal; what came of it, and of nothing else."""
    process = launch(["-c", CHILD, json.dumps([arguments, number, moment, seed])])
    _, error = process.communicate()
    if AIMED not in error:
        raise RuntimeError(f"the {moment} never came: exit code {process.returncode}, {error[-2000:]}")
    return outcome(process, error)


def kill_after(arguments: list[str], number: signal.Signals, delay: float) -> str:
    """Trains and is sent the signal after `delay` seconds, wherever it is then; what came of it."""
    process = launch(["-m", "omnax.train", *arguments])
    try:
        _, error = process.communicate(timeout=delay)
        return "had ended before"
    except subprocess.TimeoutExpired:
        (os.killpg if number == signal.SIGINT else os.kill)(process.pid, number)
    _, error = process.communicate()
    return outcome(process, error)


def outcome(process: subprocess.Popen[str], error: str) -> str:
    """How a killed run ended. RuntimeError for a traceback, or for a process that it left behind."""
    if "Traceback" in error:
        raise RuntimeError(f"ended with {error[-2000:]}")
    if left_over(process.pid):
        raise RuntimeError(f"left a process behind: {error[-2000:]}")
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
    stray += Path(tempfile.gettempdir()).glob("*") if "TMPDIR" in os.environ else []
    return [*problems, *(f"left behind: {path.name}" for path in stray)]


def aimed_life(recipe: str, workdir: Path, kills: Iterable[tuple[str, signal.Signals]], seed: int, end: Run) -> None:
    """A run that is sent a signal at each of the moments, and continued until it has ended."""
    for i, (moment, number) in enumerate(kills):
        found = kill_at(arguments_of(recipe, workdir), number, moment, seed + i)
        print(f"{recipe}: {number.name} in the {moment}: {found}", flush=True)
    end(arguments_of(recipe, workdir))


def random_life(recipe: str, workdir: Path, seconds: float, seed: int, end: Run) -> None:
    """A run that is sent each signal at a random time of the `seconds` that an unkilled one takes."""
    rng = random.Random(seed)
    for number in SIGNALS:
        delay = seconds * rng.uniform(0.2, 1.0)  # before are imports
        found = kill_after(arguments_of(recipe, workdir), number, delay)
        print(f"{recipe}: {number.name} after {delay:.1f} of {seconds:.1f} s: {found}", flush=True)
    end(arguments_of(recipe, workdir))


def run(recipe: str, scratch: Path, seed: int, brief: bool = False) -> list[str]:
    """All four lives of a recipe, or the brief one; the problems found."""
    straight, again = scratch / "straight", scratch / "again"
    finish(arguments_of(recipe, straight))  # also fills the compilation cache and the data's
    if brief:
        aimed_life(recipe, again, zip(MOMENTS, itertools.cycle(SIGNALS)), seed, finish)
        return differences(again, straight)
    begin = time.monotonic()
    finish(arguments_of(recipe, again))
    seconds = time.monotonic() - begin
    problems = [f"twice the same: {problem}" for problem in differences(again, straight)]
    for i, number in enumerate(SIGNALS):
        kills = [(moment, number) for moment in MOMENTS]
        aimed_life(recipe, scratch / number.name, kills, seed + 10 * i, finish)
        problems += [f"{number.name}: {problem}" for problem in differences(scratch / number.name, straight)]
    random_life(recipe, scratch / "random", seconds, seed, finish)
    return problems + [f"random times: {problem}" for problem in differences(scratch / "random", straight)]


def main(arguments: list[str] | None = None) -> int:
    """Prints what was done and found; returns the exit code."""
    parser = argparse.ArgumentParser("python -m omnax.benchmarks.kill_loop")
    parser.add_argument("recipes", nargs="*", help=f"of {', '.join(RUNS)}; default: all")
    parser.add_argument("--brief", action="store_true", help="one killed run of each recipe instead of four")
    parser.add_argument("--seed", type=int, default=0)
    flags = parser.parse_args(arguments)
    if unknown := set(flags.recipes) - RUNS.keys():
        parser.error(f"unknown recipes {sorted(unknown)}, expected some of {[*RUNS]}")
    logging.disable(logging.WARNING)  # Orbax's, about reading a state alone
    failed = 0
    for recipe in flags.recipes or RUNS:
        with tempfile.TemporaryDirectory(prefix="omnax-kill-") as scratch, children_in(Path(scratch)):
            try:
                problems = run(recipe, Path(scratch), flags.seed, flags.brief)
            except RuntimeError as error:
                problems = [str(error)]
        text = "; ".join(problems) or "equal to the uninterrupted run, no process and no temporary left"
        print(f"{recipe}: {text}", flush=True)
        failed += bool(problems)
    return min(failed, 1)


@contextlib.contextmanager
def children_in(scratch: Path) -> Iterator[None]:
    """Children keep what they compiled, for the next, and find an empty folder for temporary files.

    $JAX_COMPILATION_CACHE_DIR keeps it for another day.
    """
    (scratch / "temporary").mkdir()
    own = {
        "TMPDIR": str(scratch / "temporary"),
        "JAX_COMPILATION_CACHE_DIR": os.environ.get("JAX_COMPILATION_CACHE_DIR", str(scratch / "compiled")),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "0",
    }
    before, tempfile.tempdir = dict(os.environ), None
    os.environ.update(own)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)
        tempfile.tempdir = None


if __name__ == "__main__":
    sys.exit(main())
