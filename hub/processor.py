"""The published preprocessing of images as data: which size, which resize rule, which colours.

The pixel functions live in data/: `data.preprocess.build(processor.steps)` makes the transform.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

# PIL's filter numbers, as `preprocessor_config.json` has them, and timm's names -> rules of data/images/resize.py.
_FILTERS = {0: "pil_nearest", 1: "pil_lanczos", 2: "pil_bilinear", 3: "pil_bicubic"}
Step = tuple[str, dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class ImageProcessor:
    """Resize, crop, normalise: (pixels / 255 - mean) / std."""

    crop: tuple[int, int]  # rows, columns that the model sees
    # Length of the shorter side before the centre crop; None: resized to `crop` at once, whatever the aspect ratio.
    shortest_edge: int | None = None
    method: str = "pil_bilinear"  # of data/images/resize.py RESIZE
    rounding: str = "torchvision"  # of data/images/resize.py SHORTEST_EDGE
    crop_rule: str = "torchvision"  # of data/images/resize.py CENTER_CROP
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    std: tuple[float, ...] = (0.5, 0.5, 0.5)

    @property
    def steps(self) -> list[Step]:
        """From a uint8 image [X, Y, C] to what the model takes, in the language of `data.preprocess`."""
        if self.shortest_edge is None:
            geometry: list[Step] = [("resize", {"size": self.crop, "method": self.method})]
        else:
            resize = {"size": self.shortest_edge, "method": self.method, "rounding": self.rounding}
            geometry = [("resize_shortest", resize), ("center_crop", {"size": self.crop, "rule": self.crop_rule})]
        return [*geometry, ("normalize", {"mean": self.mean, "std": self.std})]

    def resized(self, size: tuple[int, int]) -> "ImageProcessor":
        """For images of another size: the margin of the crop keeps its proportion; none beside a non-square crop."""
        edge = self.shortest_edge
        if edge is not None:
            edge = math.floor(edge * size[0] / self.crop[0]) if size[0] == size[1] else None
        return dataclasses.replace(self, crop=size, shortest_edge=edge)


def from_transformers(config: Mapping[str, Any], image_size: tuple[int, int]) -> ImageProcessor:
    """Reads a `preprocessor_config.json`; missing entries are ViTImageProcessor's defaults."""
    size = config.get("size", image_size)
    shortest_edge = size.get("shortest_edge") if isinstance(size, Mapping) else None
    crop = config["crop_size"] if shortest_edge and config.get("do_center_crop", True) else size
    scale = 255 * config.get("rescale_factor", 1 / 255) if config.get("do_rescale", True) else 255.0
    mean, std = (0.0,) * 3, (1.0,) * 3
    if config.get("do_normalize", True):
        mean, std = (tuple(config.get(key, (0.5, 0.5, 0.5))) for key in ("image_mean", "image_std"))
    resample = config.get("resample", 2)
    if resample not in _FILTERS:
        raise ValueError(f"preprocessor_config.json: resample is {resample!r}, expected one of {sorted(_FILTERS)}")
    return ImageProcessor(
        crop=_pair(crop),
        shortest_edge=shortest_edge,
        method=_FILTERS[resample],
        crop_rule="floor",
        mean=tuple(value / scale for value in mean),
        std=tuple(value / scale for value in std),
    )


def _pair(size: Any) -> tuple[int, int]:
    if isinstance(size, Mapping):
        size = (size["height"], size["width"])
    return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))


def to_transformers(processor: ImageProcessor) -> dict[str, Any] | None:
    """The `preprocessor_config.json`; None where transformers has no such resize (TensorFlow's)."""
    filters = {name: number for number, name in _FILTERS.items()}
    if processor.method not in filters:
        return None
    crop = {"height": processor.crop[0], "width": processor.crop[1]}
    geometry: dict[str, Any] = {"image_processor_type": "ViTImageProcessor", "size": crop}
    if processor.shortest_edge is not None:
        size = {"shortest_edge": processor.shortest_edge}
        geometry = {"image_processor_type": "CLIPImageProcessor", "size": size, "do_center_crop": True}
        geometry |= {"crop_size": crop, "do_convert_rgb": True}
    return geometry | {
        "do_resize": True,
        "resample": filters[processor.method],
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(processor.mean),
        "image_std": list(processor.std),
    }


def from_timm(config: Mapping[str, Any], image_size: tuple[int, int]) -> ImageProcessor:
    """Reads a timm `pretrained_cfg`; missing entries are those of the AugReg weights."""
    square = image_size[0] == image_size[1]
    crop_pct = config.get("crop_pct", 0.9 if image_size == (224, 224) else 1.0)
    centred = config.get("crop_mode", "center") == "center" and square
    return ImageProcessor(
        crop=image_size,
        shortest_edge=math.floor(image_size[0] / crop_pct) if centred else None,
        method=f"pil_{config.get('interpolation', 'bicubic')}",
        mean=tuple(config.get("mean", (0.5, 0.5, 0.5))),
        std=tuple(config.get("std", (0.5, 0.5, 0.5))),
    )


def to_timm(processor: ImageProcessor, published: Mapping[str, Any]) -> dict[str, Any]:
    """The preprocessing of a timm `pretrained_cfg`; `published` is the one it came from, if any.

    Resize rules that timm lacks become its bicubic one.
    """
    side, edge = processor.crop[0], processor.shortest_edge or processor.crop[0]
    # timm rounds down to the edge; the published fraction stays if it still leads there.
    choices = (published.get("crop_pct"), side / edge, side / (edge + 0.5))
    return dict(published) | {
        "input_size": [len(processor.mean), *processor.crop],
        "interpolation": processor.method.removeprefix("pil_") if processor.method.startswith("pil_") else "bicubic",
        "crop_pct": next(choice for choice in choices if choice and math.floor(side / choice) == edge),
        "crop_mode": "center" if processor.shortest_edge else "squash",
        "mean": list(processor.mean),
        "std": list(processor.std),
    }


def from_google(image_size: tuple[int, int], resize_directly: bool) -> ImageProcessor:
    """Of .npz files: vision_transformer's evaluation (whole image to size), or big_vision's (256 : 224, then crop)."""
    if resize_directly or image_size[0] != image_size[1]:
        return ImageProcessor(crop=image_size, method="tf_bilinear")
    edge = round(image_size[0] * 256 / 224)
    return ImageProcessor(image_size, edge, method="bv_area", rounding="big_vision", crop_rule="floor")
