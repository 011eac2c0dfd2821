"""The JSON files of a checkpoint's tokeniser, entry by entry: what is not of the kind it has to be is named."""

import json
from collections.abc import Mapping
from typing import Any

import tokenizers

_WORDS = {dict: "an object", list: "a list", str: "a string", int: "an integer", float: "a number"}
_TOKENS = ("bos_token", "eos_token", "pad_token", "unk_token")


def read_document(files: Mapping[str, bytes], name: str) -> dict[str, Any]:
    """The object in one of the files (name -> content), {} without it; ValueError for anything else."""
    if name not in files:
        return {}
    try:
        content = json.loads(files[name])
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{name} is not JSON: {str(error)[:200]}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{name} holds {type(content).__name__}, expected an object")
    return content


def entry(document: Mapping[str, Any], where: str, key: str, *kinds: type, default: Any = None) -> Any:
    """`document[key]`, `default` where it is absent or null; ValueError for a value of another kind."""
    value = document.get(key)
    if value is None:
        return default
    if not isinstance(value, kinds) or isinstance(value, bool):
        expected = " or ".join(_WORDS[kind] for kind in kinds)
        raise ValueError(f"{where}: {key!r} is {repr(value)[:60]}, expected {expected}")
    return value


def vocabulary(document: Mapping[str, Any], where: str) -> dict[str, int]:
    """The ids of symbols; ValueError naming the first that has none."""
    for symbol, index in document.items():
        if not isinstance(index, int) or isinstance(index, bool) or index < 0:
            raise ValueError(f"{where}: the id of {symbol[:60]!r} is {repr(index)[:60]}, expected an integer")
    return dict(document)


def added_tokens(document: Mapping[str, Any]) -> dict[str, int]:
    """What tokenizer.json cuts out of a text before anything else, with its ids."""
    where = "tokenizer.json, added_tokens"
    added = entry(document, "tokenizer.json", "added_tokens", list, default=[])
    found: dict[str, int] = {}
    for i, token in enumerate(added):
        if not isinstance(token, dict):
            raise ValueError(f"{where}: entry {i} is {repr(token)[:60]}, expected an object")
        content, index = (entry(token, where, key, kind) for key, kind in (("content", str), ("id", int)))
        if content is None or index is None:
            raise ValueError(f"{where}: entry {i} is {repr(token)[:60]}, expected a content and an id")
        found[content] = index
    return found


def settings(files: Mapping[str, bytes]) -> dict[str, Any]:
    """tokenizer_config.json over special_tokens_map.json: the special tokens as texts, and the greatest length.

    Tokens that are absent are None, and so is a length that means none: transformers writes 1e30 for "unlimited".
    """
    found: dict[str, Any] = dict.fromkeys((*_TOKENS, "model_max_length", "tokenizer_class"))
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        document = read_document(files, name)
        for key in _TOKENS:
            token = entry(document, name, key, str, dict)
            token = entry(token, f"{name}, {key}", "content", str) if isinstance(token, dict) else token
            if key in document:
                found[key] = token
        found["tokenizer_class"] = entry(document, name, "tokenizer_class", str, default=found["tokenizer_class"])
        length = entry(document, name, "model_max_length", int, float, default=0)
        if 0 < length < 1 << 16:
            found["model_max_length"] = int(length)
    return found


def open_tokenizer(content: str) -> tokenizers.Tokenizer:
    """The tokeniser in a tokenizer.json; ValueError for what describes none.

    Truncation and padding that the file stores are of its last use: transformers encodes without them.
    """
    try:
        tokenizer = tokenizers.Tokenizer.from_str(content)
    except Exception as error:  # of no class of its own
        raise ValueError(f"tokenizer.json describes no tokeniser: {str(error)[:200]}") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer
