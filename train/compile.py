"""What a training step would need, without the hardware: memory per chip, FLOPs and collectives of the compiled update.

    python -m omnax.train.compile --config configs/vit.py:size=g14 --topology v5e:16x16 --config.batch_size=4096
    python -m omnax.train.compile --config configs/vit.py --devices 8

A TPU topology needs the package libtpu (the extra `tpu`) but no TPU; `--devices` compiles for virtual CPU devices.
"""

import argparse
import contextlib
import dataclasses
import math
import os
import re
import sys
import time
from typing import Any

import jax
from jax.experimental import topologies
from rich.console import Console
from rich.table import Table

from ..kernels.flops import count_flops
from .main import add_common_arguments, make_recipe, parse_overrides, report_errors
from .program import make_program
from .rules import flatten
from .sharding import make_mesh

COLLECTIVES = (
    "all-gather",
    "all-reduce",
    "all-to-all",
    "collective-broadcast",
    "collective-permute",
    "ragged-all-to-all",
    "reduce-scatter",
)
GIB = 2**30
ITEM_BITS = {"pred": 8, "s4": 4, "u4": 4, "bf16": 16}  # others end in their number of bits: f32, s8, u64


@dataclasses.dataclass(frozen=True)
class Collective:
    """Executions of one kind of collective in a step, and the bytes of their larger side (input or output) per chip."""

    count: int
    bytes: int


def find_collectives(hlo: str) -> dict[str, Collective]:
    """Kind -> executions and bytes in a compiled module's text.

    Loops count with their number of iterations, those of unknown length once. TPU programs split an asynchronous
    collective over several fusions: there one channel and source line counts once (all collectives of `jax.shard_map`
    have the same channel).
    """
    computations = _split(hlo)
    runs = _executions(computations)
    fusions = set(re.findall(r" fusion\(.*calls=%?([\w.-]+)", hlo))
    channels: dict[str, tuple[str, int, int]] = {}  # channel and line, or instruction -> kind, executions, bytes
    for name, lines in computations.items():
        for line in lines:
            match = re.match(r"\s*(?:ROOT )?(\S+) = (.*?) ([a-z-]+?)(-start)?\(", line)
            if match is None or match[3] not in COLLECTIVES:
                continue
            # TPU: a reduce-scatter is a fusion of this name around an all-reduce.
            kind = "reduce-scatter" if "all-reduce-scatter" in name else match[3]
            sizes = _sizes(match[2])
            size = max(sizes) if match[4] else sum(sizes)  # "-start" returns its operands too
            channel = " ".join(re.findall(r"(?:channel_id|stack_frame_id)=\d+", line))
            key = channel if channel and name in fusions else f"{name}/{match[1]}"
            if key not in channels or channels[key][1] < runs[name]:
                channels[key] = (kind, runs[name], size)
    totals: dict[str, Collective] = {}
    for kind, count, size in channels.values():
        before = totals.get(kind, Collective(0, 0))
        totals[kind] = Collective(before.count + count, before.bytes + count * size)
    return dict(sorted(totals.items()))


def _split(hlo: str) -> dict[str, list[str]]:
    """Name -> lines of every computation; the entry is called ENTRY."""
    computations: dict[str, list[str]] = {}
    lines: list[str] = []
    for line in hlo.splitlines():
        if head := re.match(r"(ENTRY )?%?(\S+) .*\{$", line):
            lines = computations.setdefault("ENTRY" if head[1] else head[2], [])
        else:
            lines.append(line)
    return computations


def _executions(computations: dict[str, list[str]]) -> dict[str, int]:
    """How often each computation runs in one run of the entry."""
    runs = dict.fromkeys(computations, 0)

    def visit(name: str, times: int) -> None:
        runs[name] += times
        for line in computations[name]:
            trips = _trips(line, computations)
            for callee in re.findall(r"(?:calls|to_apply|body|condition|branch_computations)=\{?%?([\w.-]+)", line):
                visit(callee, times * trips)

    visit("ENTRY", 1)
    return runs


def _trips(line: str, computations: dict[str, list[str]]) -> int:
    """Iterations of a while instruction, 1 for any other: as XLA notes them, or as its condition compares them."""
    condition = re.search(r" while\(.*condition=%?([\w.-]+)", line)
    if condition is None:
        return 1
    if known := re.search(r'known_trip_count":\{"n":"(\d+)"', line):
        return int(known[1])
    text = "\n".join(computations[condition[1]])
    bound = re.search(r"s32\[\]\S* constant\((\d+)\)", text)
    return int(bound[1]) if bound and "direction=LT" in text else 1


