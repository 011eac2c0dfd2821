"""The loop and its command line, in one process: stopping, resuming, failing, beginning."""

import json
import logging
import os
import shutil
import signal
import socket
from pathlib import Path
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy_recipe as toy
from omnax.hub.processor import ImageProcessor
from omnax.train import inputs
from omnax.train.checkpoint import Checkpointer, find_sound
from omnax.train.main import as_json, main, make_recipe, report_errors, train
from omnax.train.metrics import read_metrics
from omnax.train.monitor import StopSignal, read_summary
from omnax.train.processes import check_equal
from omnax.train.recipe import Evaluator
from omnax.train.settings import EmaConfig, InitFrom, MeshConfig


class Interrupted(toy.Clusters):
    """Sends a signal to the process while it reads batch 5, if one is left to send."""

    signals: ClassVar[list[int]] = []

    def __next__(self):
        if self.step == 5 and Interrupted.signals:
            os.kill(os.getpid(), Interrupted.signals.pop())
        return super().__next__()


class Hopeless(toy.Clusters):
    """No batch gives a finite loss."""

    def __next__(self):
        batch = super().__next__()
        batch["image"][0, 0] = np.nan
        return batch


def losses(workdir: Path) -> list[tuple[int, float]]:
    return [(line["step"], line["train/loss"]) for line in read_metrics(workdir) if "train/loss" in line]


