"""Colour transforms against torchvision on Pillow images, and the draws of their constructors."""

import numpy as np
import pytest
from omnax.data.images import color
from PIL import Image

PHOTO = np.random.default_rng(0).integers(0, 256, (12, 17, 3), np.uint8)
PHOTO[:, :8] //= 3


@pytest.fixture(scope="module")
def functional():
    from oracles import torch  # noqa: F401  (makes torchvision importable)

    return pytest.importorskip("torchvision.transforms.functional")


def apply(transform, image, rng):
    return transform({"image": image}, rng)["image"]


@pytest.mark.parametrize("name", ["brightness", "contrast", "saturation", "hue"])
def test_adjustments_are_torchvisions(functional, name):
    for amount in (-0.5, -0.13, 0.0, 0.27, 0.5) if name == "hue" else (0.0, 0.4, 1.0, 1.7):
        expected = getattr(functional, f"adjust_{name}")(Image.fromarray(PHOTO), amount)
        np.testing.assert_array_equal(getattr(color, f"adjust_{name}")(PHOTO, amount), np.asarray(expected))


@pytest.mark.parametrize(("kernel_size", "sigma"), [(9, 0.1), (9, 1.3), (5, 2.0)])
def test_gaussian_blur_is_torchvisions(functional, kernel_size, sigma):
    expected = np.asarray(functional.gaussian_blur(Image.fromarray(PHOTO), [kernel_size] * 2, [sigma] * 2))
    ours = color.gaussian_blur(PHOTO, kernel_size, sigma)
    # torchvision convolves with the 2-D kernel in one go: a value within 1e-5 of a half may round the other way
    assert np.abs(ours.astype(int) - expected).max() <= 1
    assert (ours != expected).mean() < 0.01


def test_gray_and_solarize_are_torchvisions(functional):
    expected = functional.rgb_to_grayscale(Image.fromarray(PHOTO), num_output_channels=3)
    np.testing.assert_array_equal(color.to_gray(PHOTO), np.asarray(expected))
    expected = functional.solarize(Image.fromarray(PHOTO), 128)
    np.testing.assert_array_equal(apply(color.solarize(), PHOTO, np.random.default_rng(0)), np.asarray(expected))
    np.testing.assert_array_equal(apply(color.invert(), PHOTO, np.random.default_rng(0)), 255 - PHOTO)


def test_gray_images_keep_their_channel():
    gray = PHOTO[..., :1]
    for transform in (color.color_jitter(0.4, 0.4, 0.2, 0.1), color.grayscale(), color.blur(), color.solarize()):
        assert apply(transform, gray, np.random.default_rng(0)).shape == gray.shape


def test_color_jitter_applies_in_the_drawn_order():
    transform = color.color_jitter(0.4, 0.3, 0.2, 0.1)
    adjustments = [color.adjust_brightness, color.adjust_contrast, color.adjust_saturation, color.adjust_hue]
    ranges = [(0.6, 1.4), (0.7, 1.3), (0.8, 1.2), (-0.1, 0.1)]
    orders = set()
    for seed in range(20):
        rng, expected = np.random.default_rng(seed), PHOTO
        rng.random()  # applied or not
        order = rng.permutation(4)
        for index in order:
            expected = adjustments[index](expected, rng.uniform(*ranges[index]))
        np.testing.assert_array_equal(apply(transform, PHOTO, np.random.default_rng(seed)), expected)
        orders.add(tuple(order))
    assert len(orders) > 10


def test_probabilities():
    rng = np.random.default_rng(0)
    changed = [not np.array_equal(apply(color.grayscale(0.2), PHOTO, rng), PHOTO) for _ in range(1000)]
    assert abs(np.mean(changed) - 0.2) < 4 * np.sqrt(0.2 * 0.8 / 1000)


def test_pil_blur_is_pillows():
    from PIL import ImageFilter

    rng = np.random.default_rng(5)
    rng.random()
    expected = Image.fromarray(PHOTO).filter(ImageFilter.GaussianBlur(rng.uniform(0.1, 2.0)))
    np.testing.assert_array_equal(apply(color.pil_blur(), PHOTO, np.random.default_rng(5)), np.asarray(expected))


def test_wrong_arguments():
    with pytest.raises(ValueError, match=r"hue must lie in \[0, 0.5\].*hue 0.7"):
        color.color_jitter(hue=0.7)
    with pytest.raises(ValueError, match="kernel_size must be odd, got 4"):
        color.blur(kernel_size=4)
    with pytest.raises(ValueError, match="a reflected border of 4 needs a larger image"):
        color.gaussian_blur(PHOTO[:4], 9, 1.0)
