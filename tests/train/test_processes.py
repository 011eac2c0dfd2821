"""The command as users and machines run it: killed, stopped, on several processes; always the ViT recipe on digits.

Every run trains the same tiny model for 16 steps, so all share one compiled program in the persistent cache.
"""

import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from omnax.train.checkpoint import Checkpointer, find_sound
from omnax.train.main import main, make_recipe
from omnax.train.metrics import read_metrics
from omnax.train.program import make_program
from omnax.train.sharding import make_mesh

STEPS = 16
DEADLINE = 600  # seconds, for a machine that does much else; a run takes a few
OVERRIDES = {
    "total_steps": str(STEPS),
    "log_every": "1",
    "save_every": "4",
    "keep_checkpoints": "5",
    "evaluators": "()",
    "model.depth": "1",
    "model.width": "32",
    "model.mlp_dim": "64",
    "mixup": "0.2",
    "batch_size": "32",
    "optimizer.schedule.warmup": "2",
    # Key biases have no gradient but for rounding (softmax does not see them), which a small eps blows up to steps of
    # the learning rate.
    "optimizer.eps": "1e-4",
}
ARGUMENTS = ["--config", "configs/vit.py", *(f"--config.{key}={value}" for key, value in OVERRIDES.items())]


def launch(workdir: Path, *arguments: str, devices: int = 1) -> subprocess.Popen:
    flags = re.sub(r"--xla_force_host_platform_device_count=\d+", "", os.environ["XLA_FLAGS"])
    environment = os.environ | {"XLA_FLAGS": f"{flags} --xla_force_host_platform_device_count={devices}"}
    command = [sys.executable, "-m", "omnax.train", *ARGUMENTS, "--workdir", str(workdir), *arguments]
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)


def launch_pair(workdir: Path) -> list[subprocess.Popen]:
    """Two processes of four devices each."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    return [
        launch(workdir, f"--coordinator={address}", "--num-processes=2", f"--process-id={i}", devices=4)
        for i in range(2)
    ]


def finish(process: subprocess.Popen) -> None:
    """Waits; an exit code other than 0 shows the end of stderr."""
    _, error = process.communicate(timeout=DEADLINE)
    assert process.returncode == 0, error[-3000:]


def wait_for_step(workdir: Path, step: int, process: subprocess.Popen) -> None:
    end = time.monotonic() + DEADLINE
    while not (losses := read_losses(workdir)) or losses[-1][0] < step:
        assert process.poll() is None and time.monotonic() < end, process.communicate()[1][-3000:]
        time.sleep(0.01)


def read_losses(workdir: Path) -> list[tuple[int, float]]:
    return [(line["step"], line["train/loss"]) for line in read_metrics(workdir) if "train/loss" in line]


def final_params(workdir: Path) -> dict:
    config, recipe = make_recipe("configs/vit.py", OVERRIDES)
    mesh = make_mesh(config.mesh)
    assert find_sound(workdir / "checkpoints") == (STEPS, {})
    with jax.set_mesh(mesh), Checkpointer(workdir / "checkpoints", keep=None) as checkpoints:
        return checkpoints.restore(make_program(recipe, config, mesh).state).state.params


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory) -> Path:
    """One process, one device."""
    workdir = tmp_path_factory.mktemp("uninterrupted")
    finish(launch(workdir))
    return workdir


@pytest.fixture(scope="module")
def eight_devices(tmp_path_factory) -> Path:
    """One process, eight devices: this process."""
    workdir = tmp_path_factory.mktemp("eight_devices")
    assert main([*ARGUMENTS, "--workdir", str(workdir)]) == 0
    return workdir


def test_killed_three_times(uninterrupted, tmp_path):
    """SIGKILL at random steps, wherever saving stands; the same command each time."""
    for step in sorted(random.Random(0).sample(range(2, STEPS), 3)):
        process = launch(tmp_path)
        wait_for_step(tmp_path, step, process)
        process.kill()
        process.communicate()
    finish(launch(tmp_path))
    assert read_losses(tmp_path) == read_losses(uninterrupted)
    assert [step for step, _ in read_losses(tmp_path)] == list(range(1, STEPS + 1))
    jax.tree.map(np.testing.assert_array_equal, final_params(tmp_path), final_params(uninterrupted))


def test_terminated_saves_and_exits_with_0(uninterrupted, tmp_path):
    process = launch(tmp_path)
    wait_for_step(tmp_path, 2, process)
    process.send_signal(signal.SIGTERM)
    start = time.monotonic()
    finish(process)
    assert time.monotonic() - start < 30
    stopped, _ = find_sound(tmp_path / "checkpoints")
    assert stopped is not None and stopped >= 2
    finish(launch(tmp_path))
    assert read_losses(tmp_path) == read_losses(uninterrupted)
    process = launch(tmp_path)  # once more: nothing to do
    _, error = process.communicate(timeout=DEADLINE)
    assert process.returncode == 0 and not error


def test_two_processes_equal_one_and_resume_from_each_other(eight_devices, uninterrupted, tmp_path):
    """SIGTERM to one of two processes stops both; one process of eight devices goes on from there, and vice versa."""
    pair, single = tmp_path / "pair", tmp_path / "single"
    processes = launch_pair(pair)
    wait_for_step(pair, 5, processes[0])
    processes[1].send_signal(signal.SIGTERM)
    for process in processes:
        finish(process)
    stopped, _ = find_sound(pair / "checkpoints")
    assert stopped is not None and 5 <= stopped < STEPS
    shutil.copytree(pair, single)
    assert main([*ARGUMENTS, "--workdir", str(single)]) == 0  # two processes -> one

    shutil.rmtree(pair)
    (pair / "checkpoints").mkdir(parents=True)
    shutil.copytree(eight_devices / "checkpoints" / "8", pair / "checkpoints" / "8")
    for process in launch_pair(pair):  # one process -> two
        finish(process)

    expected = np.array(read_losses(eight_devices))
    np.testing.assert_allclose(read_losses(single), expected, atol=1e-5)
    np.testing.assert_allclose(read_losses(pair), expected[8:], atol=1e-5)
    np.testing.assert_allclose(read_losses(uninterrupted), expected, atol=1e-5)
    for workdir in (single, pair, uninterrupted):
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), final_params(workdir), final_params(eight_devices)
        )
