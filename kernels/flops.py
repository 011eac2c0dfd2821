"""Floating-point operations of a program, counted from its jaxpr: two per multiply-accumulate of its products."""

import math
from typing import Any

import jax
from jax.interpreters import partial_eval


def count_flops(jaxpr: Any) -> int:
    """FLOPs of the products and convolutions that a jaxpr's outputs need, over all devices and iterations of scans."""
    return _flops(partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))[0])


def _flops(jaxpr: Any) -> int:
    total = 0
    for equation in jaxpr.eqns:
        name, params = equation.primitive.name, equation.params
        if name == "dot_general":
            (contracted, _), _ = params["dimension_numbers"]
            depth = math.prod(equation.invars[0].aval.shape[axis] for axis in contracted)
            total += 2 * depth * equation.outvars[0].aval.size
        elif name == "conv_general_dilated":
            kernel, out_axis = equation.invars[1].aval, params["dimension_numbers"].rhs_spec[0]
            zeros = math.prod(params["lhs_dilation"])  # one of so many pixels is not an inserted zero
            total += 2 * equation.outvars[0].aval.size * kernel.size // kernel.shape[out_axis] // zeros
        elif name == "cond":  # also how a function chooses its form by platform: one branch runs
            total += max(_flops(branch.jaxpr) for branch in params["branches"])
        else:
            inner = [getattr(x, "jaxpr", x) for x in jax.tree.leaves(list(params.values()), is_leaf=_is_jaxpr)]
            total += sum(map(_flops, filter(_is_jaxpr, inner))) * _times(name, params)
    return total


def _times(name: str, params: dict[str, Any]) -> int:
    """How often an equation runs its jaxpr: a scan per iteration, a shard_map on every device along its axes."""
    if name == "shard_map":
        return math.prod(params["mesh"].shape[axis] for axis in params["newly_manual_axes"])
    return params.get("length", 1)


def _is_jaxpr(x: Any) -> bool:
    return hasattr(x, "eqns")
