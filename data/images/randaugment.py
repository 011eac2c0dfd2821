"""RandAugment as big_vision trained the AugReg ViTs with it, quirks included.

Source: big_vision/pp/archive/autoaugment.py distort_image_with_randaugment; paper: arXiv 1909.13719. All images are
uint8 [X, Y, 3]; pixels from outside the image become 128. What one would not guess, each checked against TensorFlow:

- every drawn operation is applied (the probability that is drawn beside it is not used), and magnitude 0 changes a lot;
- the solarize threshold 256 m / 10 is compared as uint8 and wraps: m = 10 and m = 20 invert the whole image;
- posterize with 0 bits keeps one, because TensorFlow cuts shifts at 7;
- contrast blends with the number of pixels / 256 instead of their mean;
- degenerate images and blends are truncated to uint8, not rounded.
"""

import math
from collections.abc import Callable

import numpy as np

from .transforms import Transform, on_image

OUTSIDE = 128
_F32 = np.float32


def blend(degenerate: np.ndarray, image: np.ndarray, factor: float) -> np.ndarray:
    """degenerate + factor (image - degenerate), clipped and truncated."""
    base = degenerate.astype(_F32)
    return np.clip(base + _F32(factor) * (image.astype(_F32) - base), 0, 255).astype(np.uint8)


def luma(image: np.ndarray) -> np.ndarray:
    """tf.image.rgb_to_grayscale of uint8: weights 0.2989, 0.587, 0.114 on [0, 1], then trunc(255.5 x); [X, Y, 1]."""
    gray = (image.astype(_F32) * _F32(1 / 255)) @ np.array([[0.2989], [0.587], [0.114]], _F32)
    return (gray * _F32(255.5)).astype(np.uint8)


def autocontrast(image: np.ndarray) -> np.ndarray:
    """Stretches each channel to [0, 255]; a flat channel stays."""
    low, high = image.min((0, 1)).astype(_F32), image.max((0, 1)).astype(_F32)
    scale = np.divide(_F32(255), high - low, where=high > low, out=np.ones_like(high))
    offset = np.where(high > low, -low * scale, 0)
    return np.clip(image.astype(_F32) * scale + offset, 0, 255).astype(np.uint8)


def equalize(image: np.ndarray) -> np.ndarray:
    """Equalises the histogram of each channel with Pillow's integer rule."""
    return np.stack([_equalize_channel(image[..., c]) for c in range(3)], axis=-1)


