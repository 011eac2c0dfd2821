"""The argument of a config file: `vit.py:size=b16,data=digits` calls `get_config("size=b16,data=digits")`."""

from types import SimpleNamespace
from typing import Any

from ..data.lookup import unknown


def parse_arg(arg: str | None, **defaults: str | int | float | bool) -> SimpleNamespace:
    """The comma-separated `key=value` pairs of `arg` over `defaults`, which give the keys and the types.

    A key alone sets a bool to True. ValueError for a key that is not in `defaults` and a value of another type.
    """
    values: dict[str, Any] = dict(defaults)
    for pair in filter(None, (arg or "").split(",")):
        key, equals, text = pair.partition("=")
        if key not in defaults:
            raise ValueError(unknown("config argument", key, defaults))
        values[key] = _parse(key, text if equals else "True", defaults[key])
    return SimpleNamespace(**values)


def _parse(key: str, text: str, default: Any) -> Any:
    if isinstance(default, bool):
        if text not in ("True", "False"):
            raise ValueError(f"config argument {key!r} is True or False, got {text!r}")
        return text == "True"
    try:
        return type(default)(text)
    except ValueError as error:
        raise ValueError(f"config argument {key!r} is {type(default).__name__}, got {text!r}") from error
