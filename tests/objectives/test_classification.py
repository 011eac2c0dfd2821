"""Classification losses against numbers worked out by hand."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec
from omnax.objectives.classification import guess, rank, sigmoid_cross_entropy, softmax_cross_entropy

# Softmax of these rows: (1/2, 1/4, 1/4) and (1/6, 1/3, 1/2).
LOGITS = jnp.log(jnp.array([[2.0, 1.0, 1.0], [1.0, 2.0, 3.0]]))
LABELS = jnp.array([0, 2])


def test_softmax_of_integer_labels():
    total, terms = softmax_cross_entropy(LOGITS, LABELS)
    np.testing.assert_allclose(total, math.log(2), rtol=1e-6)
    assert terms == {"softmax_cross_entropy": total}


def test_softmax_of_soft_labels():
    labels = jnp.array([[0.5, 0.5, 0.0], [0.0, 1.0, 0.0]])
    losses, _ = softmax_cross_entropy(LOGITS, labels, reduction="none")
    np.testing.assert_allclose(losses, [1.5 * math.log(2), math.log(3)], rtol=1e-6)


def test_softmax_smoothing():
    """Smoothing 0.3 over 3 classes: targets 0.8, 0.1, 0.1."""
    losses, _ = softmax_cross_entropy(LOGITS, LABELS, label_smoothing=0.3, reduction="none")
    first = 0.8 * math.log(2) + 0.2 * math.log(4)
    second = 0.8 * math.log(2) + 0.1 * math.log(3) + 0.1 * math.log(6)
    np.testing.assert_allclose(losses, [first, second], rtol=1e-6)


def test_sigmoid():
    """Sigmoids of log 1, log 3: 1/2, 3/4. Label 1: -log(1 - 1/2) - log(3/4); soft label (1, 1/2)."""
    logits = jnp.log(jnp.array([[1.0, 3.0]]))
    total, terms = sigmoid_cross_entropy(logits, jnp.array([1]))
    np.testing.assert_allclose(total, math.log(2) + math.log(4 / 3), rtol=1e-6)
    assert list(terms) == ["sigmoid_cross_entropy"]
    total, _ = sigmoid_cross_entropy(logits, jnp.array([[1.0, 0.5]]))
    np.testing.assert_allclose(total, math.log(2) + 0.5 * math.log(4 / 3) + 0.5 * math.log(4), rtol=1e-6)


def test_mask_and_reductions():
    mask = jnp.array([True, False])
    for reduction, expected in (("mean", math.log(2)), ("sum", math.log(2)), ("none", [math.log(2), 0.0])):
        total, _ = softmax_cross_entropy(LOGITS, jnp.array([0, 0]), mask=mask, reduction=reduction)
        np.testing.assert_allclose(total, expected, rtol=1e-6)
    nothing, _ = softmax_cross_entropy(LOGITS, LABELS, mask=jnp.zeros(2, bool))
    assert nothing == 0


@pytest.mark.parametrize("loss", [softmax_cross_entropy, sigmoid_cross_entropy])
def test_extreme_and_bfloat16_logits(loss):
    """Finite at logits far beyond exp's range, float32 whatever the dtype of the logits."""
    total, _ = loss(jnp.array([[3e4, -3e4]], jnp.bfloat16), jnp.array([1]))
    assert total.dtype == jnp.float32
    np.testing.assert_allclose(total, 6e4, rtol=1e-2)  # bfloat16 keeps 8 bits of the logits
    grads = jax.grad(lambda z: loss(z, jnp.array([1]))[0])(jnp.array([[3e4, -3e4]]))
    np.testing.assert_allclose(grads, [[1.0, -1.0]])


def test_axis_name_gives_the_global_mean():
    """Unequal numbers of masked examples per device: the mean is over all unmasked examples, not of device means."""
    rng = np.random.default_rng(0)
    logits, labels = rng.normal(size=(8, 5)).astype(np.float32), rng.integers(5, size=8)
    mask = np.array([1, 1, 1, 1, 1, 0, 0, 0], bool)
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:4])
    sharded = jax.shard_map(
        lambda z, y, m: softmax_cross_entropy(z, y, mask=m, axis_name="data")[0],
        mesh=mesh,
        in_specs=PartitionSpec("data"),
        out_specs=PartitionSpec(),
    )
    expected, _ = softmax_cross_entropy(jnp.asarray(logits), jnp.asarray(labels), mask=jnp.asarray(mask))
    np.testing.assert_allclose(sharded(logits, labels, mask), expected, rtol=1e-6)


@pytest.mark.parametrize("loss", [softmax_cross_entropy, sigmoid_cross_entropy])
def test_a_label_outside_the_classes_is_no_loss_of_0(loss):
    """NaN, unless the example is masked; and its gradient never spoils that of the others."""
    logits, labels = jnp.zeros((3, 4)), jnp.array([0, 4, -1])
    assert jnp.isnan(loss(logits, labels)[0])
    mask = jnp.array([True, False, False])
    value, gradient = jax.value_and_grad(lambda z: loss(z, labels, mask=mask)[0])(logits)
    assert jnp.isfinite(value) and value > 0 and jnp.isfinite(gradient).all()


def test_rank_and_guess():
    scores = jnp.array([[3.0, 1, 2], [1, 1, 0], [jnp.nan, 2, 1], [1, 2, 3]])
    label = jnp.array([0, 0, 1, 5])
    assert rank(scores, label).tolist() == [0, 1, 1, 3]
    assert guess(scores[:2], label[:2]).tolist() == [0, 1]
