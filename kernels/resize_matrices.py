"""The matrices that resize one axis, rule for rule as the published systems do it; NumPy alone.

`interpolation` applies them to tables of a model inside JAX, the image transforms to pixels in processes that never
load it. Coordinates are computed in float32 in the order of the reference (torch ATen/native/UpSample.h), since half an
ulp of a coordinate is visible at 1e-5 in the result.
"""

from collections.abc import Callable

import numpy as np

_F32 = np.float32


def _cubic(x: np.ndarray, a: float) -> np.ndarray:
    """Keys' cubic convolution kernel with parameter a (-0.75 in plain torch bicubic, -0.5 in PIL and antialiased)."""
    x = np.abs(x)
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = ((a * x - 5 * a) * x + 8 * a) * x - 4 * a
    return np.where(x <= 1, near, np.where(x < 2, far, 0))


def _triangle(x: np.ndarray) -> np.ndarray:
    return np.maximum(0, 1 - np.abs(x))


def _taps(coordinates: np.ndarray, size_in: int, taps: range, kernel: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """Rows of weights `kernel(t - k)` around each source coordinate; taps beyond the border add to the border pixel."""
    floor = np.floor(coordinates)
    fraction = coordinates - floor
    matrix = np.zeros((len(coordinates), size_in), _F32)
    rows = np.arange(len(coordinates))
    for k in taps:
        columns = np.clip(floor.astype(int) + k, 0, size_in - 1)
        np.add.at(matrix, (rows, columns), kernel(fraction - k).astype(_F32))
    return matrix


def _half_pixel(size_in: int, size_out: int, step: float | None = None) -> np.ndarray:
    scale = _F32(size_in) / _F32(size_out) if step is None else _F32(step)
    return (np.arange(size_out, dtype=_F32) + _F32(0.5)) * scale - _F32(0.5)


def _aligned_corners(size_in: int, size_out: int) -> np.ndarray:
    step = _F32(size_in - 1) / _F32(size_out - 1) if size_out > 1 else _F32(0)
    return np.arange(size_out, dtype=_F32) * step


def _antialiased(size_in: int, size_out: int, kernel: Callable[[np.ndarray], np.ndarray], radius: int) -> np.ndarray:
    """Kernel stretched by the scale when shrinking, cut at the border, renormalised (PIL; torch antialias=True)."""
    step = size_in / size_out
    stretch = max(step, 1.0)
    centre = (np.arange(size_out) + 0.5) * step
    low = np.maximum((centre - radius * stretch + 0.5).astype(int), 0)
    high = np.minimum((centre + radius * stretch + 0.5).astype(int), size_in)
    columns = np.arange(size_in)
    weights = kernel((columns - centre[:, None] + 0.5) / stretch)
    weights = np.where((columns >= low[:, None]) & (columns < high[:, None]), weights, 0)
    return (weights / weights.sum(1, keepdims=True)).astype(_F32)


_CUBIC_TAPS, _LINEAR_TAPS = range(-1, 3), range(2)

# name -> (size_in, size_out) -> matrix [size_out, size_in]
METHODS: dict[str, Callable[[int, int], np.ndarray]] = {
    # F.interpolate(bicubic): transformers ViT / CLIP / Dinov2, EVA and LAVIS interpolate_pos_embed
    "bicubic": lambda i, o: _taps(_half_pixel(i, o), i, _CUBIC_TAPS, lambda x: _cubic(x, -0.75)),
    # F.interpolate(bicubic, antialias=True): timm resample_abs_pos_embed, open_clip resize_pos_embed, DINOv2 with
    # registers
    "bicubic_antialias": lambda i, o: _antialiased(i, o, lambda x: _cubic(x, -0.5), 2),
    # F.interpolate(bicubic, scale_factor=(out + 0.1) / in): DINO, iBOT, DINOv2 (interpolate_offset=0.1); the given
    # factor, not the ratio of the sizes, sets the step
    "bicubic_offset": lambda i, o: _taps(
        _half_pixel(i, o, 1.0 / ((o + 0.1) / i)), i, _CUBIC_TAPS, lambda x: _cubic(x, -0.75)
    ),
    # F.interpolate(bicubic, align_corners=True): LAVIS clip_vit.interpolate_pos_embed
    "bicubic_align_corners": lambda i, o: _taps(_aligned_corners(i, o), i, _CUBIC_TAPS, lambda x: _cubic(x, -0.75)),
    # F.interpolate(bilinear): timm loading Google's .npz; F.interpolate(linear): open_clip's text positions
    "bilinear": lambda i, o: _taps(np.maximum(_half_pixel(i, o), 0), i, _LINEAR_TAPS, _triangle),
    # scipy.ndimage.zoom(order=1): big_vision resample_posemb, vision_transformer interpolate_posembed
    "bilinear_align_corners": lambda i, o: _taps(_aligned_corners(i, o), i, _LINEAR_TAPS, _triangle),
    # jax.image.scale_and_translate(bilinear, antialias=True): SigLIP2 NaFlex
    "bilinear_antialias": lambda i, o: _antialiased(i, o, _triangle, 1),
}


def resize_matrix(size_in: int, size_out: int, method: str) -> np.ndarray:
    """The float32 [size_out, size_in] matrix that resizes one axis by a rule of `METHODS`; else ValueError."""
    if method not in METHODS:
        raise ValueError(f"unknown interpolation {method!r}, expected one of {sorted(METHODS)}")
    return METHODS[method](size_in, size_out)
