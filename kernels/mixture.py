"""Mixtures of experts without capacity: every token goes through its chosen experts' gated MLPs, none is dropped.

Four forms of one function, which "auto" chooses among by shapes and platform:

    gather    fewer rows than experts (decoding): the weights of each row's expert are picked out
    ragged    TPU: rows sorted by expert, `jax.lax.ragged_dot` (a grouped product there)
    blocks    elsewhere, where that would be a dense product over all experts: sorted rows in blocks of one expert each,
              a loop that reads one expert's weights at a time, with a backward pass of its own
    dense     all experts on all rows: the definition, and cheapest where the experts are few and small

Source: transformers models/qwen3_vl_moe; blocks after MegaBlocks (arXiv 2211.15841).
"""

import functools
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

from .attention_platform import platform
from .window_attention import permute

Form = Literal["auto", "gather", "ragged", "blocks", "dense"]
Activation = Callable[[Array], Array]


def route(logits: Float[Array, "*b E"], count: int) -> tuple[Float[Array, "*b k"], Int[Array, "*b k"]]:
    """The `count` likeliest experts of each token and their weights, which sum to 1; in float32."""
    weights, chosen = lax.top_k(jax.nn.softmax(logits.astype(jnp.float32), axis=-1), count)
    return weights / weights.sum(-1, keepdims=True), chosen


def mixture(
    x: Float[Array, "M D"],
    weights: Float[Array, "M k"],
    chosen: Int[Array, "M k"],
    gate: Float[Array, "E D F"],
    up: Float[Array, "E D F"],
    down: Float[Array, "E F D"],
    *,
    activation: Activation,
    form: Form = "auto",
    partial: bool = False,
) -> Float[Array, "M D"]:
    """Σ_k weights_k down_k(activation(gate_k x) · up_k x) over the chosen experts.

    Args:
      x: Tokens.
      weights: Of each token's experts.
      chosen: Their numbers. Numbers that no expert has add nothing: those of other devices.
      gate: First kernels of the experts' gated MLPs, whose result goes through the activation.
      up: First kernels whose result does not.
      down: Second kernels.
      activation: Elementwise; hashable.
      form: See the module.
      partial: Whether many rows may be those of other devices, so that the time should follow the rows that are not.
    """
    experts, (tokens, count) = len(gate), chosen.shape
    weights = weights.astype(x.dtype)
    kernels = tuple(kernel.astype(x.dtype) for kernel in (gate, up, down))
    if form == "auto":
        grouped: Form = "ragged" if platform().name == "tpu" else "blocks"
        form = "gather" if tokens * count <= experts else grouped
    if form == "dense":
        return _dense(x, weights, chosen, kernels, activation)
    if form == "gather":
        return _gathered(x, weights, chosen, kernels, activation)
    return _grouped(x, weights, chosen, *kernels, count=count, activation=activation, partial=partial, form=form)


def _dense(x, weights, chosen, kernels, activation):
    gate, up, down = kernels
    share = (jax.nn.one_hot(chosen, len(gate), dtype=x.dtype) * weights[..., None]).sum(1)  # M E
    hidden = activation(jnp.einsum("md,edf->emf", x, gate)) * jnp.einsum("md,edf->emf", x, up)
    return jnp.einsum("emf,efd->md", hidden * share.T[..., None], down)


def _gathered(x, weights, chosen, kernels, activation):
    """A chosen expert of another device is read as one of these and weighs nothing."""
    experts = len(kernels[0])
    own = (chosen >= 0) & (chosen < experts)
    gate, up, down = (kernel[jnp.where(own, chosen, 0)] for kernel in kernels)  # M k D F
    hidden = activation(jnp.einsum("md,mkdf->mkf", x, gate)) * jnp.einsum("md,mkdf->mkf", x, up)
    return jnp.einsum("mkf,mkfd->md", hidden * jnp.where(own, weights, 0)[..., None], down)


def _grouped(x, weights, chosen, gate, up, down, *, count, activation, partial, form):
    """Rows sorted by expert, those of no expert here last."""
    experts = len(gate)
    numbers = chosen.reshape(-1)
    numbers = jnp.where((numbers >= 0) & (numbers < experts), numbers, experts)
    order = jnp.argsort(numbers, stable=True).astype(jnp.int32)
    back = jnp.zeros_like(order).at[order].set(jnp.arange(len(order), dtype=jnp.int32))
    rows = permute(jnp.repeat(x, count, axis=0)[None], order[None], back[None])[0]
    sizes = jnp.zeros(experts + 1, jnp.int32).at[numbers].add(1)[:experts]
    if form == "ragged":
        mixed = _ragged(rows, sizes, gate, up, down, activation=activation)
    else:
        mixed = _blocks(rows, sizes, gate, up, down, activation=activation, partial=partial)
    mixed = permute(mixed[None], back[None], order[None])[0].reshape(*chosen.shape, -1)
    return (mixed * weights[..., None]).sum(1)


