"""Losses and targets of DINO, iBOT and DINOv2 against float64 twins, hand-computed numbers, and over eight devices."""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from omnax.objectives import self_distillation as sd
from references import self_distillation as reference

TOLERANCE = 1e-6


def normal(*shape, seed=0, scale=1.0):
    return jnp.asarray(scale * np.random.default_rng(seed).normal(size=shape), jnp.float32)


def targets_of(*shape, seed=1):
    return jnp.asarray(reference.softmax(wide(normal(*shape, seed=seed, scale=3.0))), jnp.float32)


def wide(x):
    return np.asarray(x, np.float64)


@pytest.fixture(scope="module")
def mesh():
    return jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))


def over_devices(mesh, function):
    specs = {"in_specs": PartitionSpec("data"), "out_specs": PartitionSpec()}
    return jax.shard_map(function, mesh=mesh, check_vma=False, **specs)


def test_teacher_temperature_is_the_published_array():
    expected = np.concatenate([np.linspace(0.04, 0.07, 30), np.full(10, 0.07)])
    got = [sd.teacher_temperature(step, 0.04, 0.07, 30) for step in range(40)]
    np.testing.assert_allclose(got, expected, atol=TOLERANCE)
    np.testing.assert_allclose(sd.teacher_temperature(0, 0.04, 0.07, 0), 0.07, atol=TOLERANCE)


def test_centring_and_sharpening():
    logits, center = normal(3, 4, 6), normal(6, seed=2)
    expected = reference.softmax((wide(logits) - center) / 0.04)
    np.testing.assert_allclose(sd.centred_targets(logits, center, 0.04), expected, atol=TOLERANCE)
    # by hand: logits (0, ln 3) at temperature 1, centre (0, ln 3) and (0, 0)
    hand = jnp.array([0.0, math.log(3)])
    np.testing.assert_allclose(sd.centred_targets(hand, hand, 1.0), [0.5, 0.5], atol=TOLERANCE)
    np.testing.assert_allclose(sd.centred_targets(hand, jnp.zeros(2), 1.0), [0.25, 0.75], atol=TOLERANCE)


def test_centring_after_the_softmax():
    logits, prior = normal(5, 6), targets_of(6)
    quotient = reference.softmax(wide(logits) / 0.1) / prior
    expected = quotient / quotient.sum(-1, keepdims=True)
    np.testing.assert_allclose(sd.prior_targets(logits, prior, 0.1), expected, atol=TOLERANCE)


def test_center_moves_by_the_mean_of_the_unmasked_rows():
    center, logits = normal(6), normal(4, 5, 6, seed=3)
    expected = 0.9 * center + 0.1 * logits.reshape(-1, 6).mean(0)
    np.testing.assert_allclose(sd.update_center(center, logits), expected, atol=TOLERANCE)
    mask = jnp.asarray(np.random.default_rng(4).random((4, 5)) < 0.4)
    expected = 0.8 * center + 0.2 * logits[mask].mean(0)
    np.testing.assert_allclose(sd.update_center(center, logits, momentum=0.8, mask=mask), expected, atol=TOLERANCE)
    np.testing.assert_array_equal(sd.update_center(center, logits, mask=jnp.zeros((4, 5), bool)), center)


@pytest.mark.parametrize("rounds", [1, 3, 7])
def test_sinkhorn_targets_equal_the_published_loop(rounds):
    logits = normal(24, 9, scale=0.3)
    expected = reference.sinkhorn_loop(wide(logits), 0.07, rounds)
    np.testing.assert_allclose(sd.sinkhorn_targets(logits, 0.07, iterations=rounds), expected, atol=TOLERANCE)


def test_sinkhorn_targets_with_padding_equal_those_without():
    logits, mask = normal(24, 9, scale=0.3), jnp.asarray(np.random.default_rng(1).random(24) < 0.6)
    got = sd.sinkhorn_targets(jnp.where(mask[:, None], logits, jnp.nan), 0.05, mask=mask)
    np.testing.assert_allclose(got[mask], reference.sinkhorn_loop(wide(logits)[mask], 0.05), atol=TOLERANCE)
    assert not np.asarray(got[~mask]).any()


def test_sinkhorn_from_a_softmax_is_another_starting_point():
    logits = normal(24, 9, scale=0.3)
    rows = wide(logits) / 0.05
    expected = reference.sinkhorn_loop(reference.log_softmax(rows), 1.0)
    got = sd.sinkhorn_targets(logits, 0.05, start="softmax")
    np.testing.assert_allclose(got, expected, atol=TOLERANCE)
    assert np.abs(got - sd.sinkhorn_targets(logits, 0.05)).max() > 0.01
    with pytest.raises(ValueError, match="start is 'exp'"):
        sd.sinkhorn_targets(logits, 0.05, start="exp")


