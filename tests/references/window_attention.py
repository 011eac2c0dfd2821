"""Dense softmax attention with a mask, and its gradients, in float64; windows cell by cell from their definition."""

import itertools

import numpy as np


def dense(query, key, value, mask, cotangent):
    """[T, N, H], [S, K, H] and mask [T, S]: the output and the gradients of sum(output * cotangent)."""
    heads, key_heads = query.shape[1], key.shape[1]
    out, dq, dk, dv = (np.zeros(x.shape) for x in (query, query, key, value))
    for n in range(heads):
        k = n // (heads // key_heads)
        scale = query.shape[2] ** -0.5
        logits = np.where(mask, scale * query[:, n] @ key[:, k].T, -np.inf)
        weights = np.exp(logits - np.maximum(logits.max(1, keepdims=True), -1e30))
        weights /= np.maximum(weights.sum(1, keepdims=True), 1e-300)
        out[:, n] = weights @ value[:, k]
        dv[:, k] += weights.T @ cotangent[:, n]
        dweights = cotangent[:, n] @ value[:, k].T
        dlogits = weights * (dweights - (weights * dweights).sum(1, keepdims=True))
        dq[:, n] += scale * dlogits @ key[:, k]
        dk[:, k] += scale * dlogits.T @ query[:, n]
    return out, dq, dk, dv


def window_of(cell, window, shift):
    return tuple((c + w - s) // w for c, w, s in zip(cell, window, shift, strict=True))


def grid_mask(grid, window, shift):
    """[cells, cells] in row-major order: True where both cells are in one window."""
    cells = list(itertools.product(*map(range, grid)))
    return np.array([[window_of(a, window, shift) == window_of(b, window, shift) for b in cells] for a in cells])


def packed_mask(grids, window, shift, merge, length):
    """[length, length] for packed (time, height, width) grids in merge-block order, padding at the end."""
    tokens = []
    for item, (frames, height, width) in enumerate(grids):
        for frame, y, x in itertools.product(range(frames), range(0, height, merge), range(0, width, merge)):
            for dy, dx in itertools.product(range(merge), repeat=2):
                tokens.append((item, frame, window_of((y + dy, x + dx), window, shift)))
    mask = np.zeros((length, length), bool)
    mask[: len(tokens), : len(tokens)] = [[a == b for b in tokens] for a in tokens]
    return mask


def swin_mask(size, window, shift):
    """The mask of microsoft/Swin-Transformer:models/swin_transformer.py for the rolled, cut grid; True is kept."""
    image = np.zeros(size)
    slices = [[slice(0, -w), slice(-w, -s), slice(-s, None)] for w, s in zip(window, shift, strict=True)]
    for number, (rows, columns) in enumerate(itertools.product(*slices)):
        image[rows, columns] = number
    (height, width), (h, w) = size, window
    cut = image.reshape(height // h, h, width // w, w).transpose(0, 2, 1, 3).reshape(-1, h * w)
    return cut[:, :, None] == cut[:, None, :]
