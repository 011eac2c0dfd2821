"""The rules of the house, read from the source: which room imports which, what the runtime never imports."""

import ast
import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# Each imports only from those before it.
FLOORS = ["kernels", "objectives", "models", "hub", "data", "train", "infer", "configs"]
ROOMS = [*FLOORS, "benchmarks"]
SOURCES = sorted(path for room in ROOMS for path in (ROOT / room).rglob("*.py"))
ORACLES = {"torch", "torchvision", "tensorflow", "transformers", "diffusers", "timm", "open_clip", "clip"}
GONE = re.compile(
    r"\bjax\.(tree_map|tree_leaves|tree_util\.tree_map|device_put_(sharded|replicated))\b"
    r"|\bjax\.experimental\.(pjit|shard_map)\b|\bTODO\b|\bFIXME\b|NotImplementedError"
)


def imports(path: Path):
    """Absolute dotted names of everything a file imports, relative imports resolved against omnax."""
    package = ("omnax", *path.relative_to(ROOT).parent.parts)
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = [*package[: len(package) - node.level + 1]] if node.level else []
            module = [*base, *([node.module] if node.module else [])]
            yield from (".".join([*module, alias.name]) for alias in node.names)


def room(path: Path) -> str:
    return path.relative_to(ROOT).parts[0]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_source_keeps_the_rules(path):
    names = list(imports(path))
    inner = {name.split(".")[1] for name in names if name.startswith("omnax.")}
    if room(path) in FLOORS:
        allowed = {*FLOORS[: FLOORS.index(room(path)) + 1]}
        assert inner <= allowed, f"{room(path)} may not import {sorted(inner - allowed)}"
        outer = {name.split(".")[0] for name in names}
        assert not outer & ORACLES, f"the runtime may not import {sorted(outer & ORACLES)}"
        assert not outer & set(ROOMS), f"import relatively, not the bare {sorted(outer & set(ROOMS))}"
    banned = GONE.findall(path.read_text())
    assert not banned, f"names gone from JAX, or unfinished work: {banned}"


def test_every_folder_with_modules_is_packaged():
    packages = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"])
    assert packages == {"omnax." + ".".join(path.parent.relative_to(ROOT).parts) for path in SOURCES}


def test_every_module_has_a_docstring():
    bare = [path for path in SOURCES if path.stat().st_size and not ast.get_docstring(ast.parse(path.read_text()))]
    assert not bare, f"modules without a docstring: {bare}"