@pytest.mark.parametrize("crops,local", [(2, 0), (2, 5), (1, 3), (3, 2)])
def test_dino_loss(crops, local):
    student, targets = normal(4, crops + local, 7), targets_of(4, crops, 7)
    expected = reference.dino(wide(student), targets)
    total, terms = sd.dino_loss(student, targets)
    np.testing.assert_allclose([terms["dino_global"], terms["dino_local"]], expected, rtol=TOLERANCE)
    np.testing.assert_allclose(total, sum(expected), rtol=TOLERANCE)


def test_dino_loss_of_uniform_student_is_log_k_and_masked_images_do_not_count():
    student, targets = jnp.zeros((3, 5, 8)), targets_of(3, 2, 8)
    np.testing.assert_allclose(sd.dino_loss(student, targets)[0], math.log(8), rtol=TOLERANCE)
    student = normal(3, 5, 8).at[2].set(jnp.nan)
    masked, _ = sd.dino_loss(student, targets, mask=jnp.array([True, True, False]))
    np.testing.assert_allclose(masked, sd.dino_loss(student[:2], targets[:2])[0], rtol=TOLERANCE)
    with pytest.raises(ValueError, match="form no pair"):
        sd.dino_loss(student[:, :1], targets[:, :1])


def test_dino_gradient_is_softmax_minus_targets():
    student, targets = normal(2, 3, 5), targets_of(2, 2, 5)
    got = jax.grad(lambda s: sd.dino_loss(s, targets)[0])(student)
    expected = reference.numerical_gradient(lambda s: sum(reference.dino(s, targets)), wide(student))
    np.testing.assert_allclose(got, expected, atol=TOLERANCE)


def compact(masked, size):
    """(indices, validity) of the masked patches in a buffer of `size` rows."""
    places = np.flatnonzero(masked)
    return jnp.asarray(np.pad(places, (0, size - len(places)))), jnp.arange(size) < len(places)


def test_ibot_loss_and_its_gradient():
    masked = jnp.asarray(np.random.default_rng(0).random((4, 6)) < 0.4)
    masked = masked.at[1].set(False)  # a crop without a mask counts in the mean
    student, targets = normal(4, 6, 5), targets_of(4, 6, 5)
    indices, valid = compact(masked, 20)
    weights = jnp.where(valid, sd.masked_weights(masked).reshape(-1)[indices], 0)

    def loss(student):
        return sd.ibot_loss(student.reshape(24, 5)[indices], targets.reshape(24, 5)[indices], weights, 4)[0]

    np.testing.assert_allclose(loss(student), reference.ibot(wide(student), targets, masked), rtol=2e-6)
    expected = reference.numerical_gradient(lambda s: reference.ibot(s, targets, masked), wide(student))
    np.testing.assert_allclose(jax.grad(loss)(student), expected, atol=TOLERANCE)


def test_koleo_and_its_gradient():
    features = normal(7, 4)
    got, terms = sd.koleo_loss(features)
    np.testing.assert_allclose(got, reference.koleo(features), rtol=TOLERANCE)
    assert set(terms) == {"koleo"}
    expected = reference.numerical_gradient(reference.koleo, wide(features))
    # the distances are differences of float32 unit vectors: the gradient has their relative error, 1e-6 of its 0.5
    np.testing.assert_allclose(jax.grad(lambda x: sd.koleo_loss(x)[0])(features), expected, atol=3e-6)


def test_koleo_by_hand_groups_and_mask():
    # unit vectors at 0, 60 and 180 degrees: nearest distances 1, 1 and 2 sin 60
    angles = np.deg2rad([0, 60, 180])
    points = jnp.asarray(np.stack([np.cos(angles), np.sin(angles)], 1), jnp.float32)
    np.testing.assert_allclose(sd.koleo_loss(5 * points)[0], -math.log(math.sqrt(3)) / 3, atol=TOLERANCE)
    features = normal(12, 4)
    expected = np.mean([reference.koleo(part) for part in np.split(features, 3)])
    np.testing.assert_allclose(sd.koleo_loss(features, groups=3)[0], expected, rtol=TOLERANCE)
    mask = jnp.arange(12) % 3 != 0
    np.testing.assert_allclose(sd.koleo_loss(features, mask=mask)[0], reference.koleo(features[mask]), rtol=TOLERANCE)
    with pytest.raises(ValueError, match="12 rows are not divisible into 5 groups"):
        sd.koleo_loss(features, groups=5)