def _ragged(rows, sizes, gate, up, down, *, activation) -> Any:
    hidden = activation(lax.ragged_dot(rows, gate, sizes)) * lax.ragged_dot(rows, up, sizes)
    mixed = lax.ragged_dot(hidden, down, sizes)
    return jnp.where((jnp.arange(len(rows)) < sizes.sum())[:, None], mixed, 0)


def _blocks(rows, sizes, gate, up, down, *, activation, partial) -> Any:
    """Groups begin a new block each; the bound on their number is all that is static."""
    most, experts = len(rows), len(gate)
    # A tenth of the rows at most is padding, as far as blocks of 8 allow
    size = int(np.clip(2 ** int(np.log2(max(most / (10 * experts), 1))), 8, 256))
    bound = (most + experts * (size - 1)) // size
    return _loop(rows, sizes, gate, up, down, activation, size, bound, partial)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6, 7, 8))
def _loop(rows, sizes, gate, up, down, activation, size, bound, partial):
    padded = jnp.pad(rows, ((0, size), (0, 0)))
    plan = _plan(sizes, len(rows), size, bound)

    def body(number, out):
        expert, begin, _ = (part[number] for part in plan)
        block = lax.dynamic_slice_in_dim(padded, begin, size)
        mixed = _mlp(block, gate[expert], up[expert], down[expert], activation)
        # What goes beyond the group's end is written again by the groups that follow
        return lax.dynamic_update_slice_in_dim(out, mixed, begin, 0)

    out = lax.fori_loop(0, _last(sizes, size, bound, partial), body, jnp.zeros_like(padded))
    return jnp.where((jnp.arange(len(rows)) < sizes.sum())[:, None], out[: len(rows)], 0)


def _mlp(x, gate, up, down, activation):
    return (activation(x @ gate) * (x @ up)) @ down


def _plan(sizes, rows, size, bound):
    """Expert, first row, and end of the group, of every block; blocks that are not needed lie behind the rows."""
    ends = jnp.cumsum(sizes)
    blocks = jnp.cumsum(-(-sizes // size))
    number = jnp.arange(bound, dtype=jnp.int32)
    expert = jnp.minimum(jnp.searchsorted(blocks, number, side="right"), len(sizes) - 1).astype(jnp.int32)
    first = blocks[expert] - -(-sizes[expert] // size)
    begin = jnp.where(number < blocks[-1], ends[expert] - sizes[expert] + (number - first) * size, rows)
    return expert, begin, ends[expert]


def _last(sizes, size, bound, partial):
    return (-(-sizes // size)).sum() if partial else bound


def _loop_forward(rows, sizes, gate, up, down, activation, size, bound, partial):
    out = _loop(rows, sizes, gate, up, down, activation, size, bound, partial)
    return out, (rows, sizes, gate, up, down)


def _loop_backward(activation, size, bound, partial, residuals, cotangent):
    rows, sizes, gate, up, down = residuals
    rows_padded, cotangent = (jnp.pad(x, ((0, size), (0, 0))) for x in (rows, cotangent))
    plan = _plan(sizes, len(rows), size, bound)

    def body(number, grads):
        expert, begin, end = (part[number] for part in plan)
        inside = (begin + jnp.arange(size) < end)[:, None]
        block = lax.dynamic_slice_in_dim(rows_padded, begin, size)
        given = jnp.where(inside, lax.dynamic_slice_in_dim(cotangent, begin, size), 0)
        one = (gate[expert], up[expert], down[expert])
        _, pull_back = jax.vjp(functools.partial(_mlp, activation=activation), block, *one)
        of_rows, *of_kernels = pull_back(given)
        kernels = (total.at[expert].add(found) for total, found in zip(grads[1:], of_kernels, strict=True))
        return lax.dynamic_update_slice_in_dim(grads[0], of_rows, begin, 0), *kernels

    zeros = tuple(jnp.zeros_like(x) for x in (rows_padded, gate, up, down))
    of_rows, *of_kernels = lax.fori_loop(0, _last(sizes, size, bound, partial), body, zeros)
    # Rows of no group have no derivative; the last block of a group may have written beyond it
    of_rows = jnp.where((jnp.arange(len(rows)) < sizes.sum())[:, None], of_rows[: len(rows)], 0)
    return of_rows, None, *of_kernels


_loop.defvjp(_loop_forward, _loop_backward)
