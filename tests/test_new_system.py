"""Adding a system touches its own files and the lines that CONTRIBUTING names: done here, in a copy, with a toy."""

import json
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ("kernels", "objectives", "models", "hub", "data", "train", "infer", "configs")

MODEL = '''
"""A toy: one linear layer."""

import dataclasses

import flax.linen as nn

from .published import Published, floats


@dataclasses.dataclass(frozen=True)
class ToyConfig:
    """Its only size."""

    width: int = 3


class Toy(nn.Module):
    """x [B, D] -> [B, D]."""

    config: ToyConfig = ToyConfig()

    @nn.compact
    def __call__(self, x):
        return nn.Dense(self.config.width, name="layer")(x)


PUBLISHED = {"one": Published(lambda scan: Toy(), {"x": floats(1, 3)}, "toys/one")}
'''
FAMILY = '''
"""Toy checkpoints."""

import jax

from ...models.toy import PUBLISHED, Toy, ToyConfig
from ..bundle import Bundle
from ..family import Family
from ..files.writers import write_file, write_safetensors
from ..mapping import Table, save_tensors
from ..rows import dense

TABLE, INPUTS = Table(dense("toy", "layer")), PUBLISHED["one"].inputs
FAMILY = Family(
    name="toy",
    config=ToyConfig,
    formats=("toy",),
    recognise=lambda source: "toy" if "toy.weight" in source.tensors else None,
    read=lambda source, format, overrides: ToyConfig(**overrides),
    table=lambda source, format, config: TABLE,
    shapes=lambda source, config: jax.eval_shape(Toy(config).init, jax.random.key(0), **INPUTS)["params"],
    bundle=lambda checkpoint, params: Bundle(Toy(checkpoint.config), params, checkpoint.config, format="toy"),
    save=lambda bundle, path, format, size: write_file(path, save_tensors(bundle.params, TABLE), write_safetensors),
)
'''
RECIPE = '''
"""Learns to double."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from .... import hub
from ....models.toy import Toy, ToyConfig
from ...optimizer import OptimizerConfig
from ...recipe import Player, Recipe
from ...settings import RunConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(RunConfig):
    """Settings of the recipe `toy`."""

    optimizer: OptimizerConfig


class Numbers:
    """The same batch over and over."""

    def __init__(self, rows: int) -> None:
        self.x = np.arange(3.0 * rows, dtype=np.float32).reshape(rows, 3) / rows

    def __next__(self):
        return {"x": self.x}

    def get_state(self):
        return {"step": 0}

    def set_state(self, state):
        pass


def make_recipe(config: Config) -> Recipe:
    """The recipe of a config."""
    model = Toy()

    def loss(params, state, batch, rng):
        return jnp.square(model.apply({"params": params}, batch["x"]) - 2 * batch["x"]).mean(), ({}, {})

    return Recipe(
        init=lambda rng: (model.init(rng, jnp.zeros((1, 3)))["params"], {}),
        players=(Player(loss, config.optimizer),),
        sharding=((".*", "-"),),
        batch={"x": jax.ShapeDtypeStruct((config.batch_size, 3), jnp.float32)},
        data=lambda shard: Numbers(config.batch_size // shard[1]),
        bundle=lambda params: hub.Bundle(model, params, ToyConfig(), format="toy"),
    )
'''
CONFIG = '''
"""Two steps."""

from ml_collections import ConfigDict


def get_config(arg: str | None = None) -> ConfigDict:
    """See the head of this file."""
    optimizer = {"lr": 0.1, "weight_decay": 0.0}
    return ConfigDict({"recipe": "toy", "batch_size": 4, "total_steps": 2, "log_every": 1, "optimizer": optimizer})
'''
COMMAND = '''
"""Doubles a number."""

import jax.numpy as jnp

from ..hub import load


def add_arguments(parser):
    parser.add_argument("--weights", required=True, help="checkpoint")


def run(arguments):
    bundle = load(arguments.weights)
    print(bundle.model.apply({"params": bundle.params}, jnp.ones((1, 3))).shape)
'''
FILES = {
    "models/toy.py": MODEL,
    "hub/families/toy.py": FAMILY,
    "train/recipes/toy/__init__.py": "",
    "train/recipes/toy/recipe.py": RECIPE,
    "configs/toy.py": CONFIG,
    "infer/toy.py": COMMAND,
}
# File elsewhere -> what its line stands behind, and the line.
LINES = {
    "models/systems.py": ("MODULES = {\n", '    "toy": "toy",\n'),
    "hub/families/__init__.py": ("MODULES = (\n", '    "toy",\n'),
    "infer/__main__.py": ("COMMANDS = {\n", '    "toy": "toy",\n'),
}
# All of it in one process, from the copy.
USE = """
import sys
from pathlib import Path
from types import ModuleType
sys.modules["omnax"] = ModuleType("omnax")
sys.modules["omnax"].__path__ = [str(Path(sys.argv[1]) / "omnax")]  # whatever else is installed by this name
from omnax import hub
from omnax.hub.__main__ import main as describe
from omnax.infer.__main__ import main as infer
from omnax.models.__main__ import main as models
from omnax.train.export import main as export
from omnax.train.main import main as train
here = Path(sys.argv[1])
assert Path(hub.__file__).is_relative_to(here), hub.__file__
assert models(["toy:one"]) == 0
config = ["--config", "configs/toy.py", "--workdir", str(here / "run")]
assert train(config) == 0
assert export([*config, "--out", str(here / "toy.safetensors")]) == 0
hub.save(hub.load(here / "toy.safetensors"), here / "again.safetensors")
assert (here / "again.safetensors").read_bytes() == (here / "toy.safetensors").read_bytes()
assert describe([str(here / "toy.safetensors")]) == 0
assert infer(["toy", "--weights", str(here / "toy.safetensors")]) == 0
"""


