"""Wav2Lip's losses: numbers by hand, torch's BCELoss (gradient and extremes included), shards, masks, LSE."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec
from omnax.objectives import lip_sync
from oracles import torch


def test_binary_cross_entropy_equals_torch_at_the_extremes():
    p = np.array([0.0, 0.0, 1.0, 1.0, 0.3, 0.3, 1e-30], np.float32)
    y = np.array([1.0, 0.0, 1.0, 0.0, 1.0, 0.0, 1.0], np.float32)
    tensor = torch.tensor(p, requires_grad=True)
    with torch.enable_grad():
        expected = torch.nn.functional.binary_cross_entropy(tensor, torch.tensor(y), reduction="none")
        expected.sum().backward()
    np.testing.assert_allclose(lip_sync.binary_cross_entropy(jnp.array(p), jnp.array(y)), expected.detach(), rtol=1e-6)
    gradient = jax.grad(lambda p: lip_sync.binary_cross_entropy(p, jnp.array(y)).sum())(jnp.array(p))
    np.testing.assert_allclose(gradient, tensor.grad, rtol=1e-6)
    assert lip_sync.binary_cross_entropy(jnp.array([1.0000002]), jnp.array([1.0])) == 0


def test_sync_loss_by_hand():
    audio = jnp.array([[1.0, 0.0], [0.6, 0.8], [1.0, 0.0]])
    face = jnp.array([[0.8, 0.6], [0.6, 0.8], [0.0, 1.0]])
    label = jnp.array([1.0, 0.0, 0.0])  # cosines 0.8, 1, 0: right, wrong, right
    total, terms = lip_sync.sync_loss(audio, face, label)
    assert total == pytest.approx((-np.log(0.8) + 100 + 0) / 3, rel=1e-5)
    assert terms["accuracy"] == pytest.approx(2 / 3)
    masked, _ = lip_sync.sync_loss(audio, face, label, mask=jnp.array([True, False, True]))
    assert masked == pytest.approx(-np.log(0.8) / 2, rel=1e-5)


def test_generator_loss_by_hand():
    generated, target = jnp.full((2, 1, 2, 2, 3), 0.5), jnp.zeros((2, 1, 2, 2, 3)).at[0].set(0.1)
    l1, _ = lip_sync.reconstruction_loss(generated, target)
    assert l1 == pytest.approx((0.4 + 0.5) / 2)
    adversarial = lip_sync.adversarial_loss(jnp.array([0.0, np.log(3.0)]), real=True)
    assert adversarial == pytest.approx((np.log(2) + np.log(4 / 3)) / 2)
    assert lip_sync.adversarial_loss(jnp.array([np.log(3.0)]), real=False) == pytest.approx(np.log(4))
    terms = {"sync": jnp.array(2.0), "l1": jnp.array(1.0), "adversarial": jnp.array(10.0)}
    total, _ = lip_sync.generator_loss(terms, sync_weight=0.03, adversarial_weight=0.07)
    assert total == pytest.approx(0.03 * 2 + 0.07 * 10 + 0.9)
    del terms["adversarial"]
    assert lip_sync.generator_loss(terms, sync_weight=0.0, adversarial_weight=0.0)[0] == 1.0


def test_shards_agree_with_one_device():
    """Devices with unequal numbers of kept examples: the mean is over examples, not over devices."""
    keys = jax.random.split(jax.random.key(0), 2)
    audio, face = (jnp.abs(jax.random.normal(key, (16, 4))) for key in keys)
    audio, face = (x / jnp.linalg.norm(x, axis=-1, keepdims=True) for x in (audio, face))
    label, mask = jnp.arange(16.0) % 2, jnp.arange(16) < 11
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    parts, whole = PartitionSpec("data"), PartitionSpec()

    def sharded(*args):
        return lip_sync.sync_loss(*args[:3], mask=args[3], axis_name="data")

    got = jax.shard_map(sharded, mesh=mesh, in_specs=(parts,) * 4, out_specs=whole)(audio, face, label, mask)
    expected = lip_sync.sync_loss(audio[:11], face[:11], label[:11])
    jax.tree.map(lambda g, e: np.testing.assert_allclose(g, e, rtol=1e-6), got, expected)


def test_lip_sync_error_finds_the_shift():
    """Sound three steps late: the distance is smallest there, and by hand for a small case."""
    sound = jax.random.normal(jax.random.key(0), (40, 8))
    mouth = jnp.roll(sound, -3, axis=0)
    distances = lip_sync.lse_distances(mouth, sound)
    assert distances.shape == (31,) and int(distances.argmin()) == 15 + 3
    small = lip_sync.lse_distances(jnp.array([[0.0], [3.0]]), jnp.array([[0.0], [1.0]]), max_shift=1)
    np.testing.assert_allclose(small, [(0 + 3) / 2, (0 + 2) / 2, (1 + 3) / 2], atol=2e-6)
    error = lip_sync.lip_sync_error(small)
    assert error["lse_d"] == pytest.approx(1, abs=2e-6) and error["lse_c"] == pytest.approx(0.5, abs=2e-6)
