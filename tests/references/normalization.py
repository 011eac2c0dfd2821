"""Normalisations row by row in float64."""

import math

import numpy as np


def layer_norm(x, scale, bias, eps):
    def row(x):
        mean = sum(x) / len(x)
        variance = sum((v - mean) ** 2 for v in x) / len(x)
        return [(v - mean) / math.sqrt(variance + eps) * s + b for v, s, b in zip(x, scale, bias, strict=True)]

    return np.apply_along_axis(row, -1, x)


def rms_norm(x, scale, eps):
    def row(x):
        square = sum(v * v for v in x) / len(x)
        return [v / math.sqrt(square + eps) * s for v, s in zip(x, scale, strict=True)]

    return np.apply_along_axis(row, -1, x)


def l2_normalize(x, eps):
    return np.apply_along_axis(lambda x: [v / max(math.hypot(*x), eps) for v in x], -1, x)


def group_norm(x, scale, bias, groups, eps):
    out = np.empty_like(x)
    for example, result in zip(x, out, strict=True):
        width = x.shape[-1] // groups
        for g in range(groups):
            values = list(example[..., g * width : (g + 1) * width].ravel())
            mean = sum(values) / len(values)
            deviation = math.sqrt(sum((v - mean) ** 2 for v in values) / len(values) + eps)
            for c in range(g * width, (g + 1) * width):
                result[..., c] = (example[..., c] - mean) / deviation * scale[c] + bias[c]
    return out
