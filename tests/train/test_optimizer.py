"""Optimisers against NumPy and optax, and the rules per parameter."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from omnax.train.optimizer import Optimizer, OptimizerConfig, clip, make_optimizer
from omnax.train.rules import flatten
from omnax.train.schedules import Schedule

CONSTANT = Schedule(kind="constant")
KERNELS = ((".*/kernel", 1.0), (".*", 0.0))


def params() -> dict:
    rng = np.random.default_rng(0)
    return {
        "body": {"kernel": jnp.asarray(rng.normal(size=(4, 3)), jnp.float32), "bias": jnp.ones(3)},
        "head": {"kernel": jnp.asarray(rng.normal(size=(3, 2)), jnp.float32)},
    }


def gradients(step: int) -> dict:
    rng = np.random.default_rng(100 + step)
    return jax.tree.map(lambda p: jnp.asarray(rng.normal(size=p.shape), jnp.float32), params())


def run(config: OptimizerConfig, steps: int = 5, total: int = 10) -> tuple[dict, Optimizer]:
    """Parameters after `steps` updates with the same random gradients."""
    optimizer = make_optimizer(config, params(), total)
    state, moved = optimizer.init(params()), params()
    for step in range(steps):
        moved, state, _ = optimizer.update(gradients(step), state, moved, jnp.int32(step))
    return moved, optimizer


def numpy_adamw(steps: int, lr: float, decay_rate: float, decayed: str = "kernel") -> dict[str, np.ndarray]:
    """arXiv 1711.05101, algorithm 2, in float64; `decay_rate` is what multiplies the parameter."""
    p = {path: np.asarray(leaf, np.float64) for path, leaf in flatten(params()).items()}
    m = {path: np.zeros_like(leaf) for path, leaf in p.items()}
    v = {path: np.zeros_like(leaf) for path, leaf in p.items()}
    for step in range(steps):
        for path, g in flatten(gradients(step)).items():
            g = np.asarray(g, np.float64)
            m[path] = 0.9 * m[path] + 0.1 * g
            v[path] = 0.999 * v[path] + 0.001 * g * g
            direction = m[path] / (1 - 0.9 ** (step + 1)) / (np.sqrt(v[path] / (1 - 0.999 ** (step + 1))) + 1e-8)
            p[path] = p[path] - lr * direction - (decay_rate * p[path] if path.endswith(decayed) else 0)
    return p


@pytest.mark.parametrize(("decay_times_lr", "decay_rate"), [(True, 0.01 * 0.1), (False, 0.1)])
def test_adamw_and_both_couplings_of_weight_decay(decay_times_lr, decay_rate):
    config = OptimizerConfig(
        lr=0.01, schedule=CONSTANT, weight_decay=0.1, decay_multiplier=KERNELS, decay_times_lr=decay_times_lr
    )
    moved, _ = run(config)
    for path, expected in numpy_adamw(5, 0.01, decay_rate).items():
        np.testing.assert_allclose(flatten(moved)[path], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("config", "reference"),
    [
        (OptimizerConfig(name="adam", lr=0.01, schedule=CONSTANT), optax.adam(0.01)),
        (
            OptimizerConfig(name="sgd", lr=0.01, schedule=CONSTANT, nesterov=True),
            optax.sgd(0.01, momentum=0.9, nesterov=True),
        ),
        (
            OptimizerConfig(name="lamb", lr=0.01, schedule=CONSTANT, weight_decay=0.1, eps=1e-6),
            optax.lamb(0.01, weight_decay=0.1),
        ),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_equals_optax(config, reference):
    moved, _ = run(config)
    expected, state = params(), reference.init(params())
    for step in range(5):
        updates, state = reference.update(gradients(step), state, expected)
        expected = optax.apply_updates(expected, updates)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), moved, expected)


def test_adafactor_by_hand():
    """Step 1: v = g² (decay 1 - 1^-0.8 = 0), so the direction is sign(g), of which the momentum takes a tenth."""
    config = OptimizerConfig(name="adafactor", lr=0.01, schedule=CONSTANT)
    moved, _ = run(config, steps=1)
    expected = jax.tree.map(lambda p, g: p - 0.01 * 0.1 * jnp.sign(g), params(), gradients(0))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), moved, expected)


def test_frozen_parameters_have_no_slot():
    config = OptimizerConfig(lr=0.01, trainable=(("head/.*", True), (".*", False)))
    optimizer = make_optimizer(config, params(), 10)
    assert optimizer.trainable == {"head/kernel"}
    sizes = {leaf.size for leaf in jax.tree.leaves(optimizer.init(params()))}
    assert sizes == {1, 6}  # the step count, and two moments of the head


def test_learning_rate_multiplier_delay_and_schedule():
    """SGD without momentum moves by lr · factor · multiplier · g exactly."""
    config = OptimizerConfig(
        name="sgd",
        b1=0.0,
        lr=0.1,
        schedule=Schedule(kind="linear"),
        lr_multiplier=(("head/.*", 3.0), (".*", 1.0)),
        delay=(("body/.*", 2), (".*", 0)),
    )
    for step, factor in ((1, 0.9), (2, 0.8)):
        optimizer = make_optimizer(config, params(), 10)
        moved, _, metrics = optimizer.update(gradients(0), optimizer.init(params()), params(), jnp.int32(step))
        np.testing.assert_allclose(metrics["lr"], 0.1 * factor, rtol=1e-6)
        change = jax.tree.map(lambda a, b: b - a, moved, params())
        g = gradients(0)
        np.testing.assert_allclose(change["head"]["kernel"], 0.1 * factor * 3 * g["head"]["kernel"], rtol=1e-4)
        expected = 0.1 * factor * g["body"]["kernel"] * (step >= 2)
        np.testing.assert_allclose(change["body"]["kernel"], expected, rtol=1e-4, atol=1e-7)


def test_weight_decay_schedule():
    """No gradient: p shrinks by lr · wd(step) alone; cosine from 0.1 to 0.3 is 0.2 half way."""
    config = OptimizerConfig(lr=0.5, schedule=CONSTANT, weight_decay=0.1, weight_decay_end=0.3)
    optimizer = make_optimizer(config, params(), 10)
    zeros = jax.tree.map(jnp.zeros_like, params())
    moved, _, _ = optimizer.update(zeros, optimizer.init(params()), params(), jnp.int32(5))
    np.testing.assert_allclose(moved["body"]["bias"], np.full(3, 1 - 0.5 * 0.2), rtol=1e-6)


def test_clipping_by_groups():
    """Norms 5 and 13 by themselves, sqrt(194) together."""
    grads = {"a": {"x": jnp.array([3.0, 4.0])}, "b": {"x": jnp.array([5.0, 12.0]), "y": jnp.zeros(2)}}
    paths = list(flatten(grads))
    together = clip(grads, 6.5, dict.fromkeys(paths, "all"))
    np.testing.assert_allclose(together["a"]["x"], np.array([3, 4]) * 6.5 / np.sqrt(194), rtol=1e-6)
    for groups in ({path: path[0] for path in paths}, dict.fromkeys(paths, "each")):
        apart = clip(grads, 6.5, groups)
        np.testing.assert_allclose(apart["a"]["x"], [3, 4])  # below the norm: untouched
        np.testing.assert_allclose(apart["b"]["x"], [2.5, 6], rtol=1e-6)


@pytest.mark.parametrize("name", ["lamb", "adamw"])
def test_scanned_and_unrolled_layers_train_alike(name):
    """Per-layer multipliers, trust ratios and "each"-clipping see a layer axis as layers."""
    rng = np.random.default_rng(0)
    layers = [jnp.asarray(rng.normal(size=(3, 2)) * (i + 1), jnp.float32) for i in range(2)]
    grads = [jnp.asarray(rng.normal(size=(3, 2)) * 10 ** (2 * i), jnp.float32) for i in range(2)]
    settings = {"name": name, "lr": 0.1, "weight_decay": 0.1, "clip_norm": 1.0, "clip_groups": ((".*", "each"),)}
    unrolled = OptimizerConfig(**settings, lr_multiplier=(("blocks_0/w", 0.5), (".*", 1.0)))
    scanned = OptimizerConfig(**settings, lr_multiplier=(("blocks/w", (0.5, 1.0)),))
    trees = (
        (unrolled, *({f"blocks_{i}": {"w": leaf} for i, leaf in enumerate(part)} for part in (layers, grads))),
        (scanned, *({"blocks": {"w": jnp.stack(part)}} for part in (layers, grads))),
    )
    results = []
    for config, start, gradient in trees:
        optimizer = make_optimizer(config, start, 10)
        moved, _, _ = optimizer.update(gradient, optimizer.init(start), start, jnp.int32(0))
        results.append(jax.tree.leaves(moved))
    np.testing.assert_allclose(jnp.stack(results[0]), results[1][0], rtol=1e-6)


def test_errors():
    with pytest.raises(ValueError, match="unknown optimizer 'adamm', did you mean 'adam"):
        OptimizerConfig(name="adamm", lr=1.0)
    with pytest.raises(ValueError, match="optimizer 'adam' has no weight decay"):
        OptimizerConfig(name="adam", lr=1.0, weight_decay=0.1)
    with pytest.raises(ValueError, match=r"optimizer\.decay_multiplier: no rule matches parameter 'body/bias'"):
        make_optimizer(OptimizerConfig(lr=1.0, decay_multiplier=((".*/kernel", 1.0),)), params(), 10)
