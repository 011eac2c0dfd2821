"""Drawn shapes with outlines as a TFDS data set: 16x16 pictures of "red disc on gray", Fill50K in small.

An example is a picture, its caption, the outline of its shape ("condition"), its area ("mask"), and another picture of
a shape in the same colour ("prompt"), of which the form, place and ground differ. The label is the colour's number.
8 colours x 3 shapes x 4 grounds; examples of training and test are drawn from different random numbers.
"""

import io
from collections.abc import Iterator

import numpy as np
import tensorflow_datasets as tfds
from scipy import ndimage

from ..images.decode import encode_png

COLORS = {
    "red": (230, 30, 30),
    "green": (30, 200, 30),
    "blue": (40, 60, 235),
    "yellow": (240, 220, 30),
    "cyan": (30, 220, 220),
    "magenta": (220, 40, 220),
    "white": (245, 245, 245),
    "orange": (250, 130, 20),
}
GROUNDS = {"black": (10, 10, 10), "gray": (90, 90, 90), "brown": (60, 30, 10), "navy": (15, 50, 60)}
SHAPES = ("disc", "square", "triangle")
SIDE = 16
RADIUS = (2.6, 5.5)
EXAMPLES = {"train": 4096, "test": 256}


def draw(color: str, shape: str, ground: str, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """A picture uint8 [16, 16, 3] and the area of its shape, bool [16, 16], of random size and place within it."""
    radius = rng.uniform(*RADIUS)
    center = rng.uniform(radius, SIDE - 1 - radius, 2)
    y, x = np.mgrid[:SIDE, :SIDE] - center[:, None, None]
    inside = {
        "disc": x**2 + y**2 <= radius**2,
        "square": np.maximum(abs(x), abs(y)) <= 0.85 * radius,
        "triangle": (y <= 0.8 * radius) & (2 * abs(x) <= y + radius),
    }[shape]
    return np.where(inside[..., None], COLORS[color], GROUNDS[ground]).astype(np.uint8), inside


def outline(inside: np.ndarray) -> np.ndarray:
    """The pixels of an area that touch the ground, uint8 [X, Y, 3]: 255 on the outline, else 0."""
    edge = inside & ndimage.binary_dilation(~inside, np.ones((3, 3)))
    return np.repeat(np.where(edge, 255, 0).astype(np.uint8)[..., None], 3, -1)


class ControlShapes(tfds.core.GeneratorBasedBuilder):
    """TFDS builder; `sources.source` prepares and opens it under the name "control_shapes"."""

    VERSION = tfds.core.Version("1.0.0")
    code_path = None  # there are no checksum files beside the code; finding it fails for editable namespace packages

    def _info(self) -> tfds.core.DatasetInfo:
        picture, area = ((SIDE, SIDE, channels) for channels in (3, 1))
        features = tfds.features.FeaturesDict(
            {
                **{
                    name: tfds.features.Image(shape=picture, encoding_format="png")
                    for name in ("image", "condition", "prompt")
                },
                "mask": tfds.features.Image(shape=area, encoding_format="png"),
                "caption": tfds.features.Text(),
                "label": tfds.features.ClassLabel(names=list(COLORS)),
            }
        )
        return tfds.core.DatasetInfo(
            builder=self,
            features=features,
            description="Drawn shapes with captions, outlines, areas and image prompts of the same colour.",
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Iterator]:
        return {split: self._generate_examples(seed, count) for seed, (split, count) in enumerate(EXAMPLES.items())}

    def _generate_examples(self, seed: int, count: int) -> Iterator:
        for number in range(count):
            rng = np.random.default_rng((seed, number))
            color, shape, ground, other_shape, other_ground = (
                str(rng.choice(names)) for names in (list(COLORS), SHAPES, list(GROUNDS), SHAPES, list(GROUNDS))
            )
            image, inside = draw(color, shape, ground, rng)
            prompt, _ = draw(color, other_shape, other_ground, rng)
            mask = np.where(inside, 255, 0).astype(np.uint8)[..., None]
            pictures = {"image": image, "condition": outline(inside), "prompt": prompt, "mask": mask}
            # without TensorFlow, TFDS takes encoded images only, and only from a file object
            encoded = {name: io.BytesIO(encode_png(pixels)) for name, pixels in pictures.items()}
            yield number, {**encoded, "caption": f"{color} {shape} on {ground}", "label": list(COLORS).index(color)}
