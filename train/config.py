"""From the command line to typed settings: config files, dotted overrides, frozen dataclasses.

A config file defines `get_config(arg) -> ml_collections.ConfigDict` and states what differs from the defaults of its
recipe's `Config` dataclass. `typed` adds those defaults, applies the overrides and builds the dataclass, so that every
key has a reader: one that nothing reads is an error.
"""

import ast
import dataclasses
import importlib.util
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from ml_collections import ConfigDict

from ..data.lookup import unknown
from ..models.ranges import check

PACKAGE = Path(__file__).resolve().parents[1]  # holds configs/ in a checkout and in an installation alike
PACKAGE_NAME = __name__.split(".")[0]
T = TypeVar("T")


def run_config_file(spec: str) -> ConfigDict:
    """What `get_config` of `path.py` or `path.py:argument` returns; ValueError for a missing file.

    The path is looked up in the working directory, then in the installed package.
    """
    name, _, argument = spec.partition(":")
    path = next((base / name for base in (Path.cwd(), PACKAGE) if (base / name).is_file()), None)
    if path is None:
        raise ValueError(f"config file {name!r} exists neither in {Path.cwd()} nor in {PACKAGE}")
    # Named as a member of the package, so that `from .common import parse_arg` works from wherever the file lies.
    module_spec = importlib.util.spec_from_file_location(f"{PACKAGE_NAME}.configs.{path.stem}", path)
    assert module_spec and module_spec.loader
    module = importlib.util.module_from_spec(module_spec)
    module_spec.loader.exec_module(module)
    return module.get_config(argument or None)


def typed(cls: type[T], config: ConfigDict, overrides: Mapping[str, str]) -> T:
    """`cls` with the values of `config` and overrides as {"optimizer.lr": "1e-3"}.

    ValueError for a key that `cls` does not have (with the nearest one), for a value of the wrong type, and for a
    number that is not in the range of its field.
    """
    _complete(config, cls)
    config.lock()
    for key, text in overrides.items():
        _override(config, key, text)
    return build(cls, config.to_dict())


def _complete(config: ConfigDict, cls: type) -> None:
    """Adds the default of every field that the config leaves out, so that an override can find it."""
    for field in dataclasses.fields(cls):
        section = _dataclass_of(typing.get_type_hints(cls)[field.name], config.get(field.name))
        if field.name in config:
            value: Any = config[field.name]
            if section and isinstance(value, ConfigDict):
                _complete(value, section)
        elif field.default is not dataclasses.MISSING:
            config[field.name] = field.default
        elif field.default_factory is not dataclasses.MISSING:
            config[field.name] = dataclasses.asdict(field.default_factory())


def _override(config: ConfigDict, dotted: str, text: str) -> None:
    *sections, last = dotted.split(".")
    node: Any = config
    for i, key in enumerate([*sections, last]):
        if not isinstance(node, ConfigDict) or key not in node:
            known = [".".join([*sections[:i], name]) for name in node] if isinstance(node, ConfigDict) else []
            raise ValueError(unknown("config key", dotted, known))
        if i < len(sections):
            node = node[key]
    try:
        node[last] = text if isinstance(node[last], str) else parse_value(text)
    except TypeError as error:
        raise ValueError(f"config key {dotted!r} is of type {type(node[last]).__name__}, got {text!r}") from error


def parse_value(text: str) -> Any:
    """A Python literal (number, tuple, None, True, ...) or else the string itself."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def build(cls: type[T], section: Mapping[str, Any], prefix: str = "") -> T:
    """A frozen dataclass from a section of a config; sections within it become the dataclasses of its annotations.

    ValueError for a key that is no field (with the nearest field) and for a field without a value; lists become tuples.
    """
    fields = {field.name: field for field in dataclasses.fields(cls) if field.init}  # type: ignore[arg-type]
    hints = typing.get_type_hints(cls, include_extras=True)
    values = {}
    for key, value in section.items():
        if key not in fields:
            raise ValueError(unknown("config key", f"{prefix}{key}", [prefix + field for field in fields]))
        nested = _dataclass_of(hints[key], value)
        if nested is not None and isinstance(value, Mapping):
            value = build(nested, value, f"{prefix}{key}.")
        values[key] = _freeze(value)
        check(f"{prefix}{key}", values[key], hints[key])
    required = (dataclasses.MISSING, dataclasses.MISSING)
    missing = [key for key, f in fields.items() if (f.default, f.default_factory) == required and key not in values]
    if missing:
        raise ValueError(f"config keys without a value: {', '.join(prefix + key for key in missing)}")
    return cls(**values)


def _dataclass_of(hint: Any, section: Any) -> type | None:
    """The dataclass in an annotation that is one, or one or None; of several the one that has most of the keys."""
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    classes = [option for option in options if dataclasses.is_dataclass(option)]
    keys = set(section) if isinstance(section, Mapping | ConfigDict) else set()

    def known(option: Any) -> int:
        return len(keys & {field.name for field in dataclasses.fields(option)})

    return max(classes, key=known, default=None)  # type: ignore[return-value]


def _freeze(value: Any) -> Any:
    return tuple(map(_freeze, value)) if isinstance(value, list | tuple) else value
