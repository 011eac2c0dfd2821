"""Where parameters lie on a device mesh while they are read."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
from flax import traverse_util
from jax.sharding import Mesh, NamedSharding, PartitionSpec

Tree = dict[str, Any]
# (abstract parameters, mesh) -> layout by "/"-joined path; with rules bound, `train.sharding.param_specs` is one.
Layout = Callable[[Tree, Mesh], Mapping[str, PartitionSpec]]


def placed(params: Tree, mesh: Mesh | None, layout: Layout | None = None) -> Tree:
    """Abstract parameters with a sharding each; unchanged without a mesh."""
    if mesh is None:
        return params
    specs = (layout or fully_sharded)(params, mesh)
    leaves: dict[str, Any] = traverse_util.flatten_dict(params, sep="/")
    shardings = {path: NamedSharding(mesh, specs[path]) for path in leaves}
    return traverse_util.unflatten_dict(
        {path: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=shardings[path]) for path, x in leaves.items()}, sep="/"
    )


def fully_sharded(params: Tree, mesh: Mesh) -> dict[str, PartitionSpec]:
    """Splits the largest dimension that the fsdp axis divides, of everything but vectors."""
    leaves: dict[str, Any] = traverse_util.flatten_dict(params, sep="/")
    return {path: _split(leaf.shape, mesh.shape.get("fsdp", 1)) for path, leaf in leaves.items()}


def _split(shape: tuple[int, ...], devices: int) -> PartitionSpec:
    fits = [i for i, length in enumerate(shape) if length % devices == 0]
    if devices == 1 or len(shape) < 2 or not fits:
        return PartitionSpec()
    largest = max(fits, key=lambda i: shape[i])
    return PartitionSpec(*("fsdp" if i == largest else None for i in range(len(shape))))
