"""Colour transforms with torchvision's semantics on Pillow images: what DINO, DINOv2 and most others train with.

Everything is uint8 [X, Y, C] in and out. The `adjust_*` functions and the blurs are pure functions of (image, amount);
the constructors below them draw the amounts.
"""

from collections.abc import Callable
from functools import reduce

import numpy as np
from PIL import Image, ImageEnhance, ImageFilter

from .decode import from_pil, to_pil
from .transforms import Range, Transform, sometimes


def adjust_brightness(image: np.ndarray, factor: float) -> np.ndarray:
    """Blends with black: 0 gives black, 1 the image."""
    return from_pil(ImageEnhance.Brightness(to_pil(image)).enhance(factor))


def adjust_contrast(image: np.ndarray, factor: float) -> np.ndarray:
    """Blends with the mean grey level of the image: 0 gives flat grey, 1 the image."""
    return from_pil(ImageEnhance.Contrast(to_pil(image)).enhance(factor))


def adjust_saturation(image: np.ndarray, factor: float) -> np.ndarray:
    """Blends with the grey image: 0 gives grey, 1 the image."""
    return from_pil(ImageEnhance.Color(to_pil(image)).enhance(factor))


def adjust_hue(image: np.ndarray, shift: float) -> np.ndarray:
    """Turns the hue by `shift` of the circle ([-0.5, 0.5]) on uint8 HSV, with wrap; grey images stay as they are."""
    if image.shape[2] != 3:
        return image
    hue, saturation, value = to_pil(image).convert("HSV").split()
    turned = np.asarray(hue) + np.int32(shift * 255).astype(np.uint8)  # uint8 arithmetic wraps, as intended
    return from_pil(Image.merge("HSV", (Image.fromarray(turned), saturation, value)).convert("RGB"))


def to_gray(image: np.ndarray) -> np.ndarray:
    """ITU-R 601 luma (0.299, 0.587, 0.114) in every channel."""
    if image.shape[2] != 3:
        return image
    return np.repeat(from_pil(to_pil(image).convert("L")), 3, axis=2)


def gaussian_blur(image: np.ndarray, kernel_size: int, sigma: float) -> np.ndarray:
    """torchvision's GaussianBlur: sampled kernel of odd size, reflected border, float32, rounded."""
    half = (kernel_size - 1) / 2
    kernel = np.exp(-0.5 * (np.linspace(-half, half, kernel_size) / sigma) ** 2)
    kernel = (kernel / kernel.sum()).astype(np.float32)
    pad = kernel_size // 2
    if min(image.shape[:2]) <= pad:
        raise ValueError(f"gaussian_blur: a reflected border of {pad} needs a larger image than {image.shape[:2]}")
    result = np.pad(image, ((pad, pad), (pad, pad), (0, 0)), mode="reflect").astype(np.float32)
    for axis, length in enumerate(image.shape[:2]):
        shifted = (result[(slice(None),) * axis + (slice(k, k + length),)] for k in range(kernel_size))
        result = reduce(np.add, (weight * window for weight, window in zip(kernel, shifted, strict=True)))
    return np.rint(result).astype(np.uint8)


def color_jitter(
    brightness: float = 0.0,
    contrast: float = 0.0,
    saturation: float = 0.0,
    hue: float = 0.0,
    probability: float = 1.0,
) -> Transform:
    """torchvision's ColorJitter: factors uniform in [max(0, 1 - x), 1 + x], hue in [-x, x], in a random order."""
    if min(brightness, contrast, saturation) < 0 or not 0 <= hue <= 0.5:
        raise ValueError(
            "color_jitter: strengths must not be negative and hue must lie in [0, 0.5], "
            f"got brightness {brightness}, contrast {contrast}, saturation {saturation}, hue {hue}"
        )
    steps: list[tuple[Callable[[np.ndarray, float], np.ndarray], float, float]] = [
        (adjust, max(0.0, 1 - strength), 1 + strength)
        for adjust, strength in (
            (adjust_brightness, brightness),
            (adjust_contrast, contrast),
            (adjust_saturation, saturation),
        )
        if strength
    ]
    if hue:
        steps.append((adjust_hue, -hue, hue))

    def apply(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        for index in rng.permutation(len(steps)):
            adjust, low, high = steps[index]
            image = adjust(image, rng.uniform(low, high))
        return image

    return sometimes(probability, apply)


def grayscale(probability: float = 1.0) -> Transform:
    """Grey, with as many channels as before."""
    return sometimes(probability, lambda image, rng: to_gray(image))


def blur(kernel_size: int = 9, sigma: Range = (0.1, 2.0), probability: float = 1.0) -> Transform:
    """`gaussian_blur` with sigma uniform in `sigma`: the blur of DINOv2."""
    if kernel_size % 2 != 1:
        raise ValueError(f"blur: kernel_size must be odd, got {kernel_size}")
    return sometimes(probability, lambda image, rng: gaussian_blur(image, kernel_size, rng.uniform(*sigma)))


def pil_blur(radius: Range = (0.1, 2.0), probability: float = 1.0) -> Transform:
    """Pillow's GaussianBlur (three box blurs) with radius uniform in `radius`: the blur of DINO and iBOT."""

    def apply(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        return from_pil(to_pil(image).filter(ImageFilter.GaussianBlur(rng.uniform(*radius))))

    return sometimes(probability, apply)


def solarize(threshold: int = 128, probability: float = 1.0) -> Transform:
    """Inverts the values from `threshold` on."""
    return sometimes(probability, lambda image, rng: np.where(image < threshold, image, 255 - image))


def invert(probability: float = 1.0) -> Transform:
    """255 minus the image."""
    return sometimes(probability, lambda image, rng: 255 - image)
