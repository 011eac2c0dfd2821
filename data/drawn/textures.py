"""Procedural textures as a TFDS data set: 32x32 colour images whose class is a pattern, whatever its colours.

4000 train and 1000 test images of ten classes, made from a fixed seed. Raw pixels tell little about the class (a 20
nearest-neighbour vote finds 0.41 of them), so that what a self-supervised network learns is visible within minutes.
"""

import io
from collections.abc import Iterator

import numpy as np
import tensorflow_datasets as tfds

from ..images.decode import encode_png

SIDE = 32
CLASSES = (
    "horizontal",
    "vertical",
    "checker",
    "dots",
    "diagonal",
    "grid",
    "rings",
    "blocks",
    "noise",
    "waves",
)


def pattern(label: int, rng: np.random.Generator) -> np.ndarray:
    """A random pattern of the class: the share of foreground colour [32, 32] in [0, 1]."""
    y, x = np.mgrid[:SIDE, :SIDE].astype(np.float64)
    frequency = 2 * np.pi / rng.uniform(5, 8)
    phase_y, phase_x = rng.uniform(0, 2 * np.pi, 2)
    wave_y, wave_x = frequency * y + phase_y, frequency * x + phase_x
    rows, columns = np.sin(wave_y) > 0, np.sin(wave_x) > 0
    if label == 6:
        centre = rng.uniform(0, SIDE, 2)
        return np.sin(frequency * np.hypot(y - centre[0], x - centre[1]) + phase_y) > 0
    if label == 7:
        return np.kron(rng.random((SIDE // 4, SIDE // 4)) > 0.5, np.ones((4, 4)))
    if label == 8:
        return rng.random((SIDE, SIDE)) > 0.5
    return {
        0: rows,
        1: columns,
        2: rows ^ columns,
        3: np.cos(wave_x) + np.cos(wave_y) > 0.9,
        4: np.sin(frequency * (x + y) / np.sqrt(2) + phase_x) > 0,
        5: (np.cos(wave_x) > 0.6) | (np.cos(wave_y) > 0.6),
        9: np.sin(wave_x + 2 * np.sin(wave_y)) > 0,
    }[label]


def texture(label: int, rng: np.random.Generator) -> np.ndarray:
    """A uint8 image [32, 32, 3] of the class, in two random colours that differ by 0.25 on average, with noise."""
    share = np.asarray(pattern(label, rng), np.float64)[..., None]
    while True:
        front, back = rng.random((2, 3))
        if abs(front.mean() - back.mean()) >= 0.25:
            break
    image = back + share * (front - back) + rng.normal(0, 0.08, (SIDE, SIDE, 3))
    return np.rint(np.clip(image, 0, 1) * 255).astype(np.uint8)


class Textures(tfds.core.GeneratorBasedBuilder):
    """TFDS builder; `sources.source` prepares and opens it under the name "textures"."""

    VERSION = tfds.core.Version("1.0.0")
    code_path = None  # as in digits.py

    def _info(self) -> tfds.core.DatasetInfo:
        features = tfds.features.FeaturesDict(
            {
                "image": tfds.features.Image(shape=(SIDE, SIDE, 3), encoding_format="png"),
                "label": tfds.features.ClassLabel(names=list(CLASSES)),
            }
        )
        return tfds.core.DatasetInfo(
            builder=self,
            features=features,
            supervised_keys=("image", "label"),
            homepage="https://arxiv.org/abs/2304.07193",
            description="Procedural 32x32 textures of ten classes, made from a fixed seed.",
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Iterator]:
        return {"train": self._generate_examples(0, 4000), "test": self._generate_examples(1, 1000)}

    def _generate_examples(self, split: int, count: int) -> Iterator:
        for index in range(count):
            label = index % len(CLASSES)
            image = texture(label, np.random.default_rng((split, index)))
            yield index, {"image": io.BytesIO(encode_png(image)), "label": label}
