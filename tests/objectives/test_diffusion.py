"""Losses of diffusion models against numbers worked out by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from omnax.objectives.diffusion import offset_noise, prediction_loss, snr_weights

# abar 0.9 and 0.2: snr 9 and 1/4; sqrt(abar) 3/sqrt(10) and 1/sqrt(5).
ALPHAS = np.array([0.9, 0.2], np.float32)
STEPS = jnp.array([0, 1])
SAMPLE = jnp.array([[[1.0, 3.0]], [[2.0, 0.0]]])
NOISE = jnp.array([[[2.0, 1.0]], [[0.0, 4.0]]])
ZERO = jnp.zeros((2, 1, 2))


@pytest.mark.parametrize(
    ("prediction", "errors"),
    [
        ("epsilon", (2.5, 8.0)),  # means of (4, 1) and (0, 16)
        ("sample", (5.0, 2.0)),  # of (1, 9) and (4, 0)
        # v of the first: 0.948683 (2, 1) - 0.316228 (1, 3) = (1.581139, 0), of the second:
        # 0.447214 (0, 4) - 0.894427 (2, 0) = (-1.788854, 1.788854)
        ("v_prediction", (1.25, 3.2)),
    ],
)
def test_loss_by_hand(prediction, errors):
    total, terms = prediction_loss(ZERO, SAMPLE, NOISE, ALPHAS, STEPS, prediction=prediction)
    np.testing.assert_allclose([total, terms["mse"]], [sum(errors) / 2] * 2, rtol=1e-6)
    # min(9, 5) = 5 and min(1/4, 5) = 1/4, over snr or snr + 1
    weights = {"epsilon": (5 / 9, 1.0), "sample": (5.0, 0.25), "v_prediction": (0.5, 0.2)}[prediction]
    np.testing.assert_allclose(snr_weights(ALPHAS, STEPS, prediction, 5.0), weights, rtol=1e-6)
    total, terms = prediction_loss(ZERO, SAMPLE, NOISE, ALPHAS, STEPS, prediction=prediction, min_snr=5.0)
    np.testing.assert_allclose(total, np.dot(weights, errors) / 2, rtol=1e-6)
    np.testing.assert_allclose(terms["mse"], sum(errors) / 2, rtol=1e-6)


def test_mask_and_devices():
    mask = jnp.array([True, False])
    total, _ = prediction_loss(ZERO, SAMPLE, NOISE, ALPHAS, STEPS, mask=mask)
    np.testing.assert_allclose(total, 2.5, rtol=1e-6)

    def per_device(sample, noise, step, mask):
        return prediction_loss(0 * sample, sample, noise, ALPHAS, step, mask=mask, axis_name="d")[0]

    split = [x[:, None] for x in (SAMPLE, NOISE, STEPS, mask)]
    np.testing.assert_allclose(jax.vmap(per_device, axis_name="d")(*split), [2.5, 2.5], rtol=1e-6)


def test_a_step_of_pure_noise_has_no_weight():
    """Zero-terminal SNR: 0 / 1 for v, where an error of the noise would say nothing (0 / 0)."""
    assert snr_weights(np.array([0.0], np.float32), jnp.array([0]), "v_prediction", 5.0) == 0


def test_loss_is_float32_and_names_what_it_does_not_know():
    half = jnp.full((2, 1, 2), 300.0, jnp.float16)  # its square overflows
    total, _ = prediction_loss(half, ZERO, ZERO, ALPHAS, STEPS)
    assert (total.dtype, float(total)) == (jnp.float32, 90000.0)
    with pytest.raises(ValueError, match="prediction is 'flow', expected one of"):
        prediction_loss(ZERO, SAMPLE, NOISE, ALPHAS, STEPS, prediction="flow")


def test_offset_is_one_number_a_channel():
    noise = jnp.zeros((3, 4, 5, 2))
    added = offset_noise(noise, jax.random.key(0), 0.1)
    assert jnp.unique(added).size == 3 * 2
    assert 0.02 < added.std() < 0.3
    np.testing.assert_array_equal(added, jnp.broadcast_to(added[:, :1, :1], added.shape))
    np.testing.assert_array_equal(offset_noise(noise + 1, jax.random.key(0), 0.0), noise + 1)
