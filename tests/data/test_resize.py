"""Resize rules against the libraries whose rules they are; TensorFlow's through arrays it wrote (references/)."""

from pathlib import Path

import numpy as np
import pytest
from omnax.data.images import resize
from omnax.data.images.transforms import center_crop, normalize, resize_shortest
from PIL import Image

GOLDENS = dict(np.load(Path(__file__).with_name("tensorflow.npz")))
RNG = np.random.default_rng(0)
PHOTO = RNG.integers(0, 256, (37, 53, 3), np.uint8)
SIZES = [(16, 24), (61, 20), (37, 53), (80, 90)]


def resampled_by_torch(image, size, mode, antialias):
    from oracles import torch

    batch = torch.from_numpy(image).permute(2, 0, 1)[None]
    result = torch.nn.functional.interpolate(batch, size, mode=mode, antialias=antialias, align_corners=False)
    return result[0].permute(1, 2, 0).numpy()


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("mode", ["bilinear", "bicubic"])
@pytest.mark.parametrize("antialias", [True, False])
def test_torch_rules(size, mode, antialias):
    rule = resize.RESIZE[f"torch_{mode}" if antialias else f"torch_{mode}_aliased"]
    image = PHOTO.astype(np.float32) / 255
    np.testing.assert_allclose(rule(image, size), resampled_by_torch(image, size, mode, antialias), atol=1e-5)
    difference = rule(PHOTO, size).astype(int) - resampled_by_torch(PHOTO, size, mode, antialias)
    # torch's uint8 kernels round their weights to 16 bits
    assert np.abs(difference).max() <= 1
    assert rule(PHOTO, size).dtype == np.uint8


@pytest.mark.parametrize("name", ["nearest", "bilinear", "bicubic", "lanczos"])
def test_pil_rules_are_pillow(name):
    expected = Image.fromarray(PHOTO).resize((24, 16), getattr(Image.Resampling, name.upper()))
    np.testing.assert_array_equal(resize.RESIZE[f"pil_{name}"](PHOTO, (16, 24)), np.asarray(expected))
    gray = resize.RESIZE[f"pil_{name}"](PHOTO[..., :1], (16, 24))
    np.testing.assert_array_equal(gray[..., 0], np.asarray(expected)[..., 0])


def test_pil_rules_keep_floats_and_do_not_premultiply_alpha():
    image = PHOTO.astype(np.float32) / 255
    ours = resize.RESIZE["pil_bicubic"](image, (16, 24))
    np.testing.assert_allclose(ours, resampled_by_torch(image, (16, 24), "bicubic", True), atol=1e-5)
    transparent = np.concatenate([PHOTO, np.zeros_like(PHOTO[..., :1])], axis=-1)
    ours = resize.RESIZE["pil_bilinear"](transparent, (16, 24))
    np.testing.assert_array_equal(ours[..., :3], resize.RESIZE["pil_bilinear"](PHOTO, (16, 24)))


@pytest.mark.parametrize("key", [key for key in GOLDENS if key.startswith(("bilinear", "area"))])
def test_tensorflow_rules_bit_for_bit(key):
    method, source, target = key.split("/")
    image, size = GOLDENS[f"input/{source}"], tuple(map(int, target.split("x")))
    expected = GOLDENS[key]
    np.testing.assert_array_equal(resize.RESIZE[f"tf_{method}"](image, size), expected)
    np.testing.assert_array_equal(resize.RESIZE[f"bv_{method}"](image, size), expected.astype(np.uint8))


# TensorFlow's "area" gives 254.99995 and so, truncated, 254
@pytest.mark.parametrize("name", [name for name in resize.RESIZE if "area" not in name])
def test_a_flat_image_stays_flat(name):
    flat = np.full((7, 9, 3), 255, np.uint8)
    for size in ((3, 5), (20, 11)):
        np.testing.assert_allclose(resize.RESIZE[name](flat, size), 255, atol=1e-4)


@pytest.mark.parametrize(
    ("rule", "shape", "size", "expected"),
    [
        ("torchvision", (479, 640), 224, (224, 299)),  # 299.29
        ("torchvision", (500, 375), 256, (341, 256)),  # 341.33
        ("torchvision", (375, 500), 248, (248, 330)),  # 330.67, cut
        ("big_vision", (375, 500), 248, (248, 331)),  # 330.67, rounded
        ("big_vision", (4, 5), 2, (2, 2)),  # 2.5, half to even
        ("big_vision", (7, 4), 2, (4, 2)),  # 3.5, half to even
    ],
)
def test_shortest_edge(rule, shape, size, expected):
    assert resize.SHORTEST_EDGE[rule](shape, size) == expected


def test_center_crop_offsets():
    assert [resize.CENTER_CROP["torchvision"](margin) for margin in range(8)] == [0, 0, 1, 2, 2, 2, 3, 4]
    assert [resize.CENTER_CROP["floor"](margin) for margin in range(8)] == [0, 0, 1, 1, 2, 2, 3, 3]


def test_center_crop():
    image = np.arange(5 * 6).reshape(5, 6, 1)
    for rule, expected in (("torchvision", [[14, 15, 16], [20, 21, 22]]), ("floor", [[7, 8, 9], [13, 14, 15]])):
        np.testing.assert_array_equal(resize.center_crop(image, (2, 3), rule)[..., 0], expected)
    with pytest.raises(ValueError, match=r"\(5, 6\) is smaller than the crop \(6, 6\)"):
        resize.center_crop(image, (6, 6), "floor")


@pytest.mark.parametrize("shape", [(43, 60), (60, 43), (41, 41)])  # with margins of 8 and 23 beside the crop
def test_clip_preprocessing_is_that_of_transformers(shape):
    from oracles import transformers

    mean, std = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
    image = RNG.integers(0, 256, (*shape, 3), np.uint8)
    processor = transformers.CLIPImageProcessorPil(size={"shortest_edge": 40}, crop_size={"height": 32, "width": 32})
    expected = processor(Image.fromarray(image), return_tensors="np")["pixel_values"][0].transpose(1, 2, 0)
    example = {"image": image}
    for step in (resize_shortest(40), center_crop(32, rule="floor"), normalize(mean, std)):
        example = step(example, RNG)
    np.testing.assert_allclose(example["image"], expected, atol=1e-6)


def test_vit_preprocessing_is_that_of_transformers():
    from oracles import transformers

    processor = transformers.ViTImageProcessorPil(size={"height": 24, "width": 32})
    expected = processor(Image.fromarray(PHOTO), return_tensors="np")["pixel_values"][0].transpose(1, 2, 0)
    resized = {"image": resize.RESIZE["pil_bilinear"](PHOTO, (24, 32))}
    ours = normalize((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))(resized, RNG)["image"]
    np.testing.assert_allclose(ours, expected, atol=1e-6)
