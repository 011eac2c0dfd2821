"""`python -m omnax.benchmarks.damage [--count 1000] [--seed 0]`: nothing damaged is read as if it were whole.

Seeded damages (bit flips, cuts, zeros, swapped and missing files) to a finished run's checkpoints and to weight files
of every format. Each is unharmed (what is read is what was written), refused by name (a ValueError that names the file
or its folder), or recovered from the older checkpoint; "silently different" and "not by name" must be 0, else exit
code 1.

Safetensors hold no checksum: damage to their elements cannot be seen by anybody. It is counted under its own name.
"""

import argparse
import collections
import functools
import logging
import random
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from rich.progress import track

from ..hub.files.readers import open_tensors
from ..hub.files.tensors import LazyTensor
from ..hub.files.torch_writer import write_torch
from ..hub.files.writers import write_npz, write_safetensors, write_sharded
from ..train.checkpoint import Checkpointer
from ..train.state import TrainState

STEPS = (4, 8)
Contents = dict[str, np.ndarray]


def flip(data: bytearray, rng: random.Random) -> None:
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)


def cut(data: bytearray, rng: random.Random) -> None:
    del data[rng.randrange(len(data)) :]


def zero(data: bytearray, rng: random.Random) -> None:
    at = rng.randrange(len(data))
    data[at : at + 512] = bytes(len(data[at : at + 512]))


def damage(folder: Path, rng: random.Random) -> str:
    """Damages one file of a folder; says how."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.stat().st_size)
    path, other = rng.choice(files), rng.choice(files)
    kind = rng.choice(["bit", "cut", "zeros", "missing", "swapped"])
    if kind == "missing":
        path.unlink()
    elif kind == "swapped":
        first, second = path.read_bytes(), other.read_bytes()
        path.write_bytes(second)
        other.write_bytes(first)
    else:
        data = bytearray(path.read_bytes())
        {"bit": flip, "cut": cut, "zeros": zero}[kind](data, rng)
        path.write_bytes(data)
    return kind


def make_state(step: int) -> TrainState:
    rng = np.random.default_rng(step)
    params = {name: jnp.asarray(rng.normal(size=(64, 32)), jnp.float32) for name in ("a", "b")}
    return TrainState(
        step=jnp.int32(step), params=params, opt_state={"": {}}, ema={}, variables={}, rng=jnp.zeros(2, jnp.uint32)
    )


def write_checkpoints(folder: Path) -> None:
    with Checkpointer(folder, keep=2) as checkpoints:
        for step in STEPS:
            checkpoints.save(step, make_state(step), {"step": step}, {"lr": 0.1})


def read_checkpoints(folder: Path) -> tuple[Contents, bool]:
    """What a run would go on from, and whether that is the newest checkpoint."""
    here = NamedSharding(Mesh(np.array(jax.devices()[:1]), "data"), PartitionSpec())
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), make_state(0))
    with Checkpointer(folder, keep=None) as checkpoints:
        if checkpoints.latest is None:
            raise ValueError(f"{folder} holds no checkpoint")
        restored = checkpoints.restore(like)
    step = np.array([int(restored.state.step), restored.data["step"]])
    return {"step": step} | {name: np.asarray(x) for name, x in restored.state.params.items()}, step[0] == STEPS[-1]


def expected_checkpoint(step: int) -> Contents:
    return {"step": np.array([step, step])} | {k: np.asarray(v) for k, v in make_state(step).params.items()}


def tensors() -> dict[str, LazyTensor]:
    arrays = {name: np.asarray(x) for name, x in make_state(1).params.items()}
    return {name: LazyTensor(x.shape, x.dtype, lambda x=x: x) for name, x in arrays.items()}


def read_weights(path: Path) -> tuple[Contents, bool]:
    file = open_tensors(path)
    return {name: file.read(name) for name in file}, True


def write_in(write: Callable[..., None], name: str, folder: Path) -> None:
    folder.mkdir()
    write(folder / name, tensors())


def sharded(folder: Path) -> None:
    folder.mkdir()
    write_sharded(folder, tensors(), max_shard_size=1000)


WRITERS: dict[str, Callable[[Path], None]] = {
    "checkpoints": write_checkpoints,
    "torch": functools.partial(write_in, write_torch, "pytorch_model.bin"),
    "npz": functools.partial(write_in, write_npz, "weights.npz"),
    "safetensors": functools.partial(write_in, write_safetensors, "model.safetensors"),
    "safetensors shards": sharded,
}
NO_CHECKSUM = ("safetensors", "safetensors shards")


def judge(kind: str, folder: Path) -> str:
    """What reading a damaged folder comes to."""
    expected: Contents
    try:
        found, newest = (read_checkpoints if kind == "checkpoints" else read_weights)(folder)
    except ValueError as error:
        return "refused by name" if str(folder) in str(error) else f"not by name: {error!r:.200}"
    except Exception as error:
        return f"not by name: {error!r:.200}"
    if kind == "checkpoints":
        expected = expected_checkpoint(STEPS[-1] if newest else STEPS[0])
    else:
        expected = {name: tensor.view() for name, tensor in tensors().items()}
    if found.keys() != expected.keys() or any((found[name] != expected[name]).any() for name in expected):
        return "elements changed, no checksum" if kind in NO_CHECKSUM and _same_shapes(found) else "silently different"
    return "unharmed" if newest else "recovered from the older checkpoint"


def _same_shapes(found: Contents) -> bool:
    return {k: (v.shape, v.dtype) for k, v in found.items()} == {k: (t.shape, t.dtype) for k, t in tensors().items()}


def run(count: int, seed: int, quiet: bool = False) -> dict[str, collections.Counter[str]]:
    """Counts of outcomes by kind of folder."""
    rng = random.Random(seed)
    counts: dict[str, collections.Counter[str]] = {kind: collections.Counter() for kind in WRITERS}
    with tempfile.TemporaryDirectory(prefix="omnax-damage-") as scratch:
        whole = {kind: Path(scratch) / f"{kind} whole" for kind in WRITERS}
        for kind, folder in whole.items():
            WRITERS[kind](folder)
        for number in track(range(count), "Damaging", disable=quiet, transient=True):
            kind = [*WRITERS][number % 5] if number % 2 else "checkpoints"
            copy = Path(scratch) / f"{number}"
            shutil.copytree(whole[kind], copy)
            how = damage(copy, rng)
            outcome = judge(kind, copy)
            counts[kind][outcome] += 1
            if outcome.startswith(("silently", "not by name")):
                print(f"{kind}, damage {number} ({how}): {outcome}")
            shutil.rmtree(copy)
    return counts


def bad(counts: dict[str, collections.Counter[str]]) -> int:
    """Damages that were neither seen nor harmless, or said without a name."""
    return sum(
        number
        for outcomes in counts.values()
        for outcome, number in outcomes.items()
        if outcome.startswith(("silently", "not by name"))
    )


def main(arguments: list[str] | None = None) -> int:
    """Prints the table; returns the exit code."""
    parser = argparse.ArgumentParser(
        "python -m omnax.benchmarks.damage", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    flags = parser.parse_args(arguments)
    logging.disable(logging.ERROR)  # several lines for each damaged checkpoint
    counts = run(flags.count, flags.seed)
    for kind, outcomes in counts.items():
        print(
            f"{kind} ({outcomes.total()}): " + ", ".join(f"{number} {name}" for name, number in outcomes.most_common())
        )
    print(f"silently different, or not said by name: {bad(counts)}")
    return min(bad(counts), 1)


if __name__ == "__main__":
    sys.exit(main())
