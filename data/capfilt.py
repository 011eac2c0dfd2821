"""CapFilt as BLIP-2 has it (arXiv 2301.12597, section 3.4): an image's captions, written and found, the best two kept.

An offline job over a caption source: for every image a captioner writes candidates, a ranker scores them and the
caption that came with the image, and the best go to a folder that data/captions.py reads as "captions"; there one of
them is drawn each time the image is seen. Captioner and ranker are functions.
"""

import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .captions import CaptionFolder
from .examples import Source
from .images.decode import CorruptExample
from .images.transforms import Example

# Examples of a caption source -> candidates of each
Captioner = Callable[[Sequence[Example]], Sequence[Sequence[str]]]
# (those examples, the texts of each) -> how well each text fits
Ranker = Callable[[Sequence[Example], Sequence[Sequence[str]]], Sequence[Sequence[float]]]

LINES, SETTINGS = "captions.jsonl", "capfilt.json"


def bootstrap(
    source: Source,
    captioner: Captioner,
    ranker: Ranker,
    out: Path,
    *,
    keep: int = 2,
    batch_size: int = 8,
    on_batch: Callable[[int], None] | None = None,
) -> CaptionFolder:
    """Writes the folder `out`; begun before, it goes on behind the last image that is whole there.

    Every line has the image's file and index in the source, its `keep` best texts and their scores. Images that cannot
    be read have none. `on_batch` is told how many images are done. ValueError for a folder of another job, and for
    `keep` below 1.
    """
    if keep < 1:
        raise ValueError(f"keep is {keep}, expected at least 1")
    (out / "images").mkdir(parents=True, exist_ok=True)
    _check_settings(out / SETTINGS, {"images": len(source), "keep": keep})
    done = _whole_lines(out / LINES)
    with (out / LINES).open("a") as file:
        for first in range(done, len(source), batch_size):
            indices = range(first, min(first + batch_size, len(source)))
            read = list(_readable(source, indices))
            lines = {index: {"index": index} for index in indices}
            if read:
                lines |= _kept([example for _, example in read], [i for i, _ in read], captioner, ranker, out, keep)
            file.write("".join(json.dumps(lines[index]) + "\n" for index in indices))
            file.flush()
            os.fsync(file.fileno())
            if on_batch:
                on_batch(indices.stop)
    return CaptionFolder(out)


def _kept(
    examples: Sequence[Example], indices: Sequence[int], captioner: Captioner, ranker: Ranker, out: Path, keep: int
) -> dict[int, dict[str, Any]]:
    # One that was written twice is there twice, and so is shown the more often
    written = captioner(examples)
    candidates = [[*example["captions"], *texts] for example, texts in zip(examples, written, strict=True)]
    lines = {}
    for index, example, texts, scores in zip(indices, examples, candidates, ranker(examples, candidates), strict=True):
        best = np.argsort(-np.asarray(scores), kind="stable")[:keep]
        name = f"images/{index:08d}"
        (out / name).write_bytes(example["image"])
        chosen = {"text": [texts[i] for i in best], "scores": [round(float(scores[i]), 6) for i in best]}
        lines[index] = {"image": name, "index": index, **chosen}
    return lines


def _readable(source: Source, indices: Sequence[int]) -> Iterator[tuple[int, Example]]:
    for index in indices:
        try:
            yield index, source[index]
        except CorruptExample:
            continue


def _check_settings(path: Path, settings: dict[str, Any]) -> None:
    if not path.is_file():
        path.write_text(json.dumps(settings) + "\n")
    elif (begun := json.loads(path.read_text())) != settings:
        raise ValueError(f"{path.parent} was begun with {begun}, this job has {settings}: give another folder")


def _whole_lines(path: Path) -> int:
    """How many images are done; a line that a killed job left half is cut off."""
    if not path.is_file():
        return 0
    data = path.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    if len(whole) < len(data):
        with path.open("r+b") as file:
            file.truncate(len(whole))
    return whole.count(b"\n")