def _equalize_channel(channel: np.ndarray) -> np.ndarray:
    histogram = np.bincount(channel.ravel(), minlength=256)
    step = (channel.size - histogram[np.flatnonzero(histogram)[-1]]) // 255
    if step == 0:
        return channel
    table = (np.cumsum(histogram) + step // 2) // step
    return np.clip(np.concatenate([[0], table[:-1]]), 0, 255).astype(np.uint8)[channel]


def posterize(image: np.ndarray, bits: int) -> np.ndarray:
    """Keeps the `bits` highest bits, at least one."""
    shift = min(8 - bits, 7)
    return image >> shift << shift


def solarize(image: np.ndarray, threshold: int) -> np.ndarray:
    """Inverts values from threshold mod 256 on."""
    return np.where(image < threshold % 256, image, 255 - image)


def solarize_add(image: np.ndarray, addition: int) -> np.ndarray:
    """Adds to the values below 128 and clips."""
    return np.where(image < 128, np.clip(image.astype(int) + addition, 0, 255), image).astype(np.uint8)


def color(image: np.ndarray, factor: float) -> np.ndarray:
    """Blends with the grey image."""
    return blend(luma(image), image, factor)


def contrast(image: np.ndarray, factor: float) -> np.ndarray:
    """Blends with a constant: the number of pixels / 256, at most 255 (see the head of the file)."""
    return blend(np.full_like(image, min(image.shape[0] * image.shape[1] / 256, 255)), image, factor)


def brightness(image: np.ndarray, factor: float) -> np.ndarray:
    """Blends with black."""
    return blend(np.zeros_like(image), image, factor)


def sharpness(image: np.ndarray, factor: float) -> np.ndarray:
    """Blends with a 3x3 smoothing whose border is the image itself."""
    kernel = np.array([[1, 1, 1], [1, 5, 1], [1, 1, 1]], _F32) / _F32(13)
    rows, columns = image.shape[0] - 2, image.shape[1] - 2
    smooth = np.zeros((rows, columns, 3), _F32)
    for i, j in np.ndindex(3, 3):
        smooth += image[i : i + rows, j : j + columns] * kernel[i, j]
    degenerate = image.copy()
    degenerate[1:-1, 1:-1] = np.clip(smooth, 0, 255).astype(np.uint8)
    return blend(degenerate, image, factor)


def transform(image: np.ndarray, matrix: tuple[float, float, float, float, float, float]) -> np.ndarray:
    """Samples the image at (a x + b y + c, d x + e y + f) for each output pixel (x, y), nearest neighbour."""
    a, b, c, d, e, f = (_F32(value) for value in matrix)
    height, width = image.shape[:2]
    y, x = np.mgrid[:height, :width].astype(_F32)
    source_x, source_y = _round_away(a * x + b * y + c), _round_away(d * x + e * y + f)
    inside = (source_x >= 0) & (source_x < width) & (source_y >= 0) & (source_y < height)
    result = np.full_like(image, OUTSIDE)
    result[inside] = image[source_y[inside], source_x[inside]]
    return result


def _round_away(values: np.ndarray) -> np.ndarray:
    """std::round: halves away from zero."""
    return np.trunc(values + np.copysign(_F32(0.5), values)).astype(int)


def rotate(image: np.ndarray, degrees: float) -> np.ndarray:
    """Rotates about the centre of the pixel grid, counter-clockwise for positive degrees."""
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    last_x, last_y = image.shape[1] - 1, image.shape[0] - 1
    x = (last_x - (cos * last_x - sin * last_y)) / 2
    y = (last_y - (sin * last_x + cos * last_y)) / 2
    return transform(image, (cos, -sin, x, sin, cos, y))


def cutout(image: np.ndarray, half: int, rng: np.random.Generator) -> np.ndarray:
    """Fills a square of side 2 `half` around a uniform pixel, cut at the border."""
    row, column = rng.integers(image.shape[0]), rng.integers(image.shape[1])
    result = image.copy()
    result[max(row - half, 0) : row + half, max(column - half, 0) : column + half] = OUTSIDE
    return result


def _sign(rng: np.random.Generator) -> float:
    return 1.0 if rng.random() < 0.5 else -1.0


# name -> (image, magnitude / 10, rng) -> image
OPERATIONS: dict[str, Callable[[np.ndarray, float, np.random.Generator], np.ndarray]] = {
    "AutoContrast": lambda image, level, rng: autocontrast(image),
    "Equalize": lambda image, level, rng: equalize(image),
    "Invert": lambda image, level, rng: 255 - image,
    "Rotate": lambda image, level, rng: rotate(image, _sign(rng) * level * 30),
    "Posterize": lambda image, level, rng: posterize(image, int(level * 4)),
    "Solarize": lambda image, level, rng: solarize(image, int(level * 256)),
    "Color": lambda image, level, rng: color(image, level * 1.8 + 0.1),
    "Contrast": lambda image, level, rng: contrast(image, level * 1.8 + 0.1),
    "Brightness": lambda image, level, rng: brightness(image, level * 1.8 + 0.1),
    "Sharpness": lambda image, level, rng: sharpness(image, level * 1.8 + 0.1),
    "ShearX": lambda image, level, rng: transform(image, (1, _sign(rng) * level * 0.3, 0, 0, 1, 0)),
    "ShearY": lambda image, level, rng: transform(image, (1, 0, 0, _sign(rng) * level * 0.3, 1, 0)),
    "TranslateX": lambda image, level, rng: transform(image, (1, 0, _sign(rng) * level * 100, 0, 1, 0)),
    "TranslateY": lambda image, level, rng: transform(image, (1, 0, 0, 0, 1, _sign(rng) * level * 100)),
    "Cutout": lambda image, level, rng: cutout(image, int(level * 40), rng),
    "SolarizeAdd": lambda image, level, rng: solarize_add(image, int(level * 110)),
}


def randaugment(layers: int = 2, magnitude: float = 10) -> Transform:
    """Applies `layers` operations, each drawn uniformly from the sixteen, at a magnitude of [0, 22] (10 is "full")."""
    if layers < 0 or not 0 <= magnitude <= 22:  # beyond 22 posterize would keep more than 8 bits
        raise ValueError(f"randaugment: need layers >= 0 and 0 <= magnitude <= 22, got {layers} and {magnitude}")
    names = list(OPERATIONS)

    def apply(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        if image.dtype != np.uint8 or image.shape[2] != 3:
            raise ValueError(f"randaugment: expected a uint8 image [X, Y, 3], got {image.dtype} {image.shape}")
        for _ in range(layers):
            image = OPERATIONS[names[rng.integers(len(names))]](image, magnitude / 10, rng)
        return image

    return on_image(apply)
