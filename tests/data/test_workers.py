"""Worker processes: what they import and weigh, and how they end, with their parent and before it."""

import importlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from omnax.data import examples, pipeline, preprocess, sources, workers
from omnax.data.images.decode import CorruptExample, encode_png
from omnax.data.pipeline import Reading, Stream
from omnax.train.config import typed
from PIL import Image

HEAVY = ("jax", "flax", "orbax", "optax", "grain", "omnax.hub", "omnax.models.layers", "omnax.train")
IMAGENET = ("decode", ("inception_crop", {"size": 224}), "flip", "value_range", ("keep", {"keys": ("image", "label")}))
LIMIT = 250  # MB resident


def spied(stream):
    """The stream with a transform behind its own that tells of the process it runs in."""
    heavy, transform = HEAVY, stream.preprocess

    def spy(example, rng):
        import os
        import sys
        from pathlib import Path

        transform(example, rng)
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        loaded = [name for name in heavy if name in sys.modules]
        return {"loaded": loaded, "pid": os.getpid(), "megabytes": pages * os.sysconf("SC_PAGE_SIZE") / 1e6}

    return Stream(stream.source, spy)


def jpegs(folder, count=12):
    rng = np.random.default_rng(0)
    for i in range(count):
        file = folder / "train" / "ab"[i % 2] / f"{i}.jpg"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (375, 500, 3), dtype=np.uint8)).save(file)
    return Stream(sources.source({"name": "folder", "path": folder}, "train"), preprocess.build(IMAGENET))


def test_a_worker_of_an_image_folder_is_light(tmp_path):
    pool = workers.Workers([spied(jpegs(tmp_path))], 1)
    told = [pool.read(0, i, (0, i)) for i in range(12)]
    pool.close()
    print(f"resident memory of a data worker: {told[-1]['megabytes']:.0f} MB")
    assert {tuple(t["loaded"]) for t in told} == {()} and {t["pid"] for t in told} == set(pool.pids)
    assert max(t["megabytes"] for t in told) < LIMIT


@pytest.mark.parametrize("name", ["vit", "clip", "dinov2", "wav2lip"])
def test_no_recipe_sends_jax_to_its_workers(name):
    """Sources, tokenisers and transforms are pickled by what they are, never by the recipe that made them."""
    recipe = importlib.import_module(f"omnax.train.recipes.{name}.recipe")
    config = typed(recipe.Config, importlib.import_module(f"omnax.configs.{name}").get_config(), {})
    (stream,) = recipe.make_recipe(config).data((0, 1))._streams
    pool = workers.Workers([spied(stream)], 1)
    told = pool.read(0, 0, (0, 0))
    pool.close()
    print(f"{name}: {told['megabytes']:.0f} MB")
    assert told["loaded"] == [] and told["megabytes"] < LIMIT


class Slow:
    """Ten numbers, of which 3 cannot be read and 5 is a mistake."""

    class_names = ()

    def __len__(self):
        return 10

    def __getitem__(self, index):
        if index == 3:
            raise CorruptExample("number 3", "broken")
        if index == 5:
            raise ArithmeticError("a mistake")
        return {"x": np.float32(index)}


def slow():
    return Stream(Slow(), lambda example, rng: example)


def test_errors_of_a_worker_are_those_of_the_reader():
    pool = workers.Workers([slow()], 1)
    assert pool.read(0, 7, (0, 0))["x"] == 7
    with pytest.raises(CorruptExample, match="number 3: broken"):
        pool.read(0, 3, (0, 0))
    with pytest.raises(ArithmeticError, match="a mistake") as caught:
        pool.read(0, 5, (0, 0))
    assert "in a data worker" in caught.value.__notes__[0]
    assert pool.read(0, 8, (0, 0))["x"] == 8
    pool.close()


class Unknown:
    """Pickled here, and nowhere to be found there."""

    def __reduce__(self):
        return importlib.import_module, ("no_such_module_anywhere",)


def test_a_source_that_a_worker_cannot_load_is_an_error():
    pool = workers.Workers([Stream(Unknown(), lambda example, rng: example)], 1)
    with pytest.raises(ModuleNotFoundError, match="no_such_module_anywhere"):
        pool.read(0, 0, (0, 0))
    pool.close()