def final_params(workdir: Path, config=None) -> dict:
    program, _, _ = toy.run(toy.recipe(), config or toy.config(), 0)
    with Checkpointer(workdir / "checkpoints", keep=None) as checkpoints:
        return checkpoints.restore(program.state).state.params


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A run of twelve steps, never interrupted."""
    workdir = tmp_path_factory.mktemp("finished")
    count = Evaluator("count", lambda state: {"steps": float(state.step), "grid": np.zeros((2, 2))})
    train(toy.config(evaluate_every=6), toy.recipe(evaluators=(count,)), workdir)
    return workdir


def assert_same_run(workdir: Path, expected: Path) -> None:
    assert losses(workdir) == losses(expected)
    jax.tree.map(np.testing.assert_array_equal, final_params(workdir), final_params(expected))


def test_what_a_run_leaves(finished):
    lines = read_metrics(finished)
    assert [line["step"] for line in lines if "train/loss" in line] == list(range(1, 13))
    assert {line["step"]: line["count/steps"] for line in lines if "count/steps" in line} == {6: 6.0, 12: 12.0}
    assert {"train/grad_norm", "train/lr", "speed/step_seconds", "speed/mfu"} <= lines[4].keys()
    assert sorted(path.name for path in (finished / "checkpoints").iterdir()) == ["12", "4", "8"]
    summary = json.loads((finished / "summary.json").read_text())
    assert (summary["step"], summary["results"]) == (12, {"count": {"steps": 12.0}})
    assert losses(finished)[0][1] > losses(finished)[-1][1]


def test_a_finished_run_has_nothing_to_do(finished):
    settings = as_json(toy.config(evaluate_every=6))
    assert read_summary(finished, settings)["step"] == 12
    assert read_summary(finished, settings | {"total_steps": 13}) is None
    assert read_summary(finished.parent, settings) is None


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_the_same_call_goes_on(number, finished, tmp_path):
    """Stopped at step 5, which is no step to save at; then bit-identical to the uninterrupted run."""
    recipe = toy.recipe(data=lambda shard: Interrupted(16, shard))
    before = [signal.getsignal(x) for x in (signal.SIGTERM, signal.SIGINT)]
    Interrupted.signals = [number]
    train(toy.config(), recipe, tmp_path)
    stopped, _ = find_sound(tmp_path / "checkpoints")
    assert stopped and stopped < 9 and not (tmp_path / "summary.json").exists()
    assert [signal.getsignal(x) for x in (signal.SIGTERM, signal.SIGINT)] == before
    assert not (tmp_path / "run.lock").exists()
    train(toy.config(), recipe, tmp_path)
    assert_same_run(tmp_path, finished)


def test_ctrl_c_twice_ends_at_once(tmp_path, capsys):
    def twice():
        with StopSignal():
            for _ in range(2):
                os.kill(os.getpid(), signal.SIGINT)

    assert report_errors(twice, debug=False) == 130
    assert "interrupted" in capsys.readouterr().err


@pytest.mark.parametrize("fails_at", [4, 12])
def test_an_evaluation_that_fails_costs_no_checkpoint_and_is_repeated(fails_at, finished, tmp_path):
    """The checkpoint that is due comes first; the next run evaluates again, and no line stands twice."""
    failures = [fails_at]

    def fail(state):
        if failures and int(state.step) == failures[0]:
            failures.pop()
            raise ValueError("no test folder")
        return {"steps": float(state.step)}

    evaluators = (Evaluator("good", lambda state: {"steps": float(state.step)}), Evaluator("bad", fail))
    config, recipe = toy.config(evaluate_every=4), toy.recipe(evaluators=evaluators)
    with pytest.raises(ValueError, match="no test folder"):
        train(config, recipe, tmp_path)
    assert find_sound(tmp_path / "checkpoints") == (fails_at, {})
    train(config, recipe, tmp_path)
    for name in ("good", "bad"):
        assert [line["step"] for line in read_metrics(tmp_path) if f"{name}/steps" in line] == [4, 8, 12]
    assert_same_run(tmp_path, finished)


def test_a_switch_thrown_by_an_evaluation_is_thrown_again(tmp_path):
    """`after_evaluation` moves the state of steps behind the checkpoint: a resumed run does it too."""

    def halve(state, results):
        return state.replace(params=jax.tree.map(lambda x: x / 2, state.params))

    failures = [8]

    def count(state):
        if failures and int(state.step) == failures[0]:
            failures.pop()
            raise ValueError("interrupted")
        return {"steps": float(state.step)}

    recipe = toy.recipe(evaluators=(Evaluator("count", count),), after_evaluation=halve)
    config = toy.config(evaluate_every=4)
    with pytest.raises(ValueError, match="interrupted"):
        train(config, recipe, tmp_path / "parts")
    train(config, recipe, tmp_path / "parts")
    train(config, recipe, tmp_path / "whole")
    assert_same_run(tmp_path / "parts", tmp_path / "whole")


def test_what_evaluators_read_is_opened_before_the_first_step(tmp_path):
    def inspect():
        raise ValueError("data/test is not a folder")

    with pytest.raises(ValueError, match="data/test is not a folder"):
        train(toy.config(), toy.recipe(inspect=inspect, evaluators=(Evaluator("none", lambda state: {}),)), tmp_path)
    assert not read_metrics(tmp_path)


def test_a_run_locks_its_working_directory(tmp_path):
    """Named while it lives; taken over when it is dead, whatever its file says."""
    (tmp_path / "run.lock").write_text('{"host": "gone", "process": 1, "since": "long ago"}\n')
    other = {}

    def second(state):
        with pytest.raises(ValueError) as error:
            train(toy.config(), toy.recipe(), tmp_path)
        other["message"] = str(error.value)
        return {}

    train(toy.config(total_steps=1), toy.recipe(evaluators=(Evaluator("second", second),)), tmp_path)
    host = socket.gethostname()
    assert f"{tmp_path} is in use by another run: process {os.getpid()} on {host}, since 20" in other["message"]
    assert not (tmp_path / "run.lock").exists()


def test_a_run_that_only_skips_is_an_error(tmp_path):
    recipe = toy.recipe(data=lambda shard: Hopeless(16, shard))
    with pytest.raises(FloatingPointError, match="all 12 updates were skipped"):
        train(toy.config(skip_non_finite=True), recipe, tmp_path)
    assert not (tmp_path / "summary.json").exists()


@pytest.mark.parametrize("content", ["", "[]", '{"step": 12}', '{"step": 12, "results": 3, "config": {}, "files": []}'])
def test_a_damaged_summary_is_named(finished, tmp_path, content):
    (tmp_path / "summary.json").write_text(content)
    with pytest.raises(ValueError, match=r"summary\.json is damaged"):
        read_summary(tmp_path, as_json(toy.config()))


@pytest.mark.parametrize("line", [b"[1]", b"{", b'{"loss": 1}', b"\xff", b"\0\0"])
def test_a_damaged_line_of_metrics_is_named(tmp_path, line):
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1}\n' + line + b'\n{"step": 2}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 2 is damaged"):
        read_metrics(tmp_path)
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1}\n' + line)  # cut by a kill: not yet a line
    assert read_metrics(tmp_path) == [{"step": 1}]


def test_a_non_finite_loss_stops_with_step_and_name(tmp_path):
    """Batch 6 leads to step 7; nothing is saved after step 4."""
    with pytest.raises(FloatingPointError, match="at step 7 grad_norm is nan, loss is nan"):
        train(toy.config(), toy.recipe(poisoned=6), tmp_path)
    assert find_sound(tmp_path / "checkpoints") == (4, {})


def test_a_non_finite_loss_is_skipped_when_configured(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        train(toy.config(skip_non_finite=True), toy.recipe(poisoned=6), tmp_path)
    assert "update 7 skipped: grad_norm is nan, loss is nan" in caplog.text
    assert [line["train/skipped"] for line in read_metrics(tmp_path)] == [0.0] * 6 + [1.0] + [0.0] * 5


def test_resume_in_a_new_working_directory_on_another_mesh(finished, tmp_path, caplog):
    """From step 8 of the finished run, reached by leaving out its last checkpoint."""
    other = tmp_path / "other"
    (other / "checkpoints").mkdir(parents=True)
    os.symlink(finished / "checkpoints" / "8", other / "checkpoints" / "8")
    config = toy.config(resume=str(other), mesh=MeshConfig(data=8))
    with caplog.at_level(logging.WARNING):
        train(config, toy.recipe(), tmp_path / "new")
    assert "mesh.fsdp: 2 -> 1" in caplog.text
    found, expected = losses(tmp_path / "new"), losses(finished)[8:]
    assert [step for step, _ in found] == [step for step, _ in expected]
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_init_from_another_run(finished, tmp_path):
    config = toy.config(
        init_from=InitFrom(path=str(finished), skip=("out/bias",)), ema=EmaConfig(decay=0.5), total_steps=1
    )
    given = final_params(finished)
    recipe = toy.recipe(adapt=lambda params: params | {"out": {"kernel": params["out"]["kernel"] * 2}})
    start: dict = {}
    train(
        config,
        toy.recipe(adapt=recipe.adapt, evaluators=(Evaluator("spy", lambda s: start.update(p=s) or {}),)),
        tmp_path,
    )
    moved = start["p"].params
    np.testing.assert_allclose(moved["in"]["kernel"], given["in"]["kernel"], atol=0.02)  # one step of 0.01 away
    np.testing.assert_allclose(moved["out"]["kernel"], 2 * given["out"]["kernel"], atol=0.02)
    assert np.abs(moved["out"]["bias"]).max() < 0.011 < np.abs(given["out"]["bias"]).max()  # the initial zeros


@pytest.mark.parametrize(
    ("adapt", "message"),
    [
        (lambda p: {"in": p["in"]}, "missing 'out/kernel'"),
        (lambda p: p | {"more": {"kernel": p["in"]["kernel"]}}, "unexpected 'more/kernel'"),
        (
            lambda p: p | {"out": {"kernel": p["out"]["kernel"].T, "bias": p["out"]["bias"]}},
            r"shape \(4, 16\), expected \(16, 4\)",
        ),
    ],
)
def test_init_from_is_strict(finished, tmp_path, adapt, message):
    with pytest.raises(ValueError, match=message):
        train(toy.config(init_from=InitFrom(path=str(finished))), toy.recipe(adapt=adapt), tmp_path)


def test_another_model_in_the_same_workdir_is_named_by_its_settings(finished, tmp_path):
    """One line says which settings made the arrays, and which array: not Orbax's tree."""
    shutil.copytree(finished, tmp_path / "run")
    recipe = toy.recipe(init=lambda rng: (lambda p, v: (p | {"more": {"bias": jnp.zeros(3)}}, v))(*toy.init(rng)))
    config = toy.config(total_steps=20, ema=EmaConfig(decay=0.5))
    message = r"ema: None in the checkpoint, \{'decay': 0\.5, .*; ema/in/bias is absent in the checkpoint, \(16,\) now"
    with pytest.raises(ValueError, match=message) as error:
        train(config, recipe, tmp_path / "run")
    assert len(str(error.value)) < 1000
    assert "log_every" not in str(error.value)


