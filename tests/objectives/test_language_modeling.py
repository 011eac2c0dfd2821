"""Next-token losses: against float64 by hand, chunks, weights by sample, denominators."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from omnax.objectives.language_modeling import IGNORE, next_token_loss, token_losses, token_weights

RNG = np.random.default_rng(0)
HIDDEN = RNG.normal(size=(2, 7, 5)).astype(np.float32)
HEAD = RNG.normal(size=(5, 11)).astype(np.float32)
LABELS = RNG.integers(0, 11, (2, 7)).astype(np.int32)
LABELS[0, [1, 4]] = LABELS[1, 0] = IGNORE


def by_hand():
    logits = HIDDEN.astype(np.float64) @ HEAD
    losses = np.log(np.exp(logits).sum(-1)) - np.take_along_axis(logits, np.maximum(LABELS, 0)[..., None], -1)[..., 0]
    learnt = LABELS != IGNORE
    return np.where(learnt, losses, 0), learnt & (logits.argmax(-1) == LABELS)


@pytest.mark.parametrize("chunk", [1, 3, 7, 1024])
def test_losses_in_chunks(chunk):
    losses, hits = token_losses(*map(jnp.asarray, (HIDDEN, HEAD, LABELS)), chunk=chunk)
    expected, right = by_hand()
    np.testing.assert_allclose(losses, expected, atol=1e-5)
    np.testing.assert_array_equal(hits, right)


def test_gradients_in_chunks_equal_those_in_one():
    whole, parts = (
        jax.grad(lambda h, w, c=c: token_losses(h, w, jnp.asarray(LABELS), chunk=c)[0].sum(), argnums=(0, 1))(
            jnp.asarray(HIDDEN), jnp.asarray(HEAD)
        )
        for c in (7, 2)
    )
    for a, b in zip(whole, parts, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)
    assert not np.any(whole[0][0, 1])  # a token that is not learnt


def test_weights_by_sample():
    """Samples with 4 and 1 learnt tokens: each counts by n, sqrt(n) or 1."""
    labels = jnp.array([[5, 5, 5, 5, IGNORE, 3, IGNORE, IGNORE]], jnp.int32)
    segments = jnp.array([[1, 1, 1, 1, 1, 2, 2, 0]], jnp.int32)
    sums = {"token": (4, 1), "sqrt": (2, 1), "sample": (1, 1)}
    for weighting, (first, second) in sums.items():
        weights = np.asarray(token_weights(labels, segments, weighting, 3))
        np.testing.assert_allclose((weights[0, :5].sum(), weights[0, 5:].sum()), (first, second), rtol=1e-6)
        assert not weights[labels == IGNORE].any()


def test_mean_over_all_and_over_parts():
    losses = jnp.array([[1.0, 3.0], [2.0, 0.0]])
    weights = jnp.array([[1.0, 0.5], [1.0, 0.0]])
    total, terms = next_token_loss(losses, weights)
    assert float(total) == pytest.approx(4.5 / 2.5) and terms["next_token"] == total
    parts = sum(next_token_loss(losses[i : i + 1], weights[i : i + 1], denominator=jnp.float32(2.5))[0] for i in (0, 1))
    assert float(parts) == pytest.approx(4.5 / 2.5)
    split, _ = jax.vmap(lambda x, w: next_token_loss(x, w, axis_name="i"), axis_name="i")(
        losses[:, None], weights[:, None]
    )
    np.testing.assert_allclose(split, 4.5 / 2.5, rtol=1e-6)
    assert float(next_token_loss(losses, 0 * weights)[0]) == 0  # nothing to learn is no NaN
