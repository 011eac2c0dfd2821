"""Named activation layouts: one line in a model says how an array is spread over the mesh, if there is one.

Parameters get their layout from regex rules (train/sharding.py); the compiler derives nearly every activation from
them. The few arrays where it needs a hint are constrained here, by the meaning of each dimension.
"""

import math

import jax
from jax.sharding import PartitionSpec
from jaxtyping import Array, Shaped

# What a dimension means -> the mesh axes it is spread over. The batch is split over data, fsdp and expert: fully
# sharded data parallelism shards parameters *and* batch along the same devices, and experts meet the tokens of their
# group.
AXES: dict[str, tuple[str, ...]] = {
    "batch": ("data", "fsdp", "expert"),
    "length": ("context",),
    "heads": ("tensor",),
    "mlp": ("tensor",),
    "vocab": ("tensor",),
    "expert": ("expert",),
}


def constrain(x: Shaped[Array, "..."], *names: str | None) -> Shaped[Array, "..."]:
    """Asks the compiler to lay `x` out by the named dimensions (keys of `AXES`; None = replicated).

    A no-op outside a mesh context (`jax.set_mesh`), inside `shard_map`, and for every dimension its mesh axes do not
    divide (a batch of one during generation, say): those stay replicated.
    """
    assert len(names) == x.ndim, f"{len(names)} names for {x.ndim} dimensions"
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.manual_axes:
        return x
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*map(mesh_axes, [mesh] * x.ndim, x.shape, names)))


def mesh_axes(mesh: jax.sharding.AbstractMesh, size: int, name: str | None) -> tuple[str, ...] | None:
    """The axes of `mesh` that a dimension of this size and meaning is spread over; None if it stays replicated."""
    axes = tuple(axis for axis in AXES[name] if axis in mesh.shape) if name else ()
    return axes if axes and size % math.prod(mesh.shape[axis] for axis in axes) == 0 else None
