"""`classify` and `features` on a small random checkpoint and pictures on disk, as a user runs them."""

import dataclasses
import io
import json
import re
import shutil
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from omnax import hub
from omnax.hub import processor as processors
from omnax.hub.processor import ImageProcessor
from omnax.infer.__main__ import main
from omnax.infer.features import principal_components
from omnax.infer.images import read_image
from omnax.models.vit import ViT, ViTConfig
from omnax.storage.paths import as_path, file_names
from omnax.storage.writing import staged
from PIL import Image

LABELS = ("cat", "dog", "bird", "fish", "tree", "house")


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    config = ViTConfig(16, 2, 2, 32, 4, image_size=8, num_classes=6, init="hf", activation="gelu", eps=1e-12)
    params = ViT(config).init(jax.random.key(0), jnp.zeros((1, 8, 8, 3)))["params"]
    params = jax.tree.map(lambda leaf: leaf * 3, params)
    bundle = hub.Bundle(ViT(config), params, config, ImageProcessor(crop=(8, 8)), labels=LABELS)
    path = tmp_path_factory.mktemp("weights")
    hub.save(bundle, path)
    return path


@pytest.fixture
def images(tmp_path):
    rng = np.random.default_rng(0)
    for name in ("a.png", "b.jpg", "c.png"):
        Image.fromarray(rng.integers(0, 256, (20, 14, 3), dtype=np.uint8)).save(tmp_path / name)
    return tmp_path


def test_classify_prints_the_published_answer(weights, images, capsys):
    """Scores equal a plain forward pass of PIL's own resize and the published normalisation."""
    lines, picture = images / "out.jsonl", images / "out.png"
    arguments = ["classify", "--weights", str(weights), str(images), "--json", str(lines), "--picture", str(picture)]
    assert main([*arguments, "--batch-size", "2"]) == 0
    printed = capsys.readouterr().out
    bundle = hub.load(weights)
    results = [json.loads(line) for line in lines.read_text().splitlines()]
    assert [result["image"] for result in results] == [str(images / name) for name in ("a.png", "b.jpg", "c.png")]
    for result in results:
        with Image.open(result["image"]) as image:
            pixels = image.convert("RGB").resize((8, 8), Image.Resampling.BILINEAR)
        inputs = (np.asarray(pixels, np.float32)[None] / 255 - 0.5) / 0.5
        expected = jax.nn.softmax(bundle.model.apply({"params": bundle.params}, inputs)["logits"][0])
        assert len(result["top"]) == 5 and list(result["top"].values()) == sorted(result["top"].values(), reverse=True)
        for label, probability in result["top"].items():
            assert probability == pytest.approx(float(expected[LABELS.index(label)]), abs=1e-5)
        assert next(iter(result["top"])) in printed
    with Image.open(picture) as drawn:
        assert drawn.size[0] > 100


def test_one_unreadable_image_is_skipped_and_named(weights, images, capsys):
    (images / "b.jpg").write_bytes((images / "b.jpg").read_bytes()[:200])
    lines, picture = images / "out.jsonl", images / "out.pdf"
    arguments = ["classify", "--weights", str(weights), str(images), "--json", str(lines), "--picture", str(picture)]
    assert main([*arguments, "--batch-size", "2"]) == 0
    found = [json.loads(line)["image"] for line in lines.read_text().splitlines()]
    assert found == [str(images / "a.png"), str(images / "c.png")]
    assert f"skipped {images / 'b.jpg'}: not a readable image" in capsys.readouterr().out


@pytest.mark.parametrize("command", ["classify", "features"])
def test_nothing_is_ranked_or_kept_by_values_that_are_not_finite(weights, images, tmp_path_factory, capsys, command):
    bundle, broken = hub.load(weights), tmp_path_factory.mktemp("broken")
    params = jax.tree.map(lambda leaf: leaf * jnp.nan, bundle.params)
    hub.save(dataclasses.replace(bundle, params=params), broken)
    rest = ["--out", str(images / "f.npz")] if command == "features" else []
    assert main([command, "--weights", str(broken), str(images), *rest, "--picture", str(images / "p.png")]) == 1
    assert f"{images / 'a.png'}: what the model makes of it is not finite" in capsys.readouterr().err
    assert not (images / "f.npz").exists() and not (images / "p.png").exists()


def test_features_file(weights, images):
    out, picture = images / "f.npz", images / "f.png"
    arguments = ["features", "--weights", str(weights), str(images / "a.png"), "--feature", "patches"]
    assert main([*arguments, "--out", str(out), "--picture", str(picture)]) == 0
    with np.load(out) as file:
        assert file["features"].shape == (1, 2, 2, 16) and file["names"].tolist() == [str(images / "a.png")]
    assert picture.stat().st_size > 0


