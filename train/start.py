"""Where a run begins: its own checkpoint, another run's, given weights, or scratch; in this order."""

import logging
import re
import reprlib
from pathlib import Path
from typing import Any

import jax

from ..data.prefetch import Prefetch
from ..storage.paths import as_path
from .checkpoint import Checkpointer, array_shapes
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
    """The state to go on from; moves `data` to the position that belongs to it. `settings`: the config as JSON.

    ValueError where the settings say two things: another beginning of a run that has begun, or `resume` and
    `init_from`; where given values are missing (see `InitFrom`); where the checkpoint is of another model.
    """
    if config.resume and config.init_from.path:
        raise ValueError(
            f"resume {config.resume!r} continues a run, init_from.path {config.init_from.path!r} begins one: give one"
        )
    if checkpoints.latest is not None:
        return _continue(program, data, checkpoints, settings)
    if config.resume:
        with Checkpointer(_checkpoints_of(config.resume), keep=None) as others:
            return _continue(program, data, others, settings)
    state = program.init(jax.random.key(config.seed))
    check_required(program.state.params, config.init_from)
    if not config.init_from.path:
        return state
    params = _read(config.init_from.path, program, recipe)
    return program.replace_params(state, take(params, program.state.params, state.params, config.init_from))


def _continue(program: Program, data: Prefetch, checkpoints: Checkpointer, settings: dict[str, Any]) -> TrainState:
    old = checkpoints.read_config()
    check_begun(checkpoints.latest, old, settings)
    check_shapes(
        checkpoints.shapes(), program.state, changes(old, settings, between="{key}: {a} in the checkpoint, {b} now")
    )
    restored = checkpoints.restore(program.state)
    data.set_state(restored.data)
    for change in changes(restored.config, settings):
        logger.warning("the checkpoint was made with another config: %s", change)
    return restored.state


def check_begun(step: int | None, old: dict[str, Any], new: dict[str, Any]) -> None:
    """ValueError where a run that has begun is given other initial weights: they would not be read."""
    before, now = (config.get("init_from", {}).get("path", "") for config in (old, new))
    if now and now != before:
        raise ValueError(
            f"init_from.path is {now!r}, but the run has begun (step {step}) from {before or 'initial values'!r}: "
            "begin another in a new working directory"
        )


def check_shapes(saved: dict[str, tuple[int, ...]], state: TrainState, changed: list[str]) -> None:
    """ValueError where the arrays of a checkpoint are not those of `state`: which settings differ, and an array."""
    wanted = array_shapes(state)
    wrong = [path for path in sorted(saved.keys() | wanted.keys()) if saved.get(path) != wanted.get(path)]
    if not wrong:
        return
    # Whatever changes arrays is among these; the rest of a config is allowed to change.
    changed = [change for change in changed if change.split(":")[0].split(".")[0] not in ("data", "mesh", "init_from")]
    path = wrong[0]
    said = f"{path} is {saved.get(path, 'absent')} in the checkpoint, {wanted.get(path, 'absent')} now"
    raise ValueError(
        f"the checkpoint does not fit these settings: {'; '.join([*changed[:10], said])} ({len(wrong)} arrays differ)"
    )


def check_required(params: Tree, init_from: InitFrom) -> None:
    """ValueError for parameters that must be given and are not."""
    missing = [
        path
        for path in flatten(params)
        if any(re.fullmatch(pattern, path) for pattern in init_from.required)
        and (not init_from.path or any(re.fullmatch(pattern, path) for pattern in init_from.skip))
    ]
    if missing:
        raise ValueError(
            f"{len(missing)} parameters would be untrained that this run builds upon, {missing[0]!r} among them: "
            "init_from.path must give them (init_from.required=() allows random ones)"
        )


def changes(
    old: dict[str, Any], new: dict[str, Any], prefix: str = "", between: str = "{key}: {a} -> {b}"
) -> list[str]:
    """The keys in which two configs (as JSON) differ, as "key: old -> new" or as `between` has it."""
    found = []
    for key in sorted(old.keys() | new.keys()):
        a, b = old.get(key), new.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            found += changes(a, b, f"{prefix}{key}.", between)
        elif a != b:
            found.append(between.format(key=prefix + key, a=reprlib.repr(a), b=reprlib.repr(b)))
    return found


def _checkpoints_of(workdir: str) -> Path:
    directory = as_path(workdir) / CHECKPOINTS
    if not directory.is_dir():
        raise ValueError(f"{workdir!r} is no working directory of a run: it has no folder {CHECKPOINTS!r}")
    return directory


def _read(path: str, program: Program, recipe: Recipe) -> Tree:
    """Parameters from another run or from published weights, fitted to the recipe's model."""
    if (as_path(path) / CHECKPOINTS).is_dir():
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