def copy_of_the_house(folder):
    """The tracked files of the rooms, and the test of the rules, as a package beside which ours is not seen."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", *ROOMS, "tests/test_house.py"]
    names = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0")
    for name in filter(None, names):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes((ROOT / name).read_bytes())


def test_a_toy_system_is_its_files_and_the_lines_of_contributing(tmp_path):
    package = tmp_path / "omnax"
    copy_of_the_house(package)
    (package / "benchmarks").mkdir()
    for name, text in FILES.items():
        assert not (package / name).exists()
        (package / name).parent.mkdir(exist_ok=True)
        (package / name).write_text(text.lstrip("\n"))
    for name, (before, line) in LINES.items():
        text = (package / name).read_text()
        assert text.count(before) == 1, f"{name} has no table that begins with {before!r}"
        (package / name).write_text(text.replace(before, before + line))
    environment = {"JAX_PLATFORMS": "cpu", "PATH": "/usr/bin:/bin", "HOME": str(tmp_path)}
    run = {"cwd": tmp_path, "env": environment, "capture_output": True, "text": True, "check": False}
    done = subprocess.run([sys.executable, "-c", USE, str(tmp_path)], **run)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "toy:one: Toy, fits toys/one" in done.stdout and "parameters: 12 " in done.stdout
    assert "  family    toy" in done.stdout and done.stdout.endswith("(1, 3)\n")
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line or "train/loss" in line][-1] == 2
    rules = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "omnax/tests/test_house.py", "-k", "toy"]
    done = subprocess.run(rules, **run)
    assert done.returncode == 0 and "6 passed" in done.stdout, done.stdout


def test_contributing_names_exactly_these_files_and_lines():
    text = (ROOT / "CONTRIBUTING.md").read_text()
    section = re.search(r"## Adding a system\n(.*?)\n## ", text, flags=re.DOTALL)
    assert section is not None
    text = " ".join(section[1].split())
    named = set(re.findall(r"`([\w/<>]+\.py)`", text))
    own = {re.sub(r"\btoy\b", "<system>", name) for name in FILES if not name.endswith("__init__.py")}
    assert own | set(LINES) <= named
    one_line = set(re.findall(r"one line in `([\w/]+\.py)`", text))
    assert one_line == set(LINES)
    assert not [name for name in named if "<" not in name and not (ROOT / name).is_file()]
