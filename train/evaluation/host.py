"""The one way in which evaluators run on global batches and bring what they find to the host.

On several processes an array lies in parts on all of them, and none can read it alone: `replicated` functions give
every process the whole, so that all go on with the same numbers, and fail alike.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import PartitionSpec
from jaxtyping import Array

from ...data.prefetch import to_devices
from ..sharding import batch_sharding
from ..state import TrainState

Batches = Callable[[], Iterable[dict[str, np.ndarray]]]  # this process's rows of every batch: image, label, mask


def replicated(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` jitted for use inside `jax.set_mesh`; every process gets its whole outputs."""
    return jax.jit(function, out_shardings=PartitionSpec())


def put(batch: Mapping[str, np.ndarray]) -> dict[str, Array]:
    """This process's rows of a batch as global arrays."""
    return to_devices(batch, batch_sharding(jax.sharding.get_mesh()))


def over(function: Callable[..., Any], state: TrainState, batches: Batches) -> Iterator[Any]:
    """What a `replicated` function(params, variables, batch) gives for each batch, on the host."""
    found = [function(state.averaged_params, state.variables, put(batch)) for batch in batches()]
    yield from jax.device_get(found)


def concatenated(function: Callable[..., Any], state: TrainState, batches: Batches) -> tuple[np.ndarray, ...]:
    """The arrays of `over`, one below the other; the last is a mask of rows, and only those that it keeps are left."""
    *columns, mask = (np.concatenate(column) for column in zip(*over(function, state, batches), strict=True))
    if not mask.any():
        raise ValueError("there is no example to evaluate")
    return tuple(column[mask] for column in columns)


def check_finite(what: str, values: np.ndarray) -> None:
    """FloatingPointError where a value is not finite: no comparison may be won by it."""
    bad = values.size - np.isfinite(values).sum()
    if bad:
        raise FloatingPointError(f"{bad} of {values.size} {what} are not finite")


def check_labels(label: np.ndarray, num_classes: int) -> None:
    """ValueError where a label is none of the classes."""
    outside = label[(label < 0) | (label >= num_classes)]
    if len(outside):
        raise ValueError(f"{len(outside)} labels are none of the {num_classes} classes, the first is {outside[0]}")
