"""Sinkhorn against the float64 twin, ott-jax, finite differences, and itself on eight devices."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from omnax.kernels.sinkhorn import (
    Potential,
    Scaling,
    _check,
    column_potential,
    doubly_stochastic,
    scaled_rows,
    sinkhorn,
    sinkhorn_knopp,
)
from references import sinkhorn as reference

TOLERANCE = 1e-5


def problem(rows, columns, seed=0, deviation=2.0):
    """Scores and positive marginals of equal sums, float32."""
    rng = np.random.default_rng(seed)
    scores = rng.normal(size=(rows, columns)) * deviation
    r, c = rng.uniform(0.2, 2.0, rows), rng.uniform(0.2, 2.0, columns)
    return scores.astype(np.float32), r.astype(np.float32), (c * r.sum() / c.sum()).astype(np.float32)


@pytest.mark.parametrize("iterations", [1, 3])
def test_notes_form_and_official_loop(iterations):
    scores, _, _ = problem(12, 7)
    u, v, expected = reference.notes_form(scores, iterations)
    np.testing.assert_allclose(reference.official_loop(scores, iterations), expected, atol=1e-14)
    result = sinkhorn(scores, iterations=iterations)
    np.testing.assert_allclose(np.exp(result.g), u, rtol=TOLERANCE)
    np.testing.assert_allclose(np.exp(result.f), v, rtol=TOLERANCE)
    np.testing.assert_allclose(sinkhorn_knopp(scores, iterations=iterations), expected, atol=1e-6)


def test_hand_computed_round():
    # P = [[1, 3], [1, 1]]: u = (2/2) / (P^T 1) = (1/2, 1/4); P u = (5/4, 3/4); v = (4/5, 4/3).
    plan = sinkhorn_knopp(jnp.log(jnp.array([[1.0, 3.0], [1.0, 1.0]])), iterations=1)
    np.testing.assert_allclose(plan, [[2 / 5, 3 / 5], [2 / 3, 1 / 3]], rtol=1e-6)


@pytest.mark.parametrize("iterations", [1, 7])
def test_general_marginals(iterations):
    scores, r, c = problem(11, 6)
    f, g, plan, error, _ = reference.log_scaling(scores, r, c, iterations)
    result = sinkhorn(scores, r, c, iterations=iterations)
    for got, expected in ((result.f, f), (result.g, g), (result.plan(scores), plan), (result.error, error)):
        np.testing.assert_allclose(got, expected, atol=TOLERANCE)
    assert result.iterations == iterations


@pytest.mark.filterwarnings("ignore:JAXopt is no longer maintained:DeprecationWarning")
@pytest.mark.parametrize(("rows", "columns"), [(10, 6), (6, 10)])
def test_equals_ott(rows, columns):
    """ott-jax with rows on axis 0, no early stop; transposed it would do the half-steps in the other order."""
    from ott.geometry.geometry import Geometry
    from ott.problems.linear.linear_problem import LinearProblem
    from ott.solvers.linear.sinkhorn import Sinkhorn

    scores, r, c = problem(rows, columns)
    for a, b, n in ((r, c, 7), (np.ones(rows, np.float32), np.full(columns, rows / columns, np.float32), 3)):
        solver = Sinkhorn(threshold=-1, min_iterations=n, max_iterations=n, inner_iterations=1)
        mass = a.sum()
        geometry = Geometry(cost_matrix=jnp.asarray(-scores), epsilon=1.0)
        out = solver(LinearProblem(geometry, a=jnp.asarray(a / mass), b=jnp.asarray(b / mass)))
        np.testing.assert_allclose(
            sinkhorn(scores, a, b, iterations=n).plan(scores), mass * np.asarray(out.matrix), atol=TOLERANCE
        )


@pytest.mark.parametrize("kind", ["uniform", "offsets", "ties"])
def test_extreme_scores_stay_exact(kind):
    """Logits of +-200 at temperature 0.04: exponents of +-5000 that decide on differences of 1e-3."""
    rng = np.random.default_rng(1)
    logits = {
        "uniform": rng.uniform(-200, 200, (24, 16)),
        "offsets": rng.choice([-197, 197], (24, 1)) + rng.normal(size=(24, 16)) / 10,
        "ties": rng.choice([-200, 0, 200], (24, 16)) + rng.normal(size=(24, 16)) / 100,
    }[kind]
    scores = (np.clip(logits, -200, 200) / 0.04).astype(np.float32)
    c = 10.0 ** rng.uniform(-12, 0, 16)
    c = (c * 24 / c.sum()).astype(np.float32)
    for columns, iterations in ((np.full(16, 24 / 16), 3), (c, 3), (c, 50)):
        plan = sinkhorn(scores, column_marginal=jnp.asarray(columns, jnp.float32), iterations=iterations).plan(scores)
        expected = reference.log_scaling(scores, np.ones(24), columns, iterations)[2]
        np.testing.assert_allclose(plan, expected, atol=TOLERANCE)


def test_invariances():
    scores, _, _ = problem(9, 5)
    rng = np.random.default_rng(2)
    plan = sinkhorn_knopp(scores)
    np.testing.assert_allclose(sinkhorn_knopp(scores + 30), plan, atol=TOLERANCE)
    np.testing.assert_allclose(sinkhorn_knopp(scores + rng.normal(size=5).astype("f") * 9), plan, atol=TOLERANCE)
    # A constant per sample cancels at convergence only: the usual "subtract each row's maximum" would change targets.
    shifted = scores + rng.normal(size=(9, 1)).astype("f") * 9
    assert np.abs(sinkhorn_knopp(shifted) - plan).max() > 0.01
    converged = [sinkhorn_knopp(s, iterations=400) for s in (scores, shifted)]
    np.testing.assert_allclose(*converged, atol=TOLERANCE)


def test_tolerance_stops_at_the_first_good_round():
    scores, r, c = problem(20, 8, deviation=1.0)
    for tolerance in (1e-1, 1e-3):
        _, _, plan, error, rounds = reference.log_scaling(scores, r, c, tolerance=tolerance)
        result = sinkhorn(scores, r, c, tolerance=tolerance)
        assert result.iterations == rounds > 1
        np.testing.assert_allclose(result.error, error, atol=TOLERANCE)
        np.testing.assert_allclose(result.plan(scores), plan, atol=TOLERANCE)
    limited = sinkhorn(scores, r, c, tolerance=1e-3, iterations=2)
    assert limited.iterations == 2 and limited.error > 1e-3


def test_doubly_stochastic():
    scores, _, _ = problem(8, 8)
    plan = doubly_stochastic(scores)
    np.testing.assert_allclose(plan.sum(0), 1, atol=TOLERANCE)
    np.testing.assert_allclose(plan.sum(1), 1, atol=TOLERANCE)
    np.testing.assert_allclose(plan, reference.log_scaling(scores, np.ones(8), np.ones(8), 500)[2], atol=TOLERANCE)
    # Zeros with total support: the two permutation matrices inside share the mass, the zeros stay.
    pattern = jnp.log(jnp.array([[1.0, 0.0, 0.0], [0.0, 2.0, 3.0], [0.0, 5.0, 7.0]]))
    root = 1 / (1 + np.sqrt(15 / 14))  # x^2 / (1 - x)^2 = (2 * 7) / (3 * 5)
    expected = [[1, 0, 0], [0, root, 1 - root], [0, 1 - root, root]]
    np.testing.assert_allclose(doubly_stochastic(pattern), np.array(expected), atol=TOLERANCE)


@jax.jit
def masked_results(scores, r, c, mask):
    result = sinkhorn(scores, r, c, mask=mask, iterations=4)
    return result.plan(scores), result.f, result.error, sinkhorn_knopp(scores, mask=mask)


@settings(max_examples=8, deadline=None, derandomize=True)
@given(st.integers(1, 7), st.integers(1, 7), st.data())
def test_masked_equals_unpadded(rows, columns, data):
    mask = np.array(data.draw(st.lists(st.booleans(), min_size=rows, max_size=rows)))
    scores, r, c = problem(rows, columns, seed=rows)
    scores = np.where(mask[:, None], scores, np.nan).astype(np.float32)  # padding may hold anything
    c = (c * r[mask].sum() / r.sum()).astype(np.float32)
    plan, f, error, targets = map(np.asarray, masked_results(scores, r, c, mask))
    assert not plan[~mask].any() and not targets[~mask].any() and np.isneginf(f[~mask]).all()
    if not mask.any():
        assert error == 0
        return
    np.testing.assert_allclose(plan[mask], reference.log_scaling(scores[mask], r[mask], c, 4)[2], atol=TOLERANCE)
    ones = np.ones(mask.sum())
    expected = reference.log_scaling(scores[mask], ones, np.full(columns, ones.sum() / columns), 3)[2]
    np.testing.assert_allclose(targets[mask], expected, atol=TOLERANCE)


def test_zero_marginals_drop_rows_and_columns():
    scores, r, c = problem(6, 5)
    r[2], c[[0, 3]] = 0, 0
    c *= r.sum() / c.sum()
    kept = np.ix_(r > 0, c > 0)
    result = sinkhorn(scores, r, c, tolerance=1e-4, iterations=1000)
    expected = np.zeros((6, 5))
    expected[kept] = reference.log_scaling(scores[kept], r[r > 0], c[c > 0], int(result.iterations))[2]
    np.testing.assert_allclose(result.plan(scores), expected, atol=TOLERANCE)


def test_half_precision_is_computed_in_float32():
    scores = problem(6, 5)[0].astype(jnp.bfloat16)
    plan = sinkhorn_knopp(jnp.asarray(scores))
    assert plan.dtype == jnp.float32
    np.testing.assert_array_equal(plan, sinkhorn_knopp(jnp.asarray(scores, jnp.float32)))


@pytest.mark.parametrize("tolerance", [None, 1e-6])
def test_gradients_equal_finite_differences(tolerance):
    """Of a weighted sum of the plan, in scores and both marginals, against central differences of the float64 twin."""
    scores, r, c = problem(5, 4, deviation=1.0)
    weight = np.random.default_rng(3).normal(size=(5, 4)).astype(np.float32)
    rounds = 3 if tolerance is None else 300

    def loss(scores, r, c):
        result = sinkhorn(scores, r, c, iterations=rounds, tolerance=tolerance)
        return (result.plan(scores) * weight).sum()

    def twin(*arrays):
        return (reference.log_scaling(*arrays, rounds)[2] * weight).sum()

    arrays = [np.float64(x) for x in (scores, r, c)]
    for index, gradient in enumerate(jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(scores, r, c)):
        for at in np.ndindex(gradient.shape):
            step = [np.zeros_like(x) for x in arrays]
            step[index][at] = 1e-5
            up, down = (twin(*(x + sign * s for x, s in zip(arrays, step, strict=True))) for sign in (1, -1))
            np.testing.assert_allclose(gradient[at], (up - down) / 2e-5, atol=TOLERANCE)


@pytest.mark.parametrize("tolerance", [None, 1e-3])
def test_gradients_with_masks_are_finite(tolerance):
    scores, _, _ = problem(6, 4)
    scores[0] = np.inf

    def loss(scores, mask):
        return jnp.square(sinkhorn(scores, mask=mask, iterations=5, tolerance=tolerance).plan(scores)).sum()

    gradient = jax.jit(jax.grad(loss))
    for mask in (np.arange(6) > 1, np.zeros(6, bool)):
        value = gradient(scores, jnp.asarray(mask))
        assert np.isfinite(value).all() and not np.any(value[~mask]) and np.any(value) == mask.any()


def collective_sizes(compiled):
    """Elements of each array that crosses devices, by operation, from the compiled text."""
    sizes = {}
    for shapes, name in re.findall(r"= (.+?) (all-\w+|reduce-scatter|collective-\w+)(?:-start)?\(", compiled.as_text()):
        found = [int(np.prod([int(n) for n in dims.split(",") if n])) for dims in re.findall(r"\w\[([\d,]*)\]", shapes)]
        sizes.setdefault(name, []).extend(found)
    return sizes


@pytest.mark.parametrize("form", ["jit", "shard_map", "shard_map unchecked"])
@pytest.mark.parametrize("tolerance", [None, 1e-3])
def test_eight_devices_equal_one(form, tolerance):
    """Values and gradients; 61 rows padded to 64 with two empty shards, fewer columns than devices."""
    rows, columns = 64, 5
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    scores, r, c = problem(rows, columns, deviation=1.0)
    mask = (np.arange(rows) < 61) & (np.arange(rows) // 8 % 4 != 1)
    c *= r[mask].sum() / c.sum()
    weight = np.random.default_rng(4).normal(size=scores.shape).astype(np.float32)

    def solve(scores, r, mask, weight, c, axis_name=None):
        result = sinkhorn(scores, r, c, mask=mask, iterations=40, tolerance=tolerance, axis_name=axis_name)
        loss = (result.plan(scores) * weight).sum()
        return loss if axis_name is None else jax.lax.psum(loss, axis_name), result

    sharded = solve
    if form != "jit":
        row, all_ = P("data"), P()
        specs = (all_, Scaling(Potential(row, row), Potential(all_, all_), all_, all_))
        sharded = jax.shard_map(
            partial(solve, axis_name="data"),
            mesh=mesh,
            in_specs=(row, row, row, row, all_),
            out_specs=specs,
            check_vma=form == "shard_map",
        )
    one, eight = (jax.jit(jax.value_and_grad(f, argnums=(0, 1, 4), has_aux=True)) for f in (solve, sharded))
    place = partial(jax.device_put, device=NamedSharding(mesh, P("data")))
    arguments = (*map(place, (scores, r, mask, weight)), jax.device_put(c, NamedSharding(mesh, P())))
    compiled = eight.lower(*arguments).compile()
    results = compiled(*arguments)
    jax.tree.map(partial(np.testing.assert_allclose, atol=TOLERANCE), results, one(scores, r, mask, weight, c))
    sizes = collective_sizes(compiled)
    assert set(sizes) == {"all-reduce"} and max(sizes["all-reduce"]) == columns


def test_only_vectors_cross_devices():
    """Teacher targets with rows, then rows and columns sharded: vectors are reduced, nothing is gathered."""
    scores, _, _ = problem(32, 48)
    for shape, names in (((8,), ("data",)), ((4, 2), ("data", "tensor"))):
        mesh = jax.make_mesh(shape, names, axis_types=(AxisType.Auto,) * len(shape))
        placed = jax.device_put(scores, NamedSharding(mesh, P(*names)))
        compiled = sinkhorn_knopp.lower(placed).compile()
        np.testing.assert_allclose(compiled(placed), sinkhorn_knopp(scores), atol=TOLERANCE)
        sizes = collective_sizes(compiled)
        assert set(sizes) == {"all-reduce"} and max(sizes["all-reduce"]) <= 48


def test_pmap():
    scores, _, _ = problem(16, 6)
    mask = np.arange(16) % 3 > 0
    solve = jax.pmap(lambda s, m: sinkhorn_knopp(s, mask=m, axis_name="data"), axis_name="data")
    plan = solve(scores.reshape(8, 2, 6), mask.reshape(8, 2)).reshape(16, 6)
    np.testing.assert_allclose(plan, sinkhorn_knopp(scores, mask=jnp.asarray(mask)), atol=TOLERANCE)


def test_bad_input_is_named():
    scores, r, c = problem(4, 3)
    with pytest.raises(ValueError, match="iterations must be at least 1, got 0"):
        sinkhorn(scores, iterations=0)
    with pytest.raises(ValueError, match=r"square, got \(4, 3\)"):
        doubly_stochastic(scores)
    # The shape checks of the test session would come first at the public entry.
    for name, arguments in {
        "row_marginal": (c, c, None),
        "column_marginal": (r, r, None),
        "mask": (r, c, c > 0),
    }.items():
        with pytest.raises(ValueError, match=f"{name} must have shape"):
            _check(jnp.asarray(scores), *(x if x is None else jnp.asarray(x) for x in arguments), 1)


@pytest.mark.parametrize(("iterations", "deviation"), [(1, 2.0), (3, 2.0), (3, 2000.0)])
def test_blocks_of_rows_give_the_same_plan(iterations, deviation):
    """3 runs of 2 blocks of 4 rows; masked rows everywhere, one block wholly, and they hold NaN."""
    scores, _, _ = problem(24, 7, deviation=deviation)
    mask = np.random.default_rng(1).random(24) < 0.7
    mask[8:12] = False
    mask, spoiled = jnp.asarray(mask), jnp.where(mask[:, None], scores, np.nan)
    runs = spoiled.reshape(3, 2, 4, 7)
    g = column_potential(lambda x: x, runs, mask.reshape(3, 2, 4), iterations=iterations)
    expected = sinkhorn_knopp(spoiled, mask=mask, iterations=iterations)
    np.testing.assert_allclose(scaled_rows(spoiled, g, mask), expected, atol=1e-6)
    np.testing.assert_allclose(scaled_rows(spoiled[4:8], g, mask[4:8]), expected[4:8], atol=1e-6)
    nothing = column_potential(lambda x: x, runs, jnp.zeros((3, 2, 4), bool))
    assert not np.asarray(scaled_rows(spoiled, nothing, jnp.zeros(24, bool))).any()
    with pytest.raises(ValueError, match="iterations must be at least 1, got 0"):
        column_potential(lambda x: x, runs, mask.reshape(3, 2, 4), iterations=0)
