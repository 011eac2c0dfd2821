"""The short form of `python -m omnax.benchmarks.kill_loop`: one recipe, one kill; settings of all."""

import pytest
from omnax.benchmarks import kill_loop
from omnax.train.main import make_recipe

TINY = {"model.depth": 1, "model.width": 32, "model.mlp_dim": 64, "batch_size": 32}


def test_a_killed_run_ends_as_an_unkilled_one():
    assert kill_loop.run("vit", kills=1, seed=0, overrides=TINY) == []


@pytest.mark.parametrize("recipe", kill_loop.CONFIGS)
def test_settings_fit_every_recipe(recipe):
    overrides = {key: str(value) for key, value in kill_loop.SETTINGS.items()}
    config, _ = make_recipe(kill_loop.CONFIGS[recipe], overrides)
    assert (config.total_steps, config.recipe) == (kill_loop.STEPS, recipe)
