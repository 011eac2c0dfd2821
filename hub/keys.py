"""What the keys of a published JSON file mean: one table a file, and the one reader that guesses nothing.

A `Section` lists every key that the publishing library's class knows, with its fate:

    used        becomes part of the model; absent, it is what the publishing library takes it to be
    harmless    cannot change the function, for one of the `REASONS`
    refused     has a meaning that no model here has: only the listed values are read, any other is refused by name

A key that a table does not list is refused by name, and so is a value of another kind than the key's.
`docs/exactness.md` shows the tables of all formats; tests/hub/test_config_keys.py feeds every key to the published
libraries and to `hub`.
"""

import dataclasses
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from .files.tensors import nearest

USED, HARMLESS, REFUSED = "used", "harmless", "refused"
REASONS = {
    "bookkeeping": "names, versions and class names that no computation reads",
    "training": "dropout, initial values and losses: nothing at inference",
    "outputs": "which of the outputs are handed back",
    "generation": "sampling and beam search; `generation_config.json` governs",
    "tokens": "ids that the tokeniser's files govern",
    "runtime": "how the library computes, not what",
    "ignored": "the publishing library's class does not read it",
}
_LIMIT = 2**31  # no published size is larger, and larger ones would overflow shapes
_LENGTH = 60  # of a value in a message
_SHOWN = 6  # problems in a message


def brief(value: Any) -> str:
    """A value from a file as messages show it: bounded, whatever the file holds."""
    text = repr(value[: 2 * _LENGTH] if isinstance(value, str | list | tuple) else value)
    return text if len(text) <= _LENGTH else f"{text[: _LENGTH - 1]}…"


def _integer(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value < _LIMIT


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _list_of(check: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list | tuple) and all(map(check, value))


def _count(value: Any) -> bool:
    return _integer(value, 1)


# What a value has to be: words for messages, and the test.
KINDS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "any": ("anything", lambda value: True),
    "flag": ("true or false", lambda value: isinstance(value, bool)),
    "count": ("a positive integer", _count),
    "integer": ("an integer", lambda value: _integer(value, -_LIMIT)),
    "whole": ("an integer of at least 0", lambda value: _integer(value, 0)),
    "number": ("a finite number", _number),
    "positive": ("a finite number above 0", lambda value: _number(value) and value > 0),
    "text": ("a string", lambda value: isinstance(value, str)),
    "size": (
        "a positive integer, or two of them",
        lambda value: _count(value) or (_list_of(_count)(value) and len(value) == 2),
    ),
    "counts": (
        "a positive integer, or a list of them",
        lambda value: _count(value) or (_list_of(_count)(value) and len(value) > 0),
    ),
    "wholes": (
        "an integer of at least 0, or a list of them",
        lambda value: _integer(value, 0) or (_list_of(lambda x: _integer(x, 0))(value) and len(value) > 0),
    ),
    "integers": ("a list of integers", _list_of(lambda value: _integer(value, -_LIMIT))),
    "numbers": ("a list of finite numbers", _list_of(_number)),
    "texts": ("a list of strings", _list_of(lambda value: isinstance(value, str))),
    "object": ("an object", lambda value: isinstance(value, Mapping)),
}


@dataclasses.dataclass(frozen=True)
class Key:
    """The fate of one key; made by the functions below."""

    fate: str
    kind: str = "any"
    default: Any = None  # the publishing library's, where the key is absent
    required: bool = False  # no file may leave it out
    null: bool = False  # null is a value of its own, passed on as None
    choices: tuple[Any, ...] = ()  # the values that are understood; (): every one of its kind
    reason: str = ""  # one of REASONS
    same_as: str = ""  # the key whose value it has to repeat
    section: "Section | None" = None  # of an object that has keys of its own

    def problem(self, value: Any) -> str:
        """What is wrong with a value, in words: "" if nothing is."""
        if self.fate == HARMLESS or (self.null and value is None):
            return ""
        words, check = KINDS[self.kind]
        if not check(value):
            return f"expected {words}{' or null' if self.null else ''}"
        if self.choices and not any(equal(value, choice) for choice in self.choices):
            return f"expected {'one of ' * (len(self.choices) > 1)}{', '.join(map(brief, self.choices))}"
        return ""


def equal(a: Any, b: Any) -> bool:
    """Equality as JSON has it: 1 is 1.0 and not true, a list is a tuple."""
    if isinstance(a, bool) or isinstance(b, bool):
        return a is b
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b


