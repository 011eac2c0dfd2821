"""Decoding, geometry, values and labels: hand-computed values, torchvision, and TensorFlow's crop statistics."""

import io
from pathlib import Path

import numpy as np
import pytest
from omnax.data.images import transforms
from omnax.data.images.decode import CorruptExample, decode_image, encode_png, stored_size
from omnax.data.images.resize import RESIZE
from PIL import ExifTags, Image

GOLDENS = dict(np.load(Path(__file__).with_name("tensorflow.npz")))
PHOTO = np.random.default_rng(0).integers(0, 256, (12, 17, 3), np.uint8)


class Scripted:
    """A generator that gives prepared numbers."""

    def __init__(self, *numbers):
        self.numbers = list(numbers)

    def draw(self, *_, **__):
        return self.numbers.pop(0)

    uniform = integers = random = draw


def apply(transform, image, rng=None):
    return transform({"image": image}, rng or np.random.default_rng(0))["image"]


def encoded(image, kind, **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def test_decode():
    np.testing.assert_array_equal(apply(transforms.decode(), encode_png(PHOTO)), PHOTO)
    gray = apply(transforms.decode(channels=1), encode_png(PHOTO[..., :1]))
    np.testing.assert_array_equal(gray, PHOTO[..., :1])
    jpeg = encoded(Image.fromarray(PHOTO), "jpeg")
    np.testing.assert_array_equal(decode_image(jpeg), np.asarray(Image.open(io.BytesIO(jpeg))))


@pytest.mark.parametrize("mode", ["I;16", "I", "F", "LAB", "CMYK", "1", "YCbCr"])
def test_every_mode_is_read_as_pillow_converts_it(mode):
    """Greys of 16 and 32 bits are cut off at 255, whatever one would wish."""
    wide = np.array([[0, 200, 256, 65535]])
    kinds = {"I;16": np.uint16, "I": np.int32, "F": np.float32}
    image = Image.fromarray(wide.astype(kinds[mode])) if mode in kinds else None
    if image is None:
        image = Image.merge("LAB", Image.fromarray(PHOTO).split()) if mode == "LAB" else Image.fromarray(PHOTO)
        image = image.convert(mode)
    data = encoded(image, "tiff")
    np.testing.assert_array_equal(decode_image(data), np.asarray(image.convert("RGB")))
    grey = decode_image(data, channels=1)[..., 0]
    np.testing.assert_array_equal(
        grey, np.asarray(image.convert("RGB").convert("L") if mode == "LAB" else image.convert("L"))
    )


def test_transparency_is_white_as_in_transformers_or_dropped():
    from oracles import transformers

    palette = Image.fromarray(PHOTO).quantize(4)
    alpha = Image.fromarray(PHOTO[..., 0])
    cases = [(palette, {"transparency": bytes([0, 255, 128, 7])})]
    for mode in ("RGB", "L"):
        image = Image.fromarray(PHOTO).convert(mode)
        image.putalpha(alpha)
        cases.append((image, {}))
    for image, options in cases:
        data = encoded(image, "png", **options)
        stored = Image.open(io.BytesIO(data))
        expected = transformers.image_transforms.convert_to_rgb(stored, return_numpy=True)
        np.testing.assert_array_equal(apply(transforms.decode(), data), expected)
        dropped = decode_image(data, alpha="drop")
        np.testing.assert_array_equal(dropped, np.asarray(stored.convert("RGBA").convert("RGB")))
        assert (dropped != expected).any()
        assert decode_image(data, channels=4).shape[2] == 4
    with pytest.raises(ValueError, match=r"alpha is 'black', expected one of \('white', 'drop'\)"):
        transforms.decode(alpha="black")


@pytest.mark.parametrize("orientation", range(1, 10))
def test_photographs_stand_upright(orientation):
    from oracles import transformers

    image = Image.fromarray(PHOTO)
    exif = image.getexif()
    exif[ExifTags.Base.Orientation] = orientation
    for kind in ("png", "jpeg"):
        data = encoded(image, kind, exif=exif)
        stored = Image.open(io.BytesIO(data))
        upright = apply(transforms.decode(), data)
        assert upright.shape[:2] == stored_size(stored)
        np.testing.assert_array_equal(upright, np.asarray(transformers.image_utils.load_image(stored)))
        np.testing.assert_array_equal(decode_image(data, upright=False), np.asarray(Image.open(io.BytesIO(data))))


def test_damaged_exif_leaves_the_photograph_as_it_is():
    data = encoded(Image.fromarray(PHOTO), "png", exif=b"Exif\0\0MM\0")
    np.testing.assert_array_equal(decode_image(data), PHOTO)


def test_corrupt_bytes_name_the_example():
    jpeg = encoded(Image.fromarray(PHOTO), "jpeg")
    for data in (jpeg[: len(jpeg) // 2], b"", b"no image", encode_png(PHOTO)[:60]):
        with pytest.raises(CorruptExample, match=r"cats/7.jpg: not a readable image"):
            transforms.decode()({"image": data, "name": "cats/7.jpg"}, np.random.default_rng(0))


def test_random_resized_crop_by_hand():
    # half of 100 x 200 at aspect 1 is 100 x 100; half of it at aspect 4 (log 1.386) is 50 x 200
    rng = Scripted(0.5, 0.0, 0, 37, 0.5, np.log(4.0), 25, 0)
    assert transforms.sample_resized_crop((100, 200), (0.08, 1), (0.25, 4), rng) == (0, 37, 100, 100)
    assert transforms.sample_resized_crop((100, 200), (0.08, 1), (0.25, 4), rng) == (25, 0, 50, 200)
    # ten squares of the whole area, 32 x 32, do not fit in 10 x 100: the middle with the widest aspect allowed
    for shape, expected in (((10, 100), (0, 43, 10, 13)), ((100, 10), (43, 0, 13, 10))):
        rng = Scripted(*[1.0, 0.0] * 10)
        assert transforms.sample_resized_crop(shape, (1, 1), (0.75, 4 / 3), rng) == expected


def test_random_resized_crop_resizes_the_crop():
    rng = np.random.default_rng(3)
    top, left, rows, columns = transforms.sample_resized_crop(PHOTO.shape[:2], (0.3, 0.6), (3 / 4, 4 / 3), rng)
    expected = RESIZE["pil_bicubic"](PHOTO[top : top + rows, left : left + columns], (8, 9))
    crop = transforms.random_resized_crop((8, 9), scale=(0.3, 0.6))
    np.testing.assert_array_equal(apply(crop, PHOTO, np.random.default_rng(3)), expected)


@pytest.mark.parametrize("key", [key for key in GOLDENS if key.startswith("crop")])
def test_inception_crop_has_the_statistics_of_tensorflow(key):
    _, shape, low, high = key.split("/")
    shape, area, rng = tuple(map(int, shape.split("x"))), (float(low), float(high)), np.random.default_rng(0)
    drawn = np.array([transforms.sample_inception_crop(shape, area, (0.75, 1.33), rng) for _ in range(3000)])
    mean, std, smallest, largest = GOLDENS[key]
    error = std * np.sqrt(1 / 3000 + 1 / 20_000)  # of the difference of the two means
    np.testing.assert_array_less(np.abs(drawn.mean(0) - mean), 4 * error + 1e-12)
    np.testing.assert_allclose(drawn.std(0), std, rtol=0.06)
    assert (drawn >= smallest).all()
    assert (drawn <= largest).all()


def test_flip_and_crops():
    np.testing.assert_array_equal(apply(transforms.flip(1.0), PHOTO), PHOTO[:, ::-1])
    np.testing.assert_array_equal(apply(transforms.flip(0.0), PHOTO), PHOTO)
    np.testing.assert_array_equal(apply(transforms.random_crop((5, 6)), PHOTO, Scripted(2, 3)), PHOTO[2:7, 3:9])
    with pytest.raises(ValueError, match=r"\(12, 17\) is smaller than the crop \(13, 13\)"):
        apply(transforms.random_crop(13), PHOTO)


def test_random_shift():
    image = np.array([[1, 2], [3, 4]], np.uint8)[..., None]
    rng = np.random.default_rng(0)
    moved = {tuple(apply(transforms.random_shift(1), image, rng).ravel().tolist()) for _ in range(100)}
    down_right, up, still = (0, 0, 0, 1), (3, 4, 0, 0), (1, 2, 3, 4)
    assert {down_right, up, still} <= moved
    assert len(moved) == 9


def test_affine_is_that_of_torchvision():
    from oracles import torch  # noqa: F401  (makes torchvision importable)

    functional = pytest.importorskip("torchvision.transforms.functional")
    for image in (PHOTO, PHOTO[..., :1]):
        picture = Image.fromarray(image if image.shape[2] == 3 else image[..., 0])
        for degrees, move, scale, shear in ((30, (2, -1), 1.3, 10), (-75, (0, 3), 0.7, -20), (0, (1, 0), 1, 0)):
            expected = functional.affine(
                picture, degrees, list(move), scale, [shear, 0.0], functional.InterpolationMode.BILINEAR, fill=9
            )
            ours = transforms.affine(image, degrees, move, scale, shear, fill=9)
            np.testing.assert_array_equal(ours.squeeze(), np.asarray(expected).reshape(image.shape).squeeze())


def test_random_affine_draws_angle_shear_move_and_scale():
    rng = Scripted(5.0, 3.0, 0.1, -0.2, 1.1)
    ours = apply(transforms.random_affine(degrees=10, translate=0.2, scale=(0.9, 1.1), shear=5), PHOTO, rng)
    np.testing.assert_array_equal(ours, transforms.affine(PHOTO, 5.0, (1.7, -2.4), 1.1, 3.0))


def test_values():
    image = np.array([0, 51, 255], np.uint8).reshape(1, 1, 3)
    np.testing.assert_allclose(apply(transforms.value_range(), image).ravel(), [-1, -0.6, 1], atol=1e-7)
    np.testing.assert_allclose(apply(transforms.value_range(0, 2), image).ravel(), [0, 0.4, 2], atol=1e-7)
    normal = apply(transforms.normalize((0.5, 0.2, 0.0), (0.5, 0.1, 2.0)), image)
    np.testing.assert_allclose(normal.ravel(), [-1, 0, 0.5], atol=1e-6)
    assert normal.dtype == np.float32


def test_labels_and_fields():
    rng = np.random.default_rng(0)
    np.testing.assert_array_equal(transforms.one_hot(4)({"label": 2}, rng)["label"], [0, 0, 1, 0])
    np.testing.assert_array_equal(transforms.one_hot(4)({"label": [0, 3]}, rng)["label"], [1, 0, 0, 1])
    for label in (4, -1):
        with pytest.raises(ValueError, match=f"label of a/b.png is {label}, expected 0 to 3"):
            transforms.one_hot(4)({"label": label, "name": "a/b.png"}, rng)
    assert transforms.keep(["label"])({"label": 1, "name": "x"}, rng) == {"label": 1}
    with pytest.raises(ValueError, match=r"no field \['label'\] in an example with \['name'\]"):
        transforms.keep(["label"])({"name": "x"}, rng)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (
            lambda: transforms.resize(8, method="pil_bicubik"),
            "unknown resize method 'pil_bicubik', did you mean 'pil_bicubic'",
        ),
        (lambda: transforms.resize_shortest(8, rounding="tf"), "unknown rounding of resize_shortest 'tf'"),
        (lambda: transforms.center_crop(8, rule="ceil"), "unknown centre crop rule 'ceil'"),
        (lambda: transforms.resize((8, 0)), r"size must be positive, got \(8, 0\)"),
        (lambda: transforms.decode(channels=2), "channels must be 1, 3 or 4, got 2"),
        (lambda: transforms.flip(1.5), r"probability must lie in \[0, 1\], got 1.5"),
    ],
)
def test_wrong_arguments(build, message):
    with pytest.raises(ValueError, match=message):
        build()
