"""Feature and correspondence pictures of a DINOv2 backbone, and the principal components behind them."""

import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from omnax import hub
from omnax.data.images.decode import encode_png
from omnax.hub.processor import ImageProcessor
from omnax.infer.__main__ import main
from omnax.infer.correspond import match
from omnax.kernels.pca import pca_colors, principal_components
from omnax.models import dinov2


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    config = dinov2.Dinov2Config(
        width=16, depth=1, num_heads=2, mlp_dim=32, patch_size=4, image_size=16, init_std=0.2, layer_scale=1.0
    )
    model = dinov2.Dinov2(config)
    params = model.init(jax.random.key(0), jnp.zeros((1, 16, 16, 3)))["params"]
    path = tmp_path_factory.mktemp("weights") / "dinov2"
    hub.save(hub.Bundle(model, params, config, ImageProcessor((16, 16), 16, crop_rule="floor")), path, "transformers")
    return path


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    for i in range(2):
        pixels = np.random.default_rng(i).integers(0, 256, (20, 24, 3), dtype=np.uint8)
        (folder / f"{i}.png").write_bytes(encode_png(pixels))
    return [str(folder / f"{i}.png") for i in range(2)]


def test_commands_write_features_and_pictures(weights, images, tmp_path, capsys):
    out = ["--out", str(tmp_path / "f.npz"), "--picture", str(tmp_path / "f.png")]
    assert main(["features", "--weights", str(weights), *images, *out]) == 0
    assert np.load(tmp_path / "f.npz")["features"].shape == (2, 16)
    picture = ["--picture", str(tmp_path / "c.png"), "--image-size", "32"]
    assert main(["correspond", "--weights", str(weights), *images, *picture]) == 0
    assert "matches, cosine" in capsys.readouterr().out
    assert (tmp_path / "c.png").is_file() and (tmp_path / "f.png").is_file()
    assert main(["correspond", "--weights", str(weights), *images, "--image-size", "30"]) == 1
    assert "ValueError: image size 30 is not divisible by the patch size 4" in capsys.readouterr().err
    assert main(["correspond", "--weights", str(weights), images[0], "missing.png"]) == 1
    assert "missing.png" in capsys.readouterr().err


def test_one_unreadable_image_is_skipped_and_named(weights, images, tmp_path, capsys, caplog):
    (tmp_path / "a.png").write_bytes(Path(images[0]).read_bytes())
    (tmp_path / "b.png").write_bytes(Path(images[0]).read_bytes()[:60])
    os.mkfifo(tmp_path / "c.png")
    out = ["--out", str(tmp_path / "f.npz"), "--picture", str(tmp_path / "f.jpg"), "--batch-size", "1"]
    assert main(["features", "--weights", str(weights), str(tmp_path), *out]) == 0
    assert np.load(tmp_path / "f.npz")["names"].tolist() == [str(tmp_path / "a.png")]
    assert f"skipped {tmp_path / 'b.png'}: not a readable image" in capsys.readouterr().out
    assert caplog.messages == [f"skipped {tmp_path / 'c.png'}: is a pipe, no file"]
    assert main(["correspond", "--weights", str(weights), images[0], str(tmp_path / "b.png")]) == 1
    printed = capsys.readouterr()
    assert "skipped" in printed.out and "b.png" in printed.out and "one of the two images cannot be read" in printed.err


def test_probe_prints_both_frozen_evaluations(weights, images, tmp_path, capsys, caplog):
    """Bright and dark images tell themselves apart by any feature."""
    for split, count in (("train", 8), ("test", 2)):
        for label, level in (("dark", 30), ("light", 220)):
            folder = tmp_path / "data" / split / label
            folder.mkdir(parents=True)
            (folder / "damaged.png").write_bytes(b"no picture")  # skipped and named by the data pipeline
            for i in range(count):
                pixels = np.random.default_rng(i).integers(level - 20, level + 20, (16, 16, 3), dtype=np.uint8)
                (folder / f"{i}.png").write_bytes(encode_png(pixels))
    data = ["--data", "folder", "--path", str(tmp_path / "data"), "--steps", "20", "--batch-size", "8"]
    assert main(["probe", "--weights", str(weights), *data]) == 0
    out = capsys.readouterr().out
    assert "20 nearest neighbours: 1.0000" in out and "as published: 1.0000" in out
    assert "(1 blocks, with" in out
    assert sum("damaged.png: not a readable image" in message for message in caplog.messages) >= 4
    assert main(["probe", "--weights", str(weights), *data, "--steps", "0"]) == 1
    assert "ValueError: --steps must be at least 1, got 0" in capsys.readouterr().err


def test_a_shifted_image_matches_itself():
    first = jax.random.normal(jax.random.key(0), (4, 5, 8))
    second = 3 * jnp.roll(first, (1, 2), (0, 1))  # patch (x, y) moves to (x + 1, y + 2)
    pairs, similarity = match(first, second, jnp.ones((4, 5), bool).at[0].set(False))
    assert len(pairs) == 15 and (pairs[:, 0, 0] > 0).all()
    np.testing.assert_array_equal(pairs[:, 1], (pairs[:, 0] + [1, 2]) % [4, 5])
    np.testing.assert_allclose(similarity, 1, atol=1e-6)


def test_principal_components_equal_an_svd():
    x = np.random.default_rng(0).normal(size=(40, 6)) * [5, 3, 2, 1, 1, 0.5]
    mask = np.arange(40) % 4 != 0
    mean, directions = principal_components(jnp.asarray(x, jnp.float32), 3, jnp.asarray(mask))
    np.testing.assert_allclose(mean, x[mask].mean(0), atol=1e-5)
    _, _, expected = np.linalg.svd(x[mask] - x[mask].mean(0))
    np.testing.assert_allclose(np.abs(directions.T @ expected[:3].T), np.eye(3), atol=1e-4)


def test_foreground_is_the_side_away_from_the_border():
    patches = 0.1 * np.random.default_rng(0).normal(size=(2, 6, 6, 8)).astype(np.float32)
    patches[:, 2:4, 2:4, 0] += 5
    for sign in (1, -1):
        colors, foreground = pca_colors(jnp.asarray(sign * patches))
        expected = np.zeros((2, 6, 6), bool)
        expected[:, 2:4, 2:4] = True
        np.testing.assert_array_equal(foreground, expected)
        assert colors.min() >= 0 and colors.max() <= 1 and not np.asarray(colors)[~expected].any()
