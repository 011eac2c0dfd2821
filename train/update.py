"""One training step as one function to jit: players in order, micro-batches, averages, the non-finite check."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array

from .optimizer import Optimizer
from .recipe import Batch, Player, Recipe, Terms
from .rules import Tree, flatten, merge, select
from .settings import UpdateConfig
from .state import TrainState

Update = Callable[[TrainState, Batch], tuple[TrainState, dict[str, Array]]]


def make_update(recipe: Recipe, optimizers: Sequence[Optimizer], config: UpdateConfig) -> Update:
    """`update(state, batch) -> (state, metrics)`, pure, without host synchronisation; metrics are float32 scalars."""

    def update(state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, Array]]:
        new, metrics, finite = state, {}, jnp.array(True)
        rng = jax.random.fold_in(jax.random.wrap_key_data(state.rng), state.step)
        prepare_rng, *player_rngs = jax.random.split(rng, 1 + len(optimizers))
        if recipe.prepare is not None:
            batch = recipe.prepare(state, batch, prepare_rng)
        for player, optimizer, rng in zip(recipe.players, optimizers, player_rngs, strict=True):
            new, own = play(player, optimizer, state, new, batch, rng, config.accumulation)
            finite &= jnp.isfinite(own["loss"]) & jnp.isfinite(own["grad_norm"])
            metrics |= {f"{player.name}/{name}" if player.name else name: value for name, value in own.items()}
        if config.ema is not None:
            new = new.replace(ema=average(new.ema, new.params, config.ema(state.step, config.total_steps)))
        if recipe.after_update is not None:
            new = recipe.after_update(new)
        if config.skip_non_finite:
            new = jax.tree.map(lambda new, old: jnp.where(finite, new, old), new, state)
            metrics["skipped"] = 1.0 - finite
        return new.replace(step=state.step + 1), {name: jnp.float32(value) for name, value in metrics.items()}

    return update


def play(
    player: Player,
    optimizer: Optimizer,
    before: TrainState,
    state: TrainState,
    batch: Batch,
    rng: Array,
    accumulation: int,
) -> tuple[TrainState, Terms]:
    """One player's move from `state`, `before` being the state before any player of this step moved."""
    trainable = select(state.params, optimizer.trainable)

    def loss(trainable: Tree, variables: Tree, batch: Batch, rng: Array) -> tuple[Array, tuple[Terms, Tree]]:
        return player.loss(merge(state.params, trainable), before.replace(variables=variables), batch, rng)

    grads, terms, variables = accumulate_gradients(loss, trainable, state.variables, batch, rng, accumulation)
    moved, opt_state, metrics = optimizer.update(grads, state.opt_state[player.name], trainable, state.step)
    state = state.replace(
        params=merge(state.params, moved),
        opt_state=state.opt_state | {player.name: opt_state},
        variables=variables,
    )
    return state, terms | metrics


def accumulate_gradients(
    loss: Callable[[Tree, Tree, Batch, Array], tuple[Array, tuple[Terms, Tree]]],
    params: Tree,
    variables: Tree,
    batch: Batch,
    rng: Array,
    accumulation: int,
) -> tuple[Tree, Terms, Tree]:
    """Mean gradient, terms (with "loss", the total) and variables over micro-batches.

    Every micro-batch starts from the same `variables`. Those that it gives out, m v + (1 - m) s with a mean s over its
    examples, say, so become by their mean what the whole batch gives: they move once per step.
    """

    def gradient(batch: Batch, rng: Array) -> tuple[tuple[Tree, Tree], Terms]:
        (total, (terms, new)), grads = jax.value_and_grad(loss, has_aux=True)(params, variables, batch, rng)
        return (grads, new), {"loss": total} | terms

    if accumulation == 1:
        (grads, new), terms = gradient(batch, rng)
        return grads, terms, new

    def body(sums: tuple[Tree, Tree], inputs: tuple[Batch, Array]) -> tuple[tuple[Tree, Tree], Terms]:
        found, terms = gradient(*inputs)
        return jax.tree.map(jnp.add, sums, found), terms

    def mean(total: Array) -> Array:
        return (total / accumulation).astype(total.dtype)

    # Micro-batch i takes every `accumulation`-th row, starting at i: each device keeps the rows it has.
    micro = {k: rearrange(jnp.asarray(v), "(b a) ... -> a b ...", a=accumulation) for k, v in batch.items()}
    inputs = (micro, jax.random.split(rng, accumulation))
    first = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), inputs)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(gradient, *first)[0])
    sums, terms = jax.lax.scan(body, zeros, inputs)
    grads, new = jax.tree.map(mean, sums)
    return grads, {name: t.mean() for name, t in terms.items()}, new


def average(ema: Tree, params: Tree, decay: Array | float) -> Tree:
    """decay e + (1 - decay) p for every leaf of `ema`, with the leaf of `params` at the same path."""
    leaves = select(params, flatten(ema))
    return jax.tree.map(lambda e, p: (decay * e + (1 - decay) * p).astype(e.dtype), ema, leaves)