def test_weights_images_and_outputs_in_a_bucket(weights, images, bucket):
    with staged(as_path("gs://bucket/infer")) as stage:
        shutil.copytree(weights, stage / "weights")
        shutil.copytree(images, stage / "images")
    local = images.with_name("results")
    for place, checkpoint, files in (
        (str(local), weights, images),
        ("gs://bucket/infer", "gs://bucket/infer/weights", "gs://bucket/infer/images"),
    ):
        common = ["--weights", str(checkpoint), str(files)]
        assert main(["classify", *common, "--json", f"{place}/out.jsonl", "--picture", f"{place}/out.png"]) == 0
        assert main(["features", *common, "--out", f"{place}/out.npz", "--picture", f"{place}/f.png"]) == 0
    here, there = (as_path(place) / "out.jsonl" for place in (local, "gs://bucket/infer"))
    assert there.read_text().replace("gs://bucket/infer/images", str(images)) == here.read_text()
    features = [np.load(io.BytesIO(file.with_name("out.npz").read_bytes()))["features"] for file in (here, there)]
    np.testing.assert_array_equal(*features)
    assert {"out.png", "f.png"} <= set(file_names(there.parent))


def test_principal_components_equal_an_eigendecomposition():
    patches = np.random.default_rng(1).normal(size=(2, 3, 4, 5)) * (5, 3, 1, 0.1, 0.1)
    flat = patches.reshape(-1, 5) - patches.reshape(-1, 5).mean(0)
    _, vectors = np.linalg.eigh(flat.T @ flat)
    expected = flat @ vectors[:, ::-1][:, :3]
    got = principal_components(patches).reshape(-1, 3)
    for one, other in zip(got.T, expected.T, strict=True):
        assert abs(np.corrcoef(one, other)[0, 1]) == pytest.approx(1, abs=1e-9)
        assert one.min() == 0 and one.max() == pytest.approx(1)


@pytest.mark.parametrize(
    "change,message",
    [
        (lambda images: images / "none.png", "no such image or folder: .*none.png"),
        (lambda images: images / "empty", "no images in .*empty"),
        (lambda images: images / "broken.jpg", "broken.jpg: not a readable image"),
    ],
)
def test_bad_images_are_one_line(weights, images, capsys, change, message):
    (images / "empty").mkdir()
    (images / "broken.jpg").write_bytes((images / "b.jpg").read_bytes()[:200])
    assert main(["classify", "--weights", str(weights), str(change(images))]) == 1
    error = capsys.readouterr().err
    assert error.startswith("ValueError: ") and error.count("\n") == 1
    assert re.search(message, error)


def test_bad_weights_are_one_line(images, capsys):
    assert main(["features", "--weights", str(images / "nowhere"), str(images / "a.png")]) == 1
    assert "no such file or directory" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["classify", "--picture", "{file}/a.png"], "cannot write"),
        (["classify", "--json", "{folder}"], "it is a folder, expected a file name"),
        (["features", "--out", "/proc/nowhere/features.npz"], "cannot write /proc/nowhere/features.npz"),
    ],
)
def test_places_that_cannot_be_written_are_found_before_any_work(arguments, message, tmp_path, capsys):
    """The weights do not even exist: they would have been read next."""
    (tmp_path / "file").touch()
    places = {"file": tmp_path / "file", "folder": tmp_path}
    command, *rest = [argument.format(**places) for argument in arguments]
    assert main([command, "--weights", "nowhere/at all", str(tmp_path), *rest]) == 1
    assert message in capsys.readouterr().err


def test_transparency_is_that_of_the_library_the_weights_come_from(tmp_path):
    """White behind it in transformers' processors; timm's, open_clip's and Google's loaders show what lies beneath."""
    Image.new("RGBA", (3, 2), (10, 20, 30, 0)).save(tmp_path / "glass.png")
    size = (8, 8)
    made = {
        "transformers": processors.from_transformers({}, size, "CLIPImageProcessor"),
        "timm": processors.from_timm({}, size),
        "open_clip": processors.from_open_clip({}, size),
        "google": processors.from_google(size, resize_directly=True),
    }
    for name, processor in made.items():
        bundle = hub.Bundle(None, {}, SimpleNamespace(num_channels=3), processor)
        pixels, _ = read_image(tmp_path / "glass.png", bundle)
        assert (pixels == (255 if name == "transformers" else (10, 20, 30))).all(), name
