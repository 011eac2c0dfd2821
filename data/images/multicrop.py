"""Multi-crop: two large and several small views of an image, each with its own augmentation (SwAV, DINO, DINOv2).

Sources: facebookresearch/dino:main_dino.py DataAugmentationDINO; dinov2:dinov2/data/augmentations.py, transforms.py.
"""

import dataclasses

import numpy as np

from ...models.ranges import Count, PositiveFraction, Whole
from . import color
from .decode import CorruptExample
from .transforms import Example, Range, Transform, flip, normalize, on_image, random_resized_crop

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
STYLES = ("dino", "dinov2", "textures")
# Probabilities of blur for the first global, the second global and the local crops. The code of DINOv2 passes 1 - p
# where p was meant, and all its released models were trained so (facebookresearch/dinov2#411, dinov3#286).
BLUR_RELEASED, BLUR_PAPER = (0.0, 0.9, 0.5), (1.0, 0.1, 0.5)


@dataclasses.dataclass(frozen=True, kw_only=True)
class CropsConfig:
    """Sizes (pixels), numbers and augmentation of the views."""

    global_size: Count = 224
    local_size: Count = 98
    local_count: Whole = 8
    global_scale: tuple[PositiveFraction, PositiveFraction] = (0.32, 1.0)  # share of the image's area
    local_scale: tuple[PositiveFraction, PositiveFraction] = (0.05, 0.32)
    # "dinov2" and "dino" differ in the blur (9-tap Gaussian, Pillow's); "textures" keeps orientation and scale of the
    # procedural images, whose label they are.
    style: str = "dinov2"
    blur: tuple[float, float, float] = BLUR_RELEASED
    upscale: bool = (
        True  # crops of images smaller than a crop are enlarged, as published; False: such images are errors
    )

    def __post_init__(self) -> None:
        if self.style not in STYLES:
            raise ValueError(f"crops.style is {self.style!r}, expected one of {STYLES}")
        for name in ("global_scale", "local_scale"):
            low, high = getattr(self, name)
            if low > high:
                raise ValueError(f"crops.{name} must be a range, got {(low, high)}")


def multicrop(config: CropsConfig) -> Transform:
    """uint8 "image" [X, Y, 3] -> float32 "global" [2, S, S, 3] and "local" [L, s, s, 3], normalised; the image goes.

    Every crop is drawn from the whole image. Raises CorruptExample (a ValueError; training skips and names such images)
    for an image that is smaller than the larger crop, where the config does not allow to enlarge it.
    """
    views = [
        *(_view(config, config.global_size, config.global_scale, index) for index in (0, 1)),
        *[_view(config, config.local_size, config.local_scale, 2)] * config.local_count,
    ]
    smallest = max(config.global_size, config.local_size if config.local_count else 0)

    def apply(example: Example, rng: np.random.Generator) -> Example:
        shape = example["image"].shape[:2]
        if min(shape) < smallest and not config.upscale:
            name = str(example.get("name", "image"))
            raise CorruptExample(name, f"its size {shape} is smaller than a crop of {smallest} pixels")
        crops = [view({"image": example["image"]}, rng)["image"] for view in views]
        rest = {key: value for key, value in example.items() if key != "image"}
        local = np.stack(crops[2:]) if config.local_count else np.zeros((0, *[config.local_size] * 2, 3), np.float32)
        return {**rest, "global": np.stack(crops[:2]), "local": local}

    return apply


def _view(config: CropsConfig, size: int, scale: Range, index: int) -> Transform:
    """The transform of the first global (0), second global (1) or a local crop (2)."""
    crop = random_resized_crop(size, scale, method="pil_bicubic")
    finish = normalize(IMAGENET_MEAN, IMAGENET_STD)
    if config.style == "textures":
        return _chain(crop, on_image(recolour), finish)
    blur = color.pil_blur if config.style == "dino" else color.blur
    return _chain(
        crop,
        flip(0.5),
        color.color_jitter(0.4, 0.4, 0.2, 0.1, probability=0.8),
        color.grayscale(0.2),
        blur(probability=config.blur[index]),
        *([color.solarize(128, 0.2)] if index == 1 else []),
        finish,
    )


def _chain(*steps: Transform) -> Transform:
    def apply(example: Example, rng: np.random.Generator) -> Example:
        for step in steps:
            example = step(example, rng)
        return example

    return apply


def recolour(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Channels permuted, gain in [0.6, 1.4] and bias in ±0.2 for each; a fifth of the images grey, a fifth inverted."""
    x = image[..., rng.permutation(3)] / np.float32(255)
    x = x * rng.uniform(0.6, 1.4, 3) + rng.uniform(-0.2, 0.2, 3)
    if rng.random() < 0.2:
        x = np.repeat(x.mean(-1, keepdims=True), 3, axis=-1)
    if rng.random() < 0.2:
        x = 1 - x
    return np.rint(np.clip(x, 0, 1) * 255).astype(np.uint8)
