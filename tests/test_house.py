"""The rules of the house, read from the source: which room imports which, what the runtime never imports."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# Each imports only from those before it: rooms, their wings, and the files of a room that stand above its wings.
FLOORS = [
    "storage",
    "kernels",
    "objectives",
    "models",
    *("hub.files", "hub", "hub.families", "hub.api", "hub.exactness", "hub.__main__"),
    *(
        "data.lookup",
        "data.checksums",
        "data.files",
        "data.splits",
        "data.images",
        "data.text",
        "data.media",
        "data",
        "data.conversations",
        "data.drawn",
    ),
    *("train", "train.evaluation", "train.recipes", "train.main", "train.compile", "train.export", "train.__main__"),
    "infer",
    "configs",
]
# Names that users import: they only pass on what stands in a wing.
PUBLIC = {"hub", "data.bpe", "data.digits", "data.visual_questions"}
ROOMS = [*dict.fromkeys(name.split(".")[0] for name in FLOORS), "benchmarks"]
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


def module(path: Path) -> str:
    """The dotted name below omnax."""
    return ".".join(part for part in path.relative_to(ROOT).with_suffix("").parts if part != "__init__")


def floor(name: str) -> int:
    """The height at which a module stands: that of the longest name in FLOORS that it lies in."""
    return FLOORS.index(max((x for x in FLOORS if f"{name}.".startswith(f"{x}.")), key=len))


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_source_keeps_the_rules(path):
    names = list(imports(path))
    here = module(path)
    if here.split(".")[0] != "benchmarks":
        inner = {name.removeprefix("omnax.") for name in names if name.startswith("omnax.")}
        if here not in PUBLIC:
            above = {name for name in inner if floor(name) > floor(here)}
            assert not above, f"{here} may not import {sorted(above)}, which stand above it"
        outer = {name.split(".")[0] for name in names}
        assert not outer & ORACLES, f"the runtime may not import {sorted(outer & ORACLES)}"
        assert not outer & set(ROOMS), f"import relatively, not the bare {sorted(outer & set(ROOMS))}"
    banned = GONE.findall(path.read_text())
    assert not banned, f"names gone from JAX, or unfinished work: {banned}"


def test_every_folder_with_modules_is_a_package():
    bare = {path.parent for path in SOURCES if not (path.parent / "__init__.py").is_file()}
    assert not bare, f"setup.py finds packages by their __init__.py, missing in {bare}"


def test_no_wing_is_found_twice():
    """A file in front of a room with the name of one in a wing only passes its names on."""
    for name in PUBLIC - {"hub"}:
        tree = ast.parse((ROOT / f"{name.replace('.', '/')}.py").read_text())
        assert not [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.ClassDef)], name


def test_every_module_has_a_docstring():
    bare = [path for path in SOURCES if path.stat().st_size and not ast.get_docstring(ast.parse(path.read_text()))]
    assert not bare, f"modules without a docstring: {bare}"