def used(kind: str, default: Any, *, null: bool = False, choices: Iterable[Any] = ()) -> Key:
    """A key that becomes part of the model. `choices` bound what is understood; `null` where null has a meaning."""
    return Key(USED, kind, default, null=null or default is None, choices=tuple(choices))


def required(kind: str, *, choices: Iterable[Any] = ()) -> Key:
    """A used key without a default in the publishing library, or whose default no published file relies on."""
    return Key(USED, kind, required=True, choices=tuple(choices))


def only(*values: Any) -> Key:
    """A key whose meaning no model here has: refused unless it has one of these values; absent, it has the first."""
    return Key(REFUSED, default=values[0], choices=values, null=None in values)


def repeats(key: str) -> Key:
    """Another word for `key` that the publishing library does not read: refused where the two differ."""
    return Key(REFUSED, same_as=key)


def harmless(reason: str) -> Key:
    """A key that cannot change the function, for one of the `REASONS`."""
    assert reason in REASONS, reason
    return Key(HARMLESS, reason=reason)


def nested(section: "Section", *, null: bool = True) -> Key:
    """An object with keys of its own; absent or null it is one without any entry."""
    return Key(USED, "object", {}, null=null, section=section)


@dataclasses.dataclass(frozen=True)
class Section:
    """The keys of one JSON object, `name` being its place in the file ("" for the whole file)."""

    keys: Mapping[str, Key]
    name: str = ""

    def read(self, document: Mapping[str, Any], where: str = "config.json") -> dict[str, Any]:
        """Every used key with its value, or the default of the publishing library; sections as such dicts in turn.

        Values stay as the file has them. Raises ValueError naming every key (of this object) that is unknown, required
        and absent, of another kind than expected, or that asks for what no model here does.
        """
        where = f"{where}, {self.name}" if self.name else where
        problems = list(self._problems(document))
        if problems:
            more = [f"and {len(problems) - _SHOWN} more"] if len(problems) > _SHOWN else []
            raise ValueError(f"{where}: {'; '.join([*problems[:_SHOWN], *more])}")
        values: dict[str, Any] = {}
        for name, key in self.keys.items():
            if key.fate != USED:
                continue
            value = document.get(name, key.default)
            values[name] = key.section.read(value or {}, where) if key.section else value
        return values

    def _problems(self, document: Mapping[str, Any]) -> Iterator[str]:
        for name, value in document.items():
            key = self.keys.get(name)
            if key is None:
                yield f"{brief(name)} is unknown, got {brief(value)}{nearest(name[:_LENGTH], self.keys)}"
            elif key.same_as:
                other = document.get(key.same_as, self.keys[key.same_as].default)
                if not equal(value, other):
                    yield f"{name!r} is {brief(value)}, expected {brief(other)} as {key.same_as!r} has it"
            elif problem := key.problem(value):
                yield f"{name!r} is {brief(value)}, {problem}"
        for name, key in self.keys.items():
            if key.required and name not in document:
                yield f"has no {name!r}, expected {KINDS[key.kind][0]}"


def markdown(sections: Mapping[str, Section], common: Mapping[str, Key] | None = None) -> str:
    """The tables as a page shows them: one heading a section, one line a key, without those that `common` has said."""
    lines: list[str] = []
    for title, section in sections.items():
        known = common if common and common.keys() <= section.keys.keys() else {}
        lines += [f"### {title}", "", *(["And the common keys.", ""] if known else [])]
        lines += ["| key | fate | absent | remark |", "|---|---|---|---|"]
        keys = {name: key for name, key in section.keys.items() if key != known.get(name)}
        lines += [f"| `{name}` | {key.fate} | {_absent(key)} | {_remark(key)} |" for name, key in keys.items()]
        lines.append("")
    return "\n".join(lines)


def _absent(key: Key) -> str:
    if key.required:
        return "refused"
    return "" if key.fate == HARMLESS or key.same_as else f"`{_json(key.default)}`"


def _remark(key: Key) -> str:
    if key.fate == HARMLESS:
        return key.reason
    if key.same_as:
        return f"refused unless it repeats `{key.same_as}`"
    if key.section:
        return "see its own table"
    choices = ", ".join(f"`{_json(choice)}`" for choice in key.choices)
    return f"refused unless {choices}" if key.fate == REFUSED else choices or KINDS[key.kind][0]


def _json(value: Any) -> str:
    return json.dumps(value)