def _sizes(shape: str) -> list[int]:
    """Bytes of every array in an HLO shape such as `(bf16[16,88]{1,0}, f32[])`."""
    found = re.findall(r"\b([a-z]+\d*)\[([\d,]*)\]", shape)
    return [math.prod(int(n) for n in dims.split(",") if n) * _bits(dtype) // 8 for dtype, dims in found]


def _bits(dtype: str) -> int:
    digits = re.search(r"\d+$", dtype)
    return ITEM_BITS.get(dtype) or int(digits[0] if digits else 8)


def report(config_spec: str, overrides: dict[str, str], devices: list[Any]) -> None:
    """Compiles the update for `devices` and prints what it needs."""
    config, recipe = make_recipe(config_spec, overrides)
    mesh = make_mesh(config.mesh, devices)
    begin = time.perf_counter()
    with jax.set_mesh(mesh):
        program = make_program(recipe, config, mesh)
        traced = program.update.trace(program.state, program.batch)
        compiled = traced.lower().compile()
    seconds = time.perf_counter() - begin
    parameters = sum(leaf.size for leaf in flatten(program.state.params).values())
    axes = " × ".join(f"{axis} {size}" for axis, size in mesh.shape.items() if size > 1) or "one device"
    model, computed = recipe.flops_per_step / len(devices), count_flops(traced.jaxpr.jaxpr) / len(devices)
    table = Table("collective", "per step", "GiB per chip and step")
    for kind, found in find_collectives(compiled.as_text()).items():
        table.add_row(kind, str(found.count), f"{found.bytes / GIB:.4f}")
    console = Console(soft_wrap=True, highlight=False)
    console.print(f"{config_spec}: {parameters:,} parameters, batch {config.batch_size}, compiled in {seconds:.0f} s")
    console.print(f"{len(devices)} × {devices[0].device_kind}, mesh {axes}")
    console.print(f"memory per chip: {describe_memory(compiled.memory_analysis())}")
    console.print(f"FLOPs per chip and step: {model:.4g} of the model, {computed:.4g} with recomputation")
    console.print(table)


def describe_memory(memory: Any) -> str:
    """The sum of XLA's memory statistics and its parts; outputs that reuse donated arguments count once."""
    parts = {
        "state and batch": memory.argument_size_in_bytes,
        "temporary": memory.temp_size_in_bytes,
        "other outputs": memory.output_size_in_bytes - memory.alias_size_in_bytes,
        "code": memory.generated_code_size_in_bytes,
    }
    detail = ", ".join(f"{name} {size / GIB:.2f}" for name, size in parts.items())
    return f"{sum(parts.values()) / GIB:.2f} GiB ({detail})"


def topology_devices(name: str) -> list[Any]:
    """The devices of a TPU topology that need not exist here; ValueError for an unknown one or without libtpu."""
    # No TPU virtual machine around us need be looked for, or warned about.
    os.environ |= {
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_ACCELERATOR_TYPE": "v5litepod-1",
    }
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # no TPU is opened, so several may compile at a time
    try:
        return list(topologies.get_topology_desc(platform="tpu", topology_name=name).devices)
    except Exception as error:  # the runtime's own error types are not public
        raise ValueError(f"no TPU topology {name!r}: {error}") from error


def virtual_devices(number: int) -> list[Any]:
    """So many CPU devices; ValueError where JAX has started with fewer."""
    with contextlib.suppress(RuntimeError):  # JAX has started
        jax.config.update("jax_num_cpu_devices", number)
    if jax.device_count() < number:
        raise ValueError(f"JAX has started with {jax.device_count()} devices, {number} are wanted")
    return jax.devices()[:number]


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser("python -m omnax.train.compile", allow_abbrev=False)
    add_common_arguments(parser)
    target = parser.add_mutually_exclusive_group(required=True)
    target.add_argument("--topology", help="TPU topology, as v5e:16x16")
    target.add_argument("--devices", type=int, help="number of virtual CPU devices")
    flags, rest = parser.parse_known_args(arguments)

    def run() -> None:
        jax.config.update("jax_platforms", "cpu")
        devices = topology_devices(flags.topology) if flags.topology else virtual_devices(flags.devices)
        report(flags.config, parse_overrides(rest), devices)

    return report_errors(run, flags.debug)


if __name__ == "__main__":
    sys.exit(main())
