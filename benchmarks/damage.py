"""`python -m omnax.benchmarks.damage [--count 1000] [--seed 0]`: nothing damaged is read as if it were whole.

Seeded damages (bit flips, cuts, zeros, swapped and missing files) to a finished run's checkpoints, to weight files of
every format that is written here, and to data: images in folders, captions, tar shards, conversations and sounds beside
a list of checksums (data/checksums.py), records of TFDS. Each is unharmed (what is read is what was written), refused
by name (a ValueError that names the file or its folder), left out by name (examples), or recovered from the older
checkpoint; "silently different" and "not by name" must be 0, else exit code 1.

Safetensors that other libraries wrote, and data without a list, hold no checksum: a change that leaves a valid file
cannot be seen by anybody. For comparison they have rows of their own.
"""

import argparse
import collections
import dataclasses
import functools
import hashlib
import io
import json
import logging
import random
import shutil
import sys
import tarfile
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from PIL import Image
from rich.progress import track

from ..data.captions import caption_source
from ..data.checksums import LIST
from ..data.conversations.turns import JsonLines
from ..data.conversations.vision_tokens import FrameSampling
from ..data.images.decode import CorruptExample, decode_image
from ..data.media.audio import load_audio, write_wav
from ..data.sources import source
from ..hub.files.readers import open_tensors
from ..hub.files.tensors import LazyTensor
from ..hub.files.torch_writer import write_torch
from ..hub.files.writers import write_npz, write_safetensors, write_sharded
from ..train.checkpoint import Checkpointer
from ..train.state import TrainState

STEPS = (4, 8)
Contents = dict[str, Any]
NO_CHECKSUM = "other content, valid in a format without checksums"


@dataclasses.dataclass(frozen=True)
class Reading:
    """What a reader makes of a folder."""

    found: Contents
    older: bool = False  # than the newest checkpoint
    named: int = 0  # examples that were left out with a word


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


def read_checkpoints(folder: Path) -> Reading:
    """What a run would go on from."""
    here = NamedSharding(Mesh(np.array(jax.devices()[:1]), "data"), PartitionSpec())
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), make_state(0))
    with Checkpointer(folder, keep=None) as checkpoints:
        if checkpoints.latest is None:
            raise ValueError(f"{folder} holds no checkpoint")
        restored = checkpoints.restore(like)
    step = [int(restored.state.step), restored.data["step"]]
    found = {"step": np.array(step)} | {name: np.asarray(x) for name, x in restored.state.params.items()}
    return Reading(found, older=step[0] != STEPS[-1])


def tensors() -> dict[str, LazyTensor]:
    arrays = {name: np.asarray(x) for name, x in make_state(1).params.items()}
    return {name: LazyTensor(x.shape, x.dtype, lambda x=x: x) for name, x in arrays.items()}


def read_weights(path: Path) -> Reading:
    file = open_tensors(path)
    return Reading({name: file.read(name) for name in file})


def write_in(write: Callable[..., None], name: str, folder: Path) -> None:
    folder.mkdir()
    write(folder / name, tensors())


def sharded(folder: Path) -> None:
    folder.mkdir()
    write_sharded(folder, tensors(), max_shard_size=1000)


def published(folder: Path) -> None:
    """As the safetensors library writes them."""
    write_in(write_safetensors, "model.safetensors", folder)
    data = (folder / "model.safetensors").read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    text = json.dumps(json.loads(data[8:end]) | {"__metadata__": {"format": "pt"}}).encode()
    (folder / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + data[end:])


def picture(index: int, kind: str) -> bytes:
    """A smooth one, of which a flipped bit leaves much as it was."""
    small = np.random.default_rng(index).integers(0, 256, (5, 5, 3)).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(small).resize((40, 40), Image.Resampling.BICUBIC).save(buffer, kind)
    return buffer.getvalue()


