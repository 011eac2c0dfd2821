"""What a checkpoint is, what of it would be refused and why, and its conversion into another published format.

    python -m omnax.hub PATH                          # a directory, a file, or the id of a hub repository
    python -m omnax.hub PATH --to open_clip --out DIR
    python -m omnax.hub PATH --out DIR                # the same format again: several shards into one file, say

Exit code 1 where `hub.load` would refuse the checkpoint. Describing reads no tensors.
"""

import argparse
import dataclasses
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import jax
from rich.console import Console
from rich.table import Table as Rows

from ..models.messages import bounded
from ..storage.paths import as_path
from .api import load, recognise, save
from .components import INDEX, open_index
from .families.stable_diffusion.ldm import split
from .family import Checkpoint, Options
from .files.source import Source, fetch, open_source
from .files.tensors import TensorFile, num_bytes
from .mapping import check_params
from .processor import without_images


@dataclasses.dataclass(frozen=True)
class Inspection:
    """What a checkpoint is, as far as its files let it be known."""

    family: str
    format: str
    others: tuple[str, ...]  # further formats that `save` may write it in
    config: str
    tensors: TensorFile
    refusals: tuple[str, ...]  # what `load` would say; none: it loads


def inspect(source: Source) -> Inspection:
    """Goes as far as `load` would without reading tensors; ValueError where no family knows the checkpoint."""
    family, format = recognise(source)
    refusals: list[str] = []
    config = "unknown"
    try:
        found, table, shapes = family.describe(source, format, {})
        config = repr(found)
        for check in (
            lambda: check_params(source.tensors, table, shapes),
            lambda: family.bundle(Checkpoint(source, format, found, Options()), shapes),  # processors, labels
        ):
            try:
                check()
            except ValueError as error:
                refusals.append(str(error))
    except ValueError as error:
        refusals.append(str(error))
    others = tuple(name for name in family.formats if name != format)
    return Inspection(family.name, format, others, config, source.tensors, tuple(refusals))


def describe(console: Console, path: Path) -> bool:
    """Prints what is at `path`, component by component; whether `load` would take it."""
    index = open_index(path)
    if index is None:
        source = open_source(path)
        parts = split(source)
        sources = parts.sources if parts else {str(path): source}
        fits = [_print(console, name, inspect(part)) for name, part in sources.items()]
        return all(fits)
    class_name = index.document.get("_class_name", "components")
    console.out(f"{path}: {class_name}, a bundle of {', '.join(index.folders)} ({INDEX})")
    fits = True
    for name in index.folders:
        if index.has_weights(name):
            try:
                fits &= _print(console, name, inspect(open_source(path / name)))
            except ValueError as error:
                console.out(f"{name}: refused: {error}")
                fits = False
        else:
            console.out(f"{name}: files, kept as they are")
    return fits


def _print(console: Console, title: str, it: Inspection) -> bool:
    """As a grid that fits a terminal; elsewhere a value stays on its line."""
    console.out(title)
    rows = Rows.grid(padding=(0, 2))
    rows.add_column(no_wrap=True)
    rows.add_column(overflow="fold")
    for name, value in _rows(it):
        if console.is_terminal:
            rows.add_row(f"  {name}", value)
        else:
            console.out(f"  {name:10}{value}")
    if console.is_terminal:
        console.print(rows)
    return not it.refusals


def _rows(it: Inspection) -> Iterator[tuple[str, str]]:
    sizes: Counter[str] = Counter()
    for tensor in it.tensors.values():
        sizes[str(tensor.dtype)] += num_bytes(tensor.shape, tensor.dtype)
    numbers = sum(num_bytes(tensor.shape, tensor.dtype) // tensor.dtype.itemsize for tensor in it.tensors.values())
    yield "family", it.family
    yield "format", f"{it.format} (also writes {', '.join(it.others)})" if it.others else it.format
    yield "config", it.config
    yield "tensors", f"{len(it.tensors):,} of {numbers:,} numbers"
    parts = ", ".join(f"{size:,} in {dtype}" for dtype, size in sizes.most_common())
    yield "bytes", f"{sum(sizes.values()):,} ({parts})"
    for refusal in it.refusals or ("nothing",):
        yield "refused", refusal


def main(arguments: list[str] | None = None) -> int:
    """The command line; what is no checkpoint is one line on stderr and exit code 1."""
    parser = argparse.ArgumentParser("python -m omnax.hub", description="Describe or convert a checkpoint.")
    parser.add_argument("path", help="a directory or file of tensors, also in a bucket, or the id of a hub repository")
    parser.add_argument("--to", metavar="FORMAT", help="the format to write; without it the checkpoint's own")
    parser.add_argument("--out", metavar="DIR", help="where to write it")
    parser.add_argument(
        "--without-preprocessing",
        action="store_true",
        help="write nothing of how images are resized, for formats that have no word for it",
    )
    options = parser.parse_args(arguments)
    if options.to and not options.out:
        parser.error("--to needs --out")
    jax.config.update("jax_platforms", "cpu")  # no accelerator need be taken
    console = Console(highlight=False, markup=False)
    try:
        path = fetch(options.path)
        if not options.out:
            return 0 if describe(console, path) else 1
        bundle = load(path)
        if options.without_preprocessing:
            bundle = dataclasses.replace(bundle, processor=without_images(bundle.processor))
        save(bundle, options.out, options.to)
        describe(console, as_path(options.out))
    except ValueError as error:
        print(f"ValueError: {bounded(' '.join(str(error).split()))}", file=sys.stderr)  # one line, whatever it says
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