def test_initial_weights_of_a_run_that_has_begun_are_refused(finished, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    config = toy.config(total_steps=20, init_from=InitFrom(path=str(finished)))
    with pytest.raises(
        ValueError, match=r"init_from\.path is .* but the run has begun \(step 12\) from 'initial values'"
    ):
        train(config, toy.recipe(), tmp_path / "run")
    both = toy.config(resume=str(finished), init_from=InitFrom(path=str(finished)))
    with pytest.raises(ValueError, match=r"continues a run, init_from\.path .* begins one"):
        train(both, toy.recipe(), tmp_path / "new")


def test_parameters_that_must_be_given(finished, tmp_path):
    """By name, whether nothing is given or they are skipped; a Wav2Lip generator's expert is such."""
    for given in ({}, {"path": str(finished), "skip": ("out/.*",)}):
        config = toy.config(init_from=InitFrom(required=("out/.*",), **given))
        with pytest.raises(ValueError, match=r"2 parameters would be untrained .* 'out/"):
            train(config, toy.recipe(), tmp_path)
    config, _ = make_recipe("configs/wav2lip.py:stage=gan,data=one", {})
    assert config.init_from.required == ("expert/.*",)
    assert make_recipe("configs/wav2lip.py:stage=expert", {})[0].init_from.required == ()


def test_other_pixels_of_initial_weights_are_said(caplog):
    """In one line with both means and deviations; [-1, 1] is a mean and a deviation of 1/2."""
    half = inputs.normalization(("decode", "value_range"), 3)
    assert half == ((0.5,) * 3, (0.5,) * 3)
    assert inputs.normalization((("value_range", {"low": 0.0, "high": 1.0}),), 1) == ((0.0,), (1.0,))
    inputs.warn_normalization("weights", ImageProcessor((8, 8)), *half)
    assert not caplog.text
    inputs.warn_normalization("weights", ImageProcessor((8, 8), mean=(0.4, 0.5, 0.5)), *half)
    assert "weights was trained on pixels of mean (0.4, 0.5, 0.5)" in caplog.text
    assert "gives mean (0.5, 0.5, 0.5) and std (0.5, 0.5, 0.5)" in caplog.text


def test_init_from_and_resume_name_missing_runs(tmp_path):
    with pytest.raises(ValueError, match="'nowhere' is no working directory of a run"):
        train(toy.config(resume="nowhere"), toy.recipe(), tmp_path)
    with pytest.raises(ValueError, match="'nowhere' holds no run, and this recipe reads no published weights"):
        train(toy.config(init_from=InitFrom(path="nowhere")), toy.recipe(), tmp_path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["configs/vit.py", "--config.optimizer.lrr=1"],
            "unknown config key 'optimizer.lrr', did you mean 'optimizer.lr'",
        ),
        (["configs/vitt.py"], "config file 'configs/vitt.py' exists neither in"),
        (["configs/vit.py:size=q16"], "unknown ViT variant 'q/16'"),
        (["configs/vit.py", "--config.mesh.fsdp=3"], "does not fit 8 devices"),
        (["configs/vit.py", "--config.optimizer.decay_multiplier=[('.*/kernl', 1.0), ('.*', 0.0)]"], "nearest: "),
        (["configs/vit.py", "--config.model.num_classes=9"], "data 'digits', split 'train' has 10 classes"),
    ],
)
def test_the_command_reports_bad_input_in_one_line(arguments, message, tmp_path, capsys):
    assert main(["--workdir", str(tmp_path), "--config", *arguments]) == 1
    error = capsys.readouterr().err  # preparing the data, where that comes first, shows its progress there too
    (line,) = (line for line in error.splitlines() if line.startswith("ValueError: "))
    assert message in line and "Traceback" not in error


