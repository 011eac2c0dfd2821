"""A run whose working directory and data lie in a bucket: killed, continued, exported, set aside; its lock."""

import json
import os
import shutil
import time
from pathlib import Path, PurePosixPath
from typing import cast

import jax
import numpy as np
import pytest
from omnax import hub
from omnax.data.drawn.digits import write_folders
from omnax.storage.paths import as_path, file_names
from omnax.storage.writing import staged
from omnax.train import export, lock
from omnax.train.checkpoint import COMMITTED, Checkpointer, find_sound
from omnax.train.main import move_aside

from .test_processes import ARGUMENTS, DEADLINE, STEPS, final_params, finish, launch, read_losses


@pytest.fixture(scope="module")
def digits(bucket, tmp_path_factory):
    """{where: folder of images}: the same on a disk and in the bucket."""
    folder = tmp_path_factory.mktemp("digits") / "images"
    write_folders(folder)
    for i, file in enumerate(sorted(folder.rglob("*.png"))):
        if i % 20:
            file.unlink()
    with staged(as_path("gs://bucket/digits")) as stage:
        shutil.copytree(folder, stage)
    return {"disk": folder, "bucket": "gs://bucket/digits"}


def settings(folder):
    return ["--config.data.name=folder", f"--config.data.path={folder}", "--config.data.workers=1"]


@pytest.fixture(scope="module")
def runs(digits, bucket, tmp_path_factory):
    """A run on a disk, and one in the bucket: killed right after a checkpoint is complete and while one is written.

    Images are read by a worker process.
    """
    folder = tmp_path_factory.mktemp("run")
    finish(launch(folder, *settings(digits["disk"])))
    place = as_path("gs://bucket/runs/killed")
    for step in (4, 12):
        process = launch(place, *settings(digits["bucket"]))
        wanted = f"runs/killed/checkpoints/{step}/{COMMITTED if step == 4 else '_CHECKPOINT_METADATA'}"
        end = time.monotonic() + DEADLINE
        while wanted not in bucket.names("bucket", "runs/killed"):
            assert process.poll() is None and time.monotonic() < end, process.communicate()[1][-3000:]
            time.sleep(0.002)
        process.kill()
        process.communicate()
    assert lock.LOCK in file_names(place)  # the dead run's, taken over at once
    finish(launch(place, *settings(digits["bucket"])))
    return folder, place


@pytest.mark.long
def test_killed_runs_in_a_bucket_end_as_one_on_a_disk(runs):
    folder, place = runs
    assert read_losses(place) == read_losses(folder)
    assert [step for step, _ in read_losses(place)] == list(range(1, STEPS + 1))
    jax.tree.map(np.testing.assert_array_equal, final_params(place), final_params(folder))
    assert lock.LOCK not in file_names(place)
    assert {"metrics.jsonl", "summary.json", "training.png"} <= set(file_names(place))
    assert any("tfevents" in name for name in file_names(place / "tensorboard"))


@pytest.mark.long
def test_a_run_is_exported_damaged_and_moved_aside(runs, digits, bucket, capsys):
    folder, place = runs
    exports = [f"{folder}/export", "gs://bucket/export"]
    for workdir, out in zip(runs, exports, strict=True):
        arguments = [*ARGUMENTS, *settings(digits["disk"]), "--workdir", str(workdir), "--out", out]
        assert export.main(arguments) == 0
    local, remote = map(hub.load, exports)
    jax.tree.map(np.testing.assert_array_equal, remote.params, local.params)

    newest = f"runs/killed/checkpoints/{STEPS}"
    name = next(name for name in bucket.names("bucket", f"{newest}/state/") if "/d/" in name)
    generation, data, written = bucket.objects["bucket", name]
    bucket.objects["bucket", name] = generation, data[:-1] + bytes([data[-1] ^ 1]), written
    assert find_sound(place / "checkpoints")[0] == 12
    with Checkpointer(place / "checkpoints", keep=5) as checkpoints:
        assert checkpoints.latest == 12
    assert not bucket.names("bucket", f"{newest}/") and bucket.names("bucket", f"{newest}.damaged/")

    move_aside(place)
    assert not bucket.names("bucket", "runs/killed/") and bucket.names("bucket", "runs/killed.1/checkpoints/12/")
    with pytest.raises(ValueError, match="local folders and gs:// buckets, got memory:"):
        Checkpointer(cast(Path, PurePosixPath("memory://bucket/run")), keep=None)


def test_the_lock_of_a_bucket_is_a_lease(bucket, monkeypatch):
    workdir = as_path("gs://bucket/leased")
    key = "bucket", f"leased/{lock.LOCK}"
    monkeypatch.setattr(lock, "_BEAT", 0.05)
    with lock.locked(workdir):
        with (
            pytest.raises(ValueError, match=rf"in use by another run: process {os.getpid()} on .* is free after 120 s"),
            lock.locked(workdir),
        ):
            pass
        first = bucket.objects[key][0]
        end = time.monotonic() + 30
        while bucket.objects[key][0] == first:  # renewed
            assert time.monotonic() < end
            time.sleep(0.01)
    assert key not in bucket.objects

    elsewhere = {"host": "other", "process": 1, "since": "today", "machine": "another", "token": "x"}
    bucket.objects[key] = 10**9, json.dumps(elsewhere).encode(), time.time() - 10
    with pytest.raises(ValueError, match="process 1 on other, since today"), lock.locked(workdir):
        pass
    bucket.objects[key] = 10**9, json.dumps(elsewhere).encode(), time.time() - 200
    with lock.locked(workdir):  # it has said nothing for longer than the lease
        assert json.loads(bucket.objects[key][1])["process"] == os.getpid()
