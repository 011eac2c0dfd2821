"""Per-example transforms: decoding, geometry, value ranges and labels.

A transform is a function `f(example, rng) -> example` of a dict and a `np.random.Generator`; the names here are the
constructors that `preprocess.build` calls from a config. Images are [X, Y, C], uint8 unless a transform says otherwise.
Sizes are an int (square) or (rows, columns). Colour has a file of its own, and so has RandAugment.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from PIL import Image

from ..lookup import lookup
from .decode import ALPHAS, Alpha, decode_image, from_pil, to_pil
from .resize import CENTER_CROP, RESIZE, SHORTEST_EDGE, Size
from .resize import center_crop as crop_center

Example = dict[str, Any]
Transform = Callable[[Example, np.random.Generator], Example]
Range = tuple[float, float]


def on_image(function: Callable[[np.ndarray, np.random.Generator], np.ndarray]) -> Transform:
    """Lifts a function of (image, rng) to the example's "image"."""
    return lambda example, rng: {**example, "image": function(example["image"], rng)}


def sometimes(probability: float, function: Callable[[np.ndarray, np.random.Generator], np.ndarray]) -> Transform:
    """Applies a function of (image, rng) with the given probability; one number is drawn in either case."""
    if not 0 <= probability <= 1:
        raise ValueError(f"probability must lie in [0, 1], got {probability}")
    return on_image(lambda image, rng: function(image, rng) if rng.random() < probability else image)


def pair(size: int | Sequence[int]) -> Size:
    """(size, size) of an int, or the two ints given; ValueError for anything else."""
    rows, columns = (size, size) if isinstance(size, int) else size
    if rows < 1 or columns < 1:
        raise ValueError(f"size must be positive, got {size}")
    return rows, columns


def decode(channels: int = 3, upright: bool = True, alpha: Alpha = "white") -> Transform:
    """Image bytes -> uint8 [X, Y, channels]. Damaged bytes raise CorruptExample with the example's "name".

    `upright` and `alpha` are those of `decode.decode_image`.
    """
    if channels not in (1, 3, 4):
        raise ValueError(f"decode: channels must be 1, 3 or 4, got {channels}")
    if alpha not in ALPHAS:
        raise ValueError(f"decode: alpha is {alpha!r}, expected one of {ALPHAS}")

    def apply(example: Example, rng: np.random.Generator) -> Example:
        name = example.get("name", "image")
        return {**example, "image": decode_image(example["image"], channels, name, upright=upright, alpha=alpha)}

    return apply


def resize(size: int | Sequence[int], method: str = "pil_bilinear") -> Transform:
    """Resizes to exactly `size` by a rule of `resize.RESIZE`; the aspect ratio is not kept."""
    target, function = pair(size), lookup(RESIZE, method, "resize method")
    return on_image(lambda image, rng: function(image, target))


def resize_shortest(size: int, method: str = "pil_bicubic", rounding: str = "torchvision") -> Transform:
    """Resizes so that the shorter side is `size`; `rounding` of the longer side is a rule of `SHORTEST_EDGE`."""
    function = lookup(RESIZE, method, "resize method")
    shape = lookup(SHORTEST_EDGE, rounding, "rounding of resize_shortest")
    return on_image(lambda image, rng: function(image, shape((image.shape[0], image.shape[1]), size)))


