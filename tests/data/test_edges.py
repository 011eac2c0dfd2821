"""Canny edges beside OpenCV's, bit for bit; pictures that follow their image."""

import json

import numpy as np
import pytest
from omnax.data import preprocess
from omnax.data.captions import caption_source
from omnax.data.drawn import control_shapes
from omnax.data.images.decode import CorruptExample, decode_image, encode_png
from omnax.data.images.edges import canny, canny_edges


def pictures():
    """Noise, steps, smooth fields and drawn shapes, grey and coloured, of odd sizes."""
    rng = np.random.default_rng(0)
    for i in range(40):
        rows, columns = rng.integers(1, 24, 2)
        channels = (1, 3)[i % 2]
        noise = rng.integers(0, 256, (rows, columns, channels))
        field = np.cumsum(np.cumsum(rng.normal(size=(rows, columns, channels)), 0), 1) * 20 + 128
        yield (noise, np.clip(field, 0, 255), noise // 64 * 64)[i % 3].astype(np.uint8)
    yield control_shapes.draw("red", "disc", "navy", rng)[0]


def test_canny_is_opencv():
    cv2 = pytest.importorskip("cv2")
    rng, found = np.random.default_rng(1), 0
    for image in pictures():
        low, high = rng.uniform(0, 400, 2)  # in either order
        for euclidean in (False, True):
            expected = cv2.Canny(image, low, high, L2gradient=euclidean)
            np.testing.assert_array_equal(canny_edges(image, low, high, euclidean=euclidean), expected)
            found += expected.any()
    assert found > 40


def test_canny_as_a_transform():
    image = control_shapes.draw("yellow", "square", "black", np.random.default_rng(0))[0]
    out = preprocess.build([("canny", {"low": (50, 150), "high": (200, 300)})])(
        {"image": image}, np.random.default_rng(3)
    )
    rng = np.random.default_rng(3)
    edges = canny_edges(image, rng.uniform(50, 150), rng.uniform(200, 300))
    np.testing.assert_array_equal(out["condition"], np.repeat(edges[..., None], 3, -1))
    assert edges.any()
    with pytest.raises(ValueError, match=r"range of two from 0 on, got \(3, 2\)"):
        canny(low=(3, 2))


def test_further_pictures_are_treated_alike():
    """Random crops, flips and turns of image and condition are the same; other fields are passed on."""
    image = np.arange(12 * 12 * 3, dtype=np.uint8).reshape(12, 12, 3)
    steps = preprocess.build([("random_crop", {"size": 6}), "flip"])
    apply = preprocess.alike(steps, ("condition", "mask"))
    seen = set()
    for seed in range(8):
        out = apply({"image": image, "condition": 255 - image, "mask": image, "label": 3}, np.random.default_rng(seed))
        np.testing.assert_array_equal(out["condition"], 255 - out["image"])
        np.testing.assert_array_equal(out["mask"], out["image"])
        assert out["label"] == 3
        seen.add(out["image"].tobytes())
    assert len(seen) > 4


def test_drawn_control_shapes(tmp_path):
    source = caption_source(
        {"name": "control_shapes", "data_dir": str(tmp_path), "pictures": ("condition", "prompt", "mask")}, "test"
    )
    assert len(source) == 256
    for i in range(0, 256, 16):
        example = source[i]
        image, condition, prompt = (decode_image(example[name]) for name in ("image", "condition", "prompt"))
        inside = decode_image(example["mask"], 1)[..., 0] > 0
        color, _, _, ground = example["captions"][0].split()
        assert color == source.class_names[example["label"]]
        assert (image[inside] == control_shapes.COLORS[color]).all()
        assert (image[~inside] == control_shapes.GROUNDS[ground]).all()
        np.testing.assert_array_equal(condition, control_shapes.outline(inside))
        assert ((prompt == control_shapes.COLORS[color]).all(-1)).any()
        assert 9 <= inside.sum() <= 110


def test_folder_with_condition_images(tmp_path):
    image, edges = (np.full((4, 4, 3), value, np.uint8) for value in (9, 255))
    for name, pixels in (("a.png", image), ("a_edges.png", edges)):
        (tmp_path / name).write_bytes(encode_png(pixels))
    lines = [{"image": "a.png", "condition": "a_edges.png", "text": "a cat"}, {"image": "a.png", "text": "no edges"}]
    lines.append({"image": "a.png", "condition": "gone.png", "text": "a cat"})
    (tmp_path / "captions.jsonl").write_text("\n".join(map(json.dumps, lines)))
    config = {"name": "captions", "path": str(tmp_path), "pictures": ("condition",)}
    source = caption_source(config, "train")
    np.testing.assert_array_equal(decode_image(source[0]["condition"]), edges)
    with pytest.raises(CorruptExample, match=r"line 2.*'condition'"):
        source[1]
    with pytest.raises(CorruptExample, match=r"gone.png.*cannot be read"):
        source[2]
    assert "condition" not in caption_source(config | {"pictures": ()}, "train")[1]
    with pytest.raises(ValueError, match="tar shards have one picture"):
        caption_source(config | {"name": "tar"}, "train")
