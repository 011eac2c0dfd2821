"""JSON files beside the tensors."""

import json
from pathlib import Path
from typing import Any

from ...storage.paths import read_whole, size_of

MAX_DOCUMENT = 100_000_000  # bytes: an index of a million tensors


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; empty without the file, ValueError where it holds something else."""
    if not path.is_file():
        return {}
    if (size := size_of(path)) > MAX_DOCUMENT:
        raise ValueError(f"{path} has {size} bytes, expected a JSON object of at most {MAX_DOCUMENT}")
    try:
        content = json.loads(read_whole(path))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {str(error)[:200]}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds {type(content).__name__}, expected a JSON object")
    return content