@pytest.mark.parametrize("features", [normal(1, 8), jnp.repeat(normal(1, 8), 4, 0), jnp.zeros((3, 8))])
def test_koleo_is_finite_for_one_image_and_for_duplicates(features):
    value, gradient = jax.value_and_grad(lambda x: sd.koleo_loss(x)[0])(features)
    assert np.isfinite(value) and np.isfinite(gradient).all()
    np.testing.assert_allclose(value, reference.koleo(features), rtol=1e-5)
    if len(features) == 1:
        assert not np.asarray(gradient).any()


def test_extreme_logits_stay_finite():
    logits = jnp.asarray(np.random.default_rng(0).choice([-200.0, 200.0], (16, 8)), jnp.float32)
    center = jnp.full(8, 100.0)
    for targets in (
        sd.sinkhorn_targets(logits, 0.04),
        sd.centred_targets(logits, center, 0.04),
        sd.prior_targets(logits, jnp.full(8, 1 / 8), 0.04),
    ):
        np.testing.assert_allclose(np.asarray(targets).sum(-1), 1, atol=1e-5)
        value, gradient = jax.value_and_grad(lambda s, q=targets: sd.cross_entropy(s, q).mean())(logits)
        assert np.isfinite(value) and np.isfinite(gradient).all()


def test_targets_carry_no_gradient():
    logits = normal(6, 5)

    def total(logits):
        targets = sd.sinkhorn_targets(logits, 0.1) * sd.centred_targets(
            logits, sd.update_center(jnp.zeros(5), logits), 1
        )
        return (targets * sd.prior_targets(logits, jnp.ones(5), 1.0)).sum()

    assert not np.asarray(jax.grad(total)(logits)).any()


def test_statistics_by_hand():
    certain = jnp.eye(4)
    got = sd.target_statistics(certain)
    np.testing.assert_allclose([got["usage_entropy"], got["target_entropy"]], [math.log(4), 0], atol=TOLERANCE)
    collapsed = sd.target_statistics(certain[jnp.array([1, 1, 1, 0])], mask=jnp.array([True, True, True, False]))
    np.testing.assert_allclose([collapsed["usage_entropy"], collapsed["target_entropy"]], [0, 0], atol=TOLERANCE)


def test_eight_devices_equal_one(mesh):
    """Each device holds another number of masked patches, one of them none; values and gradients."""
    masked = jnp.asarray(np.random.default_rng(2).random((16, 6)) < np.linspace(-0.1, 0.9, 16)[:, None])
    student, teacher = normal(16, 6, 5), normal(16, 6, 5, seed=1)
    global_student, global_targets = normal(16, 3, 5, seed=2), targets_of(16, 2, 5, seed=3)
    counts = np.asarray(masked).reshape(8, -1).sum(1)
    assert len(set(counts)) > 4 and counts[0] == 0

    def loss(student, teacher, masked, crops, targets, axis_name=None):
        flat = masked.reshape(-1)
        patch_targets = sd.sinkhorn_targets(teacher.reshape(-1, 5), 0.07, mask=flat, axis_name=axis_name)
        weights = sd.masked_weights(masked).reshape(-1)
        terms = {
            "ibot": sd.ibot_loss(student.reshape(-1, 5), patch_targets, weights, len(masked), axis_name=axis_name)[0],
            "dino": sd.dino_loss(crops, targets, axis_name=axis_name)[0],
            "koleo": sd.koleo_loss(student[:, 0], axis_name=axis_name)[0],
        }
        terms["center"] = sd.update_center(jnp.zeros(5), teacher, mask=masked, axis_name=axis_name)
        return terms | sd.target_statistics(patch_targets, flat, axis_name)

    arrays = (student, teacher, masked, global_student, global_targets)
    one = loss(*arrays)
    eight = jax.jit(over_devices(mesh, partial(loss, axis_name="data")))(*arrays)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5, atol=TOLERANCE), eight, one)

    def total(function, student):
        terms = function(student, *arrays[1:])
        return terms["ibot"] + terms["dino"] + terms["koleo"]

    expected = jax.grad(partial(total, loss))(student)
    sharded = jax.device_put(student, NamedSharding(mesh, PartitionSpec("data")))
    np.testing.assert_allclose(jax.jit(jax.grad(partial(total, loss)))(sharded), expected, atol=TOLERANCE)
