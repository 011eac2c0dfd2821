"""Parts held out of labelled data, by a seeded shuffle within every class: the order of the rows decides nothing."""

from typing import Any

import numpy as np
from jaxtyping import Bool


def held_out(labels: Any, share: float = 0.1, seed: int = 0) -> Bool[np.ndarray, " B"]:
    """Which rows are held out: of each label the same `share`, shuffled; the same for the same labels and seed.

    The rows of all classes together are ranked by (rank within its class) / (size of the class), and the first `share`
    of them taken: classes too small for a row of their own are so held out in turn. ValueError for a share outside
    (0, 1), or where none or all would be held out.
    """
    labels = np.asarray(labels)
    if not 0 < share < 1 or labels.ndim != 1 or len(labels) < 2:
        raise ValueError(
            f"cannot hold out {share} of {len(labels)} rows: expected a share in (0, 1) and 2 rows or more"
        )
    rng = np.random.default_rng(seed)
    place = np.empty(len(labels))
    for label in np.unique(labels):
        rows = np.flatnonzero(labels == label)
        place[rng.permutation(rows)] = (np.arange(len(rows)) + rng.random()) / len(rows)
    count = min(max(round(share * len(labels)), 1), len(labels) - 1)
    chosen = np.zeros(len(labels), bool)
    chosen[np.argsort(place, kind="stable")[:count]] = True
    return chosen
