"""What the processes of a run agree on before they compute together."""

import hashlib
import json
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils


def on_first(compute: Callable[[], Any]) -> Any:
    """The result of process 0, which is JSON, on every process; its ValueError is raised on every process."""
    if jax.process_count() == 1:
        return compute()
    text = b""
    if jax.process_index() == 0:
        try:
            text = json.dumps({"result": compute()}).encode()
        except ValueError as error:
            text = json.dumps({"error": str(error)}).encode()
    length = int(multihost_utils.broadcast_one_to_all(np.int32(len(text))))
    padded = np.frombuffer(text.ljust(length), np.uint8)
    document = json.loads(np.asarray(multihost_utils.broadcast_one_to_all(padded)).astype(np.uint8).tobytes())
    if "error" in document:
        raise ValueError(document["error"])
    return document["result"]


def check_equal(name: str, document: Any) -> None:
    """ValueError on every process where one of them has another JSON document than the first."""
    if jax.process_count() == 1:
        return
    digest = hashlib.sha256(json.dumps(document, sort_keys=True).encode()).digest()
    digests = np.asarray(multihost_utils.process_allgather(np.frombuffer(digest, np.uint8)))
    others = [i for i, row in enumerate(digests) if (row != digests[0]).any()]
    if others:
        raise ValueError(f"the processes of a run must have one {name}: that of processes {others} is not process 0's")
