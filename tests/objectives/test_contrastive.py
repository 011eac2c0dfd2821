"""Contrastive losses: numbers by hand, a float64 twin, the three forms over eight devices, flat memory of the ring."""

import math
import subprocess
import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec
from omnax.objectives import contrastive

FORMS = ("full", "rows", "ring")
SCALE, BIAS = 14.0, -10.0  # of CLIP, of SigLIP at their start
TOLERANCE = 1e-6  # of losses and gradients, absolute; both are of order 1


def features(batch=32, width=12, seed=0):
    """Normalised pairs whose cosines are about 0.7."""
    generator = np.random.default_rng(seed)
    pair = generator.normal(size=(2, batch, width))
    pair[1] += pair[0]
    return (pair / np.linalg.norm(pair, axis=-1, keepdims=True)).astype(np.float32)


def dense_info_nce(image, text, scale, bias=None, mask=None):
    """Float64, one logit at a time."""
    keep = np.flatnonzero(np.ones(len(image), bool) if mask is None else mask)
    logits = [[scale * float(np.dot(image[i].astype(float), text[j].astype(float))) for j in keep] for i in keep]
    rows = [math.log(sum(map(math.exp, row))) - row[i] for i, row in enumerate(logits)]
    columns = [math.log(sum(map(math.exp, column))) - column[i] for i, column in enumerate(zip(*logits, strict=True))]
    return (sum(rows) + sum(columns)) / 2 / len(keep)


def dense_sigmoid(image, text, scale, bias, mask=None):
    keep = np.flatnonzero(np.ones(len(image), bool) if mask is None else mask)
    total = 0.0
    for i in keep:
        for j in keep:
            logit = scale * float(np.dot(image[i].astype(float), text[j].astype(float))) + bias
            total += math.log1p(math.exp(-logit if i == j else logit))
    return total / len(keep)


LOSSES = {
    "info_nce": (lambda i, t, s, b, **options: contrastive.info_nce(i, t, s, **options), dense_info_nce),
    "sigmoid": (contrastive.sigmoid_loss, dense_sigmoid),
}


def spread(name, form, devices=8, masked=False):
    """The loss of global arrays, computed in `form` over so many devices."""
    loss, _ = LOSSES[name]
    mesh = jax.make_mesh((devices,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:devices])
    rows = PartitionSpec("data")

    @partial(jax.shard_map, mesh=mesh, in_specs=(rows, rows, *[PartitionSpec()] * 2, rows), out_specs=PartitionSpec())
    def sharded(image, text, scale, bias, mask):
        return loss(image, text, scale, bias, mask=mask if masked else None, form=form, axis_name="data")[0]

    return sharded


def arguments(batch=32):
    image, text = map(jnp.asarray, features(batch))
    return image, text, jnp.float32(SCALE), jnp.float32(BIAS)


def test_info_nce_by_hand():
    """Logits log [[2, 1], [1, 3]]: rows -log 2/3, -log 3/4, columns the same."""
    image = jnp.log(jnp.array([[2.0, 1.0], [1.0, 3.0]]))
    total, terms = contrastive.info_nce(image, jnp.eye(2), jnp.float32(1))
    np.testing.assert_allclose(total, (math.log(3 / 2) + math.log(4 / 3)) / 2, rtol=1e-6)
    asymmetric = jnp.log(jnp.array([[2.0, 1.0], [4.0, 3.0]]))
    total, terms = contrastive.info_nce(asymmetric, jnp.eye(2), jnp.float32(1))
    np.testing.assert_allclose(terms["image_to_text"], (math.log(3 / 2) + math.log(7 / 3)) / 2, rtol=1e-6)
    np.testing.assert_allclose(terms["text_to_image"], (math.log(6 / 2) + math.log(4 / 3)) / 2, rtol=1e-6)
    np.testing.assert_allclose(total, (terms["image_to_text"] + terms["text_to_image"]) / 2, rtol=1e-6)


def test_sigmoid_by_hand():
    """Logits log [[3, 1], [1, 1]]: σ = 3/4 and 1/2 for the pairs, 1/2 for the others."""
    image = jnp.log(jnp.array([[3.0, 1.0], [1.0, 1.0]]))
    total, _ = contrastive.sigmoid_loss(image, jnp.eye(2), jnp.float32(1), jnp.float32(0))
    np.testing.assert_allclose(total, (math.log(4 / 3) + 3 * math.log(2)) / 2, rtol=1e-6)


