"""A trained run leaves as a published checkpoint that loads and computes the same."""

import jax
import numpy as np
import pytest
from omnax import hub
from omnax.data.drawn.digits import read_digits
from omnax.train.export import main as export
from omnax.train.main import main as train
from oracles import timm, torch

SMALL = [
    "--config.total_steps=2",
    "--config.batch_size=16",
    "--config.model.depth=1",
    "--config.evaluators=()",
    "--config.ema=None",
]


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    path = tmp_path_factory.mktemp("run")
    assert train(["--config", "configs/vit.py", "--workdir", str(path), *SMALL]) == 0
    return path


def test_timm_reads_what_was_trained(workdir, tmp_path):
    """The digits model has no class token: timm's format holds it; classes and preprocessing come along."""
    arguments = ["--config", "configs/vit.py", "--workdir", str(workdir), "--out", str(tmp_path / "out"), *SMALL]
    assert export(arguments) == 0
    bundle = hub.load(tmp_path / "out")
    assert bundle.labels == tuple("0123456789") and bundle.processor.mean == (0.5,)
    images = (read_digits()[0][:4].astype(np.float32) / 255 - 0.5) / 0.5
    logits = bundle.model.apply({"params": bundle.params}, images)["logits"]
    arguments = bundle.metadata["model_args"] | {"weight_init": "skip"}
    model = timm.create_model(bundle.metadata["architecture"], **arguments).eval()
    model.load_state_dict(timm.models.load_state_dict(tmp_path / "out" / "model.safetensors"), strict=True)
    expected = model(torch.from_numpy(images.transpose(0, 3, 1, 2))).numpy()
    np.testing.assert_allclose(logits, expected, atol=1e-5)


def test_errors_are_one_line(workdir, tmp_path, capsys):
    arguments = ["--config", "configs/vit.py", "--out", str(tmp_path / "out"), *SMALL]
    assert export([*arguments, "--workdir", str(tmp_path)]) == 1
    assert "holds no checkpoint" in capsys.readouterr().err
    assert export([*arguments, "--workdir", str(workdir), "--format", "onnx"]) == 1
    assert "unknown format 'onnx'" in capsys.readouterr().err
    moved = ["--config.data.name=folder", f"--config.data.path={tmp_path}"]
    assert export([*arguments, *moved, "--workdir", str(tmp_path / "nowhere")]) == 1
    assert "is not a folder" in capsys.readouterr().err  # for the classes' names, before the checkpoint is looked for
    assert not (tmp_path / "out").exists()
    assert jax.sharding.get_abstract_mesh().empty
