"""The train state: everything that changes from step to step and is saved in a checkpoint."""

from typing import Any

import flax.struct
from jaxtyping import Array, Int, UInt32

from .rules import Tree, merge


class TrainState(flax.struct.PyTreeNode):
    """State before update number `step`.

    `opt_state` has one optax state per player; it and `ema` hold trainable parameters only. `variables` are the
    recipe's own: batch statistics, teachers, centres.
    """

    step: Int[Array, ""]
    params: Tree
    opt_state: dict[str, Any]
    ema: Tree  # {} when no average is kept
    variables: Tree
    rng: UInt32[Array, "2"]  # data of the run's key; a step uses fold_in(key, step)

    @property
    def averaged_params(self) -> Tree:
        """The parameters to evaluate and export: averaged where an average is kept."""
        return merge(self.params, self.ema)
