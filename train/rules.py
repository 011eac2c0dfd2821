"""Parameter paths and the regex rules over them: freezing, learning rates, weight decay and sharding all use these.

A parameter's path is the "/"-joined keys of its nested dict (`encoder/blocks_0/attn/query/kernel`). Rules are (regex,
value) pairs; the regex must match the whole path, the first match wins, and both a path that no rule matches and a
rule that decides no path are errors: a typing mistake never passes silently.
"""

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

from flax import traverse_util

T = TypeVar("T")
Rules = Sequence[tuple[str, T]]
Tree = dict[str, Any]  # nested dict of arrays


def flatten(tree: Tree) -> dict[str, Any]:
    """Nested dict -> {path: leaf}, in the tree's order."""
    return traverse_util.flatten_dict(tree, sep="/")


def unflatten(leaves: Mapping[str, Any]) -> Tree:
    """The inverse of `flatten`."""
    return traverse_util.unflatten_dict(dict(leaves), sep="/")


def select(tree: Tree, paths: Iterable[str]) -> Tree:
    """The part of a nested dict under the given leaf paths."""
    wanted = set(paths)
    return unflatten({path: leaf for path, leaf in flatten(tree).items() if path in wanted})


def merge(tree: Tree, update: Tree) -> Tree:
    """`tree` with the leaves of `update`, a part of it, put in."""
    return unflatten(flatten(tree) | flatten(update))


def match_rules(rules: Rules[T], paths: Iterable[str], what: str) -> dict[str, T]:
    """The value of each path: that of the first rule whose regex matches it entirely.

    A string value may refer to groups of its regex (`\\1`). ValueError, naming `what`, for a path that no rule matches
    and for a rule that is the first match of no path.
    """
    for pattern, _ in rules:
        compiled(pattern, what)
    values: dict[str, T] = {}
    used: set[int] = set()
    paths = list(paths)
    for path in paths:
        for i, (pattern, value) in enumerate(rules):
            if match := re.fullmatch(pattern, path):
                values[path] = match.expand(value) if isinstance(value, str) and "\\" in value else value  # type: ignore[assignment]
                used.add(i)
                break
        else:
            raise ValueError(f"{what}: no rule matches parameter {path!r}, rules are {[rule[0] for rule in rules]}")
    for i, (pattern, _) in enumerate(rules):
        if i not in used:
            taken = any(re.fullmatch(pattern, path) for path in paths)
            reason = ": earlier rules take all it matches" if taken else nearest(pattern, paths)
            raise ValueError(f"{what}: rule {pattern!r} decides no parameter{reason}")
    return values


def compiled(pattern: str, what: str) -> re.Pattern[str]:
    """ValueError naming `what` for a pattern that is no regular expression."""
    try:
        return re.compile(pattern)
    except re.error as error:
        raise ValueError(f"{what}: {pattern!r} is no regular expression ({error})") from error


def nearest(path: str, paths: Iterable[str]) -> str:
    """The end of an error message about a path: the nearest of the others, where one is near."""
    near = difflib.get_close_matches(path, list(paths), n=1)
    return f" (nearest: {near[0]!r})" if near else ""
