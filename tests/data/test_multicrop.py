"""Multi-crop views and the procedural textures they are shown on."""

import numpy as np
import pytest
from omnax.data.drawn import textures
from omnax.data.images import color
from omnax.data.images.decode import CorruptExample
from omnax.data.images.multicrop import BLUR_PAPER, CropsConfig, multicrop, recolour

SMALL = {"global_size": 16, "local_size": 12, "local_count": 3}


def picture(rows=40, columns=48):
    return np.random.default_rng(0).integers(0, 256, (rows, columns, 3), dtype=np.uint8)


@pytest.mark.parametrize("style", ["dino", "dinov2", "textures"])
def test_views(style):
    apply = multicrop(CropsConfig(**SMALL, style=style))
    example = {"image": picture(), "label": 3}
    first, again = (apply(example, np.random.default_rng(5)) for _ in range(2))
    assert first["global"].shape == (2, 16, 16, 3) and first["local"].shape == (3, 12, 12, 3)
    assert first["global"].dtype == first["local"].dtype == np.float32
    assert first["label"] == 3 and "image" not in first
    np.testing.assert_array_equal(first["local"], again["local"])
    assert (first["global"][0] != first["global"][1]).any() and (first["local"][0] != first["local"][1]).any()
    low, high = -0.485 / 0.229, (1 - 0.406) / 0.225
    assert low - 0.2 < first["global"].min() and first["global"].max() <= high + 1e-5


def test_without_local_crops():
    out = multicrop(CropsConfig(global_size=16, local_size=12, local_count=0))({"image": picture()}, _rng())
    assert out["local"].shape == (0, 12, 12, 3)


def _rng():
    return np.random.default_rng(1)


def test_blur_probabilities(monkeypatch):
    """The released models blur no first crop, nine in ten second and half of the local ones; the paper differs."""
    asked = []
    monkeypatch.setattr(color, "blur", lambda **options: asked.append(options) or (lambda example, rng: example))
    multicrop(CropsConfig(**SMALL))
    multicrop(CropsConfig(**SMALL, blur=BLUR_PAPER))
    assert [options["probability"] for options in asked] == [0.0, 0.9, 0.5, 1.0, 0.1, 0.5]


def test_small_images_are_enlarged_or_refused():
    example = {"image": picture(14, 40), "name": "a.png"}
    assert multicrop(CropsConfig(**SMALL))(example, _rng())["global"].shape == (2, 16, 16, 3)
    with pytest.raises(CorruptExample, match=r"a.png: its size \(14, 40\) is smaller than a crop of 16 pixels"):
        multicrop(CropsConfig(**SMALL, upscale=False))(example, _rng())
    assert issubclass(CorruptExample, ValueError)


@pytest.mark.parametrize(
    "fields,message",
    [
        ({"style": "swav"}, "crops.style is 'swav', expected one of"),
        ({"local_scale": (0.4, 0.3)}, r"crops.local_scale must be a range, got \(0.4, 0.3\)"),
    ],
)
def test_bad_configs_are_named(fields, message):
    with pytest.raises(ValueError, match=message):
        CropsConfig(**fields)


def test_recolour_keeps_the_pattern():
    """Channels are permuted and scaled: each output channel is an affine image of an input channel."""
    image = picture(20, 20) // 4 + 90  # no clipping
    for seed in range(10):
        out = recolour(image, np.random.default_rng(seed)).reshape(-1, 3).astype(float)
        inputs = image.reshape(-1, 3).astype(float)
        if (out[:, 0] == out[:, 1]).all():
            continue  # grey
        correlation = np.abs(np.corrcoef(inputs.T, out.T)[:3, 3:])
        assert (correlation.max(0) > 0.999).all()


def test_textures_are_ten_recognisable_patterns():
    images = [textures.texture(label, np.random.default_rng((0, label))) for label in range(10)]
    assert all(image.shape == (32, 32, 3) and image.dtype == np.uint8 for image in images)
    rows = textures.pattern(0, _rng())
    assert (rows == rows[:, :1]).all() and 0 < rows.mean() < 1
    columns = textures.pattern(1, _rng())
    assert (columns == columns[:1]).all()
    diagonal = textures.pattern(4, _rng())
    np.testing.assert_array_equal(diagonal[1:, :-1], diagonal[:-1, 1:])
    blocks = textures.pattern(7, _rng())
    np.testing.assert_array_equal(blocks, np.kron(blocks[::4, ::4], np.ones((4, 4))))
