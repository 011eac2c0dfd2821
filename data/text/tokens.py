"""Rows of token ids, all of one length, as text towers take them."""

from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np
from jaxtyping import Int

Overflow = Literal["truncate", "error"]
OVERFLOWS = ("truncate", "error")


def token_rows(
    texts: str | Sequence[str],
    encode: Callable[[str], list[int]],
    *,
    start: Sequence[int],
    end: int,
    pad: int,
    length: int,
    overflow: Overflow,
) -> Int[np.ndarray, "B T"]:
    """start, `encode(text)`, end, padding: int32 rows of so many ids.

    A text that does not fit loses its tail but keeps its end, or with `overflow="error"` is a ValueError.
    """
    if overflow not in OVERFLOWS:
        raise ValueError(f"overflow is {overflow!r}, expected one of {OVERFLOWS}")
    texts = [texts] if isinstance(texts, str) else texts
    rows = np.full((len(texts), length), pad, np.int32)
    for row, text in zip(rows, texts, strict=True):
        ids = [*start, *encode(text), end]
        if len(ids) > length:
            if overflow == "error":
                raise ValueError(f"text of {len(ids)} tokens, expected at most {length}: {text[:60]!r}")
            ids = [*ids[: length - 1], end]
        row[: len(ids)] = ids
    return rows
