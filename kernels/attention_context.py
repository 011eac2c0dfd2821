"""Attention over lengths that lie on the devices of a mesh's `context` axis, none of which ever holds all of a layer.

- By heads (DeepSpeed-Ulysses, arXiv:2309.14509): an all-to-all gives each device the whole length for its share of the
  heads, where the platform's own kernel runs, and another brings the result back. Taken where the key heads divide.
- In a ring (arXiv:2310.01889): keys and values go round, and each device adds what its queries see of them, forward;
  backward they go round once more with their gradients. Its blocks are those of the XLA back end, everywhere.

Both are balanced but for a causal ring, where the first devices see little. Memory falls with the axis in both.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec
from jaxtyping import Array

from .attention_xla import Rules, add_blocks, cast, finished, in_blocks, no_blocks, overlap, pull_blocks
from .constraints import mesh_axes

AXIS = "context"
_BLOCK = 1024  # of the ring, where the call says none


def context_size(length: int, keys: int) -> int:
    """The devices over which both lengths lie; 1 outside a mesh, inside `shard_map`, and where they do not divide."""
    mesh = jax.sharding.get_abstract_mesh()
    size = 1 if mesh.empty or mesh.manual_axes else mesh.shape.get(AXIS, 1)
    return size if length % size == 0 and keys % size == 0 else 1


def attend_over_context(run: Callable[..., Array], query, key, value, segment_ids, lengths, words):
    """What `run(query, key, value, segment_ids, key_lengths)` gives on one device, over the mesh in use.

    `words`: (causal, window, scale, block size) for the ring.
    """
    mesh = jax.sharding.get_abstract_mesh()
    batch, heads = mesh_axes(mesh, key.shape[0], "batch"), mesh_axes(mesh, key.shape[2], "heads")
    share = key.shape[2] // (mesh.shape["tensor"] if heads else 1)
    part = _by_heads if share % mesh.shape[AXIS] == 0 else functools.partial(_in_ring, words=words)
    spread, row = PartitionSpec(batch, AXIS, heads, None), PartitionSpec(batch, AXIS)
    mapped = jax.shard_map(
        lambda *arrays: part(run, *arrays),
        in_specs=(spread, spread, spread, row, PartitionSpec(batch)),
        out_specs=spread,
        check_vma=False,
    )
    return mapped(query, key, value, segment_ids, lengths)


def _by_heads(run, query, key, value, segment_ids, lengths):
    exchange = functools.partial(lax.all_to_all, axis_name=AXIS, tiled=True)
    query, key, value = (exchange(x, split_axis=2, concat_axis=1) for x in (query, key, value))
    ids = jax.tree.map(lambda ids: lax.all_gather(ids, AXIS, axis=1, tiled=True), segment_ids)
    return exchange(run(query, key, value, ids, lengths), split_axis=1, concat_axis=2)


def _in_ring(run, query, key, value, segment_ids, lengths, *, words):
    causal, window, scale, block_size = words
    length = query.shape[1]
    positions = (lax.axis_index(AXIS) * length + jnp.arange(length))[None] if causal else None
    segments = segment_ids if segment_ids is None or isinstance(segment_ids, tuple) else (segment_ids, segment_ids)
    rules = Rules(None, positions, segments, None, window)
    mix = functools.partial(_ring, keys=key.shape[1], lengths=lengths)
    return in_blocks(mix, query, key, value, rules, scale, block_size or _BLOCK)


def _ring(query, key, value, rules: Rules, groups: int, *, keys: int, lengths):
    """As `attention_xla.in_blocks` asks; `keys` are those of a device without padding, `lengths` of the whole rows."""
    limit = None if rules.length is None and lengths is None else keys
    arrays = rules.positions, rules.segments, lengths
    return _ring_mix(query, key, value, arrays, (rules.window, limit, keys, groups))


def _visit(arrays, static, source):
    """The rules of this device's queries for the keys that lie on device `source` at first."""
    positions, segments, lengths = arrays
    window, limit, keys, _ = static
    start = source * keys
    length = limit if lengths is None else jnp.minimum(lengths - start, keys)
    return Rules(None, positions if positions is None else positions - start, segments, length, window)


def _turn(tree):
    """To the next device of the ring, from the one before."""
    size = lax.axis_size(AXIS)
    return jax.tree.map(lambda x: lax.ppermute(x, AXIS, [(i, (i + 1) % size) for i in range(size)]), tree)


def _round(step, carry, moving, arrays, static):
    """`step(carry, moving, rules)` -> the same two, on every device's keys in turn; `moving` ends where it began."""
    positions, segments, lengths = arrays

    def visit(state, number):
        carry, moving, ids = state
        source = (lax.axis_index(AXIS) - number) % lax.axis_size(AXIS)
        seen = segments if segments is None else (segments[0], ids)
        carry, moving = step(carry, moving, _visit((positions, seen, lengths), static, source))
        return (carry, *_turn((moving, ids))), None

    start = carry, moving, segments if segments is None else segments[1]
    (carry, moving, _), _ = lax.scan(visit, start, jnp.arange(lax.axis_size(AXIS)))
    return carry, moving


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _ring_mix(query, key, value, arrays, static):
    return _ring_forward(query, key, value, arrays, static)[0]


def _ring_forward(query, key, value, arrays, static):
    def step(sums, moving, rules):
        key, value = moving
        return add_blocks(sums, query, key, value, rules, static[-1]), moving

    sums, _ = _round(step, no_blocks(query), (key, value), arrays, static)
    out, logsumexp = finished(sums, query.dtype)
    return out, (query, key, value, arrays, out, logsumexp)


def _ring_backward(static, residuals, gradient):
    query, key, value, arrays, out, logsumexp = residuals
    rows = query, gradient, overlap(gradient, out), logsumexp

    def step(to_query, moving, rules):
        key, value, *to_keys = moving
        more, to_keys = pull_blocks(tuple(to_keys), rows, key, value, rules, static[-1])
        return to_query + more, (key, value, *to_keys)

    zeros = [jnp.zeros(x.shape, jnp.float32) for x in (query, key, value)]
    to_query, (_, _, *to_keys) = _round(step, zeros[0], (key, value, *zeros[1:]), arrays, static)
    return *cast((to_query, *to_keys), (query, key, value)), None


_ring_mix.defvjp(_ring_forward, _ring_backward)
