"""Every published size of every system: parameters, operations of a forward pass, the checkpoint that fits.

    python -m omnax.models                            # all of them; plain lines where the output is no terminal
    python -m omnax.models qwen2_5_vl                 # those of one system
    python -m omnax.models qwen2_5_vl:7b --shapes     # one: config, parts, and with --shapes every parameter

Everything is derived from the size tables by tracing; no weights are read and nothing is computed.
"""

import argparse
import dataclasses
import difflib
import os
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import jax
from flax import traverse_util
from rich import box
from rich.console import Console
from rich.table import Table

from .messages import bounded
from .published import Published, count, describe
from .systems import SYSTEMS


def main(arguments: list[str] | None = None) -> int:
    """The command line; an unknown name is one line on stderr and exit code 1."""
    parser = argparse.ArgumentParser("python -m omnax.models", description="Published sizes and their checkpoints.")
    parser.add_argument("name", nargs="?", help="a system, or one of its sizes: vit, vit:B/16, qwen2_5_vl:7b")
    parser.add_argument("--shapes", action="store_true", help="list every parameter of the size")
    options = parser.parse_args(arguments)
    jax.config.update("jax_platforms", "cpu")  # nothing is computed: no accelerator need be taken
    console = Console(highlight=False)
    try:
        system, _, size = (options.name or "").partition(":")
        if size:
            explain(console, *find(system, size), options.shapes)
        elif options.shapes:
            raise ValueError("--shapes needs one size, as vit:B/16")
        else:
            for name in [_match(system, SYSTEMS, "system")] if system else SYSTEMS:
                overview(console, name, SYSTEMS[name])
    except ValueError as error:
        print(f"ValueError: {bounded(str(error))}", file=sys.stderr)
        return 1
    except BrokenPipeError:  # the reader has seen enough: `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def find(system: str, size: str) -> tuple[str, Published]:
    """The full name of a size and what is published of it; ValueError for an unknown one, with the nearest."""
    system = _match(system, SYSTEMS, "system")
    size = _match(size, SYSTEMS[system], f"size of {system}")
    return f"{system}:{size}", SYSTEMS[system][size]


def _match(name: str, known: Iterable[str], what: str) -> str:
    """The known name that is meant, in whatever case where that is clear."""
    choices = list(known)
    found = [name] if name in choices else [x for x in choices if x.lower() == name.lower()]
    if len(found) == 1:
        return found[0]
    nearest = difflib.get_close_matches(name, choices, n=1)
    hint = f", did you mean {nearest[0]!r}?" if nearest else ""
    raise ValueError(f"unknown {what} {name!r}{hint} (known: {', '.join(choices)})")


def overview(console: Console, system: str, sizes: Mapping[str, Published]) -> None:
    """One system's sizes: a table on a terminal, a line each elsewhere."""
    rows = ((name, published, describe(published, scan=True)) for name, published in sizes.items())
    if not console.is_terminal:
        for name, published, it in rows:
            fields = (f"{system}:{name}", count(it.params), it.flops, published.checkpoint or "-")
            print(*fields, *(f"{part}={number}" for part, number in parts(it.params).items()), sep="\t", flush=True)
        return
    table = Table(title=system, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("size", no_wrap=True)
    table.add_column("parameters", justify="right", no_wrap=True)
    table.add_column("GFLOP", justify="right", no_wrap=True)
    table.add_column("checkpoint, parts", overflow="fold")
    for name, published, it in rows:
        detail = ", ".join(f"{part} {number:,}" for part, number in parts(it.params).items())
        gflop = f"{it.flops / 1e9:,.{1 if it.flops > 1e9 else 5}f}"
        table.add_row(name, f"{count(it.params):,}", gflop, f"{published.checkpoint or '-'}\n[dim]{detail}[/]")
    console.print(table)


def explain(console: Console, name: str, published: Published, shapes: bool) -> None:
    """One size: inputs, config, parts, and where asked for every parameter."""
    it, module = describe(published), published.build(False)
    total = count(it.params)
    beside = "".join(f", {count(tree):,} numbers in {kind}" for kind, tree in it.variables.items())
    console.out(f"{name}: {type(module).__name__}, fits {published.checkpoint or 'no published checkpoint'}")
    console.out(f"parameters: {total:,}{beside} ({total / 2**28:.2f} GiB in float32, {total / 2**29:.2f} in bfloat16)")
    console.out(f"forward pass: {it.flops:,} floating-point operations of {', '.join(_inputs(published.inputs))}")
    for field, value in _fields(getattr(module, "config", None)):
        console.out(f"  {field} = {value!r}")
    table = Table(box=None)
    table.add_column("part", overflow="fold")
    for column in ("parameters", *(["shape"] if shapes else [])):
        table.add_column(column, justify="right", no_wrap=True)
    rows = parameters(it.params) if shapes else ((part, number) for part, number in parts(it.params, 2).items())
    for part, number, *shape in rows:
        table.add_row(part, f"{number:,}", *shape)
    console.print(table)
    leaves: dict[str, Any] = traverse_util.flatten_dict(it.params, sep="/")
    for words, pattern in published.sums.items():
        number = sum(leaf.size for path, leaf in leaves.items() if re.fullmatch(pattern, path))
        console.out(f"{words}: {number:,} ({_short(number)})")


def _short(number: int) -> str:
    size, unit = (1e9, "B") if number >= 1e9 else (1e6, "M")
    return f"{number / size:.2f} {unit}"


def parts(params: Mapping[str, Any], depth: int = 1) -> dict[str, int]:
    """Parameters by the first `depth` modules of their paths, the largest part first; layers are one part."""
    totals: dict[str, int] = {}
    leaves: dict[tuple[str, ...], Any] = traverse_util.flatten_dict(params)
    for path, leaf in leaves.items():
        part = re.sub(r"_\d+$", "_*", "/".join(path[: max(1, min(depth, len(path) - 1))]))
        totals[part] = totals.get(part, 0) + leaf.size
    return dict(sorted(totals.items(), key=lambda item: -item[1]))


def parameters(params: Mapping[str, Any]) -> Iterator[tuple[str, int, str]]:
    """(path, numbers, shape) of every parameter; those of equal layers are one row that counts them."""
    groups: dict[tuple[str, tuple[int, ...]], int] = {}
    leaves: dict[str, Any] = traverse_util.flatten_dict(params, sep="/")
    for path, leaf in leaves.items():
        key = re.sub(r"(?<=blocks_)\d+", "*", path), leaf.shape
        groups[key] = groups.get(key, 0) + leaf.size
    for (path, shape), number in groups.items():
        size = jax.ShapeDtypeStruct(shape, "float32").size
        times = f"{number // size} × " if number > size else ""
        yield path, number, f"{times}[{', '.join(map(str, shape))}]"


def _inputs(inputs: Mapping[str, Any]) -> Iterator[str]:
    for path, leaf in jax.tree_util.tree_flatten_with_path(dict(inputs))[0]:
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        yield f"{name} {leaf.dtype}[{','.join(map(str, leaf.shape))}]"


def _fields(config: Any, prefix: str = "config.") -> Iterator[tuple[str, Any]]:
    """The fields of a config and of the configs in it."""
    for field in dataclasses.fields(config) if config else ():
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            yield from _fields(value, f"{prefix}{field.name}.")
        else:
            yield f"{prefix}{field.name}", value


if __name__ == "__main__":
    sys.exit(main())
