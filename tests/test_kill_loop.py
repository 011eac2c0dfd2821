"""The short form of `python -m omnax.benchmarks.kill_loop`: one recipe killed in a save; settings of all."""

import signal

import pytest
from omnax.benchmarks import kill_loop
from omnax.train import main


def here(arguments):
    assert main.main(arguments) == 0


def test_a_killed_run_ends_as_an_unkilled_one(tmp_path, monkeypatch):
    """In CI two of the three processes are this one, which has its imports behind it."""
    config, tiny = kill_loop.RUNS["vit"]
    monkeypatch.setitem(kill_loop.RUNS, "vit", (config, tiny | {"data.workers": 0}))
    here(kill_loop.arguments_of("vit", tmp_path / "straight"))
    kill_loop.aimed_life("vit", tmp_path / "killed", [("save", signal.SIGKILL)], 0, here)
    assert kill_loop.differences(tmp_path / "killed", tmp_path / "straight") == []


@pytest.mark.parametrize("recipe", kill_loop.RUNS)
def test_settings_fit_every_recipe(recipe):
    arguments = kill_loop.arguments_of(recipe, "unused")
    config, _ = main.make_recipe(arguments[1], main.parse_overrides(arguments[4:]))
    assert (config.total_steps, config.recipe) == (kill_loop.STEPS, recipe)
