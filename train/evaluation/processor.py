"""The preprocessing that a run was evaluated with, as the published processor that is written beside its weights."""

import inspect
from typing import Any

import numpy as np

from ...data import preprocess
from ...hub.processor import ImageProcessor, Step
from ..inputs import Steps, normalization

_GEOMETRY = ("resize", "resize_shortest", "resize_keep_ratio", "center_crop")
_PIXELS = ("value_range", "normalize")
_OTHER = ("decode", "keep", "one_hot")  # what comes in and what is handed on
TOLERANCE = 1e-5  # of pixels after normalisation: the same numbers in another order of float32 operations


def processor_of(steps: Steps, size: tuple[int, int], channels: int) -> ImageProcessor:
    """The processor that does what a list of transforms does to images, for a model of `size`.

    ValueError naming the step for a list that no published processor does, also where one odd image shows it.
    """
    entries = [(step, {}) if isinstance(step, str) else step for step in steps]
    names = [name for name, _ in entries]
    order = [name for name in names if name in (*_GEOMETRY, *_PIXELS)]
    unknown = [name for name in names if name not in (*_GEOMETRY, *_PIXELS, *_OTHER)]
    if unknown or len(set(order)) < len(order) or order != sorted(order, key=(*_GEOMETRY, *_PIXELS).index):
        raise ValueError(f"no published processor does this preprocessing of evaluation: {(unknown or order)}")
    found = {name: _arguments(name, given) for name, given in entries}
    mean, std = normalization(steps, channels)
    settings: dict[str, Any] = {"crop": size, "mean": mean, "std": std}
    settings |= {"alpha": found["decode"]["alpha"]} if "decode" in found else {}
    if "center_crop" in found:
        settings["crop_rule"] = found["center_crop"]["rule"]
    if shortest := found.get("resize_shortest"):
        settings |= {"shortest_edge": shortest["size"], "method": shortest["method"], "rounding": shortest["rounding"]}
    elif keep := found.get("resize_keep_ratio"):
        settings |= {"fit": "contain" if keep["contain"] else "cover", "edges": _pair(keep["size"])}
        settings |= {"method": keep["method"]}
    elif resize := found.get("resize"):
        edges = _pair(resize["size"])
        settings |= {"method": resize["method"], "edges": None if edges == size else edges}
    elif "center_crop" in found:
        settings["fit"] = "none"
    processor = ImageProcessor(**settings)
    _compare([entry for entry in entries if entry[0] in order], processor, channels)
    return processor


def _arguments(name: str, given: dict[str, Any]) -> dict[str, Any]:
    bound = inspect.signature(preprocess.TRANSFORMS[name]).bind(**given)
    bound.apply_defaults()
    return bound.arguments


def _pair(size: Any) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def _compare(evaluated: list[Step], processor: ImageProcessor, channels: int) -> None:
    """ValueError where an image with odd sides comes out differently; without a resize, one of the model's size."""
    rows, columns = processor.crop
    resized = any(name in _GEOMETRY for name, _ in evaluated)
    shape = (2 * rows + 13, rows + columns + 6, channels) if resized else (rows, columns, channels)
    image = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    ours, written = (
        preprocess.build(steps)({"image": image}, np.random.default_rng(0))["image"]
        for steps in (evaluated, processor.steps)
    )
    expected = (rows, columns, channels)
    if ours.shape != expected or written.shape != expected:
        raise ValueError(f"evaluation gives images of {ours.shape}, the processor {written.shape}, expected {expected}")
    difference = float(np.abs(ours.astype(np.float32) - written).max())
    scale = max(1.0, float(np.abs(ours).max()))
    if difference > TOLERANCE * scale:
        raise ValueError(f"the processor differs from the preprocessing of evaluation by {difference:.2g}: {evaluated}")
