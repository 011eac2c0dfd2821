"""Sinkhorn-Knopp matrix scaling in log space (Sinkhorn 1964; Sinkhorn & Knopp 1967).

Given scores S [B, K] and marginals r [B], c [K] of equal sums, find f and g such that the plan exp(S_bk + f_b + g_k)
has row sums r and column sums c. One round is

    g_k = log c_k - logsumexp_b(S_bk + f_b)          f_b = log r_b - logsumexp_k(S_bk + g_k)

from f = 0, columns first, so that after any number of rounds the row sums are exact and the columns carry the error.

Two things are done with care. A potential stays the unevaluated pair (-max, log marginal - log sum): at scores of
+-5000 (logits of +-200 at temperature 0.04) adding the two would round it to 5e-4, which is a relative error of the
plan. And each update depends on the other potential alone, so the loops carry g only, which sharded rows share.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

AxisName = str | tuple[str, ...] | None
ROWS, COLUMNS = 1, 0  # the axis that is summed to get the marginal of the rows, of the columns


class Potential(NamedTuple):
    """The logarithm of a scaling vector, high + low: minus the largest exponent and the rest (-inf: no mass)."""

    high: Float[Array, " L"]
    low: Float[Array, " L"]

    @property
    def value(self) -> Float[Array, " L"]:
        return self.high + self.low


class Scaling(NamedTuple):
    """The result of `sinkhorn`. The plan diag(exp f) exp(S) diag(exp g) is only built by `plan`."""

    row: Potential
    column: Potential
    error: Float[Array, ""]
    """L1 distance between the column sums of the plan and c; the row sums are exact."""
    iterations: Int[Array, ""]
    """Rounds done."""

    @property
    def f(self) -> Float[Array, " B"]:
        """Row potentials, log v of the notes, -inf on masked rows. Rounded at large scores: `row` is what is exact."""
        return self.row.value

    @property
    def g(self) -> Float[Array, " K"]:
        """Column potentials, log u of the notes. Rounded likewise."""
        return self.column.value

    @jax.jit
    def plan(self, scores: Float[Array, "B K"]) -> Float[Array, "B K"]:
        """The scaled matrix for the `scores` that were given to `sinkhorn`; masked rows are zero whatever they hold."""
        return _plan(scores, self.row, self.column)


@partial(jax.jit, static_argnames=("iterations", "tolerance", "axis_name"))
def sinkhorn(
    scores: Float[Array, "B K"],
    row_marginal: Float[Array, " B"] | None = None,
    column_marginal: Float[Array, " K"] | None = None,
    *,
    mask: Bool[Array, " B"] | None = None,
    iterations: int = 100,
    tolerance: float | int | None = None,
    axis_name: AxisName = None,
) -> Scaling:
    """Scales exp(scores) to the given marginals.

    Rows may be sharded. Under `jax.jit` with sharded `scores` nothing need be said; inside `jax.shard_map` or
    `jax.pmap` name the mesh axis. Either way only K-vectors and scalars cross devices.

    Differentiable in reverse mode in `scores` and both marginals: through the rounds when their number is fixed
    (recomputing each, so that only g is kept per round), through the fixed point when `tolerance` is given (first
    derivatives only, as exact as the convergence).

    Args:
        scores: log of the matrix (for teacher targets: logits / temperature). -inf is a zero of the matrix. Computed in
            float32 at least.
        row_marginal: r, default 1 for each row. A zero drops the row.
        column_marginal: c, the same on all devices, default sum(r) / K. sum(c) must be the sum of r over the rows
            kept, otherwise no plan has these columns and `error` stays at the difference.
        mask: True for real rows. The others get no mass, may hold anything (even NaN), may fill a shard or the batch.
        iterations: number of rounds, or the limit when `tolerance` is given.
        tolerance: stop after the first round that leaves an L1 error of the column sums of at most this. Float32
            reaches about 1e-6 of sum(c).
        axis_name: mesh axis (or axes) that the rows are spread over.

    Raises:
        ValueError: fewer than one round, or marginals or a mask that do not fit `scores`.
    """
    _check(scores, row_marginal, column_marginal, mask, iterations)
    scores = scores.astype(jnp.promote_types(scores.dtype, jnp.float32))
    r = jnp.ones_like(scores[:, 0]) if row_marginal is None else row_marginal.astype(scores.dtype)
    r = r if mask is None else jnp.where(mask, r, 0)
    if column_marginal is None:
        columns = scores.shape[1]
        c = jnp.full(columns, _across(axis_name, jax.lax.psum, r.sum()) / columns)
    else:
        c = column_marginal.astype(scores.dtype)

    problem = _Problem(_drop_dead(scores, r > 0, c > 0), r, c)
    if tolerance is None:
        g, done = _run(problem, iterations, axis_name), jnp.int32(iterations)
    else:
        g, done = _converge(problem, iterations, tolerance, axis_name)
    f = _update(problem.scores, g, r, ROWS)
    error = _column_error(g, _update(problem.scores, f, c, COLUMNS, axis_name), c)
    return Scaling(_without_mass(f, r > 0), _without_mass(g, c > 0), error, done)


@partial(jax.jit, static_argnames=("iterations", "axis_name"))
def sinkhorn_knopp(
    scores: Float[Array, "B K"],
    *,
    iterations: int = 3,
    mask: Bool[Array, " B"] | None = None,
    axis_name: AxisName = None,
) -> Float[Array, "B K"]:
    """Balanced assignment of B samples to K prototypes, the teacher target of DINOv2.

    With P = exp(scores)^T [K, B], v = 1 and B the number of valid samples on all devices, each round does
    u_k = (B / K) / sum_b P_kb v_b and then v_b = 1 / sum_k u_k P_kb; the result holds u_k P_kb v_b at [b, k]. After any
    number of rounds this equals the in-place loop of facebookresearch/dinov2:dinov2/loss/dino_clstoken_loss.py, but it
    cannot overflow. Rows sum to one, masked rows are zero. For targets wrap it in `jax.lax.stop_gradient`.
    """
    return sinkhorn(scores, mask=mask, iterations=iterations, axis_name=axis_name).plan(scores)


@partial(jax.jit, static_argnames=("iterations", "tolerance"))
def doubly_stochastic(
    scores: Float[Array, "B K"], *, iterations: int = 1000, tolerance: float | int | None = 1e-6
) -> Float[Array, "B K"]:
    """Scales the square matrix exp(scores) until rows and columns sum to one.

    A solution exists when the matrix is positive, or non-negative with total support (Sinkhorn & Knopp 1967).

    Raises:
        ValueError: the matrix is not square.
    """
    if scores.shape[0] != scores.shape[1]:
        raise ValueError(f"doubly_stochastic: scores must be square, got {scores.shape}")
    return sinkhorn(scores, iterations=iterations, tolerance=tolerance).plan(scores)


def column_potential(
    scores: Callable[[Any], Float[Array, "B K"]],
    rows: Any,
    mask: Bool[Array, "N L B"],
    *,
    iterations: int = 3,
    axis_name: AxisName = None,
) -> Potential:
    """The column potential of `sinkhorn_knopp` for a matrix that is never there: u of the notes alone is kept.

    v follows from u row by row, so `scaled_rows` gives any block of the plan. Each round computes the scores of every
    block once. Not for differentiation.

    Args:
        scores: what `rows` holds of one block -> its scores.
        rows: arrays with two more leading dimensions: N runs of L blocks. Runs go side by side, and may be sharded:
            only K-vectors cross devices. Of each run one block's scores exist at a time.
        mask: True for real rows.
        iterations: number of rounds.
        axis_name: mesh axis (or axes) that further rows are spread over, inside `jax.shard_map`.

    Raises:
        ValueError: fewer than one round.
    """
    _check_rounds(iterations)
    count = _across(axis_name, jax.lax.psum, mask.sum())
    columns = jax.eval_shape(scores, jax.tree.map(lambda x: x[0, 0], rows)).shape[1]
    marginal = jnp.full(columns, count / columns)

    def update(row_potential: Callable[[Array, Array], Potential]) -> Potential:
        def add(sums: _Sum, block: tuple[Any, Array]) -> tuple[_Sum, None]:
            values = _drop_dead(scores(block[0]), block[1], jnp.full(columns, True))
            new = _sum_exp(values, row_potential(values, block[1]), COLUMNS)
            both = _Sum(*(jnp.stack(pair) for pair in zip(sums, new, strict=True)))
            return _add_up(both), None

        nothing = _Sum(jnp.full(columns, -jnp.inf), jnp.zeros(columns))
        sums = jax.vmap(lambda *run: jax.lax.scan(add, nothing, run)[0])(rows, mask)
        return _potential(_over_devices(_add_up(sums), axis_name), marginal)

    g = update(lambda values, kept: Potential(jnp.zeros(len(kept)), jnp.zeros(len(kept))))
    return jax.lax.fori_loop(1, iterations, lambda _, g: update(partial(_row_potential, g)), g)


def scaled_rows(scores: Float[Array, "B K"], column: Potential, mask: Bool[Array, " B"]) -> Float[Array, "B K"]:
    """Rows of the plan: exp(scores + column), each row scaled to sum to one; masked rows are zero."""
    scores = _drop_dead(scores, mask, jnp.isfinite(column.low))
    return _plan(scores, _without_mass(_row_potential(column, scores, mask), mask), column)


class _Problem(NamedTuple):
    scores: Float[Array, "B K"]  # -inf where the row or the column has no mass
    r: Float[Array, " B"]
    c: Float[Array, " K"]


class _Sum(NamedTuple):
    """Sums of exponentials, exp(top) · mass."""

    top: Float[Array, "*N L"]  # the largest exponent, -inf of an empty sum
    mass: Float[Array, "*N L"]


def _update(
    scores: Float[Array, "B K"],
    other: Potential,
    marginal: Float[Array, " L"],
    axis: int,
    axis_name: AxisName = None,
) -> Potential:
    """log(marginal) - logsumexp(scores + other) over `axis`, the axis along which `other` runs."""
    return _potential(_over_devices(_sum_exp(scores, other, axis), axis_name), marginal)


def _sum_exp(scores: Float[Array, "B K"], other: Potential, axis: int) -> _Sum:
    """The sum of exp(scores + other) over `axis`."""
    high, low = (jnp.expand_dims(part, 1 - axis) for part in other)
    total, error = _two_sum(scores, high)
    low += error
    # The maximum keeps the sum in [1, L], hence a potential's `low` small. It decides no value, so no derivative goes
    # through it.
    top = jax.lax.stop_gradient((total + low).max(axis))
    return _Sum(top, jnp.exp((total - jnp.expand_dims(_finite(top), axis)) + low).sum(axis))


def _add_up(sums: _Sum) -> _Sum:
    """The sum over the first axis."""
    top = sums.top.max(0)
    return _Sum(top, (sums.mass * jnp.exp(sums.top - _finite(top))).sum(0))


def _over_devices(sums: _Sum, axis_name: AxisName) -> _Sum:
    """The sum over all devices of `axis_name`."""
    if axis_name is None:
        return sums
    top = jax.lax.pmax(sums.top, axis_name)
    return _Sum(top, jax.lax.psum(sums.mass * jnp.exp(sums.top - _finite(top)), axis_name))


def _potential(sums: _Sum, marginal: Float[Array, " L"]) -> Potential:
    return Potential(-_finite(sums.top), _safe_log(marginal) - _safe_log(sums.mass))


def _row_potential(column: Potential, scores: Float[Array, "B K"], mask: Bool[Array, " B"]) -> Potential:
    """v of the notes, given u."""
    return _potential(_sum_exp(scores, column, ROWS), mask.astype(scores.dtype))


def _plan(scores: Float[Array, "B K"], row: Potential, column: Potential) -> Float[Array, "B K"]:
    """exp(scores + row + column)."""
    scores = _drop_dead(scores, jnp.isfinite(row.low), jnp.isfinite(column.low))
    total, row_error = _two_sum(scores, row.high[:, None])
    total, column_error = _two_sum(total, column.high)
    return jnp.exp(total + (row_error + column_error + row.low[:, None] + column.low))


def _first(problem: _Problem, axis_name: AxisName) -> Potential:
    """g of the first round, from f = 0."""
    zeros = jnp.zeros_like(problem.r)
    return _update(problem.scores, Potential(zeros, zeros), problem.c, COLUMNS, axis_name)


def _next(problem: _Problem, g: Potential, axis_name: AxisName) -> Potential:
    """g of the next round: f from g, then g from f."""
    return _update(problem.scores, _update(problem.scores, g, problem.r, ROWS), problem.c, COLUMNS, axis_name)


def _run(problem: _Problem, iterations: int, axis_name: AxisName) -> Potential:
    """g after a fixed number of rounds. The backward pass keeps g of each round and recomputes the matrices."""
    step = jax.checkpoint(partial(_next, axis_name=axis_name), prevent_cse=False)
    return jax.lax.fori_loop(1, iterations, lambda _, g: step(problem, g), _first(problem, axis_name))


def _iterate(
    problem: _Problem, iterations: int, tolerance: float | int, axis_name: AxisName
) -> tuple[Potential, Int[Array, ""]]:
    """g of the first round whose column error is at most `tolerance`, and the number of rounds."""

    def unfinished(state):
        g, following, done = state
        return (done < iterations) & (_column_error(g, following, problem.c) > tolerance)

    def advance(state):
        _, g, done = state
        return g, _next(problem, g, axis_name), done + 1

    first = _first(problem, axis_name)
    g, _, done = jax.lax.while_loop(unfinished, advance, (first, _next(problem, first, axis_name), jnp.int32(1)))
    return g, done


def _converge_forward(problem, iterations, tolerance, axis_name):
    g, done = _iterate(problem, iterations, tolerance, axis_name)
    return (g, done), (problem, g, done)


def _converge_backward(iterations, tolerance, axis_name, residuals, cotangents):
    """Implicit differentiation of g = _next(problem, g): the Neumann series of the adjoint, one term per forward round.

    Forward and adjoint rounds contract alike, so the truncation error is of the order of the tolerance. It is what
    differentiating the rounds themselves would give with every iterate replaced by the last one.
    """
    del iterations, tolerance
    problem, g, done = residuals
    _, pull_back = jax.vjp(partial(_next, axis_name=axis_name), problem, g)
    add = partial(jax.tree.map, jnp.add)
    adjoint = jax.lax.fori_loop(1, done, lambda _, total: add(cotangents[0], pull_back(total)[1]), cotangents[0])
    return (pull_back(adjoint)[0],)


_converge = jax.custom_vjp(_iterate, nondiff_argnums=(1, 2, 3))
_converge.defvjp(_converge_forward, _converge_backward)


def _column_error(g: Potential, following: Potential, c: Float[Array, " K"]) -> Float[Array, ""]:
    """L1 distance of the column sums from c before the update from `g` to `following`, which makes it zero."""
    return jnp.sum(c * jnp.abs(jnp.expm1((g.high - following.high) + (g.low - following.low))))


def _drop_dead(scores: Float[Array, "B K"], rows: Bool[Array, " B"], columns: Bool[Array, " K"]) -> Float[Array, "B K"]:
    return jnp.where(rows[:, None] & columns, scores, -jnp.inf)


def _without_mass(potential: Potential, alive: Bool[Array, " L"]) -> Potential:
    return Potential(potential.high, jnp.where(alive, potential.low, -jnp.inf))


def _two_sum(a: Float[Array, "*s"], b: Float[Array, "*t"]) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
    """a + b rounded, and what the rounding dropped (Knuth, TAOCP 2, 4.2.2); a may be -inf."""
    total = a + b
    b_seen = total - a
    dropped = (a - (total - b_seen)) + (b - b_seen)
    return total, jax.lax.stop_gradient(jnp.where(jnp.isfinite(total), dropped, 0))


def _finite(top: Float[Array, "*N L"]) -> Float[Array, "*N L"]:
    return jnp.where(jnp.isfinite(top), top, 0)


def _safe_log(x: Float[Array, " L"]) -> Float[Array, " L"]:
    """log(x), and 0 with zero derivative where x is 0: such rows and columns are already cut out of the scores."""
    return jnp.log(jnp.where(x > 0, x, 1))


def _across(axis_name: AxisName, reduce: Callable[[Array, AxisName], Array], x: Array) -> Array:
    return x if axis_name is None else reduce(x, axis_name)


def _check(
    scores: Array, row_marginal: Array | None, column_marginal: Array | None, mask: Array | None, iterations: int
) -> None:
    _check_rounds(iterations)
    for name, vector, length in (
        ("row_marginal", row_marginal, scores.shape[0]),
        ("mask", mask, scores.shape[0]),
        ("column_marginal", column_marginal, scores.shape[1]),
    ):
        if vector is not None and vector.shape != (length,):
            raise ValueError(f"sinkhorn: {name} must have shape ({length},), got {vector.shape}")


def _check_rounds(iterations: int) -> None:
    if iterations < 1:
        raise ValueError(f"sinkhorn: iterations must be at least 1, got {iterations}")
