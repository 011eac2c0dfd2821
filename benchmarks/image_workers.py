"""`python -m omnax.benchmarks.image_workers`: images/s and memory of the data pipeline's worker processes.

Draws a folder of JPEGs once and reads it as a published ViT recipe does (inception crop to 224, flip, value range),
for each number of workers given (0: threads of this process). Memory is what Linux counts for each worker: resident
(with pages shared between processes) and its own share of them.
"""

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

from ..data import pipeline, preprocess, sources
from ..train import main as training  # what a training run has loaded beside its data

KEEP = ("keep", {"keys": ("image", "label")})
TRANSFORMS = ("decode", ("inception_crop", {"size": 224}), "flip", "value_range", KEEP)
BATCH = 64


def write_jpegs(folder: Path, count: int, side: tuple[int, int] = (375, 500), classes: int = 4) -> Path:
    """`folder`/train/<class>/<number>.jpg: smooth random pictures of ImageNet's usual size, 40 to 60 kB each."""
    rng = np.random.default_rng(0)
    for number in range(count):
        small = Image.fromarray(rng.integers(0, 256, (24, 32, 3), dtype=np.uint8))
        large = np.asarray(small.resize((side[1], side[0]), Image.Resampling.BICUBIC), np.int16)
        noisy = np.clip(large + rng.integers(-8, 9, large.shape), 0, 255).astype(np.uint8)
        file = folder / "train" / f"class_{number % classes}" / f"{number:05d}.jpg"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(noisy).save(file, quality=85)
    return folder


def worker_memory() -> list[tuple[int, int]]:
    """(resident, own share) in MiB of each child process."""
    pids = [int(pid) for task in Path("/proc/self/task").iterdir() for pid in (task / "children").read_text().split()]
    found = []
    for pid in pids:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
        sizes = {key: int(rest.split()[0]) // 1024 for key, _, rest in (line.partition(":") for line in lines[1:])}
        found.append((sizes["Rss"], sizes["Pss"]))
    return found


def measure(folder: Path, workers: int, batches: int) -> str:
    """One line: the rate after the first two batches, and the workers' memory at the end."""
    source = sources.source({"name": "folder", "path": folder}, "train")
    stream = pipeline.Stream(source, preprocess.build(TRANSFORMS))
    reading = pipeline.Reading(threads=8, workers=workers)
    opened = time.perf_counter()
    iterator = pipeline.train([stream], batch_size=BATCH, seed=0, reading=reading)
    next(iterator)
    first = time.perf_counter() - opened
    next(iterator)
    start = time.perf_counter()
    for _ in range(batches):
        next(iterator)
    rate = BATCH * batches / (time.perf_counter() - start)
    memory = ", ".join(f"{resident} ({own})" for resident, own in worker_memory()) or "-"
    iterator.close()
    return f"{workers:7} {rate:10.0f} {first:13.1f}   {memory}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--batches", type=int, default=20)
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 2])
    arguments = parser.parse_args()
    print(f"{training.__name__} is loaded; {arguments.images} JPEGs of 375 x 500, batches of {BATCH} at 224 x 224")
    print(f"{'workers':>7} {'images/s':>10} {'first batch s':>13}   resident (own) MiB of each worker")
    with tempfile.TemporaryDirectory() as scratch:
        folder = write_jpegs(Path(scratch), arguments.images)
        for workers in arguments.workers:
            print(measure(folder, workers, arguments.batches), flush=True)


if __name__ == "__main__":
    main()
