"""Low-rank adaptation (LoRA, arXiv 2106.09685): a frozen projection W x learns beside it a term scale · B (A x).

Parameters lie beside those of the projection: `query/kernel` has `query_lora/{a, b}`.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import traverse_util
from jax.typing import DTypeLike
from jaxtyping import Array, Float

SUFFIX = "_lora"


class LowRank(nn.Module):
    """x [B, T, *in] -> [B, T, *features] through `rank` channels; zero at first, since b is."""

    features: tuple[int, ...]
    rank: int
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "B T ..."]) -> Float[Array, "B T ..."]:
        inner = x.shape[2:]
        # U(±1/sqrt(fan_in)), as the published code has it (Kaiming uniform with slope sqrt(5))
        in_axes = tuple(range(len(inner)))
        init = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform", in_axis=in_axes, out_axis=-1)
        a = self.param("a", init, (*inner, self.rank))
        b = self.param("b", nn.initializers.zeros, (self.rank, *self.features))
        narrow = jnp.tensordot(x.astype(self.dtype), a.astype(self.dtype), len(inner))
        return jnp.tensordot(narrow, b.astype(self.dtype), 1)


def merge(params: dict[str, Any], scale: float) -> dict[str, Any]:
    """Parameters without low-rank terms that compute the same: each is added into its projection's kernel."""
    flat: dict[tuple[str, ...], Any] = traverse_util.flatten_dict(params)  # type: ignore[assignment]
    merged = {path: leaf for path, leaf in flat.items() if not path[-2].endswith(SUFFIX)}
    for path, a in flat.items():
        if path[-2].endswith(SUFFIX) and path[-1] == "a":
            b = flat[*path[:-1], "b"]
            target = (*path[:-2], path[-2].removesuffix(SUFFIX), "kernel")
            product = jax.vmap(_product) if "blocks" in path else _product
            merged[target] = merged[target] + (scale * product(a, b)).astype(merged[target].dtype)
    return traverse_util.unflatten_dict(merged)


def _product(a: Array, b: Array) -> Array:
    return jnp.tensordot(a, b, 1)
