"""The update: micro-batches, players, averages, hooks, the non-finite check."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy_recipe as toy
from omnax.train.optimizer import OptimizerConfig
from omnax.train.recipe import Player
from omnax.train.rules import flatten
from omnax.train.schedules import Schedule
from omnax.train.settings import EmaConfig, MeshConfig

ONE_DEVICE = MeshConfig(data=8)
SGD = OptimizerConfig(name="sgd", b1=0.0, lr=0.1, schedule=Schedule(kind="constant"))


def assert_close(a, b, tolerance=1e-5):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=tolerance, atol=tolerance), a, b)


def test_micro_batches_equal_the_whole_batch():
    """Without dropout."""
    results = [toy.run(toy.recipe(dropout=0.0), toy.config(accumulation=a), 5) for a in (1, 4)]
    assert_close(results[0][1].params, results[1][1].params)
    assert_close(results[0][1].variables, results[1][1].variables)
    assert_close(results[0][2], results[1][2])
    with pytest.raises(
        ValueError, match="batch 'image' of 16 examples is not divisible by 5 micro-batches on 4 shards"
    ):
        toy.run(toy.recipe(), toy.config(accumulation=5), 1)


@pytest.mark.parametrize("accumulation", [1, 2, 4])
def test_variables_move_once_per_step(accumulation):
    """By hand: a running mean of 1 that meets the examples 0 .. 15 moves to 0.9 + 0.1 · 7.5, a counter from 0 to 1."""

    def loss(params, state, batch, rng):
        old = state.variables
        new = {"mean": 0.9 * old["mean"] + 0.1 * batch["image"][:, 0].mean(), "count": old["count"] + 1}
        return jnp.square(params["in"]["bias"]).sum(), ({}, new)

    rows = jnp.arange(16.0)[:, None] * jnp.ones(toy.WIDTH)
    recipe = toy.recipe(
        init=lambda rng: (toy.init(rng)[0], {"mean": jnp.float32(1), "count": jnp.int32(0)}),
        players=(Player(loss, toy.OPTIMIZER),),
        prepare=lambda state, batch, rng: dict(batch) | {"image": rows},
    )
    _, state, _ = toy.run(recipe, toy.config(accumulation=accumulation), 1)
    assert float(state.variables["mean"]) == pytest.approx(1.65, rel=1e-6)
    assert state.variables["count"] == 1 and state.variables["count"].dtype == jnp.int32


def test_players_run_in_order_on_their_own_parameters():
    """Each player's loss is the sum of squares of the other's parameters and its own: gradients 2 p in its group."""

    def loss(params, state, batch, rng):
        leaves = flatten(params).values()
        before = sum(jnp.abs(leaf).sum() for leaf in flatten(state.params).values())
        return sum(jnp.square(leaf).sum() for leaf in leaves), ({"before": before}, state.variables)

    players = (Player(loss, SGD, "first", "in/.*"), Player(loss, SGD, "second", "out/.*"))
    program, state, metrics = toy.run(toy.recipe(players=players), toy.config(), 1)
    start = program.init(jax.random.key(0))
    assert_close(state.params, jax.tree.map(lambda p: 0.8 * p, start.params))
    squares = {part: sum(float(jnp.square(x).sum()) for x in start.params[part].values()) for part in ("in", "out")}
    assert metrics[0]["first/loss"] == pytest.approx(squares["in"] + squares["out"], rel=1e-5)
    assert metrics[0]["second/loss"] == pytest.approx(0.64 * squares["in"] + squares["out"], rel=1e-5)
    assert metrics[0]["first/before"] == metrics[0]["second/before"]  # both see the parameters before the step
    assert set(state.opt_state) == {"first", "second"}


def test_frozen_parameters_stay_and_cost_nothing():
    optimizer = dataclasses.replace(SGD, trainable=(("out/.*", True), (".*", False)))
    recipe = toy.recipe(players=(Player(toy.make_loss(0.0), optimizer),))
    program, state, _ = toy.run(recipe, toy.config(ema=EmaConfig(decay=0.5)), 3)
    start = program.init(jax.random.key(0))
    np.testing.assert_array_equal(state.params["in"]["kernel"], start.params["in"]["kernel"])
    assert np.abs(state.params["out"]["kernel"] - start.params["out"]["kernel"]).max() > 0.01
    assert set(flatten(state.ema)) == {"out/kernel", "out/bias"}


def test_average_moves_once_per_step():
    program, state, _ = toy.run(toy.recipe(), toy.config(accumulation=2, ema=EmaConfig(decay=0.75)), 1)
    start = program.init(jax.random.key(0)).params
    assert_close(state.ema, jax.tree.map(lambda a, b: 0.75 * a + 0.25 * b, start, state.params))
    assert_close(state.averaged_params, state.ema)


def test_average_schedules():
    step = jnp.int32(5)
    assert float(EmaConfig(decay=0.9)(step, 10)) == pytest.approx(0.9)
    assert float(EmaConfig(decay=0.9, decay_end=1.0)(step, 10)) == pytest.approx(0.95)
    assert float(EmaConfig(decay=0.9, warmup=True)(step, 10)) == pytest.approx(6 / 15)


def test_hooks():
    """`prepare` sees the whole batch; `after_update` the state after all players."""
    seen = []

    def prepare(state, batch, rng):
        seen.append(batch["image"].shape)
        return dict(batch) | {"image": batch["image"] * 0}

    recipe = toy.recipe(
        prepare=prepare,
        after_update=lambda state: state.replace(params=jax.tree.map(lambda p: jnp.clip(p, -0.1, 0.1), state.params)),
    )
    _, state, metrics = toy.run(recipe, toy.config(accumulation=4), 2)
    assert seen == [(16, toy.WIDTH)]  # traced once
    assert all(np.abs(leaf).max() <= 0.1 for leaf in jax.tree.leaves(state.params))
    assert metrics[0]["loss"] == pytest.approx(math.log(toy.CLASSES), abs=1e-5)  # no input, zero biases: no preference


def test_non_finite_update_is_skipped_when_configured():
    """The poisoned third batch changes nothing but the step."""
    poisoned = toy.recipe(poisoned=2)
    _, before, _ = toy.run(poisoned, toy.config(skip_non_finite=True), 2)
    _, after, metrics = toy.run(poisoned, toy.config(skip_non_finite=True), 3)
    assert math.isnan(metrics[2]["loss"]) and metrics[2]["skipped"] == 1 and metrics[1]["skipped"] == 0
    jax.tree.map(np.testing.assert_array_equal, after.replace(step=0), before.replace(step=0))
    assert after.step == 3


def test_updates_compile_once_and_do_not_read_the_device():
    program, state, _ = toy.run(toy.recipe(), toy.config(), 3)
    assert program.update._cache_size() == 1
    batch = {
        name: jax.device_put(rows, program.batch[name].sharding) for name, rows in toy.Clusters(16).__next__().items()
    }
    with jax.set_mesh(program.mesh), jax.transfer_guard("disallow"):
        program.update(state, batch)
