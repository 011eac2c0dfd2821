"""Where a run begins: its own checkpoint, another run's, given weights, or scratch; in this order."""

import logging
import re
from pathlib import Path
from typing import Any

import jax

from ..data.prefetch import Prefetch
from .checkpoint import Checkpointer
from .program import Program
from .recipe import Recipe
from .rules import Tree, flatten, nearest, unflatten
from .settings import InitFrom, RunConfig
from .state import TrainState

CHECKPOINTS = "checkpoints"  # folder of a workdir

logger = logging.getLogger(__name__)


def start(
    program: Program,
    recipe: Recipe,
    data: Prefetch,
    checkpoints: Checkpointer,
    config: RunConfig,
    settings: dict[str, Any],
) -> TrainState:
    """The state to go on from; moves `data` to the position that belongs to it. `settings`: the config as JSON."""
    if checkpoints.latest is not None:
        return _continue(program, data, checkpoints, settings)
    if config.resume:
        with Checkpointer(_checkpoints_of(config.resume), keep=None) as others:
            return _continue(program, data, others, settings)
    state = program.init(jax.random.key(config.seed))
    if not config.init_from.path:
        return state
    params = _read(config.init_from.path, program, recipe)
    return program.replace_params(state, take(params, program.state.params, state.params, config.init_from))


def _continue(program: Program, data: Prefetch, checkpoints: Checkpointer, settings: dict[str, Any]) -> TrainState:
    restored = checkpoints.restore(program.state)
    data.set_state(restored.data)
    for change in changes(restored.config, settings):
        logger.warning("the checkpoint was made with another config: %s", change)
    return restored.state


def changes(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> list[str]:
    """The keys in which two configs (as JSON) differ, as "key: old -> new"."""
    found = []
    for key in sorted(old.keys() | new.keys()):
        a, b = old.get(key), new.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            found += changes(a, b, f"{prefix}{key}.")
        elif a != b:
            found.append(f"{prefix}{key}: {a!r} -> {b!r}")
    return found


def _checkpoints_of(workdir: str) -> Path:
    directory = Path(workdir) / CHECKPOINTS
    if not directory.is_dir():
        raise ValueError(f"{workdir!r} is no working directory of a run: it has no folder {CHECKPOINTS!r}")
    return directory


def _read(path: str, program: Program, recipe: Recipe) -> Tree:
    """Parameters from another run or from published weights, fitted to the recipe's model."""
    if (Path(path) / CHECKPOINTS).is_dir():
        with Checkpointer(_checkpoints_of(path), keep=None) as others:
            params = others.restore_params(program.state.params)
        return recipe.adapt(params) if recipe.adapt else params
    if recipe.load is None:
        raise ValueError(f"init_from: {path!r} holds no run, and this recipe reads no published weights")
    return recipe.load(path)


def take(given: Tree, wanted: Tree, initial: Tree, init_from: InitFrom) -> Tree:
    """`given` where not skipped, `initial` elsewhere; ValueError naming each missing, unexpected or misshapen one."""
    given, shapes, result = flatten(given), flatten(wanted), flatten(initial)

    def skipped(path: str) -> bool:
        return any(re.fullmatch(pattern, path) for pattern in init_from.skip)

    problems = [f"unexpected {path!r}" for path in given if path not in shapes and not skipped(path)]
    for path, like in shapes.items():
        if skipped(path):
            continue
        if path not in given:
            problems.append(f"missing {path!r}{nearest(path, given)}")
        elif given[path].shape != like.shape:
            problems.append(f"{path!r} has shape {given[path].shape}, expected {like.shape}")
        else:
            result[path] = given[path].astype(like.dtype)
    if problems:
        raise ValueError(f"init_from {init_from.path!r} (skip takes regexes of paths): " + "; ".join(problems))
    return unflatten(result)
