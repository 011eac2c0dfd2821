"""Preprocessing written in a config: a list of transform names, or of (name, arguments) where there are arguments.

config.preprocess = ["decode", ("random_resized_crop", {"size": 224}), "flip", ("value_range", {"low": 0.0})]
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from .images import color, edges, randaugment, transforms
from .images.transforms import Example, Transform
from .lookup import lookup, unknown

TRANSFORMS: dict[str, Callable[..., Transform]] = {
    constructor.__name__: constructor
    for constructor in (
        transforms.decode,
        transforms.resize,
        transforms.resize_shortest,
        transforms.resize_keep_ratio,
        transforms.center_crop,
        transforms.random_crop,
        transforms.random_resized_crop,
        transforms.inception_crop,
        transforms.flip,
        transforms.random_shift,
        transforms.random_affine,
        color.color_jitter,
        color.grayscale,
        color.blur,
        color.pil_blur,
        color.solarize,
        color.invert,
        randaugment.randaugment,
        edges.canny,
        transforms.value_range,
        transforms.normalize,
        transforms.one_hot,
        transforms.keep,
    )
}


def build(spec: Sequence[str | tuple[str, Mapping[str, Any]]]) -> Transform:
    """The transforms of `spec`, one after the other, as one transform.

    All draw from the same generator, in order. An entry that is no name or (name, arguments), an unknown name and
    unknown or missing arguments are ValueErrors that say where in the list they stand.
    """
    steps = [_construct(entry, f"preprocess[{i}]") for i, entry in enumerate(spec)]

    def apply(example: Example, rng: np.random.Generator) -> Example:
        for step in steps:
            example = step(example, rng)
        return example

    return apply


def alike(transform: Transform, pictures: Sequence[str]) -> Transform:
    """The transform of "image" on further pictures of an example, each with the same random numbers.

    So a picture that belongs to the image pixel by pixel is cropped and turned as it is. Other fields are the image's.
    """

    def apply(example: Example, rng: np.random.Generator) -> Example:
        seed = int(rng.integers(2**63))
        done = {
            name: transform({**example, "image": example[name]}, np.random.default_rng(seed))["image"]
            for name in pictures
        }
        rest = {key: value for key, value in example.items() if key not in pictures}
        return {**transform(rest, np.random.default_rng(seed)), **done}

    return apply


def _construct(entry: str | tuple[str, Mapping[str, Any]], where: str) -> Transform:
    if isinstance(entry, str):
        entry = (entry, {})
    if not isinstance(entry, Sequence) or len(entry) != 2 or not isinstance(entry[1], Mapping):
        raise ValueError(f"{where}: expected a name or (name, arguments), got {entry!r}")
    name, arguments = entry
    constructor = lookup(TRANSFORMS, name, f"transform in {where}")
    parameters = inspect.signature(constructor).parameters
    for argument in arguments:
        if argument not in parameters:
            raise ValueError(unknown(f"argument of {name} in {where}", argument, parameters))
    missing = [p.name for p in parameters.values() if p.default is p.empty and p.name not in arguments]
    if missing:
        raise ValueError(f"{where}: {name} needs {', '.join(missing)}")
    return constructor(**arguments)
