"""Convolutions as loops over output (or input) pixels, written independently of kernels/convolution.py."""

import numpy as np


def conv2d(x, kernel, stride, padding):
    """Every output pixel sees one window of the zero-padded image."""
    padded = np.pad(x, [(0, 0), (padding[0],) * 2, (padding[1],) * 2, (0, 0)])
    size = kernel.shape[:2]
    rows, columns = ((padded.shape[1 + a] - size[a]) // stride[a] + 1 for a in (0, 1))
    out = np.zeros((x.shape[0], rows, columns, kernel.shape[3]), x.dtype)
    for i in range(rows):
        for j in range(columns):
            top, left = i * stride[0], j * stride[1]
            window = padded[:, top : top + size[0], left : left + size[1]]
            out[:, i, j] = np.tensordot(window, kernel, 3)
    return out


def conv2d_transpose(x, kernel, stride, padding, output_padding):
    """Every input pixel paints one window of the output, which is then cropped by the padding."""
    size = kernel.shape[:2]
    full = [(x.shape[1 + a] - 1) * stride[a] + size[a] + output_padding[a] for a in (0, 1)]
    out = np.zeros((x.shape[0], *full, kernel.shape[2]), x.dtype)
    for i in range(x.shape[1]):
        for j in range(x.shape[2]):
            top, left = i * stride[0], j * stride[1]
            out[:, top : top + size[0], left : left + size[1]] += np.einsum("bc,xydc->bxyd", x[:, i, j], kernel)
    return out[:, padding[0] : full[0] - padding[0], padding[1] : full[1] - padding[1]]
