"""Gradients of a float64 function by central differences, entry by entry."""

import numpy as np

STEP = 1e-6  # error about STEP² · f''' and 1e-16 / STEP: below 1e-9 for the functions of order one it is used on


def gradients(function, arrays, cotangent):
    """d Σ cotangent · function(*arrays) / d arrays."""
    arrays = [np.array(x, np.float64) for x in arrays]
    results = [np.zeros_like(x) for x in arrays]
    for x, result in zip(arrays, results, strict=True):
        for index in np.ndindex(x.shape):
            kept = x[index]
            x[index] = kept + STEP
            above = function(*arrays)
            x[index] = kept - STEP
            result[index] = (cotangent * (above - function(*arrays))).sum() / (2 * STEP)
            x[index] = kept
    return results
