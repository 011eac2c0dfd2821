"""A recipe to follow by hand: a two-layer perceptron on random clusters, with dropout and running statistics."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from omnax.objectives.classification import softmax_cross_entropy
from omnax.train.optimizer import OptimizerConfig
from omnax.train.program import Program, make_program
from omnax.train.recipe import Player, Recipe
from omnax.train.settings import MeshConfig, RunConfig
from omnax.train.sharding import make_mesh
from omnax.train.state import TrainState

WIDTH, HIDDEN, CLASSES = 8, 16, 4
OPTIMIZER = OptimizerConfig(
    lr=1e-2, weight_decay=0.1, decay_multiplier=((".*/kernel", 1.0), (".*", 0.0)), clip_norm=1.0
)
SHARDING = (("in/kernel", "fsdp tensor"), ("in/bias", "tensor"), ("out/kernel", "tensor fsdp|tensor -"), (".*", "-"))


class Clusters:
    """Batch s is a pure function of s; share (index, count) gets its rows."""

    def __init__(self, batch_size: int, shard: tuple[int, int] = (0, 1), poisoned: int = -1) -> None:
        self.step, self.batch_size, self.poisoned = 0, batch_size, poisoned
        rows = batch_size // shard[1]
        self.rows = slice(shard[0] * rows, (shard[0] + 1) * rows)

    def __next__(self) -> dict[str, np.ndarray]:
        rng = np.random.default_rng(self.step)
        label = rng.integers(CLASSES, size=self.batch_size).astype(np.int32)
        centres = np.random.default_rng(0).normal(size=(CLASSES, WIDTH))
        image = (centres[label] + rng.normal(size=(self.batch_size, WIDTH))).astype(np.float32)
        if self.step == self.poisoned:
            image[0, 0] = np.nan
        self.step += 1
        return {"image": image[self.rows], "label": label[self.rows]}

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


def make_loss(dropout: float) -> Any:
    def loss(params, state, batch, rng):
        hidden = jnp.tanh(batch["image"] @ params["in"]["kernel"] + params["in"]["bias"])
        mean = 0.9 * state.variables["batch_stats"]["mean"] + 0.1 * hidden.mean(0)
        hidden = jnp.where(jax.random.bernoulli(rng, 1 - dropout, hidden.shape), hidden / (1 - dropout), 0.0)
        total, terms = softmax_cross_entropy(hidden @ params["out"]["kernel"] + params["out"]["bias"], batch["label"])
        return total, (terms, {"batch_stats": {"mean": mean}})

    return loss


def recipe(batch_size: int = 16, poisoned: int = -1, dropout: float = 0.1, **fields: Any) -> Recipe:
    settings = {
        "init": init,
        "players": (Player(make_loss(dropout), OPTIMIZER),),
        "sharding": SHARDING,
        "batch": {
            "image": jax.ShapeDtypeStruct((batch_size, WIDTH), jnp.float32),
            "label": jax.ShapeDtypeStruct((batch_size,), jnp.int32),
        },
        "data": lambda shard: Clusters(batch_size, shard, poisoned),
    }
    return Recipe(**(settings | fields))


def config(**fields: Any) -> RunConfig:
    settings = {"recipe": "toy", "batch_size": 16, "total_steps": 12, "log_every": 1, "evaluate_every": 100}
    return RunConfig(**(settings | {"mesh": MeshConfig(fsdp=2, tensor=2), "save_every": 4} | fields))


def run(recipe: Recipe, config: RunConfig, steps: int) -> tuple[Program, TrainState, list[dict[str, float]]]:
    """The state and the metrics after `steps` plain updates on the mesh of the config."""
    mesh = make_mesh(config.mesh)
    with jax.set_mesh(mesh):
        program = make_program(recipe, config, mesh)
        state, data, metrics = program.init(jax.random.key(config.seed)), recipe.data((0, 1)), []
        for _ in range(steps):
            batch = {name: jax.device_put(rows, program.batch[name].sharding) for name, rows in next(data).items()}
            state, step_metrics = program.update(state, batch)
            metrics.append({name: float(value) for name, value in step_metrics.items()})
    return program, state, metrics
