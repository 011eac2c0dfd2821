"""The mixture-of-experts MLP of Qwen3: a router without noise or capacity, gated experts, none of them shared.

Source: transformers models/qwen3_vl_moe. On a mesh, tokens and experts are spread over the `expert` axis: a chip
gathers the tokens of its group, does its own experts' part, and the parts are summed where the tokens came from.
"""

import functools
from collections.abc import Sequence

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from ...kernels.activations import ACTIVATIONS
from ...kernels.constraints import mesh_axes
from ...kernels.mixture import mixture, route


@flax.struct.dataclass
class RouterLoad:
    """Sums over the tokens of each row that are no padding; a layer axis before them where layers are stacked."""

    chosen: Float[Array, "B E"]  # how often each expert was chosen
    probability: Float[Array, "B E"]  # of each expert
    tokens: Float[Array, " B"]


class Experts(nn.Module):
    """x -> (Σ over the chosen experts of weight · down(activation(gate x) · up x), what the router did)."""

    num_experts: int
    per_token: int
    hidden: int
    activation: str
    kernel_init: nn.initializers.Initializer
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"], mask: Bool[Array, "B T"]) -> tuple[Float[Array, "B T D"], RouterLoad]:
        experts, width = self.num_experts, x.shape[-1]
        router = nn.Dense(experts, use_bias=False, kernel_init=self.kernel_init, dtype=self.dtype, name="router")
        logits = router(x).astype(jnp.float32)
        weights, chosen = route(logits, self.per_token)
        shapes = {"gate": (width, self.hidden), "up": (width, self.hidden), "down": (self.hidden, width)}
        made = (self.param(name, self.kernel_init, (experts, *shape)) for name, shape in shapes.items())
        kernels = [jnp.asarray(kernel, self.dtype) for kernel in made]
        mixed = _spread(x, weights, chosen, kernels, self.activation)
        return mixed, _load(logits, chosen, mask)


def _load(logits: Float[Array, "B T E"], chosen: Int[Array, "B T k"], mask: Bool[Array, "B T"]) -> RouterLoad:
    kept = mask.astype(jnp.float32)
    counts = jax.nn.one_hot(chosen, logits.shape[-1]).sum(-2)
    sums = (jnp.einsum("bte,bt->be", x, kept) for x in (counts, jax.nn.softmax(logits, axis=-1)))
    return RouterLoad(next(sums), next(sums), kept.sum(1))


def _mix(
    x: Float[Array, "B T D"],
    weights: Float[Array, "B T k"],
    chosen: Int[Array, "B T k"],
    kernels: Sequence[Array],
    activation: str,
    partial: bool = False,
) -> Float[Array, "B T D"]:
    flat = (y.reshape(-1, y.shape[-1]) for y in (x, weights, chosen))
    return mixture(*flat, *kernels, activation=ACTIVATIONS[activation], partial=partial).reshape(x.shape)


def _spread(
    x: Float[Array, "B T D"],
    weights: Float[Array, "B T k"],
    chosen: Int[Array, "B T k"],
    kernels: Sequence[Array],
    activation: str,
) -> Float[Array, "B T D"]:
    """`_mix` on the mesh in use: sorting stays on the chip; ValueError where experts do not divide over their axis."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.manual_axes or mesh.size == 1:
        return _mix(x, weights, chosen, kernels, activation)
    experts, hidden = kernels[0].shape[0], kernels[0].shape[2]
    groups = mesh.shape.get("expert", 1)
    if experts % groups:
        raise ValueError(f"{experts} experts are not divisible by the {groups} devices of the mesh axis 'expert'")
    rows = mesh_axes(mesh, x.shape[0], "batch")
    tokens = PartitionSpec(rows, mesh_axes(mesh, x.shape[1], "length"), None)
    columns = mesh_axes(mesh, hidden, "mlp")
    own = "expert" if groups > 1 else None
    gathers = groups > 1 and rows is not None and "expert" in rows
    first, second = PartitionSpec(own, None, columns), PartitionSpec(own, columns, None)

    def on_chip(x, weights, chosen, *kernels):
        if gathers:
            gather = functools.partial(lax.all_gather, axis_name="expert", axis=0, tiled=True)
            x, weights, chosen = gather(x), gather(weights), gather(chosen)
        if groups > 1:
            chosen = chosen - lax.axis_index("expert") * (experts // groups)
        mixed = _mix(x, weights, chosen, kernels, activation, partial=groups > 1)
        if columns:
            mixed = lax.psum(mixed, columns)
        if gathers:
            return lax.psum_scatter(mixed, "expert", scatter_dimension=0, tiled=True)
        return lax.psum(mixed, "expert") if groups > 1 else mixed

    # Which values differ between chips is not followed: loops begin with zeros, which do not
    return jax.shard_map(
        on_chip, in_specs=(tokens, tokens, tokens, first, first, second), out_specs=tokens, check_vma=False
    )(x, weights, chosen, *kernels)
