"""The argument of a config file: `vit.py:size=b16,data=digits` calls `get_config("size=b16,data=digits")`."""

from types import SimpleNamespace
from typing import Any

from ..data.lookup import unknown


class Chosen(SimpleNamespace):
    """The arguments by name; `given` are those that the person named."""

    __slots__ = ("given",)


def parse_arg(arg: str | None, **known: Any) -> Chosen:
    """The comma-separated `key=value` pairs of `arg`; `known` has the default of each key, which gives its type.

    A tuple lists the values that are understood, the default first. A key alone sets a bool to True. ValueError for an
    unknown key, a value of another type or one that is not listed.
    """
    values = {key: default[0] if isinstance(default, tuple) else default for key, default in known.items()}
    given: set[str] = set()
    for pair in filter(None, (arg or "").split(",")):
        key, equals, text = pair.partition("=")
        if key not in known:
            raise ValueError(unknown("config argument", key, known))
        values[key] = _parse(key, text if equals else "True", values[key])
        if isinstance(known[key], tuple) and values[key] not in known[key]:
            raise ValueError(unknown(f"value of config argument {key!r}:", values[key], filter(None, known[key])))
        given.add(key)
    chosen = Chosen(**values)
    chosen.given = given
    return chosen


def only_with(chosen: Chosen, condition: bool, where: str, *keys: str) -> None:
    """ValueError for arguments that were given where nothing reads them."""
    if not condition and (unread := sorted(chosen.given & set(keys))):
        raise ValueError(f"config argument {unread[0]!r} is read with {where} only")


def _parse(key: str, text: str, default: Any) -> Any:
    if isinstance(default, bool):
        if text not in ("True", "False"):
            raise ValueError(f"config argument {key!r} is True or False, got {text!r}")
        return text == "True"
    try:
        return type(default)(text)
    except ValueError as error:
        raise ValueError(f"config argument {key!r} is {type(default).__name__}, got {text!r}") from error