def test_a_finished_run_with_other_settings_is_no_success(tmp_path, capsys):
    """Exit code 1 naming what differs; `--new` begins again beside what was there."""
    common = [
        "--config",
        "configs/vit.py",
        "--config.total_steps=1",
        "--config.evaluators=()",
        "--config.model.depth=1",
    ]
    run = [*common, "--workdir", str(tmp_path / "run")]
    assert main(run) == 0
    assert main(run) == 0
    assert "is finished" in capsys.readouterr().out
    assert main([*run, "--config.seed=3"]) == 1
    assert "finished run with other settings (seed: 0 -> 3)" in capsys.readouterr().err
    assert main([*run, "--config.seed=3", "--new"]) == 0
    assert {path.name for path in tmp_path.iterdir()} == {"run", "run.1"}
    assert find_sound(tmp_path / "run.1" / "checkpoints") == find_sound(tmp_path / "run" / "checkpoints") == (1, {})


def test_processes_without_a_coordinator_are_refused(tmp_path, capsys):
    assert main(["--config", "configs/vit.py", "--workdir", str(tmp_path / "run"), "--num-processes=2"]) == 1
    assert "--num-processes 2 needs --coordinator" in capsys.readouterr().err


def test_processes_with_other_configs_are_refused(monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 3)
    rows = [np.zeros(32, np.uint8)] * 2 + [np.ones(32, np.uint8)]
    monkeypatch.setattr("jax.experimental.multihost_utils.process_allgather", lambda row: np.stack(rows))
    with pytest.raises(ValueError, match=r"must have one config: that of processes \[2\] is not process 0's"):
        check_equal("config", {"seed": 1})
