"""RandAugment's operations against what big_vision's code gives under TensorFlow (references/tensorflow_goldens.py)."""

from pathlib import Path

import numpy as np
import pytest
from omnax.data.images import randaugment

GOLDENS = dict(np.load(Path(__file__).with_name("tensorflow.npz")))
IMAGE = GOLDENS["input/randaugment"]
MAGNITUDES = (0, 7, 10, 15, 20)


class Positive:
    """Draws the plus sign."""

    def random(self):
        return 0.0


@pytest.mark.parametrize("name", [name for name in randaugment.OPERATIONS if name != "Cutout"])
def test_operations_are_big_visions(name):
    for magnitude in MAGNITUDES:
        ours = randaugment.OPERATIONS[name](IMAGE, magnitude / 10, Positive())
        difference = np.abs(ours.astype(int) - GOLDENS[f"{name}/{magnitude}"])
        if name == "Sharpness":  # TensorFlow sums the nine products in another order before it truncates
            assert difference.max() <= 1
            assert (difference > 0).mean() < 0.005
        else:
            np.testing.assert_array_equal(difference, 0)


@pytest.mark.parametrize("key", [key for key in GOLDENS if key.startswith(("rotate", "shear", "translate"))])
def test_geometry_is_big_visions(key):
    name, amount = key.split("/")[0], float(key.split("/")[1])
    ours = {
        "rotate": lambda: randaugment.rotate(IMAGE, amount),
        "shear_x": lambda: randaugment.transform(IMAGE, (1, amount, 0, 0, 1, 0)),
        "shear_y": lambda: randaugment.transform(IMAGE, (1, 0, 0, amount, 1, 0)),
        "translate_x": lambda: randaugment.transform(IMAGE, (1, 0, amount, 0, 1, 0)),
        "translate_y": lambda: randaugment.transform(IMAGE, (1, 0, 0, 0, 1, amount)),
    }[name]()
    np.testing.assert_array_equal(ours, GOLDENS[key])


def test_translation_reads_from_the_right_and_fills_with_grey():
    moved = randaugment.transform(IMAGE, (1, 0, 3, 0, 1, 0))
    np.testing.assert_array_equal(moved[:, :-3], IMAGE[:, 3:])
    np.testing.assert_array_equal(moved[:, -3:], 128)


def test_quirks():
    # the threshold 256 m / 10 wraps at 256, and posterize keeps at least one bit
    np.testing.assert_array_equal(randaugment.OPERATIONS["Solarize"](IMAGE, 1.0, Positive()), 255 - IMAGE)
    np.testing.assert_array_equal(randaugment.OPERATIONS["Posterize"](IMAGE, 0.0, Positive()), IMAGE // 128 * 128)
    # contrast 0.1 of a 224 x 224 image: 196 = 50176 / 256 instead of the mean, 196 + 0.1 (10 - 196) = 177.4
    flat = np.full((224, 224, 3), 10, np.uint8)
    np.testing.assert_array_equal(randaugment.OPERATIONS["Contrast"](flat, 0.0, Positive()), 177)


def test_cutout():
    rng = np.random.default_rng(1)
    row, column = rng.integers(19), rng.integers(24)
    ours = randaugment.OPERATIONS["Cutout"](IMAGE, 0.1, np.random.default_rng(1))  # half size int(4.0)
    y, x = np.mgrid[:19, :24]
    inside = (y >= row - 4) & (y < row + 4) & (x >= column - 4) & (x < column + 4)
    np.testing.assert_array_equal(ours, np.where(inside[..., None], 128, IMAGE))


def test_layers_are_drawn_uniformly_with_replacement(monkeypatch):
    drawn = []
    recorders = {
        name: lambda image, level, rng, name=name: (drawn.append((name, level)), image)[1]
        for name in randaugment.OPERATIONS
    }
    monkeypatch.setattr(randaugment, "OPERATIONS", recorders)
    rng = np.random.default_rng(0)
    for _ in range(800):
        randaugment.randaugment(layers=2, magnitude=15)({"image": IMAGE}, rng)
    names, counts = np.unique([name for name, _ in drawn], return_counts=True)
    assert len(names) == 16
    assert {level for _, level in drawn} == {1.5}
    assert np.abs(counts - 100).max() < 4 * np.sqrt(100)


def test_wrong_arguments():
    with pytest.raises(ValueError, match="0 <= magnitude <= 22, got 2 and 30"):
        randaugment.randaugment(magnitude=30)
    with pytest.raises(ValueError, match=r"expected a uint8 image \[X, Y, 3\], got float32"):
        randaugment.randaugment()({"image": IMAGE.astype(np.float32)}, np.random.default_rng(0))
