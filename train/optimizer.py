"""Optimisers: clipping, an optax direction, decoupled weight decay, the learning rate; regex rules per parameter.

    p <- p - lr s(t) m_p d_p - [lr s(t) m_p | s(t)] wd(t) w_p p

d is the direction of the named optimiser (Adam's m̂ / (√v̂ + ε), say), s the schedule, m the learning-rate and w the
decay multiplier of the parameter. The bracket is the decoupling: with `decay_times_lr` the decay is multiplied by the
learning rate (torch.optim.AdamW, optax.adamw, the papers); without, by the schedule's factor alone (big_vision: its
1e-4 at a peak rate of 1e-3 equals 0.1 in the other form).
"""

import dataclasses
from collections.abc import Callable
from typing import Any, cast

import jax.numpy as jnp
import optax
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int

from ..data.lookup import lookup
from ..models.ranges import BelowOne, NonNegative, Positive
from .rules import Rules, Tree, flatten, match_rules, select, unflatten
from .schedules import Schedule, anneal

Multiplier = float | tuple[float, ...]  # a tuple has one value per layer of a stacked parameter's leading axis


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """An optimiser and its rules; each list of rules covers all parameters of the player, frozen ones too."""

    name: str = "adamw"  # see DIRECTIONS
    lr: NonNegative  # peak
    schedule: Schedule = dataclasses.field(default_factory=Schedule)
    b1: BelowOne = 0.9  # Adam, LAMB; the momentum of SGD and Adafactor
    b2: BelowOne = 0.999  # Adam, LAMB; the cap of Adafactor's decay
    eps: Positive = 1e-8
    nesterov: bool = False  # SGD
    mu_dtype: str = "float32"  # of the first moment
    weight_decay: NonNegative = 0.0
    weight_decay_end: NonNegative | None = None  # cosine from weight_decay over the run
    decay_times_lr: bool = True
    clip_norm: Positive | None = None
    # Parameters whose gradients are clipped together: rules to a group name; in "each" every parameter stands alone.
    clip_groups: Rules[str] = ((".*", "all"),)
    trainable: Rules[bool] = ((".*", True),)
    lr_multiplier: Rules[Multiplier] = ((".*", 1.0),)
    decay_multiplier: Rules[float] = ((".*", 1.0),)
    delay: Rules[int] = ((".*", 0),)  # steps before a parameter moves; its moments run from the start

    def __post_init__(self) -> None:
        lookup(DIRECTIONS, self.name, "optimizer")
        if self.name == "adam" and self.weight_decay:
            raise ValueError(f"optimizer 'adam' has no weight decay, got {self.weight_decay}: 'adamw' decouples it")


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """`init(params) -> opt_state`, `update(grads, opt_state, params, step) -> (params, opt_state, metrics)`.

    `init` takes the whole tree and makes slots for the `trainable` paths only; the trees of `update` are that part.
    """

    trainable: frozenset[str]
    init: Callable[[Tree], Any]
    update: Callable[[Tree, Any, Tree, Int[Array, ""]], tuple[Tree, Any, dict[str, Array]]]


def make_optimizer(config: OptimizerConfig, params: Tree, total_steps: int) -> Optimizer:
    """The optimiser for `params` (arrays or shapes); ValueError for rules that do not fit their paths."""
    paths = list(flatten(params))
    values = {
        name: match_rules(getattr(config, name), paths, f"optimizer.{name}")
        for name in ("trainable", "clip_groups", "lr_multiplier", "decay_multiplier", "delay")
    }
    trainable = [path for path in paths if values["trainable"][path]]
    direction = DIRECTIONS[config.name](config, values["decay_multiplier"])

    def init(params: Tree) -> Any:
        return direction.init(select(params, trainable))

    def update(grads: Tree, opt_state: Any, params: Tree, step: Array) -> tuple[Tree, Any, dict[str, Array]]:
        metrics = {"grad_norm": optax.tree.norm(grads)}
        if config.clip_norm is not None:
            grads = clip(grads, config.clip_norm, values["clip_groups"])
        directions, opt_state = direction.update(grads, opt_state, params)
        factor = config.schedule(step, total_steps)
        metrics["lr"] = config.lr * factor
        decay = weight_decay(config, step, total_steps)

        def move(path: str, p: Array, d: Array) -> Array:
            multiplier = _align(values["lr_multiplier"][path], p)
            on = jnp.where(step >= values["delay"][path], factor, 0.0) if values["delay"][path] else factor
            change = config.lr * on * multiplier * d
            if config.name != "lamb" and values["decay_multiplier"][path]:  # LAMB's direction holds the decay
                rate = config.lr * on * multiplier if config.decay_times_lr else on
                change = change + rate * decay * values["decay_multiplier"][path] * p
            return (p - change).astype(p.dtype)

        flat = flatten(cast(Tree, directions))
        params = unflatten({path: move(path, p, flat[path]) for path, p in flatten(params).items()})
        return params, opt_state, metrics

    return Optimizer(frozenset(trainable), init, update)


