"""Evaluators against direct computations, with padding and on a mesh."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from omnax.train.evaluation import evaluators
from omnax.train.recipe import Evaluator
from omnax.train.settings import MeshConfig
from omnax.train.sharding import make_mesh

STATE = types.SimpleNamespace(averaged_params={}, variables={})


@pytest.fixture(scope="module", autouse=True)
def mesh():
    with jax.set_mesh(make_mesh(MeshConfig())):
        yield


def split(x: np.ndarray, label: np.ndarray, batch_size: int = 16):
    """The examples as batches, the last one padded with rows that would count if the mask were ignored."""

    def batches():
        for start in range(0, len(x), batch_size):
            part = slice(start, start + batch_size)
            missing = batch_size - len(x[part])
            yield {
                "image": np.concatenate([x[part], np.full((missing, x.shape[1]), 7, np.float32)]),
                "label": np.concatenate([label[part], np.zeros(missing, np.int32)]),
                "mask": np.arange(batch_size) < len(x[part]),
            }

    return batches


def identity(params, variables, image):
    return image


def clusters(count: int, seed: int, spread: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    label = rng.integers(3, size=count).astype(np.int32)
    return (np.eye(3, 5)[label] * 2 + spread * rng.normal(size=(count, 5))).astype(np.float32), label


def test_accuracy_loss_and_confusion_ignore_the_padding():
    x, label = clusters(37, 0)
    result = evaluators.accuracy("test", identity, split(x[:, :3], label), num_classes=3).run(STATE)
    guess = x[:, :3].argmax(-1)
    assert result["accuracy"] == pytest.approx((guess == label).mean())
    log_softmax = x[:, :3] - np.log(np.exp(x[:, :3]).sum(-1, keepdims=True))
    assert result["loss"] == pytest.approx(-log_softmax[np.arange(37), label].mean(), rel=1e-5)
    expected = np.zeros((3, 3), int)
    np.add.at(expected, (label, guess), 1)
    np.testing.assert_array_equal(result["confusion"], expected)


def test_nearest_neighbours_against_numpy():
    bank, label = clusters(50, 1)
    query, _ = clusters(11, 2)
    votes = evaluators.nearest_neighbours(query, bank, label, num_classes=3, k=7, block=4)
    for q, vote in zip(query, votes, strict=True):
        similarity = bank @ q / np.linalg.norm(bank, axis=1) / np.linalg.norm(q)
        nearest = np.argsort(-similarity)[:7]
        weight = np.exp((similarity[nearest] - similarity.max()) / 0.07)
        np.testing.assert_allclose(vote, np.bincount(label[nearest], weight, 3), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("scores", "wins"), [([1.0, 1.0, 1.0], 0), ([0.0, 2.0, 1.0], 1), ([2.0, 2.0, 1.0], 0)])
def test_ties_count_against_the_model(scores, wins):
    """Two equal scores are no hit, but among the best two only where no third ties."""
    x, label = np.float32([scores] * 8), np.ones(8, np.int32)
    result = evaluators.accuracy("test", identity, split(x, label, 8), 3, top=(2,))(STATE)
    assert result["accuracy"] == wins and np.trace(result["confusion"]) == 8 * wins
    assert result["top_2_accuracy"] == (scores != [1.0, 1.0, 1.0])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda x, y: evaluators.accuracy("test", identity, split(x, y), 3, top=(2,)), "evaluator 'test': .*1 of 37"),
        (lambda x, y: evaluators.knn("knn", identity, split(x, y), split(x, y), 3), "evaluator 'knn': 1 of 111 feat"),
        (lambda x, y: evaluators.linear_probe("p", identity, split(x, y), split(x, y), 3), "evaluator 'p': 1 of 111"),
    ],
)
def test_scores_that_are_not_finite_are_an_error(make, message):
    x, label = clusters(37, 0)
    x = x[:, :3].copy()
    x[5, 1] = np.nan
    with pytest.raises(FloatingPointError, match=message):
        make(x, label)(STATE)
    x[5, 1], label[4] = 0, 3
    with pytest.raises(ValueError, match=r"evaluator .*1 labels are none of the 3 classes"):
        make(x, label)(STATE)


def test_equal_features_win_nothing():
    """Sorted by class, as a folder is: the first twenty rows of the bank would vote for their own class."""
    x, label = np.ones((64, 5), np.float32), np.arange(64, dtype=np.int32) // 32
    batches = split(x, label)
    assert evaluators.knn("knn", identity, batches, batches, 2)(STATE) == {"accuracy": 0.0}
    votes = evaluators.nearest_neighbours(x, x, label, 2, 4, own=np.ones(64, np.int32))
    np.testing.assert_array_equal(votes[:, 1], 0)
    assert evaluators.linear_probe("probe", identity, batches, batches, 2)(STATE)["accuracy"] <= 0.5


def test_an_evaluator_that_gives_nan_is_named():
    with pytest.raises(FloatingPointError, match="evaluator 'sync': sync not finite"):
        Evaluator("sync", lambda state: {"sync": float("nan"), "l1": 1.0})(STATE)


def test_knn_evaluator():
    train, test = clusters(64, 3, spread=0.3), clusters(19, 4, spread=0.3)
    assert evaluators.knn("knn", identity, split(*train), split(*test), num_classes=3).run(STATE) == {"accuracy": 1.0}


def test_linear_probe_learns_on_badly_scaled_features():
    """Separable only through the second feature, which is tiny beside the first and offset."""
    rng = np.random.default_rng(5)

    def make(count: int) -> tuple[np.ndarray, np.ndarray]:
        label = rng.integers(2, size=count).astype(np.int32)
        x = np.stack([1e3 * rng.normal(size=count), 5 + 1e-2 * (2 * label - 1 + 0.2 * rng.normal(size=count))], -1)
        return x.astype(np.float32), label

    train, test = make(200), make(50)
    result = evaluators.linear_probe("probe", identity, split(*train), split(*test), num_classes=2).run(STATE)
    assert result["accuracy"] > 0.97
    assert np.float32(result["learning_rate"]) in np.float32(evaluators.PROBE_RATES)


def test_linear_fit_ignores_masked_examples():
    x, label = clusters(40, 6)
    mask = np.arange(40) < 30
    spoiled = np.where(mask, label, (label + 1) % 3)
    rates = jnp.array([0.1])
    fits = [evaluators.fit_linear(x, y, mask, num_classes=3, rates=rates, steps=50) for y in (label, spoiled)]
    np.testing.assert_array_equal(fits[0][0], fits[1][0])
    assert evaluators.fit_linear._cache_size() >= 1


def heads_twin(x, label, kernel, bias, rate, batches):
    """SGD with momentum on softmax regression, written out in float64."""
    kernel, bias = np.float64(kernel), np.float64(bias)
    speed = [np.zeros_like(kernel), np.zeros_like(bias)]
    for step, rows in enumerate(batches):
        logits = x[rows] @ kernel + bias
        error = np.exp(logits - logits.max(1, keepdims=True))
        error = (error / error.sum(1, keepdims=True) - np.eye(3)[label[rows]]) / len(rows)
        speed = [0.9 * v + g for v, g in zip(speed, (x[rows].T @ error, error.sum(0)), strict=True)]
        now = rate * 0.5 * (1 + np.cos(np.pi * step / len(batches)))
        kernel, bias = kernel - now * speed[0], bias - now * speed[1]
    return kernel, bias


def test_linear_heads_learn_side_by_side_as_each_alone():
    """Two heads against the twin on the same full batches; what a head does not see has no weight."""
    x, label = clusters(40, 7)
    inputs = np.array([[True] * 5, [False, True, True, False, True]])
    rates = jnp.array([0.1, 0.02])
    fit = lambda rates: evaluators.fit_linear_heads(  # noqa: E731
        jnp.asarray(x), jnp.asarray(label), inputs, rates, 3, jax.random.key(0), steps=30, batch_size=40
    )
    start, (kernels, biases) = fit(0 * rates), fit(rates)
    for i, rate in enumerate(rates):
        np.testing.assert_array_equal(kernels[i][~inputs[i]], 0)
        args = (start[0][i][inputs[i]], start[1][i], float(rate), [np.arange(40)] * 30)
        kernel, bias = heads_twin(np.float64(x)[:, inputs[i]], label, *args)
        np.testing.assert_allclose(kernels[i][inputs[i]], kernel, atol=1e-5)
        np.testing.assert_allclose(biases[i], bias, atol=1e-5)
    guess = x @ np.asarray(kernels[1]) + np.asarray(biases[1])
    got = evaluators.head_accuracies(kernels, biases, x, label)
    np.testing.assert_allclose(got[1], (guess.argmax(-1) == label).mean(), atol=1e-6)


def test_published_grid_of_linear_heads():
    """The class is in the mean patch alone, beside two blocks' class tokens of noise: only heads with it can learn."""
    rng = np.random.default_rng(8)

    def make(count: int) -> tuple[np.ndarray, np.ndarray]:
        label = rng.integers(2, size=count).astype(np.int32)
        signal = (2 * label - 1)[:, None] + 0.2 * rng.normal(size=(count, 2))
        return np.concatenate([rng.normal(size=(count, 4)), signal], 1).astype(np.float32), label

    train, test = split(*make(200)), split(*make(50))
    options = {"num_classes": 2, "blocks": 2, "steps": 40, "batch_size": 32}
    result = evaluators.linear_heads("heads", identity, train, test, **options).run(STATE)
    assert result["accuracy"] == 1 and result["best_accuracy"] == 1 and result["mean_patch"] == 1
    assert result["blocks"] in (1, 2) and result["learning_rate"] in evaluators.HEAD_RATES
    seen = [evaluators.head_inputs(used, 4, pool, 10).nonzero()[0].tolist() for used, pool in ((1, False), (1, True))]
    assert seen == [[6, 7], [6, 7, 8, 9]] and evaluators.head_inputs(4, 4, False, 10).sum() == 8