@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
@pytest.mark.parametrize("name", LOSSES)
def test_every_form_on_eight_devices_equals_the_dense_loss(name, masked):
    loss, twin = LOSSES[name]
    args = arguments()
    mask = jnp.arange(32) % 5 != 3
    expected = twin(*map(np.asarray, args[:2]), SCALE, BIAS, np.asarray(mask) if masked else None)
    dense = jax.jit(jax.value_and_grad(lambda *a: loss(*a, mask=mask if masked else None)[0], argnums=(0, 1, 2, 3)))
    value, gradients = dense(*args)
    np.testing.assert_allclose(value, expected, rtol=0, atol=2 * TOLERANCE)  # NumPy's sums are in float64
    for form in FORMS:
        sharded = jax.jit(jax.value_and_grad(spread(name, form, masked=masked), argnums=(0, 1, 2, 3)))
        sharded_value, sharded_gradients = sharded(*args, mask)
        np.testing.assert_allclose(sharded_value, value, rtol=0, atol=TOLERANCE, err_msg=form)
        for ours, theirs in zip(sharded_gradients, gradients, strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=0, atol=TOLERANCE, err_msg=form)


@pytest.mark.parametrize("name", LOSSES)
def test_gradients_under_pmap_average_to_the_dense_ones(name):
    """Data-parallel practice: each device differentiates its own call, parameter gradients are averaged."""
    loss, _ = LOSSES[name]
    image, text, scale, bias = arguments()
    noise = np.random.default_rng(1).normal(size=(12, 12))
    mixing = jnp.asarray((np.eye(12) + 0.1 * noise).astype(np.float32))  # a parameter

    def total(mixing, scale, image, text, **options):
        return loss(image @ mixing, text, scale, bias, **options)[0]

    expected, gradients = jax.value_and_grad(total, argnums=(0, 1))(mixing, scale, image, text)
    split = image.reshape(8, 4, -1), text.reshape(8, 4, -1)
    for form in FORMS:

        def step(mixing, scale, image, text, form=form):
            local = partial(total, form=form, axis_name="data")
            value, gradient = jax.value_and_grad(local, argnums=(0, 1))(mixing, scale, image, text)
            return value, jax.lax.pmean(gradient, "data")

        values, means = jax.pmap(step, axis_name="data", in_axes=(None, None, 0, 0))(mixing, scale, *split)
        np.testing.assert_allclose(values, np.full(8, expected), rtol=0, atol=TOLERANCE)
        for ours, theirs in zip(means, gradients, strict=True):
            np.testing.assert_allclose(ours[0], theirs, rtol=0, atol=TOLERANCE, err_msg=form)


def test_logits_far_beyond_exp_stay_finite():
    image, text, _, _ = arguments()
    for form in FORMS:
        loss = spread("info_nce", form)
        value, gradient = jax.jit(jax.value_and_grad(loss))(
            image, text, jnp.float32(5000), jnp.float32(0), jnp.ones(32, bool)
        )
        assert np.isfinite(value) and np.isfinite(gradient).all()


def test_memory_of_the_ring_is_flat():
    """The benchmark's table, from 2 to 64 virtual devices, which a process of its own can have."""
    command = [sys.executable, "-m", "omnax.benchmarks.contrastive_memory", "--pairs", "64", "--width", "32"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    head, *lines = [line.split() for line in done.stdout.splitlines()]
    assert head == ["devices", "batch", "full", "MiB", "rows", "MiB", "ring", "MiB"]
    sizes = {int(line[0]): [float(cell) for cell in line[2:]] for line in lines}
    assert list(sizes) == [2, 4, 8, 16, 32, 64]
    full, rows, ring = zip(*sizes.values(), strict=True)
    assert max(ring) <= 1.1 * min(ring)
    assert full[-1] > 100 * full[0] and rows[-1] > 10 * rows[0]
    assert ring[-1] < rows[-1] < full[-1]


def test_duplicates_are_counted():
    tokens = jnp.array([[1, 2, 0], [3, 0, 0], [1, 2, 0], [1, 3, 0], [1, 2, 0], [3, 0, 0]])
    assert contrastive.count_duplicates(tokens) == 3
    assert contrastive.count_duplicates(tokens[:2]) == 0
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 3, (2000, 8)) * rng.integers(1, 20000, 8)  # few distinct ids in every place
    assert contrastive.count_duplicates(jnp.asarray(tokens)) == len(tokens) - len(np.unique(tokens, axis=0))


def test_log_scale_is_clamped():
    for value, expected in ((-0.5, 0.0), (2.0, 2.0), (9.0, math.log(100))):
        np.testing.assert_allclose(contrastive.clamp_log_scale(jnp.float32(value)), expected, rtol=1e-6)