def write_list(folder: Path) -> None:
    """SHA256SUMS of everything in the folder."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    lines = [f"{hashlib.sha256(path.read_bytes()).hexdigest()}  ./{path.relative_to(folder)}\n" for path in files]
    (folder / LIST).write_text("".join(lines))


def write_images(folder: Path, listed: bool = True) -> None:
    kinds = ["jpeg", "png", "webp", "bmp", "gif", "tiff"]
    for i in range(12):
        path = folder / "train" / ("cat", "dog")[i % 2] / f"{i}.{kinds[i // 2]}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(picture(i, kinds[i // 2]))
    if listed:
        write_list(folder)


def write_captions(folder: Path) -> None:
    folder.mkdir()
    for i in range(8):
        (folder / f"{i}.jpg").write_bytes(picture(i, "jpeg"))
    lines = (json.dumps({"image": f"{i}.jpg", "text": [f"picture {i}", "a picture"]}) for i in range(8))
    (folder / "captions.jsonl").write_text("\n".join(lines))
    write_list(folder)


def write_shards(folder: Path) -> None:
    folder.mkdir()
    for shard in range(2):
        with tarfile.open(folder / f"train-{shard}.tar", "w") as archive:
            for i in range(4):
                for suffix, data in (("jpg", picture(i, "jpeg")), ("txt", f"picture {i}".encode())):
                    info = tarfile.TarInfo(f"{shard}{i}.{suffix}")
                    info.size = len(data)
                    archive.addfile(info, io.BytesIO(data))
    write_list(folder)


def write_conversations(folder: Path) -> None:
    folder.mkdir()
    entries = []
    for i in range(6):
        (folder / f"{i}.jpg").write_bytes(picture(i, "jpeg"))
        turns = [{"from": "human", "value": "<image> What is it?"}, {"from": "gpt", "value": f"It is number {i}."}]
        entries.append(json.dumps({"image": f"{i}.jpg", "conversations": turns}))
    (folder / "turns.jsonl").write_text("\n".join(entries))
    write_list(folder)


def write_sounds(folder: Path) -> None:
    folder.mkdir()
    for i in range(3):
        write_wav(folder / f"{i}.wav", np.random.default_rng(i).uniform(-1, 1, 4000))
    write_list(folder)


def write_records(folder: Path) -> None:
    source({"name": "digits", "data_dir": folder}, "train")


def examples(opened: Any) -> Reading:
    """All examples of a source by name: pixels, label and captions."""
    found, named = {}, 0
    for i in range(len(opened)):
        try:
            example = opened[i]
            pixels = decode_image(example["image"], name=example["name"])
            found[example["name"]] = (pixels.tobytes(), example.get("label"), example.get("captions"))
        except CorruptExample:
            named += 1
    return Reading(found, named=named)


def read_images(folder: Path) -> Reading:
    return examples(source({"name": "folder", "path": folder}, "train"))


def read_captions(folder: Path) -> Reading:
    return examples(caption_source({"name": "captions", "path": folder}, "train"))


def read_shards(folder: Path) -> Reading:
    return examples(caption_source({"name": "tar", "path": folder}, "train"))


def read_records(folder: Path) -> Reading:
    return examples(source({"name": "digits", "data_dir": folder}, "train[:200]"))


def read_conversations(folder: Path) -> Reading:
    found, named, opened = {}, 0, JsonLines(folder / "turns.jsonl")
    for i in range(len(opened)):
        try:
            turn = opened[i]
            pixels = [np.asarray(media.read(FrameSampling()).frames[0]).tobytes() for media in turn.media]
            found[str(i)] = (repr(turn.messages), pixels)
        except CorruptExample:
            named += 1
    return Reading(found, named=named)


def read_sounds(folder: Path) -> Reading:
    return Reading({name: load_audio(folder / name) for name in ("0.wav", "1.wav", "2.wav")})


@dataclasses.dataclass(frozen=True)
class Kind:
    """What is damaged: how it is written and read, and whether there are checksums."""

    write: Callable[[Path], None]
    read: Callable[[Path], Reading] = read_weights
    checksums: bool = True


KINDS = {
    "checkpoints": Kind(write_checkpoints, read_checkpoints),
    "torch": Kind(functools.partial(write_in, write_torch, "pytorch_model.bin")),
    "npz": Kind(functools.partial(write_in, write_npz, "weights.npz")),
    "safetensors": Kind(functools.partial(write_in, write_safetensors, "model.safetensors")),
    "safetensors shards": Kind(sharded),
    "images": Kind(write_images, read_images),
    "captions": Kind(write_captions, read_captions),
    "tar shards": Kind(write_shards, read_shards),
    "conversations": Kind(write_conversations, read_conversations),
    "sounds": Kind(write_sounds, read_sounds),
    "TFDS records": Kind(write_records, read_records),
    "safetensors of others": Kind(published, checksums=False),
    "images without a list": Kind(functools.partial(write_images, listed=False), read_images, checksums=False),
}


class Heard(logging.Handler):
    """Counts the warnings that name a folder."""

    def __init__(self, folder: Path):
        super().__init__()
        self._folder, self.count = str(folder), 0

    def emit(self, record: logging.LogRecord) -> None:
        self.count += self._folder in record.getMessage()


def judge(kind: Kind, folder: Path, expected: Contents) -> str:
    """What reading a damaged folder comes to; `expected` holds names without their folder."""
    logger, heard = logging.getLogger("omnax"), Heard(folder)
    logger.addHandler(heard)
    try:
        reading = kind.read(folder)
    except ValueError as error:
        return "refused by name" if str(folder) in str(error) else f"not by name: {error!r:.200}"
    except Exception as error:
        return f"not by name: {error!r:.200}"
    finally:
        logger.removeHandler(heard)
    if reading.older:
        before = {name: np.asarray(x) for name, x in make_state(STEPS[0]).params.items()}
        same = all(np.array_equal(reading.found[name], value) for name, value in before.items())
        return "recovered from the older checkpoint" if same else "silently different"
    found = relative(reading.found, folder)
    lacking = expected.keys() - found.keys()
    same = all(name in expected and _equal(value, expected[name]) for name, value in found.items())
    if same and not lacking:
        return "unharmed"
    if same and len(lacking) <= reading.named + heard.count:
        return "left out by name"
    return "silently different" if kind.checksums else NO_CHECKSUM


def relative(found: Contents, folder: Path) -> Contents:
    """Names without the folder that they lie in."""
    return {name.replace(str(folder), ""): value for name, value in found.items()}


def _equal(a: Any, b: Any) -> bool:
    return np.array_equal(a, b) if isinstance(a, np.ndarray) else a == b


def run(count: int, seed: int, quiet: bool = False) -> dict[str, collections.Counter[str]]:
    """Counts of outcomes by kind; a quarter of the damages fall on checkpoints."""
    rng = random.Random(seed)
    counts: dict[str, collections.Counter[str]] = {name: collections.Counter() for name in KINDS}
    with tempfile.TemporaryDirectory(prefix="omnax-damage-") as scratch:
        whole: dict[str, tuple[Path, Contents]] = {}
        for name, kind in KINDS.items():
            folder = Path(scratch) / f"{name} whole"
            kind.write(folder)
            whole[name] = folder, relative(kind.read(folder).found, folder)
        order = _order(count)
        for number, name in enumerate(track(order, "Damaging", disable=quiet, transient=True)):
            copy = Path(scratch) / f"{number}"
            shutil.copytree(whole[name][0], copy)
            how = damage(copy, rng)
            outcome = judge(KINDS[name], copy, whole[name][1])
            counts[name][outcome] += 1
            if outcome.startswith(("silently", "not by name")):
                print(f"{name}, damage {number} ({how}): {outcome}")
            shutil.rmtree(copy)
    return counts


def _order(count: int) -> list[str]:
    first, *others = KINDS
    return [others[number * 3 // 4 % len(others)] if number % 4 else first for number in range(count)]


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
    logging.getLogger("omnax").propagate = False  # several lines for each damaged checkpoint
    logging.getLogger("omnax").addHandler(logging.NullHandler())
    logging.getLogger("absl").setLevel(logging.ERROR)
    counts = run(flags.count, flags.seed)
    for kind, outcomes in counts.items():
        print(
            f"{kind} ({outcomes.total()}): " + ", ".join(f"{number} {name}" for name, number in outcomes.most_common())
        )
    print(f"silently different, or not said by name: {bad(counts)}")
    return min(bad(counts), 1)


if __name__ == "__main__":
    sys.exit(main())
