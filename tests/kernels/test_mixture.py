"""Mixtures of experts: every form beside a loop over tokens in NumPy, under any imbalance; costs; eight devices."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from omnax.kernels.flops import count_flops
from omnax.kernels.mixture import mixture, route
from references import mixture as reference

TOLERANCE = 1e-5
TOKENS, WIDTH, HIDDEN, EXPERTS, CHOSEN = 150, 8, 12, 6, 2
RNG = np.random.default_rng(0)
X = RNG.normal(size=(TOKENS, WIDTH)).astype(np.float32)
KERNELS = tuple(
    RNG.normal(0, 0.3, shape).astype(np.float32)
    for shape in ((EXPERTS, WIDTH, HIDDEN), (EXPERTS, WIDTH, HIDDEN), (EXPERTS, HIDDEN, WIDTH))
)
WEIGHTS = RNG.dirichlet(np.ones(CHOSEN), TOKENS).astype(np.float32)
# Which experts the tokens go to; those without a kernel are on other devices
LOADS = {
    "spread": np.stack([RNG.permutation(EXPERTS)[:CHOSEN] for _ in range(TOKENS)]),
    "all to one pair": np.tile([4, 1], (TOKENS, 1)),
    "to the first and last": np.tile([EXPERTS - 1, 0], (TOKENS, 1)),
    "half elsewhere": np.stack([RNG.integers(-9, 0, TOKENS), RNG.integers(2, EXPERTS + 5, TOKENS)], 1),
    "all elsewhere": np.tile([-1, EXPERTS], (TOKENS, 1)),
    "one token here": np.r_[np.array([[3, -1]]), np.tile([-1, EXPERTS], (TOKENS - 1, 1))],
}


@functools.partial(jax.jit, static_argnames=("form", "partial"))
def value_and_gradients(x, weights, kernels, chosen, cotangent, form, partial):
    def run(x, weights, *kernels):
        return mixture(x, weights, chosen, *kernels, activation=jax.nn.silu, form=form, partial=partial)

    value, pull_back = jax.vjp(run, x, weights, *kernels)
    return value, pull_back(cotangent)


FORMS = [("dense", False), ("gather", False), ("ragged", False), ("blocks", False), ("blocks", True)]


@pytest.mark.parametrize(("form", "partial"), FORMS)
def test_every_form_equals_the_twin(form, partial):
    """Values, and gradients of tokens, weights and kernels."""
    cotangent = RNG.normal(size=X.shape).astype(np.float32)
    for name, chosen in LOADS.items():
        value, gradients = value_and_gradients(X, WEIGHTS, KERNELS, chosen.astype(np.int32), cotangent, form, partial)
        expected = reference.mixture(X, WEIGHTS, chosen, *KERNELS)
        np.testing.assert_allclose(value, expected, atol=TOLERANCE, err_msg=name)
        wanted = reference.gradients(X, WEIGHTS, chosen, *KERNELS, cotangent)
        for got, gradient in zip(gradients, wanted, strict=True):
            # Sums over up to 150 tokens, in float32
            np.testing.assert_allclose(got, gradient, atol=TOLERANCE * max(1, np.abs(gradient).max()), err_msg=name)


def test_router_weights_sum_to_one_and_are_the_likeliest():
    logits = RNG.normal(size=(5, EXPERTS)).astype(np.float32)
    weights, chosen = route(jnp.asarray(logits), 3)
    np.testing.assert_array_equal(chosen, np.argsort(-logits, axis=1)[:, :3])
    probability = np.exp(np.take_along_axis(logits, np.asarray(chosen), 1))
    np.testing.assert_allclose(weights, probability / probability.sum(1, keepdims=True), atol=1e-6)


def test_operations_are_those_of_the_chosen_experts():
    """As traced, loops with their iterations: the compiled loop runs as often (see below)."""
    tokens, experts, chosen, width, hidden = 4096, 16, 4, 32, 48
    shapes = ((tokens, width), (tokens, chosen), (experts, width, hidden), (experts, width, hidden))
    args = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in (*shapes, (experts, hidden, width))]
    numbers = jnp.arange(tokens * chosen, dtype=jnp.int32).reshape(tokens, chosen) % experts

    def run(x, weights, *kernels):
        return mixture(x, weights, numbers, *kernels, activation=jax.nn.silu)

    active = 2 * tokens * chosen * 3 * width * hidden
    assert active <= count_flops(jax.make_jaxpr(run)(*args).jaxpr) <= 1.1 * active
    compiled = jax.jit(run).lower(*args).compile()
    body = compiled.cost_analysis()["flops"]  # XLA counts a loop's body once
    trips = int(compiled.as_text().split('known_trip_count":{"n":"')[1].split('"')[0])
    assert body * trips < 1.2 * active < 0.4 * active * experts / chosen  # sorting and activations are in it too
