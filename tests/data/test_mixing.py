"""Mixup and CutMix by hand, and on a sharded batch."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from omnax.data import mixing

IMAGE = np.arange(4.0, dtype=np.float32)[:, None, None, None] * np.ones((4, 10, 20, 1), np.float32)
LABEL = np.eye(4, dtype=np.float32)


def test_mixup_by_hand(monkeypatch):
    monkeypatch.setattr(jax.random, "beta", lambda key, a, b: jnp.float32(0.25))  # and so the weight is 0.75
    image, label = mixing.mixup(jax.random.key(0), IMAGE, LABEL, 0.2)
    # example i is 0.75 i + 0.25 (i - 1), example 0 is 0.25 * 3
    np.testing.assert_allclose(image[:, 0, 0, 0], [0.75, 0.75, 1.75, 2.75])
    np.testing.assert_allclose(np.ptp(image, axis=(1, 2, 3)), 0)
    expected = [[0.75, 0, 0, 0.25], [0.25, 0.75, 0, 0], [0, 0.25, 0.75, 0], [0, 0, 0.25, 0.75]]
    np.testing.assert_allclose(label, expected)


def test_mixup_weights_follow_the_folded_beta():
    weights = jax.vmap(lambda key: mixing.mixup(key, IMAGE[:, :1, :1], LABEL, 0.5)[1][0, 0])(
        jax.random.split(jax.random.key(1), 4000)
    )
    assert float(weights.min()) >= 0.5
    # Beta(1/2, 1/2) is the arcsine law: its upper half has mean 1/2 + 1/pi and variance 1/8 - 1/pi^2
    error = np.sqrt((1 / 8 - 1 / np.pi**2) / 4000)
    assert abs(float(weights.mean()) - (0.5 + 1 / np.pi)) < 4 * error


def test_cutmix_by_hand(monkeypatch):
    # 0.36 of the image: half sides int(0.3 * 10) and int(0.3 * 20) around pixel (2, 15), cut at the top
    centres = iter([2, 15])
    monkeypatch.setattr(jax.random, "beta", lambda key, a, b: jnp.float32(0.64))
    monkeypatch.setattr(jax.random, "randint", lambda key, shape, low, high: jnp.int32(next(centres)))
    image, label = mixing.cutmix(jax.random.key(0), IMAGE, LABEL, 1.0)
    expected = IMAGE.copy()
    expected[:, 0:5, 9:20] = np.roll(IMAGE, 1, axis=0)[:, 0:5, 9:20]
    np.testing.assert_array_equal(image, expected)
    pasted = 5 * 11 / 200
    np.testing.assert_allclose(label, (1 - pasted) * LABEL + pasted * np.roll(LABEL, 1, axis=0), atol=1e-7)


def test_cutmix_labels_are_the_shares_of_the_pixels():
    mix = jax.jit(mixing.cutmix, static_argnums=3)
    shares = []
    for seed in range(20):
        image, label = mix(jax.random.key(seed), IMAGE, LABEL, 1.0)
        share = np.stack([(image == value).mean((1, 2, 3)) for value in range(4)], axis=1)
        np.testing.assert_allclose(label, share, atol=1e-6)
        shares.append(float(label[0, 0]))
    assert np.ptp(shares) > 0.5


def test_sharded_equals_one_device():
    @jax.jit
    def both(key, image, label):
        return mixing.cutmix(key, *mixing.mixup(key, image, label, 0.8), 0.8)

    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:4])
    sharded = jax.device_put((IMAGE, LABEL), NamedSharding(mesh, PartitionSpec("data")))
    one, many = both(jax.random.key(3), IMAGE, LABEL), both(jax.random.key(3), *sharded)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), one, many)
