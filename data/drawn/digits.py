"""The handwritten digits of scikit-learn (1797 real 8x8 images, UCI optdigits) as a TFDS data set, without TensorFlow.

TFDS writes array_record files that it also reads back by index. Images are PNG bytes, grey levels 0..16 spread over
0..255; 1437 train and 360 test examples, equal shares of every class in both.

    python -m omnax.data.digits DIR      writes them as files, one folder per split and class
"""

import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import tensorflow_datasets as tfds

from ..images.decode import encode_png

TEST_EXAMPLES = 360


def split_indices(labels: np.ndarray, test_examples: int = TEST_EXAMPLES) -> dict[str, np.ndarray]:
    """Stratified split without a random generator: the test examples are spread evenly over the order by class."""
    by_class = np.argsort(labels, kind="stable")
    test = by_class[np.arange(test_examples) * len(labels) // test_examples]
    return {"train": np.setdiff1d(np.arange(len(labels)), test), "test": np.sort(test)}


def read_digits() -> tuple[np.ndarray, np.ndarray]:
    """All images, uint8 [1797, 8, 8, 1], and labels [1797]."""
    from sklearn.datasets import load_digits  # only needed once, and half a second to import

    pixels, labels = (np.asarray(part) for part in load_digits(return_X_y=True))
    return np.rint(pixels.reshape(-1, 8, 8, 1) * (255 / 16)).astype(np.uint8), labels


def write_folders(directory: Path) -> None:
    """The digits as PNG files `split/class/number.png`: what `sources.ImageFolder` and other programs read."""
    images, labels = read_digits()
    for split, indices in split_indices(labels).items():
        for index in indices:
            file = directory / split / str(labels[index]) / f"{index:04d}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(encode_png(images[index]))


class Digits(tfds.core.GeneratorBasedBuilder):
    """TFDS builder; `sources.source` prepares and opens it under the name "digits"."""

    VERSION = tfds.core.Version("1.0.0")
    code_path = None  # there are no checksum files beside the code; finding it fails for editable namespace packages

    def _info(self) -> tfds.core.DatasetInfo:
        features = tfds.features.FeaturesDict(
            {
                "image": tfds.features.Image(shape=(8, 8, 1), encoding_format="png"),
                "label": tfds.features.ClassLabel(names=[str(digit) for digit in range(10)]),
            }
        )
        return tfds.core.DatasetInfo(
            builder=self,
            features=features,
            supervised_keys=("image", "label"),
            homepage="https://archive.ics.uci.edu/dataset/80/optical+recognition+of+handwritten+digits",
            description="Handwritten digits, 8x8 grey levels, test part of the UCI optdigits collection.",
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Iterator]:
        images, labels = read_digits()
        splits = split_indices(labels)
        return {name: self._generate_examples(images, labels, indices) for name, indices in splits.items()}

    def _generate_examples(self, images: np.ndarray, labels: np.ndarray, indices: np.ndarray) -> Iterator:
        for index in indices:
            # without TensorFlow, TFDS takes encoded images only, and only from a file object
            yield int(index), {"image": io.BytesIO(encode_png(images[index])), "label": int(labels[index])}
