"""The cuDNN back end of attention: jax.nn.dot_product_attention, which is exacting about what it is given.

Causal, a window of it and a number of keys are words that cuDNN knows: no array is quadratic in length. Anything else
is one mask, which it adds as a bias. Odd lengths it takes in inference. For gradients jax 0.10.2 means to refuse them
beside a bias alone, but takes its own placeholder for one and refuses them all: there a row or a column is added that
nobody sees.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array

from .attention_xla import Rules, visible_keys


class Words(NamedTuple):
    """What is said without an array."""

    scale: float
    causal: bool = False
    window: int | None = None


def attend_plain(query, key, value, lengths: Array | None, words: Words):
    """Without a mask; rows of no keys are given one, for the gradient's sake, and cleared."""
    if lengths is None:
        return _attend(query, key, value, None, None, words)
    out = _attend(query, key, value, None, jnp.maximum(lengths, 1).astype(jnp.int32), words)
    return jnp.where(rearrange(lengths > 0, "b -> b 1 1 1"), out, 0)


def attend_masked(query, key, value, rules: Rules, scale: float):
    """With the rules as one mask; it adds a large negative number, so that fully masked rows need clearing."""
    visible = visible_keys(rules, jnp.arange(key.shape[1]))
    assert visible is not None, "nothing to mask"
    visible = rearrange(visible, "b k g t s -> b (k g) t s")
    visible = jnp.broadcast_to(visible, (*visible.shape[:2], query.shape[1], key.shape[1]))
    out = _attend(query, key, value, visible, None, Words(scale))
    return jnp.where(rearrange(visible.any(-1), "b n t -> b t n 1"), out, 0)


def _call(query, key, value, mask, lengths, words: Words):
    return jax.nn.dot_product_attention(
        *(query, key, value),
        mask=mask,
        scale=words.scale,
        is_causal=words.causal,
        key_value_seq_lengths=lengths,
        local_window_size=None if words.window is None else (words.window - 1, 0),
        implementation="cudnn",
    )


def _attend_forward(query, key, value, mask, lengths, words):
    def attend_even(query, key, value):
        length, keys = query.shape[1], key.shape[1]
        row, column = ((0, length % 2), (0, keys % 2))
        query, key, value = (
            jnp.pad(x, ((0, 0), side, (0, 0), (0, 0))) for x, side in ((query, row), (key, column), (value, column))
        )
        if mask is not None:
            padded = jnp.pad(mask, ((0, 0), (0, 0), row, column))
            return _call(query, key, value, padded, lengths, words)[:, :length]
        hidden = keys % 2 == 0 or (words.causal and length <= keys)  # the added key, in the future of all
        of_keys = lengths if hidden or lengths is not None else jnp.full(query.shape[:1], keys, jnp.int32)
        return _call(query, key, value, None, of_keys, words)[:, :length]

    return jax.vjp(attend_even, query, key, value)


def _attend_backward(words, pull_back, gradient):
    return *pull_back(gradient), None, None


_attend = jax.custom_vjp(_call, nondiff_argnums=(5,))
_attend.defvjp(_attend_forward, _attend_backward)
