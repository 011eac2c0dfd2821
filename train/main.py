"""`python -m omnax.train --config configs/vit.py:size=b16 --workdir runs/vit --config.optimizer.lr=1e-3`

`train` is the loop of every system and holds the order of operations only: save, evaluate, draw a batch, update, write.
Do not reorder: a checkpoint then holds the exact data position, and no evaluation that fails can cost one. A run that
goes on from a checkpoint repeats the evaluation of its step, which may move the state (`Recipe.after_evaluation`).
"""

import argparse
import contextlib
import dataclasses
import importlib
import itertools
import json
import os
import pkgutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from ..data.lookup import lookup
from ..data.prefetch import Prefetch, process_shard
from ..models.messages import bounded, bounded_errors, log_to_stderr
from ..storage.paths import as_path
from . import recipes
from .checkpoint import Checkpointer
from .config import run_config_file, typed
from .lock import locked
from .monitor import Monitor, StopSignal, describe, read_summary
from .processes import check_equal, on_first
from .program import make_program
from .recipe import Recipe
from .settings import RunConfig
from .sharding import batch_sharding, make_mesh
from .start import CHECKPOINTS, changes, start


@bounded_errors()
def train(config: RunConfig, recipe: Recipe, workdir: Path) -> None:
    """Runs the loop from wherever `workdir` stands to `config.total_steps`, or to a SIGTERM."""
    settings = as_json(config)
    mesh = make_mesh(config.mesh)
    with contextlib.ExitStack() as stack:
        stop = stack.enter_context(StopSignal())
        stack.enter_context(locked(workdir))
        stack.enter_context(jax.set_mesh(mesh))
        checkpoints = stack.enter_context(Checkpointer(workdir / CHECKPOINTS, config.keep_checkpoints))
        program = make_program(recipe, config, mesh)
        data = stack.enter_context(contextlib.closing(open_data(recipe, config, mesh)))
        if recipe.inspect and recipe.evaluators:
            recipe.inspect()
        state = start(program, recipe, data, checkpoints, config, settings)
        step = first = int(state.step)
        monitor = stack.enter_context(Monitor(config, recipe, workdir, first))
        while True:
            done, stopped = step >= config.total_steps, stop(step)
            if done or stopped or (step > first and step % config.save_every == 0):
                monitor.flush(final=done)  # a state that came from a non-finite loss is never saved
                checkpoints.save(step, state, data.get_state(), settings)
            if done or (step > 0 and step % config.evaluate_every == 0 and not stopped):
                results = monitor.evaluate(step, state)
                state = recipe.after_evaluation(state, results) if recipe.after_evaluation else state
            if done or stopped:
                break
            batch = next(data)
            state, metrics = program.update(state, batch)
            step += 1
            monitor.write(step, metrics)
        checkpoints.wait()
        if done:
            monitor.finish(step, settings)
        else:
            monitor.print(f"stopped and saved at step {step}; the same command continues")


def open_data(recipe: Recipe, config: RunConfig, mesh: Mesh) -> Prefetch:
    """Global batches on the devices, of which this process reads its rows."""
    rows = batch_sharding(mesh)
    return Prefetch(recipe.data(process_shard(rows, config.batch_size)), rows)


def as_json(config: RunConfig) -> dict[str, Any]:
    """The config as a checkpoint holds it: tuples are lists."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


@bounded_errors()
def make_recipe(config_spec: str, overrides: dict[str, str]) -> tuple[RunConfig, Recipe]:
    """The typed config and the recipe that a config file asks for; nothing is computed and no data is read yet."""
    settings = run_config_file(config_spec)
    names = [module.name for module in pkgutil.iter_modules(recipes.__path__) if module.ispkg]
    modules = {name: f"{recipes.__name__}.{name}.recipe" for name in names}
    module = importlib.import_module(lookup(modules, overrides.get("recipe", str(settings.get("recipe"))), "recipe"))
    config = typed(module.Config, settings, overrides)
    return config, module.make_recipe(config)


def parse_overrides(arguments: list[str]) -> dict[str, str]:
    """`--config.a.b=value` and `--config.a.b value` as {"a.b": "value"}; ValueError for anything else."""
    overrides, rest = {}, list(arguments)
    while rest:
        flag, equals, value = rest.pop(0).partition("=")
        if not flag.startswith("--config."):
            raise ValueError(f"unknown argument {flag!r}, settings are given as --config.key=value")
        if not equals and not rest:
            raise ValueError(f"argument {flag!r} has no value")
        overrides[flag.removeprefix("--config.")] = value if equals else rest.pop(0)
    return overrides


def add_common_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of training and of compile-only."""
    parser.add_argument("--config", required=True, help="config file, with its argument: configs/vit.py:size=b16")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        "python -m omnax.train", epilog="Settings: --config.key.key=value", allow_abbrev=False
    )
    add_common_arguments(parser)
    where = "where the run lives, also in a bucket (gs://…); the same again continues it"
    parser.add_argument("--workdir", required=True, type=as_path, help=where)
    parser.add_argument("--new", action="store_true", help="begin again: what lies in the workdir is moved aside")
    environment = os.environ.get
    address = "host:port of process 0 of several; 'auto' on TPU pods and under Slurm"
    parser.add_argument("--coordinator", default=environment("JAX_COORDINATOR_ADDRESS"), help=address)
    parser.add_argument("--num-processes", type=int, default=environment("JAX_NUM_PROCESSES"))
    parser.add_argument("--process-id", type=int, default=environment("JAX_PROCESS_ID"))
    flags, rest = parser.parse_known_args(arguments)
    return report_errors(lambda: _run(flags, rest), flags.debug)


def _run(flags: argparse.Namespace, rest: list[str]) -> None:
    log_to_stderr()
    if flags.num_processes and int(flags.num_processes) > 1 and not flags.coordinator:
        raise ValueError(f"--num-processes {flags.num_processes} needs --coordinator host:port, the same for all")
    if flags.coordinator == "auto":
        jax.distributed.initialize()
    elif flags.coordinator:
        jax.distributed.initialize(flags.coordinator, flags.num_processes, flags.process_id)
    config, recipe = make_recipe(flags.config, parse_overrides(rest))
    settings = as_json(config)
    check_equal("config", settings)
    if flags.new:
        move_aside(flags.workdir)
    summary = read_summary(flags.workdir, settings)
    if summary is None:
        train(config, recipe, flags.workdir)
    elif found := changes(summary["config"], settings):
        more = f", and {len(found) - 5} more" if len(found) > 5 else ""
        raise ValueError(
            f"{flags.workdir} holds a finished run with other settings ({'; '.join(found[:5])}{more}): "
            "give another --workdir, or --new to begin again"
        )
    else:
        print(f"{flags.workdir} is finished. {describe(summary)}")


def move_aside(workdir: Path) -> None:
    """Renames a working directory to the first free `WORKDIR.1`, `WORKDIR.2`, ...; nothing is ever deleted."""

    def rename() -> None:
        if workdir.exists():
            with locked(workdir):
                pass  # nobody runs in it
            names = (workdir.with_name(f"{workdir.name}.{i}") for i in itertools.count(1))
            free = next(name for name in names if not name.exists())
            workdir.rename(free)
            print(f"the run in {workdir} was moved to {free}")

    on_first(rename)


def report_errors(run: Callable[[], None], debug: bool) -> int:
    """Runs a command; what the user can mend is one line on stderr and exit code 1 instead of a traceback."""
    try:
        run()
    except (ValueError, FloatingPointError) as error:
        if debug:
            raise
        print(f"{type(error).__name__}: {bounded(str(error))}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 128 + signal.SIGINT
    return 0
