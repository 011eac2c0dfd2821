"""Normalisations against the row-by-row twin, values and gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from omnax.kernels.normalization import group_norm, l2_normalize, layer_norm, rms_norm
from references import normalization as reference
from references.gradients import gradients

CASES = {"layer_norm": (layer_norm, 2), "rms_norm": (rms_norm, 1), "l2_normalize": (l2_normalize, 0)}


@pytest.mark.parametrize("name", CASES)
@settings(max_examples=6, deadline=None, derandomize=True)
@given(shape=st.lists(st.integers(1, 4), max_size=2), width=st.integers(1, 9), seed=st.integers(0, 99))
def test_any_shape_against_the_twin(name, shape, width, seed):
    """Rows of one entry too: their layer norm is the bias, and its gradient for x is 0."""
    function, parameters = CASES[name]
    rng = np.random.default_rng(seed)
    x, cotangent = rng.normal(size=(2, *shape, width)).astype(np.float32)
    arrays = [x, *(rng.normal(size=(parameters, width)).astype(np.float32))]
    out, pull_back = jax.vjp(functools.partial(function, eps=1e-2), *map(jnp.asarray, arrays))
    twin = functools.partial(getattr(reference, name), eps=1e-2)
    np.testing.assert_allclose(out, twin(*(a.astype(np.float64) for a in arrays)), rtol=1e-5, atol=1e-5)
    for result, expected in zip(pull_back(jnp.asarray(cotangent)), gradients(twin, arrays, cotangent), strict=True):
        np.testing.assert_allclose(result, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("grid", "groups"), [((3, 2), 2), ((), 3), ((4,), 1)])
def test_group_norm_against_the_twin(grid, groups):
    rng = np.random.default_rng(0)
    x, cotangent = (3 + rng.normal(size=(2, 2, *grid, 6))).astype(np.float32)
    arrays = [x, *rng.normal(size=(2, 6)).astype(np.float32)]
    out, pull_back = jax.vjp(lambda *a: group_norm(*a, groups, eps=1e-2), *map(jnp.asarray, arrays))
    twin = functools.partial(reference.group_norm, groups=groups, eps=1e-2)
    np.testing.assert_allclose(out, twin(*(a.astype(np.float64) for a in arrays)), atol=1e-5)
    for result, expected in zip(pull_back(jnp.asarray(cotangent)), gradients(twin, arrays, cotangent), strict=True):
        np.testing.assert_allclose(result, expected, rtol=1e-5, atol=2e-5)  # numeric derivatives of sums of 50 terms
    with pytest.raises(ValueError, match="6 channels are not divisible by 4 groups"):
        group_norm(*map(jnp.asarray, arrays), 4)


def test_without_scale_and_bias():
    x = jnp.asarray([[1.0, 2.0, 3.0], [-2.0, 0.0, 2.0]])
    np.testing.assert_allclose(layer_norm(x, eps=0.0), [[-(1.5**0.5), 0, 1.5**0.5]] * 2, rtol=1e-6)
    np.testing.assert_allclose(rms_norm(x, eps=0.0)[1], [-(1.5**0.5), 0, 1.5**0.5], rtol=1e-6)


def test_variance_takes_two_passes():
    """Mean 4096, deviation 1: float32 squares are 1 or 2 apart, so that E[x²] - E[x]² is off by up to 100 %."""
    x = jnp.asarray(4096 + np.random.default_rng(0).normal(size=(4, 64)), jnp.float32)
    expected = reference.layer_norm(np.asarray(x, np.float64), np.ones(64), np.zeros(64), 1e-6)
    np.testing.assert_allclose(layer_norm(x), expected, atol=1e-3)  # the float32 mean is rounded to 2⁻¹² … 2⁻¹¹


@pytest.mark.parametrize("name", CASES)
def test_bfloat16_is_the_rounded_float32(name):
    function, parameters = CASES[name]
    x = jnp.asarray(np.random.default_rng(0).normal(size=(5, 40)), jnp.bfloat16)
    vectors = [jnp.linspace(0.5, 2, 40)] * parameters
    np.testing.assert_array_equal(function(x, *vectors), function(x.astype(jnp.float32), *vectors).astype(jnp.bfloat16))


def test_short_vectors_are_divided_by_eps():
    x = jnp.asarray([[0.0, 0.0], [3e-4, 4e-4], [3.0, 4.0]])
    np.testing.assert_allclose(l2_normalize(x, 1e-3), [[0, 0], [0.3, 0.4], [0.6, 0.8]], rtol=1e-6)
    assert np.isfinite(jax.grad(lambda x: l2_normalize(x).sum())(x)).all()
