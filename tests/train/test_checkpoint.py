"""Checkpoints: round trip, damage of every kind, other meshes, parameters alone."""

import logging
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
import toy_recipe as toy
from omnax.train.checkpoint import Checkpointer, find_damage, find_sound
from omnax.train.settings import EmaConfig, MeshConfig


@pytest.fixture(scope="module")
def trained():
    """A program, and its state after one step."""
    program, state, _ = toy.run(toy.recipe(), toy.config(ema=EmaConfig(decay=0.5)), 1)
    return program, state


@pytest.fixture(scope="module")
def saved(trained, tmp_path_factory) -> Path:
    """Checkpoints of steps 1, 2 and 3; the oldest of four is gone."""
    directory = tmp_path_factory.mktemp("run") / "checkpoints"
    with Checkpointer(directory, keep=3) as checkpoints:
        for step in range(4):
            checkpoints.save(step, trained[1].replace(step=np.int32(step)), {"step": step}, {"lr": 0.1})
    return directory


def test_round_trip(trained, saved):
    program, state = trained
    assert sorted(path.name for path in saved.iterdir()) == ["1", "2", "3"]
    with Checkpointer(saved, keep=3) as checkpoints:
        assert checkpoints.latest == 3
        restored = checkpoints.restore(program.state)
    assert (restored.data, restored.config) == ({"step": 3}, {"lr": 0.1})
    jax.tree.map(np.testing.assert_array_equal, restored.state, state.replace(step=np.int32(3)))
    same = jax.tree.map(lambda a, b: a.sharding.is_equivalent_to(b.sharding, a.ndim), restored.state, program.state)
    assert all(jax.tree.leaves(same))


def test_another_mesh_and_parameters_alone(saved):
    program, _, _ = toy.run(toy.recipe(), toy.config(mesh=MeshConfig(data=8), ema=EmaConfig(decay=0.5)), 0)
    with Checkpointer(saved, keep=None) as checkpoints:
        state = checkpoints.restore(program.state).state
        params = checkpoints.restore_params(program.state.params)
    assert state.params["in"]["kernel"].sharding.is_fully_replicated
    jax.tree.map(np.testing.assert_array_equal, params, state.averaged_params)
    assert np.abs(params["in"]["kernel"] - state.params["in"]["kernel"]).max() > 0


def _files(checkpoint: Path) -> list[Path]:
    return sorted(path for path in checkpoint.rglob("*") if path.is_file())


def _truncate(file: Path) -> None:
    with file.open("r+b") as f:
        f.truncate(file.stat().st_size // 2)


def _flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


DAMAGE = {
    "truncated": _truncate,
    "empty": lambda file: file.write_bytes(b""),
    "missing": Path.unlink,
    "one bit": _flip,
    "zeros": lambda file: file.write_bytes(bytes(file.stat().st_size)),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_of_any_file_is_found(saved, tmp_path, kind):
    assert find_damage(saved / "3") is None
    for file in _files(saved / "3"):
        copy = tmp_path / "copy"
        shutil.copytree(saved / "3", copy)
        DAMAGE[kind](copy / file.relative_to(saved / "3"))
        assert find_damage(copy), file
        shutil.rmtree(copy)


def test_damaged_newest_is_set_aside(trained, saved, tmp_path, caplog):
    directory = tmp_path / "checkpoints"
    shutil.copytree(saved, directory)
    for step in ("2", "3"):
        _truncate(max(_files(directory / step), key=lambda file: file.stat().st_size))
    with Checkpointer(directory, keep=None) as checkpoints:
        assert checkpoints.latest == 1  # reading changes nothing
    assert (directory / "3").exists()
    with caplog.at_level(logging.WARNING), Checkpointer(directory, keep=3) as checkpoints:
        assert int(checkpoints.restore(trained[0].state).state.step) == 1
        checkpoints.save(2, trained[1], {}, {})
    assert "3 is damaged" in caplog.text and "taking the one before it" in caplog.text
    assert sorted(path.name for path in directory.iterdir()) == ["1", "2", "2.damaged", "3.damaged"]
    assert find_sound(directory) == (2, {})


def test_nothing_sound_is_an_error(saved, tmp_path):
    directory = tmp_path / "checkpoints"
    shutil.copytree(saved / "3", directory / "3")
    (directory / "3" / "inventory.json").unlink()
    with pytest.raises(ValueError, match=r"every checkpoint in .* is damaged"):
        Checkpointer(directory, keep=3)
    assert (directory / "3").exists()


def test_a_half_written_checkpoint_is_no_checkpoint(trained, saved, tmp_path):
    """What a kill during a save leaves: a temporary directory, removed by the next run."""
    directory = tmp_path / "checkpoints"
    shutil.copytree(saved, directory)
    half = directory / "4.orbax-checkpoint-tmp"
    shutil.copytree(saved / "3", half)
    with Checkpointer(directory, keep=3) as checkpoints:
        assert checkpoints.latest == 3
        checkpoints.save(5, trained[1], {}, {})
    assert not half.exists()


def test_another_file_and_another_step_are_found(saved, tmp_path):
    copy = tmp_path / "3"
    shutil.copytree(saved / "3", copy)
    assert find_damage(copy) is None
    copy.rename(tmp_path / "7")
    assert find_damage(tmp_path / "7") == "it holds step 3"
    (tmp_path / "7").rename(copy)
    (copy / "state" / "more").touch()
    assert find_damage(copy) == "state/more was added"


def test_one_set_aside_before_keeps_its_name(trained, saved, tmp_path):
    directory = tmp_path / "checkpoints"
    shutil.copytree(saved, directory)
    (directory / "3.damaged").mkdir()
    _flip(max(_files(directory / "3"), key=lambda file: file.stat().st_size))
    with Checkpointer(directory, keep=3) as checkpoints:
        assert checkpoints.latest == 2
    assert sorted(path.name for path in directory.iterdir()) == ["1", "2", "3.damaged", "3.damaged.2"]


def test_no_value_that_is_not_finite_is_saved(trained, tmp_path):
    state = trained[1]
    bad = state.replace(params=state.params | {"out": {**state.params["out"], "bias": np.float32([0, np.inf, 0, 0])}})
    with Checkpointer(tmp_path, keep=3) as checkpoints:
        with pytest.raises(FloatingPointError, match=r"at step 1 1 arrays of .* not finite.*params/out/bias"):
            checkpoints.save(1, bad, {}, {})
        assert checkpoints.latest is None
    assert find_sound(tmp_path) == (None, {})
