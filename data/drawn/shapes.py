"""Drawn shapes with captions as a TFDS data set: 32x32 pictures of "a red circle in the upper left" and the like.

8 colours x 4 shapes x 4 quadrants make 128 captions. Those of 16 combinations are held out whole as the test split, in
which every colour, shape and quadrant has been seen in training, but never together.
"""

import io
import itertools
from collections.abc import Iterator

import numpy as np
import tensorflow_datasets as tfds

from ..images.decode import encode_png

COLORS = {
    "red": (220, 40, 40),
    "green": (40, 190, 60),
    "blue": (50, 80, 230),
    "yellow": (235, 215, 50),
    "purple": (150, 50, 200),
    "orange": (245, 140, 30),
    "cyan": (60, 215, 225),
    "white": (240, 240, 240),
}
SHAPES = ("circle", "square", "triangle", "cross")
QUADRANTS = ("upper left", "upper right", "lower left", "lower right")
COMBINATIONS = tuple(itertools.product(COLORS, SHAPES, QUADRANTS))
CAPTIONS = tuple(f"a {color} {shape} in the {quadrant}" for color, shape, quadrant in COMBINATIONS)
SIDE, PER_CAPTION, HELD_OUT = 32, 64, 16


def held_out(number: int = HELD_OUT) -> frozenset[int]:
    """Which captions are for testing: a fixed choice, spread over colours, shapes and quadrants."""
    return frozenset(np.random.default_rng(7).permutation(len(CAPTIONS))[:number].tolist())


def draw(caption: int, rng: np.random.Generator) -> np.ndarray:
    """A uint8 picture [32, 32, 3] of the combination: jittered by 2 pixels, radius 5 to 7, on a dark noisy ground."""
    color, shape, quadrant = COMBINATIONS[caption]
    corner = QUADRANTS.index(quadrant)
    center = np.array([8 + 16 * (corner // 2), 8 + 16 * (corner % 2)]) + rng.integers(-2, 3, 2)
    radius = rng.integers(5, 8)
    y, x = np.mgrid[:SIDE, :SIDE] - center[:, None, None]
    inside = {
        "circle": x**2 + y**2 <= radius**2,
        "square": np.maximum(abs(x), abs(y)) <= radius - 1,
        "triangle": (y <= radius - 1) & (2 * abs(x) <= y + radius),
        "cross": (np.minimum(abs(x), abs(y)) <= 1) & (np.maximum(abs(x), abs(y)) <= radius),
    }[shape]
    ground = rng.integers(0, 60, 3) + rng.integers(0, 20, (SIDE, SIDE, 3))
    return np.where(inside[..., None], COLORS[color], ground).astype(np.uint8)


class Shapes(tfds.core.GeneratorBasedBuilder):
    """TFDS builder; `sources.source` prepares and opens it under the name "shapes". The label numbers the caption."""

    VERSION = tfds.core.Version("1.0.0")
    code_path = None  # there are no checksum files beside the code; finding it fails for editable namespace packages

    def _info(self) -> tfds.core.DatasetInfo:
        features = tfds.features.FeaturesDict(
            {
                "image": tfds.features.Image(shape=(SIDE, SIDE, 3), encoding_format="png"),
                "caption": tfds.features.Text(),
                "label": tfds.features.ClassLabel(names=list(CAPTIONS)),
            }
        )
        return tfds.core.DatasetInfo(
            builder=self,
            features=features,
            description="Drawn shapes: colour, shape and quadrant of a 32x32 picture, with a caption that names them.",
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Iterator]:
        test = held_out()
        train = [caption for caption in range(len(CAPTIONS)) if caption not in test]
        return {"train": self._generate_examples(train), "test": self._generate_examples(sorted(test))}

    def _generate_examples(self, captions: list[int]) -> Iterator:
        for number, caption in itertools.product(range(PER_CAPTION), captions):
            image = draw(caption, np.random.default_rng((caption, number)))
            # without TensorFlow, TFDS takes encoded images only, and only from a file object
            encoded = io.BytesIO(encode_png(image))
            key = number * len(CAPTIONS) + caption
            yield key, {"image": encoded, "caption": CAPTIONS[caption], "label": caption}
