"""What a system gives the train loop: initial values, losses with their optimisers, data, evaluators, layout rules."""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Array

from ..data.prefetch import StatefulBatches
from ..hub import Bundle
from .optimizer import OptimizerConfig
from .rules import Rules, Tree
from .state import TrainState

Batch = Mapping[str, Any]  # named arrays; dimension 0 is the example
Terms = dict[str, Array]  # named scalars
# loss(params, state, batch, rng) -> (total, (terms, variables)). `params` are the whole tree, of which the player's
# trainable part is differentiated. `state` gives step, ema, the current variables, and the parameters from before any
# player of this step moved.
Loss = Callable[[Tree, TrainState, Batch, Array], tuple[Array, tuple[Terms, Tree]]]


@dataclasses.dataclass(frozen=True)
class Player:
    """One (loss, parameter group, optimiser) row of the update; most systems have one, a GAN two."""

    loss: Loss
    optimizer: OptimizerConfig
    name: str = ""  # prefix of its metrics
    parameters: str = ".*"  # regex: the paths it may train and its optimiser's rules are about


@dataclasses.dataclass(frozen=True)
class Evaluator:
    """A named measurement of a state: numbers go to the metrics, arrays to the pictures."""

    name: str
    run: Callable[[TrainState], dict[str, float | np.ndarray]]

    def __call__(self, state: TrainState) -> dict[str, float | np.ndarray]:
        """What `run` finds; its errors, and numbers that are not finite, are errors with the evaluator's name."""
        try:
            results = self.run(state)
        except (ValueError, FloatingPointError) as error:
            kind = FloatingPointError if isinstance(error, FloatingPointError) else ValueError
            raise kind(f"evaluator {self.name!r}: {error}") from error
        bad = [name for name, value in results.items() if not np.isfinite(value).all()]
        if bad:
            raise FloatingPointError(f"evaluator {self.name!r}: {', '.join(bad)} not finite")
        return results


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """How one system trains; `train.main` supplies everything else."""

    init: Callable[[Array], tuple[Tree, Tree]]  # rng -> (params, variables), traceable
    players: tuple[Player, ...]  # run in this order in every step
    sharding: Rules[str]  # parameter path -> layout, see train/sharding.py
    batch: Mapping[str, jax.ShapeDtypeStruct]  # one global batch
    data: Callable[[tuple[int, int]], StatefulBatches]  # (index, count) of the share of every batch -> batches
    evaluators: tuple[Evaluator, ...] = ()
    inspect: Callable[[], Any] | None = None  # opens what the evaluators will read: at the start, not after an hour
    # Runs in the update on the whole batch, before the players split it into micro-batches: mixing of examples, token
    # counts over the batch, rollouts.
    prepare: Callable[[TrainState, Batch, Array], Batch] | None = None
    after_update: Callable[[TrainState], TrainState] | None = None  # moves teachers, clamps parameters
    # (state, {evaluator: its numbers}) -> state, on the host: switches that wait for an evaluation, saved with it.
    after_evaluation: Callable[[TrainState, dict[str, dict[str, float]]], TrainState] | None = None
    load: Callable[[str], Tree] | None = None  # published weights -> parameters
    adapt: Callable[[Tree], Tree] | None = None  # parameters of another run -> those of this model
    bundle: Callable[[Tree], Bundle] | None = None  # parameters -> what hub.save writes in the published format
    class_names: Callable[[], tuple[str, ...]] | None = None  # of the data, where a bundle holds them
    flops_per_step: float = 0.0  # of the model: forward and backward, without recomputation
    pictures: Callable[[Path, dict[str, Any]], list[Path]] | None = None  # (workdir, results) -> files written