@pytest.mark.parametrize(
    ("number", "message"), [(signal.SIGKILL, "was killed by SIGKILL"), (signal.SIGSTOP, "was stopped")]
)
def test_a_lost_worker_is_an_error_and_no_hang(monkeypatch, number, message):
    monkeypatch.setattr(workers, "_STOPPED", 0.5)
    batches = pipeline.train([Stream(Numbers(), lambda example, rng: example)], batch_size=4, seed=0, reading=TWO)
    next(batches)
    begun = time.monotonic()
    os.kill(batches._workers.pids[0], number)
    with pytest.raises(workers.WorkerLost, match=message):
        for _ in range(1000):
            next(batches)
    assert time.monotonic() - begun < 30
    batches.close()


class Numbers:
    class_names = ()

    def __len__(self):
        return 100

    def __getitem__(self, index):
        return {"x": np.float32(index)}


TWO = Reading(workers=2)

# Reads with two workers, prints their ids and waits for its end.
PARENT = """
import sys, time
sys.path.insert(0, sys.argv[2])
from test_workers import Numbers, Stream, TWO, pipeline
batches = pipeline.train([Stream(Numbers(), lambda example, rng: example)], batch_size=4, seed=0, reading=TWO)
next(batches)
print(*batches._workers.pids, flush=True)
if sys.argv[1] == "wait":
    time.sleep(60)
"""


def gone(pid, seconds=10):
    """Whether the process ends (or is a zombie of a parent that does not look) within so many seconds."""
    for _ in range(seconds * 20):
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            return True
        if state in "ZX":
            return True
        time.sleep(0.05)
    return False


@pytest.mark.parametrize("end", ["killed", "killed while one is stopped", "at its own end"])
def test_workers_end_with_their_parent(end):
    how = "end" if end == "at its own end" else "wait"
    command = [sys.executable, "-c", PARENT, how, str(Path(__file__).parent)]
    parent = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    pids = [int(pid) for pid in parent.stdout.readline().split()]
    assert len(pids) == 2
    if "stopped" in end:
        os.kill(pids[0], signal.SIGSTOP)
    if how == "wait":
        parent.kill()
    assert parent.wait(60) == (-signal.SIGKILL if how == "wait" else 0)
    parent.stdout.close()
    assert [pid for pid in pids if not gone(pid)] == []


def test_workers_follow_the_cores(tmp_path, monkeypatch):
    cores = examples.usable_cores()
    assert 1 <= cores <= len(os.sched_getaffinity(0))
    stream = jpegs(tmp_path, 4)
    batches = pipeline.train([stream], batch_size=2, seed=0, reading=Reading(workers=-1))
    expected = next(pipeline.train([stream], batch_size=2, seed=0))
    np.testing.assert_array_equal(next(batches)["image"], expected["image"])
    assert len(batches._workers.pids) == cores
    batches.close()
    with pytest.raises(ValueError, match="workers is -2, threads 8: expected -1"):
        Reading(workers=-2)


def test_a_quota_bounds_the_cores(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(64)))
    for text, cores in (("max 100000\n", 64), ("250000 100000\n", 3), ("50000 100000\n", 1)):
        monkeypatch.setattr(Path, "is_file", lambda path: True)
        monkeypatch.setattr(Path, "read_text", lambda path, text=text: text)
        assert examples.usable_cores() == cores


def test_published_configs_follow_the_cores():
    for name, argument in (("vit", "size=b16,data=i1k"), ("dinov2", None), ("clip", None)):
        module = importlib.import_module(f"omnax.configs.{name}")
        text = Path(module.__file__).read_text()
        assert '"workers": -1' in text and '"workers": 16' not in text
        assert argument is None or module.get_config(argument).data.workers == -1


def test_png_bytes_are_read_by_workers_too(tmp_path):
    """A damaged file is skipped and named, also out of a worker."""
    for i in range(3):
        file = tmp_path / "train" / "a" / f"{i}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(encode_png(np.full((6, 6, 3), i, np.uint8))[: 40 if i == 1 else None])
    steps = preprocess.build(["decode", ("keep", {"keys": ("image", "label")})])
    stream = Stream(sources.source({"name": "folder", "path": tmp_path}, "train"), steps)
    batches = pipeline.evaluate(stream, batch_size=3, reading=Reading(workers=1))
    assert next(batches)["mask"].tolist() == [True, False, True]
    assert [Path(name).name for name in batches.skipped] == ["1.png"]
    batches.close()
