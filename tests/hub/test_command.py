"""`python -m omnax.hub PATH`: what a checkpoint is, what of it is refused, conversion."""

import json
import subprocess
import sys

import numpy as np
import pytest
from omnax import hub
from omnax.hub.__main__ import main

from .blanks import image_tower, one_of_each, text_tower


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """{family: path}"""
    folder, paths = tmp_path_factory.mktemp("checkpoints"), {}
    for family, bundle in one_of_each().items():
        paths[family] = folder / (family.replace(" ", "_") + (".pth" if bundle.format == "torch" else ""))
        hub.save(bundle, paths[family])
    return paths


@pytest.mark.parametrize("family", ["CLIP", "DINOv2", "Qwen-VL", "S3FD", "ViT", "Wav2Lip network"])
def test_every_family_is_described(checkpoints, family, capsys):
    assert main([str(checkpoints[family])]) == 0
    lines = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines()[1:])
    assert lines["family"].strip() == family and lines["refused"].strip() == "nothing"
    assert lines["format"].startswith(hub.load(checkpoints[family]).format)
    assert "Config(" in lines["config"] and " in float32" in lines["bytes"]


def test_what_would_be_refused_is_said_as_load_says_it(checkpoints, capsys):
    path = checkpoints["ViT"]
    settings = json.loads((path / "config.json").read_text())
    try:
        (path / "config.json").write_text(json.dumps(settings | {"hidden_act": "prelu"}))
        with pytest.raises(ValueError, match="prelu") as refusal:
            hub.load(path)
        assert main([str(path)]) == 1
        assert str(refusal.value) in capsys.readouterr().out
        (path / "config.json").write_text(json.dumps(settings | {"num_hidden_layers": 3}))
        assert main([str(path)]) == 1
        assert "missing 'vit.encoder.layer.2" in capsys.readouterr().out
    finally:
        (path / "config.json").write_text(json.dumps(settings))


def test_components_one_by_one(tmp_path, capsys):
    index = {"_class_name": "Pipe", "text_encoder": ["a", "B"], "image_encoder": ["a", "B"], "scheduler": ["a", "B"]}
    hub.save(text_tower(), tmp_path / "text_encoder")
    hub.save(image_tower(), tmp_path / "image_encoder")
    (tmp_path / "scheduler").mkdir()
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    assert main([str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "Pipe, a bundle of text_encoder, image_encoder, scheduler" in out and out.count("CLIP") == 2
    assert "scheduler: files, kept as they are" in out
    (tmp_path / "text_encoder" / "model.safetensors").unlink()
    (tmp_path / "text_encoder" / "pytorch_model.bin").write_bytes(b"nothing")
    assert main([str(tmp_path)]) == 1
    assert "text_encoder: refused: " in capsys.readouterr().out


def test_conversion(checkpoints, tmp_path, capsys):
    assert main([str(checkpoints["ViT"]), "--to", "timm", "--out", str(tmp_path / "timm")]) == 0
    assert "timm" in capsys.readouterr().out
    assert hub.load(tmp_path / "timm").format == "timm"
    assert main([str(checkpoints["ViT"]), "--to", "gguf", "--out", str(tmp_path / "none")]) == 1
    assert "unknown format 'gguf', expected one of" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("content", [b"plain text", b"", None])
def test_none_is_refused_in_one_line(content, tmp_path):
    path = tmp_path / "notes.txt"
    if content is not None:
        path.write_bytes(content)
    command = [sys.executable, "-m", "omnax.hub", str(path)]
    if content == b"plain text":
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 1 and not done.stdout
        assert done.stderr.startswith("ValueError: ") and done.stderr.count("\n") == 1 and str(path) in done.stderr
    else:
        assert main(command[3:]) == 1


def test_tensors_of_nobody_are_refused(tmp_path, capsys):
    np.savez(tmp_path / "numbers.npz", a=np.zeros(3))
    assert main([str(tmp_path / "numbers.npz")]) == 1
    error = capsys.readouterr().err
    assert "is none of the known models (" in error and "DINOv2, " in error