def resize_keep_ratio(size: int | Sequence[int], method: str = "pil_bicubic", contain: bool = False) -> Transform:
    """timm's ResizeKeepRatio: the image covers `size`, or with `contain` lies within it; sides are rounded."""
    target, function = pair(size), lookup(RESIZE, method, "resize method")

    def apply(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        ratios = [image.shape[axis] / target[axis] for axis in (0, 1)]
        ratio = max(ratios) if contain else min(ratios)
        rows, columns = (max(1, round(side / ratio)) for side in image.shape[:2])
        return function(image, (rows, columns))

    return on_image(apply)


def center_crop(
    size: int | Sequence[int], rule: str = "torchvision", fill: int | Sequence[int] | None = None
) -> Transform:
    """The middle of the image; `rule` of `resize.CENTER_CROP` says where an odd margin goes.

    An image that is smaller is laid on `fill`, a level or one for each channel; without it that is a ValueError.
    """
    lookup(CENTER_CROP, rule, "centre crop rule")
    target = pair(size)

    def apply(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        if fill is not None:
            image = _padded(image, target, fill)
        return crop_center(image, target, rule)

    return on_image(apply)


def _padded(image: np.ndarray, size: Size, fill: int | Sequence[int]) -> np.ndarray:
    """At least of `size`: what is missing comes half before the image and half, if odd the larger one, behind it."""
    rows, columns = (max(0, size[axis] - image.shape[axis]) for axis in (0, 1))
    if not rows and not columns:
        return image
    shape = (image.shape[0] + rows, image.shape[1] + columns, image.shape[2])
    canvas = np.empty(shape, image.dtype)
    canvas[...] = np.asarray(fill, image.dtype)
    top, left = rows // 2, columns // 2
    canvas[top : top + image.shape[0], left : left + image.shape[1]] = image
    return canvas


def random_crop(size: int | Sequence[int]) -> Transform:
    """A crop of `size` at a uniform place; ValueError where the image is smaller."""
    rows, columns = pair(size)

    def apply(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        if image.shape[0] < rows or image.shape[1] < columns:
            raise ValueError(f"random_crop: image {image.shape[:2]} is smaller than the crop {(rows, columns)}")
        top, left = rng.integers(image.shape[0] - rows + 1), rng.integers(image.shape[1] - columns + 1)
        return image[top : top + rows, left : left + columns]

    return on_image(apply)


def random_resized_crop(
    size: int | Sequence[int],
    scale: Range = (0.08, 1.0),
    ratio: Range = (3 / 4, 4 / 3),
    method: str = "pil_bicubic",
) -> Transform:
    """torchvision's RandomResizedCrop: area uniform in `scale`, aspect (columns / rows) log-uniform in `ratio`."""
    target, function = pair(size), lookup(RESIZE, method, "resize method")

    def apply(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        top, left, rows, columns = sample_resized_crop(image.shape[:2], scale, ratio, rng)
        return function(image[top : top + rows, left : left + columns], target)

    return on_image(apply)


def sample_resized_crop(shape: Size, scale: Range, ratio: Range, rng: np.random.Generator) -> tuple[int, int, int, int]:
    """(top, left, rows, columns) as torchvision draws it: ten tries, then the central crop nearest to `ratio`."""
    height, width = shape
    for _ in range(10):
        area = height * width * rng.uniform(*scale)
        aspect = math.exp(rng.uniform(math.log(ratio[0]), math.log(ratio[1])))
        columns, rows = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < columns <= width and 0 < rows <= height:
            return int(rng.integers(height - rows + 1)), int(rng.integers(width - columns + 1)), rows, columns
    columns = min(width, round(height * ratio[1]))
    rows = min(height, round(width / ratio[0]))
    return (height - rows) // 2, (width - columns) // 2, rows, columns


def inception_crop(
    size: int | Sequence[int],
    area: Range = (0.05, 1.0),
    ratio: Range = (0.75, 1.33),
    method: str = "bv_bilinear",
) -> Transform:
    """TensorFlow's distorted bounding box, then a resize: the training crop of big_vision and vision_transformer."""
    target, function = pair(size), lookup(RESIZE, method, "resize method")

    def apply(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        top, left, rows, columns = sample_inception_crop(image.shape[:2], area, ratio, rng)
        return function(image[top : top + rows, left : left + columns], target)

    return on_image(apply)


def sample_inception_crop(
    shape: Size, area: Range, ratio: Range, rng: np.random.Generator
) -> tuple[int, int, int, int]:
    """(top, left, rows, columns) as tf.image.sample_distorted_bounding_box draws it: 100 tries, then the whole image.

    Uniform in aspect ratio and in height, not in area; the last possible offset is never drawn. Both are TensorFlow's.
    Source: tensorflow/core/kernels/image/sample_distorted_bounding_box_op.cc GenerateRandomCrop.
    """
    height, width = shape
    smallest, largest = area[0] * height * width, area[1] * height * width
    for _ in range(100):
        aspect = rng.uniform(*ratio)
        upper = round(math.sqrt(largest / aspect))
        if round(upper * aspect) > width:
            upper = int((width + 0.5 - 1e-7) / aspect)
            upper -= round(upper * aspect) > width
        upper = min(upper, height)
        rows = int(rng.integers(min(round(math.sqrt(smallest / aspect)), upper), upper + 1))
        rows += rows * round(rows * aspect) < smallest
        rows -= rows * round(rows * aspect) > largest
        columns = round(rows * aspect)
        if smallest <= rows * columns <= largest and 0 < rows <= height and 0 < columns <= width:
            top = int(rng.integers(height - rows)) if rows < height else 0
            left = int(rng.integers(width - columns)) if columns < width else 0
            return top, left, rows, columns
    return 0, 0, height, width


def flip(probability: float = 0.5) -> Transform:
    """Mirrors left and right."""
    return sometimes(probability, lambda image, rng: image[:, ::-1])


def random_shift(pixels: int, fill: int = 0) -> Transform:
    """Moves the image by up to `pixels` along each axis, uniformly; the gap is filled with `fill`."""

    def apply(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        padded = np.pad(image, ((pixels, pixels), (pixels, pixels), (0, 0)), constant_values=fill)
        top, left = rng.integers(2 * pixels + 1, size=2)
        return padded[top : top + image.shape[0], left : left + image.shape[1]]

    return on_image(apply)


def random_affine(
    degrees: float = 0.0,
    translate: float = 0.0,
    scale: Range = (1.0, 1.0),
    shear: float = 0.0,
    fill: int = 0,
) -> Transform:
    """Rotates, shears (degrees, both up to +-), scales and moves (up to +- a fraction of the side) about the centre.

    The map is torchvision's RandomAffine with bilinear sampling, but moves are not rounded to whole pixels: on
    an 8x8 digit that would leave none.
    """

    def apply(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        angle, slant = rng.uniform(-degrees, degrees), rng.uniform(-shear, shear)
        rows, columns = image.shape[:2]
        move = (rng.uniform(-translate, translate) * columns, rng.uniform(-translate, translate) * rows)
        return affine(image, angle, move, rng.uniform(*scale), slant, fill)

    return on_image(apply)


def affine(image: np.ndarray, degrees: float, move: Range, scale: float, shear: float, fill: int = 0) -> np.ndarray:
    """torchvision's affine: out = centre + move + R(degrees) Shear(shear) scale (in - centre), bilinear.

    `move` is (columns, rows) in pixels; positive degrees turn clockwise as one looks at the image.
    """
    angle, slant = math.radians(degrees), math.radians(shear)
    rotation = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    inverse = np.linalg.inv(scale * rotation @ np.array([[1, -math.tan(slant)], [0, 1]]))
    centre = np.array([image.shape[1] / 2, image.shape[0] / 2])
    offset = centre - inverse @ (centre + np.asarray(move))
    coefficients = (*inverse[0], offset[0], *inverse[1], offset[1])
    picture = to_pil(image)
    filling = fill if image.shape[2] == 1 else (fill,) * image.shape[2]
    return from_pil(
        picture.transform(
            picture.size, Image.Transform.AFFINE, coefficients, Image.Resampling.BILINEAR, fillcolor=filling
        )
    )


def value_range(low: float = -1.0, high: float = 1.0) -> Transform:
    """uint8 or float in [0, 255] -> float32 in [low, high] (big_vision's value_range)."""
    return on_image(lambda image, rng: image.astype(np.float32) / 255 * np.float32(high - low) + np.float32(low))


def normalize(mean: Sequence[float], std: Sequence[float]) -> Transform:
    """uint8 or float in [0, 255] -> float32 (image / 255 - mean) / std, per channel."""
    shift, width = np.asarray(mean, np.float32), np.asarray(std, np.float32)

    def apply(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        if image.shape[-1] != len(shift):
            raise ValueError(f"normalize: image has {image.shape[-1]} channels, mean and std have {len(shift)}")
        return (image.astype(np.float32) / 255 - shift) / width

    return on_image(apply)


def one_hot(num_classes: int, key: str = "label") -> Transform:
    """An int label -> float32 [num_classes]; several labels give several ones. ValueError for one out of range."""

    def apply(example: Example, rng: np.random.Generator) -> Example:
        label = np.asarray(example[key])
        if label.size and not 0 <= label.min() <= label.max() < num_classes:
            name = example.get("name", "an example")
            raise ValueError(f"one_hot: {key} of {name} is {label}, expected 0 to {num_classes - 1}")
        target = np.zeros(num_classes, np.float32)
        target[label] = 1
        return {**example, key: target}

    return apply


def keep(keys: Sequence[str]) -> Transform:
    """Drops every field of the example but these."""

    def apply(example: Example, rng: np.random.Generator) -> Example:
        missing = [key for key in keys if key not in example]
        if missing:
            raise ValueError(f"keep: no field {missing} in an example with {sorted(example)}")
        return {key: example[key] for key in keys}

    return apply
