"""Preprocessing written in a config."""

import ml_collections
import numpy as np
import pytest
from omnax.data.images.decode import encode_png
from omnax.data.preprocess import TRANSFORMS, build

PHOTO = np.random.default_rng(0).integers(0, 256, (12, 17, 3), np.uint8)


def test_config_to_transform():
    config = ml_collections.ConfigDict(
        {
            "preprocess": [
                "decode",
                ("random_resized_crop", {"size": 8, "scale": (0.5, 1.0)}),
                "flip",
                ["color_jitter", {"brightness": 0.4}],
                "value_range",
                ("keep", {"keys": ["image"]}),
            ]
        }
    )
    config.lock()
    transform = build(config.preprocess)
    example = {"image": encode_png(PHOTO), "label": 3}
    first, again, other = (transform(example, np.random.default_rng(seed)) for seed in (0, 0, 1))
    assert first.keys() == {"image"}
    assert first["image"].shape == (8, 8, 3)
    np.testing.assert_array_equal(first["image"], again["image"])
    assert not np.array_equal(first["image"], other["image"])


def test_all_transforms_share_one_generator_in_order():
    transform = build(["flip", ("random_crop", {"size": 4})])
    rng, expected = np.random.default_rng(9), np.random.default_rng(9)
    image = PHOTO[:, ::-1] if expected.random() < 0.5 else PHOTO
    top, left = expected.integers(9), expected.integers(14)
    result = transform({"image": PHOTO}, rng)["image"]
    np.testing.assert_array_equal(result, image[top : top + 4, left : left + 4])


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (["decode", "flipp"], r"unknown transform in preprocess\[1\] 'flipp', did you mean 'flip'"),
        ([("resize", {"sise": 3})], r"unknown argument of resize in preprocess\[0\] 'sise', did you mean 'size'"),
        (["resize"], r"preprocess\[0\]: resize needs size"),
        ([("resize", {"size": 3}, 4)], r"preprocess\[0\]: expected a name or \(name, arguments\), got \('resize'"),
        ([("flip", 0.5)], r"preprocess\[0\]: expected a name or \(name, arguments\)"),
        ([7], r"preprocess\[0\]: expected a name or \(name, arguments\), got 7"),
        ([("flip", {"probability": 2})], r"probability must lie in \[0, 1\], got 2"),
    ],
)
def test_mistakes_are_named(spec, message):
    with pytest.raises(ValueError, match=message):
        build(spec)


def test_every_name_is_that_of_its_constructor():
    assert all(constructor.__name__ == name and constructor.__doc__ for name, constructor in TRANSFORMS.items())
