"""Activations against their definitions, number by number; gradients by central differences."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from omnax.kernels.activations import ACTIVATIONS, gelu
from references.activations import FUNCTIONS
from references.gradients import gradients

# Not at 0, where relu has a corner; the tails to where exp and erf are all but saturated.
POINTS = np.concatenate([np.linspace(-12, 12, 240), [-1e-3, 1e-3, -40, 40]]).astype(np.float32)


def test_the_names_are_those_of_the_table():
    assert ACTIVATIONS.keys() == FUNCTIONS.keys()


@pytest.mark.parametrize("name", FUNCTIONS)
def test_values_and_gradients(name):
    twin = np.vectorize(FUNCTIONS[name], otypes=[np.float64])
    out, pull_back = jax.vjp(ACTIVATIONS[name], jnp.asarray(POINTS))
    np.testing.assert_allclose(out, twin(POINTS.astype(np.float64)), rtol=1e-6, atol=1e-6)
    (expected,) = gradients(twin, [POINTS], np.ones_like(POINTS))
    # The tanh form's derivative has 1 - tanh², which cancels where tanh is all but 1: 4e-6, in torch too.
    np.testing.assert_allclose(pull_back(jnp.ones_like(out))[0], expected, rtol=2e-6, atol=5e-6)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_far_away_everything_is_finite(name):
    x = jnp.asarray([-1e12, -1e4, 0.0, 1e4, 1e12])
    out, pull_back = jax.vjp(ACTIVATIONS[name], x)
    assert np.isfinite(out).all() and np.isfinite(pull_back(jnp.ones_like(x))[0]).all()


def test_gelu_in_bfloat16_is_the_rounded_float32():
    x = jnp.asarray(POINTS, jnp.bfloat16)
    out, pull_back = jax.vjp(gelu, x)
    wide, pull_back_wide = jax.vjp(gelu, x.astype(jnp.float32))
    np.testing.assert_array_equal(out, wide.astype(jnp.bfloat16))
    ones = jnp.ones_like(out)
    np.testing.assert_array_equal(pull_back(ones)[0], pull_back_wide(ones.astype(jnp.float32))[0].astype(jnp.bfloat16))
