"""Schedules as factors of a peak value: warm-up, a curve (constant, cosine, linear, reciprocal root), cooldown."""

import dataclasses
import math
from collections.abc import Callable

import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from ..data.lookup import lookup
from ..models.ranges import Count, NonNegative, Whole


@dataclasses.dataclass(frozen=True, kw_only=True)
class Schedule:
    """A linear rise from 0 over `warmup` steps, times the curve, times a linear fall to 0 over `cooldown` steps.

    As google-research/big_vision (utils.py create_learning_rate_schedule): the curve runs over what follows the
    warm-up, and step 0 of a warm-up has factor 0. Its peak is the step after it, or its last step where `inclusive`
    (np.linspace, as facebookresearch/dino and dinov2 have it).
    """

    kind: str = "cosine"  # "constant", "cosine", "linear", "rsqrt"
    warmup: Whole = 0  # steps
    inclusive: bool = False
    end: NonNegative = 0.0  # factor at the end of "cosine" and "linear"
    timescale: Count = 10_000  # steps, of "rsqrt"
    cooldown: Whole = 0  # steps

    def __post_init__(self) -> None:
        lookup(CURVES, self.kind, "schedule")

    def __call__(self, step: ArrayLike, total_steps: int) -> Float[Array, ""]:
        """The factor before update number `step` (0 is the first) of `total_steps`."""
        step = jnp.asarray(step, jnp.float32)
        past = jnp.maximum(step - self.warmup, 0.0)
        progress = jnp.clip(past / max(total_steps - self.warmup, 1), 0.0, 1.0)
        factor = CURVES[self.kind](self, past, progress)
        if self.warmup:
            factor = factor * jnp.minimum(1.0, step / max(self.warmup - self.inclusive, 1))
        if self.cooldown:
            factor = factor * jnp.clip((total_steps - step) / self.cooldown, 0.0, 1.0)
        return factor


CURVES: dict[str, Callable[[Schedule, Array, Array], Array]] = {
    "constant": lambda schedule, past, progress: jnp.ones_like(progress),
    "cosine": lambda schedule, past, progress: anneal(1.0, schedule.end, progress),
    "linear": lambda schedule, past, progress: 1 + (schedule.end - 1) * progress,
    "rsqrt": lambda schedule, past, progress: jnp.sqrt(schedule.timescale / (schedule.timescale + past)),
}


def anneal(start: float, end: float, progress: ArrayLike) -> Float[Array, ""]:
    """Half a cosine from start (progress 0) to end (progress 1)."""
    return end + (start - end) * 0.5 * (1 + jnp.cos(math.pi * jnp.asarray(progress)))
