"""The device mesh, and where the train state and the batches lie on it.

A sharding rule gives a parameter's layout as text: one word per trailing dimension, `-` for a whole dimension, a mesh
axis (or several, joined by `+`) for a split one. "fsdp tensor" splits the last two dimensions of a kernel, whatever
layer axis stands before them; "-" or "" replicates. Every split must divide its dimension; `|` separates fallbacks,
tried in order: "fsdp tensor|fsdp -". "auto" splits the largest dimension that fsdp divides, or replicates.
"""

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from ..kernels.constraints import AXES
from ..models.ranges import CountOrRest
from .rules import Rules, Tree, flatten, match_rules

MESH_AXES = ("data", "fsdp", "tensor", "context", "expert")
MIN_AUTO_SIZE = 2**14  # elements; gathering smaller parameters costs more latency than their copies cost memory


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """Devices per mesh axis; one axis may be -1: all that remain."""

    data: CountOrRest = -1
    fsdp: CountOrRest = 1
    tensor: CountOrRest = 1
    context: CountOrRest = 1
    expert: CountOrRest = 1


def make_mesh(config: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """The mesh over `devices` (default: all); ValueError where the sizes do not multiply to their number."""
    devices = jax.devices() if devices is None else devices
    sizes = dataclasses.asdict(config)
    fixed = math.prod(size for size in sizes.values() if size != -1)
    free = [axis for axis, size in sizes.items() if size == -1]
    if len(free) > 1 or len(devices) % fixed or (not free and fixed != len(devices)):
        raise ValueError(f"mesh {sizes} does not fit {len(devices)} devices")
    shape = tuple(len(devices) // fixed if size == -1 else size for size in sizes.values())
    # Split: a mesh axis may take part of a TPU torus' axis, as context=4 does of an 8x8x8.
    grid = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    return Mesh(grid, MESH_AXES, axis_types=(AxisType.Auto,) * len(shape))


def param_specs(rules: Rules[str], params: Tree, mesh: Mesh) -> dict[str, PartitionSpec]:
    """The layout of every parameter (arrays or shapes) by path."""
    layouts = match_rules(rules, flatten(params), "sharding")
    return {path: _spec(layouts[path], path, leaf.shape, mesh) for path, leaf in flatten(params).items()}


def _spec(layout: str, path: str, shape: tuple[int, ...], mesh: Mesh) -> PartitionSpec:
    if layout == "auto":
        return _largest(shape, mesh)
    for choice in layout.split("|"):
        words = choice.split()
        if len(words) > len(shape):
            raise ValueError(f"sharding of {path!r}: {choice!r} has {len(words)} dimensions, the shape is {shape}")
        axes = [() if word == "-" else tuple(word.split("+")) for word in words]
        if unknown := [axis for group in axes for axis in group if axis not in mesh.shape]:
            raise ValueError(f"sharding of {path!r}: unknown mesh axes {unknown}, expected some of {MESH_AXES}")
        axes = [()] * (len(shape) - len(axes)) + axes
        if all(size % _size(mesh, group) == 0 for size, group in zip(shape, axes, strict=True)):
            return PartitionSpec(*(group or None for group in axes))
    raise ValueError(f"sharding of {path!r}: {layout!r} does not divide {shape} on mesh {dict(mesh.shape)}")


def _size(mesh: Mesh, axes: Iterable[str]) -> int:
    return math.prod(mesh.shape[axis] for axis in axes)


def _largest(shape: tuple[int, ...], mesh: Mesh) -> PartitionSpec:
    fits = [i for i, size in enumerate(shape) if size % mesh.shape["fsdp"] == 0]
    if not fits or math.prod(shape) < MIN_AUTO_SIZE:
        return PartitionSpec()
    largest = max(fits, key=lambda i: shape[i])
    return PartitionSpec(*("fsdp" if i == largest else None for i in range(len(shape))))


def tree_shardings(tree: Any, params: Tree, specs: Mapping[str, PartitionSpec], mesh: Mesh) -> Any:
    """A sharding per leaf of a train state (arrays or shapes).

    A leaf lies as the parameter whose path ends its own and whose shape it has: optimiser moments, averages and
    teachers follow their parameters. All other leaves are replicated.
    """
    shapes = {path: leaf.shape for path, leaf in flatten(params).items()}

    def sharding(key_path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        keys = [str(key.key) for key in key_path if isinstance(key, jax.tree_util.DictKey)]
        suffixes = ("/".join(keys[i:]) for i in range(len(keys)))
        path = next((path for path in suffixes if shapes.get(path) == leaf.shape), None)
        return NamedSharding(mesh, specs[path] if path else PartitionSpec())

    return jax.tree_util.tree_map_with_path(sharding, tree)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Examples are split over the data and fsdp axes."""
    return NamedSharding(mesh, PartitionSpec(AXES["batch"]))
