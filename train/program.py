"""The compiled side of a run: a recipe on a mesh as jitted `init` and `update` with their shardings."""

import dataclasses
import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array

from .optimizer import Optimizer, make_optimizer
from .recipe import Player, Recipe
from .rules import Tree, flatten, select
from .settings import UpdateConfig
from .sharding import batch_sharding, param_specs, tree_shardings
from .state import TrainState
from .update import make_update


@dataclasses.dataclass(frozen=True)
class Program:
    """Jitted `init(rng) -> state` and `update(state, batch) -> (state, metrics)`, for use inside `jax.set_mesh(mesh)`.

    `update` donates the state. `state` holds its shapes, dtypes and shardings, `batch` those of a global batch.
    """

    mesh: Mesh
    state: TrainState
    batch: dict[str, jax.ShapeDtypeStruct]
    init: Callable[[Array], TrainState]
    update: Any  # a jitted function: the compile-only tools lower it

    def replace_params(self, state: TrainState, params: Tree) -> TrainState:
        """The state with other parameters, laid out as its own; averages start from them."""
        shardings = jax.tree.map(lambda leaf: leaf.sharding, self.state.params)
        params = jax.device_put(params, shardings)
        return state.replace(params=params, ema=jax.tree.map(jnp.copy, select(params, flatten(state.ema))))


def make_program(recipe: Recipe, config: UpdateConfig, mesh: Mesh) -> Program:
    """Resolves all rules on shapes alone and jits; ValueError for rules or a batch size that do not fit."""
    key = jax.eval_shape(jax.random.key, 0)
    params, _ = jax.eval_shape(recipe.init, key)
    optimizers = [_make_optimizer(player, params, config.total_steps) for player in recipe.players]
    init = make_init(recipe, optimizers, averaged=config.ema is not None)
    state = jax.eval_shape(init, key)
    shardings = tree_shardings(state, params, param_specs(recipe.sharding, params, mesh), mesh)
    rows, everywhere = batch_sharding(mesh), NamedSharding(mesh, PartitionSpec())
    _check_batch(recipe, config.accumulation, rows)
    return Program(
        mesh=mesh,
        state=jax.tree.map(_with_sharding, state, shardings),
        batch={name: _with_sharding(array, rows) for name, array in recipe.batch.items()},
        init=jax.jit(init, out_shardings=shardings),
        update=jax.jit(
            make_update(recipe, optimizers, config),
            in_shardings=(shardings, rows),
            out_shardings=(shardings, everywhere),
            donate_argnums=0,
        ),
    )


def make_init(recipe: Recipe, optimizers: Sequence[Optimizer], averaged: bool) -> Callable[[Array], TrainState]:
    """`init(rng) -> state` at step 0."""

    def init(rng: Array) -> TrainState:
        init_rng, run_rng = jax.random.split(rng)
        params, variables = recipe.init(init_rng)
        trainable = {path for optimizer in optimizers for path in optimizer.trainable}
        return TrainState(
            step=jnp.int32(0),
            params=params,
            opt_state={p.name: o.init(params) for p, o in zip(recipe.players, optimizers, strict=True)},
            ema=select(params, trainable) if averaged else {},
            variables=variables,
            rng=jax.random.key_data(run_rng),
        )

    return init


def _make_optimizer(player: Player, params: Tree, total_steps: int) -> Optimizer:
    paths = [path for path in flatten(params) if re.fullmatch(player.parameters, path)]
    if not paths:
        raise ValueError(f"player {player.name!r}: no parameter matches {player.parameters!r}")
    return make_optimizer(player.optimizer, select(params, paths), total_steps)


def _check_batch(recipe: Recipe, accumulation: int, sharding: NamedSharding) -> None:
    """Every device must get equally many examples of every micro-batch."""
    shards = math.prod(sharding.mesh.shape[axis] for axis in sharding.spec[0])
    for name, array in recipe.batch.items():
        if array.shape[0] % (shards * accumulation):
            raise ValueError(
                f"batch {name!r} of {array.shape[0]} examples is not divisible by {accumulation} micro-batches on "
                f"{shards} shards of the mesh"
            )


def _with_sharding(array: jax.ShapeDtypeStruct, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=sharding)
