"""The ranges of settings: a dataclass field says its own, `dropout: BelowOne = 0.0`; `check` refuses other values."""

import dataclasses
import math
import types
import typing
from collections.abc import Iterator
from typing import Annotated, Any

_LENGTH = 80  # of a value in a message


@dataclasses.dataclass(frozen=True)
class Range:
    """The numbers from `low` to `high`, without the ends that are `open`; `also` is allowed besides."""

    low: float
    high: float = math.inf
    open: str = ""  # "low", "high" or "low high"
    also: tuple[float, ...] = ()

    def __contains__(self, value: float) -> bool:
        above = self.low < value or (self.low == value and "low" not in self.open)
        below = value < self.high or (self.high == value and "high" not in self.open)
        return value in self.also or (above and below)

    def __str__(self) -> str:
        low = f"{'above' if 'low' in self.open else 'at least'} {self.low:g}"
        high = f" and {'below' if 'high' in self.open else 'at most'} {self.high:g}" if self.high < math.inf else ""
        return f"{low}{high}" + "".join(f", or {value:g}" for value in self.also)


Count = Annotated[int, Range(1)]
Whole = Annotated[int, Range(0)]
Integer = Annotated[int, Range(-math.inf)]
CountOrRest = Annotated[int, Range(1, also=(-1,))]  # -1: all that remain
Workers = Annotated[int, Range(0, also=(-1,))]  # -1: one for each core
Real = Annotated[float, Range(-math.inf)]
Positive = Annotated[float, Range(0, open="low")]
NonNegative = Annotated[float, Range(0)]
Fraction = Annotated[float, Range(0, 1)]
PositiveFraction = Annotated[float, Range(0, 1, open="low")]
BelowOne = Annotated[float, Range(0, 1, open="high")]  # what is kept of an average, or dropped


def check(name: str, value: Any, hint: Any) -> None:
    """ValueError naming a setting whose number, or one of its numbers, is not in the range that `hint` annotates.

    Without one it has to be finite.
    """
    allowed = range_of(hint)
    for number in _numbers(value):
        if not math.isfinite(number) or (allowed is not None and number not in allowed):
            expected = f"a number {allowed}" if allowed and allowed.low > -math.inf else "a finite number"
            raise ValueError(f"config key {name!r} is {repr(value)[:_LENGTH]}, expected {expected}")


def range_of(hint: Any) -> Range | None:
    """The range in an annotation: `Count`, `Count | None`, `tuple[Count, ...]`."""
    if typing.get_origin(hint) is Annotated:
        return next((extra for extra in hint.__metadata__ if isinstance(extra, Range)), None)
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) in (tuple, typing.Union):
        return next((found for part in typing.get_args(hint) if (found := range_of(part))), None)
    return None


def _numbers(value: Any) -> Iterator[float]:
    if isinstance(value, int | float) and not isinstance(value, bool):
        yield value
    elif isinstance(value, tuple):
        for part in value:
            yield from _numbers(part)
