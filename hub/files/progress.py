"""A progress bar where weights are large enough to wait for."""

from collections.abc import Iterable, Sequence
from typing import TypeVar

import jax
from rich.console import Console
from rich.progress import track

T = TypeVar("T")
MIN_SIZE = 2**30  # bytes; less is read and written in about a second


def shown(items: Sequence[T], text: str, size: int) -> Iterable[T]:
    """Iterates over `items`, of `size` bytes in all, with a bar on stderr that goes away when it is full."""
    quiet = size < MIN_SIZE or jax.process_index() > 0
    return track(items, text, console=Console(stderr=True), transient=True, disable=quiet)
