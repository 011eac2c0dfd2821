"""Every evaluator of every published config on two processes: the same numbers as on one."""

import functools
import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from omnax.train.evaluation import evaluators
from omnax.train.main import make_recipe
from omnax.train.program import make_program
from omnax.train.settings import MeshConfig
from omnax.train.sharding import make_mesh

pytestmark = pytest.mark.long  # three children each, minutes of compilation
DEADLINE = 900  # seconds, for a machine that does much else
CONFIGS = Path(__file__).parents[2] / "configs"
DRAWN = {"name": "drawn", "task": "position", "size": 6}
FACES = {"batch_size": "4", "data.test_clips": "2", "data.windows_per_clip": "3"}
RUNS = {
    "configs/vit.py": {
        "model.depth": "1",
        "model.width": "32",
        "evaluators": "('accuracy', 'knn', 'linear_probe')",
    },
    "configs/clip.py": {
        "model.image.trunk.depth": "1",
        "model.text.depth": "1",
        "data.merges": "60",
        "evaluators": "('zero_shot', 'retrieval')",
    },
    "configs/dinov2.py": {
        "model.depth": "1",
        "batch_size": "48",
        "evaluators": "('knn', 'linear_probe', 'linear_heads', 'pca')",
    },
    "configs/qwen_vl.py": {"model.text.depth": "1", "data.tests": repr((DRAWN,))},
    "configs/wav2lip.py:data=one": FACES,
    "configs/wav2lip.py:data=one,stage=gan": FACES | {"evaluators": "('sync', 'cross_audio', 'lse')"},
}
PAIRS = {
    "configs/blip2.py": {"model.qformer.depth": "1"},
    "configs/blip2.py:stage=2": {"model.qformer.depth": "1", "model.opt.depth": "1"},
}
GROUPS = {"five": RUNS, "blip2": PAIRS}
UNPROVEN = {"stable_diffusion"}  # its evaluators draw for minutes; nobody has run them on two processes


def evaluate(runs: str, address: str, index: int, count: int) -> dict[str, float]:
    """All numbers of all evaluators on the initial values of tiny models; arrays by their mean."""
    if count > 1:
        jax.distributed.initialize(address, count, index)
    evaluators.linear_heads = functools.partial(evaluators.linear_heads, steps=20, batch_size=64)
    found = {}
    for spec, overrides in GROUPS[runs].items():
        config, recipe = make_recipe(spec, overrides)
        mesh = make_mesh(MeshConfig())
        with jax.set_mesh(mesh):
            program = make_program(recipe, config, mesh)
            state = program.init(jax.random.key(0))
            for evaluator in recipe.evaluators:
                for key, value in evaluator(state).items():
                    found[f"{spec} {evaluator.name} {key}"] = float(np.mean(value, dtype=np.float64))
    return found


def launch(runs: str, index: int, count: int, address: str, out: Path) -> subprocess.Popen:
    flags = re.sub(r"--xla_force_host_platform_device_count=\d+", "", os.environ["XLA_FLAGS"])
    environment = os.environ | {"XLA_FLAGS": f"{flags} --xla_force_host_platform_device_count={2 // count}"}
    command = [sys.executable, __file__, runs, address, str(index), str(count), str(out)]
    with out.with_suffix(".log").open("w") as log:  # a full pipe of one process would stop both
        return subprocess.Popen(command, env=environment, stderr=log, stdout=log)


@pytest.fixture(scope="module", params=list(GROUPS))
def results(request, tmp_path_factory) -> list[dict[str, float]]:
    """Of one process with two devices, and of two processes with one each."""
    out = tmp_path_factory.mktemp("results")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    files = [out / "one.json", out / "first.json", out / "second.json"]
    for group in ([(0, 1, files[0])], [(0, 2, files[1]), (1, 2, files[2])]):
        processes = [launch(request.param, index, count, address, file) for index, count, file in group]
        for process in processes:
            process.wait(timeout=DEADLINE)
        for process, (_, _, file) in zip(processes, group, strict=True):
            assert process.returncode == 0, file.with_suffix(".log").read_text()[-3000:]
    return [json.loads(file.read_text()) for file in files]


def test_two_processes_find_what_one_does(results):
    one, first, second = results
    assert first == second and first.keys() == one.keys()
    for name, value in one.items():
        # Learnt classifiers take sums in another order; of 360 digits or 16 pairs one may change sides.
        loose = "probe" in name or "heads" in name
        assert first[name] == pytest.approx(value, abs=0.02 if loose else 1e-4, rel=1e-3), name


def test_every_evaluator_of_every_published_config_is_among_them(results):
    """The evaluators that the headers' commands name, by recipe; Qwen-VL's tests are one kind."""
    covered = {(name.split("/")[1].split(".")[0], name.split()[1]) for name in results[0]}
    recipes = {recipe for recipe, _ in covered}
    named = {spec.split("/")[1].split(".")[0] for group in GROUPS.values() for spec in group}
    files = {file.stem: file for file in CONFIGS.glob("[!_]*.py") if file.stem not in {"common", "qwen3_vl"}}
    assert files.keys() == named | UNPROVEN
    for file in (files[name] for name in sorted(recipes)):
        for spec in set(re.findall(rf"configs/{file.stem}\.py(?::[\w=,/.+@-]+)?", file.read_text())):
            _, recipe = make_recipe(spec.removesuffix(":stage="), {})  # "stage=$n" in the headers' loops
            if file.stem != "qwen_vl":
                assert {(file.stem, evaluator.name) for evaluator in recipe.evaluators} <= covered, spec


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))
    runs, address, index, count, out = sys.argv[1:]
    Path(out).write_text(json.dumps(evaluate(runs, address, int(index), int(count))))
