"""A recipe to follow by hand: a two-layer perceptron on random clusters, with dropout and running statistics."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from omnax.objectives.classification import softmax_cross_entropy
from omnax.train.optimizer import OptimizerConfig
from omnax.train.recipe import Player, Recipe

WIDTH, HIDDEN, CLASSES = 8, 16, 4
OPTIMIZER = OptimizerConfig(
    lr=1e-2, weight_decay=0.1, decay_multiplier=((".*/kernel", 1.0), (".*", 0.0)), clip_norm=1.0
)
SHARDING = (("in/kernel", "fsdp tensor"), ("in/bias", "tensor"), ("out/kernel", "tensor fsdp|tensor -"), (".*", "-"))


class Clusters:
    """Batch s is a pure function of s; process p of n gets its rows."""

    def __init__(self, batch_size: int, poisoned: int = -1) -> None:
        self.step, self.batch_size, self.poisoned = 0, batch_size, poisoned

    def __next__(self) -> dict[str, np.ndarray]:
        rng = np.random.default_rng(self.step)
        label = rng.integers(CLASSES, size=self.batch_size).astype(np.int32)
        centres = np.random.default_rng(0).normal(size=(CLASSES, WIDTH))
        image = (centres[label] + rng.normal(size=(self.batch_size, WIDTH))).astype(np.float32)
        if self.step == self.poisoned:
            image[0, 0] = np.nan
        self.step += 1
        rows = self.batch_size // jax.process_count()
        own = slice(jax.process_index() * rows, (jax.process_index() + 1) * rows)
        return {"image": image[own], "label": label[own]}

    def get_state(self) -> dict[str, Any]:
        return {"step": self.step}

    def set_state(self, state: dict[str, Any]) -> None:
        self.step = state["step"]


def init(rng: jax.Array) -> tuple[dict[str, Any], dict[str, Any]]:
    keys = jax.random.split(rng)
    params = {
        "in": {"kernel": jax.random.normal(keys[0], (WIDTH, HIDDEN)) * 0.3, "bias": jnp.zeros(HIDDEN)},
        "out": {"kernel": jax.random.normal(keys[1], (HIDDEN, CLASSES)) * 0.3, "bias": jnp.zeros(CLASSES)},
    }
    return params, {"batch_stats": {"mean": jnp.zeros(HIDDEN)}}


def loss(params, state, batch, rng):
    hidden = jnp.tanh(batch["image"] @ params["in"]["kernel"] + params["in"]["bias"])
    mean = 0.9 * state.variables["batch_stats"]["mean"] + 0.1 * hidden.mean(0)
    hidden = jnp.where(jax.random.bernoulli(rng, 0.9, hidden.shape), hidden / 0.9, 0.0)
    total, terms = softmax_cross_entropy(hidden @ params["out"]["kernel"] + params["out"]["bias"], batch["label"])
    return total, (terms, {"batch_stats": {"mean": mean}})


def recipe(batch_size: int = 16, poisoned: int = -1, **fields: Any) -> Recipe:
    shapes = {
        "image": jax.ShapeDtypeStruct((batch_size, WIDTH), jnp.float32),
        "label": jax.ShapeDtypeStruct((batch_size,), jnp.int32),
    }
    settings = {
        "init": init,
        "players": (Player(loss, OPTIMIZER),),
        "sharding": SHARDING,
        "batch": shapes,
        "data": lambda: Clusters(batch_size, poisoned),
    }
    return Recipe(**(settings | fields))
