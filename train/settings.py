"""The settings that all recipes share, as frozen dataclasses; `config.build` makes them from a config file."""

import dataclasses

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from ..data.lookup import lookup
from ..models.ranges import Count, Fraction, Whole
from .rules import compiled
from .schedules import anneal
from .sharding import MeshConfig

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16, "float16": jnp.float16}


def dtype_of(name: str) -> np.dtype:
    """What a model computes in; ValueError for a name that is none of `DTYPES`."""
    return jnp.dtype(lookup(DTYPES, name, "dtype"))


@dataclasses.dataclass(frozen=True, kw_only=True)
class EmaConfig:
    """Exponential moving average of the trainable parameters, once per step: e <- decay e + (1 - decay) p."""

    decay: Fraction
    decay_end: Fraction | None = None  # cosine from decay over the run
    warmup: bool = False  # min(decay, (1 + step) / (10 + step)): early averages forget the initial values

    def __call__(self, step: Array, total_steps: int) -> Array:
        """The decay at `step`."""
        progress = jnp.clip(step / total_steps, 0.0, 1.0)
        decay = anneal(self.decay, self.decay if self.decay_end is None else self.decay_end, progress)
        return jnp.minimum(decay, (1 + step) / (10 + step)) if self.warmup else decay


@dataclasses.dataclass(frozen=True, kw_only=True)
class UpdateConfig:
    """What the update does beside the players' own settings."""

    total_steps: Count
    accumulation: Count = 1  # micro-batches per step
    skip_non_finite: bool = False  # keep the old state where a loss or gradient norm is not finite; else the run stops
    ema: EmaConfig | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class InitFrom:
    """Parameters to begin with: published weights, or the working directory of another run."""

    path: str = ""  # empty: initial values
    skip: tuple[str, ...] = ()  # regexes: parameters that are not taken (a new head) or not wanted (an old one)
    # Regexes: parameters that a run may not begin with at random (a frozen teacher); () allows it.
    required: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("skip", "required"):
            for pattern in getattr(self, name):
                compiled(pattern, f"init_from.{name}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunConfig(UpdateConfig):
    """The settings every recipe shares; a recipe's `Config` adds its own."""

    recipe: str  # a module of train/recipes
    seed: Whole = 0
    batch_size: Count  # examples per step, over all devices and micro-batches
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    resume: str = ""  # working directory of a run to continue in a new one
    init_from: InitFrom = dataclasses.field(default_factory=InitFrom)
    log_every: Count = 50  # steps
    evaluate_every: Count = 1000
    save_every: Count = 1000
    keep_checkpoints: Count = 3
