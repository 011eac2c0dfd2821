"""Rotary embeddings pair by pair, with complex numbers. Angles are float32 products, as everywhere published."""

import math

import numpy as np


def angle(position, frequency):
    return np.float64(np.float32(position) * np.float32(frequency))


def rotate(x, angles, interleaved, factor=1.0):
    """x [T, N, H] float64, angles [T, H / 2]: each pair is a complex number times factor * e^(i angle)."""
    out = np.empty_like(x)
    tokens, heads, channels = x.shape
    for t in range(tokens):
        for n in range(heads):
            for j in range(channels // 2):
                a, b = (2 * j, 2 * j + 1) if interleaved else (j, j + channels // 2)
                turned = complex(x[t, n, a], x[t, n, b]) * factor * np.exp(1j * angles[t, j])
                out[t, n, a], out[t, n, b] = turned.real, turned.imag
    return out


def angles_1d(positions, channels, theta):
    """positions [T]."""
    return np.array([[angle(p, theta ** (-2 * j / channels)) for j in range(channels // 2)] for p in positions])


def angles_axial(positions, widths, theta):
    """positions [T, A]; axis a has widths[a] channels."""
    return np.concatenate([angles_1d(positions[:, a], width, theta) for a, width in enumerate(widths)], axis=1)


def angles_multimodal(positions, sections, theta, interleaved):
    """positions [T, 3]: choose, for every pair, among the three tables that a 1-D embedding of each axis would have."""
    half = sum(sections)
    tables = [angles_1d(positions[:, axis], 2 * half, theta) for axis in range(3)]
    out = np.empty((len(positions), half))
    for j in range(half):
        if interleaved:
            axis = j % 3 if j % 3 and j < 3 * sections[j % 3] else 0
        else:
            axis = 0 if j < sections[0] else 1 if j < sections[0] + sections[1] else 2
        out[:, j] = tables[axis][:, j]
    return out


def yarn(channels, theta, factor, length, fast=32, slow=1):
    """Frequencies of YaRN by its definition in turns over the trained length, rounded as the released code does."""
    frequencies = [theta ** (-2 * j / channels) for j in range(channels // 2)]

    def crossing(turns):  # pair number, not whole, at which a pair makes this many turns
        return channels / 2 * math.log(length / (2 * math.pi * turns)) / math.log(theta)

    first, last = math.floor(crossing(fast)), math.ceil(crossing(slow))
    first, last = max(first, 0), min(last, channels - 1)
    blend = [min(max((j - first) / (last - first), 0), 1) for j in range(channels // 2)]
    return [f * (1 - b) + f / factor * b for f, b in zip(frequencies, blend, strict=True)]


def llama3(channels, theta, factor, length, low, high):
    """Frequencies of Llama 3.1 by wavelength."""
    out = []
    for j in range(channels // 2):
        frequency = theta ** (-2 * j / channels)
        wavelength = 2 * math.pi / frequency
        if wavelength > length / low:
            frequency /= factor
        elif wavelength >= length / high:
            smooth = (length / wavelength - low) / (high - low)
            frequency = (1 - smooth) * frequency / factor + smooth * frequency
        out.append(frequency)
    return out
