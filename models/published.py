"""What is published of a system: its sizes and the checkpoints they fit, described without weights.

A model's file ends with its `PUBLISHED`; `systems.py` names them all; `python -m omnax.models` prints them.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from ..kernels.flops import count_flops

Tree = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Published:
    """One published network, the inputs of one forward pass, and the checkpoint that fits it."""

    build: Callable[[bool], nn.Module]  # whether to scan over its layers (if it can) -> the module
    inputs: Mapping[str, Any]  # abstract arguments of the module
    checkpoint: str  # ids of hub repositories, or names of files; "": only the size is published
    flops: int | None = None  # of the products of one forward pass; None: counted in the traced program
    sums: Mapping[str, str] = dataclasses.field(default_factory=dict)  # words -> regex of the parameters they count


@dataclasses.dataclass(frozen=True)
class Description:
    """What a published network consists of and does."""

    params: Tree  # abstract
    variables: Tree  # collections beside the parameters, abstract
    flops: int  # of the products of one forward pass


def describe(published: Published, *, scan: bool = False) -> Description:
    """Parameters and floating-point operations, by tracing; scanned layers are traced once, and stacked."""
    module = published.build(scan)
    collections: Any = jax.eval_shape(module.init, jax.random.key(0), **published.inputs)
    flops = published.flops
    if flops is None:
        flops = count_flops(jax.make_jaxpr(module.apply)(collections, **published.inputs).jaxpr)
    return Description(collections["params"], {k: v for k, v in collections.items() if k != "params"}, flops)


def count(tree: Any) -> int:
    """The numbers in a tree of (abstract) arrays."""
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def floats(*shape: int) -> Any:
    """An abstract float32 array, in the place of a real one."""
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def integers(*shape: int) -> Any:
    """An abstract int32 array, in the place of a real one."""
    return jax.ShapeDtypeStruct(shape, jnp.int32)
