"""Finding things by name, for configs written by people."""

import difflib
from collections.abc import Iterable, Mapping
from typing import TypeVar

T = TypeVar("T")


def lookup(table: Mapping[str, T], name: str, what: str) -> T:
    """`table[name]`, or a ValueError that says what was meant to be named, the nearest names and all of them."""
    if name not in table:
        raise ValueError(unknown(what, name, table))
    return table[name]


def unknown(what: str, name: object, known: Iterable[str]) -> str:
    """The message for a name that does not exist."""
    known = sorted(known)
    shown = str(name)[:200]
    nearest = difflib.get_close_matches(shown, known, n=1)
    hint = f", did you mean {nearest[0]!r}?" if nearest else ""
    listed = ", ".join(known[:60]) + f", … {len(known) - 60} more" * (len(known) > 60)
    return f"unknown {what} {shown!r}{hint} (known: {listed})"
