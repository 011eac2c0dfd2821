"""The XLA back end of attention: dense, or in blocks with the recurrences of FlashAttention (arXiv:2307.08691).

Inside, heads come first, and the T queries of the G = N / K heads that share a key head are R = G T rows: queries
[B, K, R, H], keys and values [B, K, S, H]. The gradients are written out: they keep inputs and output and take the
softmax again. In blocks this makes memory linear in length; on CPUs it halves forward and backward (one layer of ViT-B
at batch 8: 32 ms, against 79 for autodiff of einsum, softmax, einsum).
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange
from jax import lax
from jaxtyping import Array

# Added to the logits of keys that a query does not see: far below any logit, and two of them still do not overflow.
_HIDDEN = -0.25 * float(jnp.finfo(jnp.float32).max)


class Rules(NamedTuple):
    """Which keys a query sees: those that every rule allows; None is no rule."""

    mask: Array | None = None  # bool [#B, #K, #G, #T, #S]
    positions: Array | None = None  # int [#B, T], of the queries among the keys: they see the keys up to it
    segments: tuple[Array, Array] | None = None  # int, of the queries [B, T] and the keys [B, S]
    length: Array | int | None = None  # int [#B]: the keys from here on are padding
    window: Array | int | None = None  # of the keys up to its position a query sees the last so many


def attend(query, key, value, rules: Rules, scale: float):
    """softmax(scale · query keyᵀ) value of [B, T, N, H], [B, S, K, H] twice; zeros where a query sees nothing."""
    groups = query.shape[2] // key.shape[2]
    visible = _visible_rows(rules, jnp.arange(key.shape[1]), groups, query.shape[1])
    rows = rearrange(scale * query, "b t (k g) h -> b k (g t) h", g=groups)
    key, value = (rearrange(x, "b s k h -> b k s h") for x in (key, value))
    out = _softmax_mix(rows, key, value, visible)
    if visible is not None:
        out = jnp.where(visible.any(-1, keepdims=True), out, 0)
    return rearrange(out, "b k (g t) h -> b t (k g) h", g=groups)


def attend_biased(query, key, value, bias, rules: Rules, scale: float):
    """softmax(scale · query keyᵀ + bias) value; the bias [#B, #N, T, S] has a gradient, so autodiff does all of it."""
    groups = query.shape[2] // key.shape[2]
    visible = _visible_rows(rules, jnp.arange(key.shape[1]), groups, query.shape[1])
    heads = bias if bias.shape[1] > 1 else jnp.broadcast_to(bias, (bias.shape[0], query.shape[2], *bias.shape[2:]))
    rows = rearrange(scale * query, "b t (k g) h -> b k (g t) h", g=groups)
    key, value = (rearrange(x, "b s k h -> b k s h") for x in (key, value))
    logits = _logits(rows, key, visible) + rearrange(heads, "b (k g) t s -> b k (g t) s", g=groups)
    out = _mix(jax.nn.softmax(logits), value).astype(query.dtype)
    if visible is not None:
        out = jnp.where(visible.any(-1, keepdims=True), out, 0)
    return rearrange(out, "b k (g t) h -> b t (k g) h", g=groups)


def attend_blockwise(query, key, value, rules: Rules, scale: float, block_size: int):
    """The same over pairs of one block of queries and one of keys, so that no array is quadratic in length."""
    return in_blocks(_softmax_mix_blocks, query, key, value, rules, scale, block_size)


def in_blocks(mix, query, key, value, rules: Rules, scale: float, block_size: int):
    """`mix(queries [n, B, K, R, H], keys and values [m, B, K, S, H], rules, G)`, laid out as the whole again."""
    length, keys, groups = query.shape[1], key.shape[1], query.shape[2] // key.shape[2]
    size, key_size = min(block_size, length), min(block_size, keys)
    rows = rearrange(_pad(scale * query, 1, size), "b (n t) (k g) h -> n b k (g t) h", t=size, g=groups)
    key, value = (rearrange(_pad(x, 1, key_size), "b (m s) k h -> m b k s h", s=key_size) for x in (key, value))
    out: Array = mix(rows, key, value, _padded(rules, size, key_size, keys), groups)
    return rearrange(out, "n b k (g t) h -> b (n t) (k g) h", g=groups)[:, :length]


def visible_keys(rules: Rules, key_positions: Array) -> Array | None:
    """Which of the keys at these positions each query sees, bool [#B, #K, #G, #T, #S]; None is all of them."""
    terms = [] if rules.mask is None else [rules.mask]
    if rules.positions is not None:
        terms.append((key_positions <= rules.positions[..., None])[:, None, None])
        if rules.window is not None:
            terms.append((key_positions > rules.positions[..., None] - rules.window)[:, None, None])
    if rules.segments is not None:
        queries, keys = rules.segments
        terms.append((queries[:, :, None] == keys[:, None, :])[:, None, None])
    if rules.length is not None:
        terms.append(key_positions < jnp.reshape(rules.length, (-1, 1, 1, 1, 1)))
    return functools.reduce(jnp.logical_and, terms) if terms else None


def _visible_rows(rules, key_positions, groups, length):
    """The same by row: bool [#B, #K, #R, #S]."""
    visible = visible_keys(rules, key_positions)
    if visible is None:
        return None
    if visible.shape[2:4] != (1, 1):
        visible = jnp.broadcast_to(visible, (*visible.shape[:2], groups, length, visible.shape[4]))
    return rearrange(visible, "b k g t s -> b k (g t) s")


def _logits(query, key, visible):
    """float32 [B, K, R, S], about `_HIDDEN` where a key is not visible."""
    logits = jnp.einsum("bkrh,bksh->bkrs", query, key, preferred_element_type=jnp.float32)
    # Added rather than selected: XLA fuses the sum, on CPUs, with the products before and after it (twice as fast).
    return logits if visible is None else logits + jnp.where(visible, 0, _HIDDEN)


def _mix(weights, value):
    """Σ_s weights value: float32 [B, K, R, H]."""
    return jnp.einsum("bkrs,bksh->bkrh", weights.astype(value.dtype), value, preferred_element_type=jnp.float32)


def _gradients(query, key, value, weights, overlap, gradient):
    """float32 gradients of queries, keys and values for normalised weights and overlap Σ_h gradient · output."""
    to_weights = jnp.einsum("bkrh,bksh->bkrs", gradient, value, preferred_element_type=jnp.float32)
    to_logits = (weights * (to_weights - overlap)).astype(query.dtype)
    to_keys = functools.partial(jnp.einsum, "bkrs,bkrh->bksh", preferred_element_type=jnp.float32)
    return _mix(to_logits, key), to_keys(to_logits, query), to_keys(weights.astype(gradient.dtype), gradient)


@jax.custom_vjp
def _softmax_mix(query, key, value, visible):
    logits = _logits(query, key, visible)
    weights = jnp.exp(logits - logits.max(-1, keepdims=True))
    return (_mix(weights, value) / weights.sum(-1, keepdims=True)).astype(query.dtype)


def _softmax_mix_forward(query, key, value, visible):
    out = _softmax_mix(query, key, value, visible)
    return out, (query, key, value, visible, out)


def _softmax_mix_backward(residuals, gradient):
    # Without the barrier XLA finds the first softmax equal and stores it: 45 % more memory for ViT-B on a TPU v5e.
    (query, key, value, visible, out), gradient = lax.optimization_barrier((residuals, gradient))
    weights = jax.nn.softmax(_logits(query, key, visible))
    grads = _gradients(query, key, value, weights, overlap(gradient, out), gradient)
    return *cast(grads, (query, key, value)), None


_softmax_mix.defvjp(_softmax_mix_forward, _softmax_mix_backward)


def cast(arrays, like):
    return tuple(x.astype(y.dtype) for x, y in zip(arrays, like, strict=True))


def overlap(gradient, out):
    return (gradient.astype(jnp.float32) * out.astype(jnp.float32)).sum(-1, keepdims=True)


def _pad(x, axis, size):
    """Zeros at the end of an axis up to a multiple of `size`; an axis of 1 stays for it broadcasts."""
    missing = -x.shape[axis] % size if x.shape[axis] > 1 else 0
    return jnp.pad(x, [(0, missing if i == axis else 0) for i in range(x.ndim)])


def _padded(rules, size, key_size, keys):
    mask, positions, segments, length, window = rules
    if keys % key_size:
        length = keys if length is None else jnp.minimum(length, keys)
    return Rules(
        mask if mask is None else _pad(_pad(mask, 3, size), 4, key_size),
        positions if positions is None else _pad(positions, 1, size),
        segments if segments is None else (_pad(segments[0], 1, size), _pad(segments[1], 1, key_size)),
        length,
        window,
    )


def _tile(rules, row, column, size, key_size, groups):
    """`_visible_rows` for one block of queries and one of keys, given by their numbers."""

    def cut(x, axis, index, size):
        return x if x.shape[axis] == 1 else lax.dynamic_slice_in_dim(x, index * size, size, axis)

    mask, positions, segments, length, window = rules
    tile = Rules(
        mask if mask is None else cut(cut(mask, 3, row, size), 4, column, key_size),
        positions if positions is None else cut(positions, 1, row, size),
        segments if segments is None else (cut(segments[0], 1, row, size), cut(segments[1], 1, column, key_size)),
        length,
        window,
    )
    return _visible_rows(tile, column * key_size + jnp.arange(key_size), groups, size)


def _unless_hidden(visible, step, carry):
    """step(carry), passed over if nobody sees anything; where that differs by example or head, no time is saved."""
    if visible is None or visible.shape[:2] != (1, 1):
        return step(carry)
    return lax.cond(visible.any(), step, lambda carry: carry, carry)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _softmax_mix_blocks(query, key, value, rules, groups):
    """Queries [n, B, K, R, H] and keys [m, B, K, S, H] in blocks, all pairs of them in turn."""
    return _softmax_mix_blocks_forward(query, key, value, rules, groups)[0]


def _softmax_mix_blocks_forward(query, key, value, rules, groups):
    sums = add_blocks(no_blocks(query), query, key, value, rules, groups)
    out, logsumexp = finished(sums, query.dtype)
    return out, (query, key, value, rules, out, logsumexp)


def no_blocks(query):
    """Sums over no keys at all, for queries [n, B, K, R, H]: (largest logit, Σ weights, Σ weights value)."""
    zeros = jnp.zeros(query.shape, jnp.float32)
    return jnp.full_like(zeros[..., :1], -jnp.inf), zeros[..., :1], zeros


def add_blocks(sums, query, key, value, rules, groups):
    """The sums with those over keys and values [m, B, K, S, H] added, the weights relative to the largest logit."""

    def mix_rows(inputs):
        row, query, sums = inputs

        def add_keys(carry, inputs):
            column, key, value = inputs
            visible = _tile(rules, row, column, query.shape[2] // groups, key.shape[2], groups)

            def step(carry):
                top, total, mixed = carry
                logits = _logits(query, key, visible)
                new_top = jnp.maximum(top, logits.max(-1, keepdims=True))
                weights, shrink = jnp.exp(logits - new_top), jnp.exp(top - new_top)
                return new_top, shrink * total + weights.sum(-1, keepdims=True), shrink * mixed + _mix(weights, value)

            return _unless_hidden(visible, step, carry), None

        return lax.scan(add_keys, sums, (jnp.arange(len(key)), key, value))[0]

    return lax.map(mix_rows, (jnp.arange(len(query)), query, sums))


def finished(sums, dtype):
    """The mixed values and the logarithms of Σ exp(logits), from the sums over all keys."""
    top, total, mixed = sums
    seen = top > 0.5 * _HIDDEN
    total = jnp.where(seen, total, 1)
    return jnp.where(seen, mixed / total, 0).astype(dtype), jnp.where(seen, top + jnp.log(total), 0)


def _softmax_mix_blocks_backward(groups, residuals, gradient):
    query, key, value, rules, out, logsumexp = residuals
    zeros = jnp.zeros(key.shape, jnp.float32), jnp.zeros(value.shape, jnp.float32)
    rows = query, gradient, overlap(gradient, out), logsumexp
    to_query, to_keys = pull_blocks(zeros, rows, key, value, rules, groups)
    return *cast((to_query, *to_keys), (query, key, value)), None


def pull_blocks(to_keys, rows, key, value, rules, groups):
    """float32 gradients of queries, and of these keys and values added to `to_keys`.

    `rows` are the queries, the output's gradient, its `overlap` and the logarithms of Σ exp(logits) over all keys.
    """

    def pull_rows(to_keys, inputs):
        row, (query, gradient, overlap, logsumexp) = inputs

        def pull_keys(to_query, inputs):
            column, key, value, *to_key_value = inputs
            visible = _tile(rules, row, column, query.shape[2] // groups, key.shape[2], groups)

            def step(sums):
                weights = jnp.exp(_logits(query, key, visible) - logsumexp)
                return jax.tree.map(jnp.add, sums, _gradients(query, key, value, weights, overlap, gradient))

            to_query, *to_key_value = _unless_hidden(visible, step, (to_query, *to_key_value))
            return to_query, tuple(to_key_value)

        zeros = jnp.zeros(query.shape, jnp.float32)
        to_query, to_keys = lax.scan(pull_keys, zeros, (jnp.arange(len(key)), key, value, *to_keys))
        return to_keys, to_query

    to_keys, to_query = lax.scan(pull_rows, to_keys, (jnp.arange(len(rows[0])), rows))
    return to_query, to_keys


_softmax_mix_blocks.defvjp(_softmax_mix_blocks_forward, _softmax_mix_blocks_backward)
