"""Noise schedules, adding noise and guidance, against numbers of the papers' code and NumPy."""

import jax.numpy as jnp
import numpy as np
import pytest
from omnax.kernels.diffusion import (
    BETA_SCHEDULES,
    add_noise,
    cumulative_alphas,
    guide,
    make_betas,
    velocity,
    zero_terminal_snr,
)
from omnax.models.samplers import SamplerConfig

RANDOM = np.random.default_rng(0)


def test_stable_diffusion_schedule():
    """Figures of CompVis' schedule; after the rescaling the last step keeps nothing."""
    alphas = SamplerConfig().alphas
    expected = {0: 0.999149978, 1: 0.998296022, 250: 0.673792303, 500: 0.276332468, 750: 0.056169804, 999: 0.004660095}
    np.testing.assert_allclose(alphas[list(expected)], list(expected.values()), rtol=2e-7)  # nine digits each
    rescaled = SamplerConfig(zero_snr=True, prediction="v_prediction").alphas
    np.testing.assert_allclose(rescaled[[0, 500, 998]], [0.999149978, 0.241019, 1.968e-7], rtol=2e-4)  # four digits
    assert rescaled[999] == 0


@pytest.mark.parametrize("schedule", BETA_SCHEDULES)
def test_betas_grow_and_are_float32(schedule):
    betas = make_betas(schedule, 0.001, 0.02, 100)
    assert betas.dtype == np.float32
    assert (np.diff(betas) > 0).all()
    if schedule != "squaredcos_cap_v2":
        np.testing.assert_allclose(betas[[0, -1]], [0.001, 0.02], rtol=1e-6)
    assert zero_terminal_snr(betas)[-1] == 1
    assert cumulative_alphas(betas).dtype == np.float32


def test_noised_sample_and_velocity_turn_back():
    """x = sqrt(abar) x_t - sqrt(1 - abar) v: the two are a rotation of sample and noise."""
    sample, noise = (jnp.asarray(RANDOM.normal(size=(3, 2, 2, 4)), jnp.float32) for _ in range(2))
    alphas, steps = np.array([0.9, 0.5, 0.1], np.float32), jnp.array([2, 0, 1])
    noised, v = (f(sample, noise, alphas, steps) for f in (add_noise, velocity))
    kept = alphas[steps][:, None, None, None]
    np.testing.assert_allclose(np.sqrt(kept) * noised - np.sqrt(1 - kept) * v, sample, atol=1e-6)
    np.testing.assert_allclose(noised[0], np.sqrt(0.1) * sample[0] + np.sqrt(0.9) * noise[0], atol=1e-6)


@pytest.mark.parametrize("rescale", [0.0, 0.7, 1.0])
def test_guidance(rescale):
    unconditional, conditional = RANDOM.normal(size=(2, 3, 4, 4, 2)).astype(np.float32)
    found = guide(jnp.asarray(unconditional), jnp.asarray(conditional), 7.5, rescale)
    for i in range(3):
        guided = unconditional[i] + 7.5 * (conditional[i] - unconditional[i])
        narrowed = guided * conditional[i].std(ddof=1) / guided.std(ddof=1)
        np.testing.assert_allclose(found[i], rescale * narrowed + (1 - rescale) * guided, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(guide(jnp.zeros((1, 2)), jnp.zeros((1, 2)), 3.0, rescale), 0)  # of an untrained model
