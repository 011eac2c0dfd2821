"""Evaluators against direct computations, with padding and on a mesh."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from omnax.train import evaluators
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