def weight_decay(config: OptimizerConfig, step: Array, total_steps: int) -> Array | float:
    """The decay coefficient at `step`."""
    if config.weight_decay_end is None:
        return config.weight_decay
    return anneal(config.weight_decay, config.weight_decay_end, jnp.clip(step / total_steps, 0.0, 1.0))


def clip(grads: Tree, norm: float, groups: dict[str, str]) -> Tree:
    """Scales each group of gradients down to the norm where it is larger; in group "each" every parameter by itself."""
    leaves = flatten(grads)
    squares = {path: _sum_squares(path, g) for path, g in leaves.items()}
    totals: dict[str, Array] = {}
    for path, square in squares.items():
        totals[groups[path]] = totals.get(groups[path], 0.0) + square.sum()

    def scale(path: str) -> Array:
        square = squares[path] if groups[path] == "each" else totals[groups[path]]
        return _align(norm / jnp.maximum(jnp.sqrt(square), norm), leaves[path])

    return unflatten({path: g * scale(path).astype(g.dtype) for path, g in leaves.items()})


def _sum_squares(path: str, x: Array) -> Float[Array, "..."]:
    """Sum of squares of a parameter; one for each layer of a scanned stack (`blocks`, layer axis first)."""
    axes = tuple(range(int("blocks" in path.split("/")), x.ndim))
    return jnp.square(x.astype(jnp.float32)).sum(axes)


def _align(value: Multiplier | Array, x: Array) -> Array:
    """A scalar, or a vector over the leading axis of `x`, in a shape that multiplies `x`."""
    value = jnp.asarray(value, jnp.float32)
    return value.reshape(value.shape + (1,) * (x.ndim - 1)) if value.ndim else value


def scale_by_trust_ratio() -> optax.GradientTransformation:
    """LAMB's ‖p‖ / ‖d‖ per parameter (arXiv 1904.00962), per layer in scanned stacks; 1 where a norm is 0."""

    def update(updates: Tree, state: optax.EmptyState, params: Tree | None = None) -> tuple[Tree, optax.EmptyState]:
        leaves = flatten(params or {})

        def scale(path: str, d: Array) -> Array:
            p_norm, d_norm = jnp.sqrt(_sum_squares(path, leaves[path])), jnp.sqrt(_sum_squares(path, d))
            zero = (p_norm == 0) | (d_norm == 0)
            return d * _align(jnp.where(zero, 1.0, p_norm / jnp.where(zero, 1.0, d_norm)), d)

        return unflatten({path: scale(path, d) for path, d in flatten(updates).items()}), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)  # type: ignore[arg-type]


def _adam(config: OptimizerConfig, decay: dict[str, float]) -> optax.GradientTransformation:
    return optax.scale_by_adam(config.b1, config.b2, config.eps, mu_dtype=config.mu_dtype)


def _sgd(config: OptimizerConfig, decay: dict[str, float]) -> optax.GradientTransformation:
    return optax.trace(config.b1, config.nesterov, accumulator_dtype=config.mu_dtype)


def _lamb(config: OptimizerConfig, decay: dict[str, float]) -> optax.GradientTransformation:
    def mask(params: Tree) -> Tree:
        return unflatten({path: bool(decay[path]) for path in flatten(params)})

    decayed = optax.add_decayed_weights(config.weight_decay, mask)
    return optax.chain(_adam(config, decay), decayed, scale_by_trust_ratio())


def _adafactor(config: OptimizerConfig, decay: dict[str, float]) -> optax.GradientTransformation:
    """big_vision's form for ViT-g (big_vision/optax.py scale_by_adafactor): decay capped at b2, then momentum."""

    def decay_rate(step: ArrayLike, exponent: ArrayLike) -> Array:
        return jnp.minimum(config.b2, 1 - (jnp.asarray(step) + 1.0) ** -jnp.asarray(exponent))

    factored = optax.scale_by_factored_rms(min_dim_size_to_factor=32, decay_rate_fn=decay_rate)
    return optax.chain(factored, optax.ema(config.b1, debias=False, accumulator_dtype=config.mu_dtype))


DIRECTIONS: dict[str, Callable[[OptimizerConfig, dict[str, float]], optax.GradientTransformation]] = {
    "adam": _adam,
    "adamw": _adam,
    "sgd": _sgd,
    "lamb": _lamb,
    "adafactor": _adafactor,
}
