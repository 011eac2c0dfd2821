"""Whole rows of short attention in one Pallas kernel for TPUs: logits never leave the chip's vector memory.

A program takes one example with all of its heads, [T, N H] as the projections leave it: nothing is transposed to
heads-first, padded to tiles or widened to 128 lanes a head. The backward pass takes the softmax again and gives all
three gradients at once. One layer reads and writes four arrays forward and eight backward. Softmax in float32, products
as the XLA back end rounds them.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import PartitionSpec
from jaxtyping import Array

from .constraints import mesh_axes

_MEMORY = 14 * 2**20  # of the 16 MiB of vector memory that a kernel gets
_HIDDEN = -0.25 * float(jnp.finfo(jnp.float32).max)


def fits(length: int, keys: int, width: int, itemsize: int) -> bool:
    """Whether the arrays of an example, `width` numbers a token, and its heads' logits fit into vector memory."""
    blocks = 2 * (4 * length + 4 * keys) * width * itemsize  # the backward pass's; the next example comes meanwhile
    return blocks + 6 * length * keys * 4 <= _MEMORY


def attend_rows(query, key, value, causal: bool, scale: float, interpret: bool = False):
    """softmax(scale · query keyᵀ) value of [B, T, N, H], [B, S, N, H] twice, on each device's examples and heads."""
    mesh = jax.sharding.get_abstract_mesh()
    run = functools.partial(_attend_on_device, causal=causal, scale=scale, interpret=interpret)
    if mesh.empty or mesh.manual_axes:
        return run(query, key, value)
    batch, heads = mesh_axes(mesh, key.shape[0], "batch"), mesh_axes(mesh, key.shape[2], "heads")
    spread = PartitionSpec(batch, None, heads, None)
    return jax.shard_map(run, in_specs=(spread,) * 3, out_specs=spread, check_vma=False)(query, key, value)


def _attend_on_device(query, key, value, *, causal, scale, interpret):
    rows = (x.reshape(*x.shape[:2], -1) for x in (query, key, value))
    out: Array = _mix(*rows, (query.shape[2], causal, scale, interpret))
    return out.reshape(query.shape)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _mix(query, key, value, static):
    return _call(_forward_kernel, (query, key, value), (query,), static)[0]


def _mix_forward(query, key, value, static):
    out = _mix(query, key, value, static)
    return out, (query, key, value, out)


def _mix_backward(static, residuals, gradient):
    query, key, value, out = residuals
    return tuple(_call(_backward_kernel, (query, key, value, out, gradient), (query, key, value), static))


_mix.defvjp(_mix_forward, _mix_backward)


def _call(kernel, inputs, like, static):
    heads, causal, scale, interpret = static
    block = lambda x: pl.BlockSpec((1, *x.shape[1:]), lambda i: (i, 0, 0))  # noqa: E731
    return pl.pallas_call(
        functools.partial(kernel, heads=heads, causal=causal, scale=scale),
        grid=(len(inputs[0]),),
        in_specs=[block(x) for x in inputs],
        out_specs=[block(x) for x in like],
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in like],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",)),
        interpret=interpret,
        name=f"attention_rows{kernel.__name__}",
    )(*inputs)


def _forward_kernel(query, key, value, out, *, heads, causal, scale):
    for head in _lanes(query, heads):
        q, k, v = ((scale * query[0, :, head]).astype(query.dtype), key[0, :, head], value[0, :, head])
        weights, total = _weights(q, k, causal)
        out[0, :, head] = (_dot(weights.astype(v.dtype), v, 1, 0) / total).astype(out.dtype)


def _backward_kernel(query, key, value, out, gradient, to_query, to_key, to_value, *, heads, causal, scale):
    for head in _lanes(query, heads):
        q, k, v = ((scale * query[0, :, head]).astype(query.dtype), key[0, :, head], value[0, :, head])
        g = gradient[0, :, head]
        weights, total = _weights(q, k, causal)
        weights = weights / total
        overlap = (g.astype(jnp.float32) * out[0, :, head].astype(jnp.float32)).sum(-1, keepdims=True)
        to_logits = (weights * (_dot(g, v, 1, 1) - overlap)).astype(q.dtype)
        to_query[0, :, head] = (scale * _dot(to_logits, k, 1, 0)).astype(to_query.dtype)
        to_key[0, :, head] = _dot(to_logits, q, 0, 0).astype(to_key.dtype)
        to_value[0, :, head] = _dot(weights.astype(g.dtype), g, 0, 0).astype(to_value.dtype)


def _lanes(query, heads):
    width = query.shape[-1] // heads
    return [slice(i * width, (i + 1) * width) for i in range(heads)]


def _weights(query, key, causal):
    """exp(logits - their largest) [T, S] and its sums [T, 1], float32."""
    logits = _dot(query, key, 1, 1)
    if causal:
        rows, columns = (jax.lax.broadcasted_iota(jnp.int32, logits.shape, i) for i in (0, 1))
        logits = jnp.where(columns <= rows, logits, _HIDDEN)
    weights = jnp.exp(logits - logits.max(-1, keepdims=True))
    return weights, weights.sum(-1, keepdims=True)


def _dot(a, b, i: int, j: int):
    """The product over dimension i of a and j of b, float32."""
    return jax.lax.dot_general(a, b, (((i,), (j,)), ((), ())), preferred_element_type=jnp.float32)
