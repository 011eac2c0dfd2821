"""Whatever is named in it, and however often: no message has 2,000 characters."""

import json
import logging

import numpy as np
import pytest
import safetensors.numpy
from omnax import hub
from omnax.data import captions, sources
from omnax.hub.__main__ import main as hub_command
from omnax.infer.__main__ import main as infer
from omnax.models.messages import BoundedFormatter, bounded, bounded_errors
from omnax.train import main as train

LONG = "x" * 9_999
MANY = [f"{i:0200d}" for i in range(999)]


def weights(folder, names, config=None):
    folder.mkdir()
    safetensors.numpy.save_file({name: np.zeros(1, np.float32) for name in names}, folder / "model.safetensors")
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    return folder


def files(folder):
    folder.mkdir()
    for name in MANY:
        (folder / name).write_bytes(b"")
    return folder


def sharded(folder):
    folder.mkdir()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": LONG}}))
    return folder


VIT = {"model_type": "vit", "architectures": ["ViTModel"]}
LOADED = {
    "tensors of no model": lambda path: hub.load(weights(path / "a", MANY)),
    "tensors of another model": lambda path: hub.load(weights(path / "a", MANY, VIT)),
    "a long tensor": lambda path: hub.load(weights(path / "a", [LONG], VIT)),
    "keys of a config": lambda path: hub.load(weights(path / "a", ["a"], VIT | dict.fromkeys(MANY, 1))),
    "a value of a config": lambda path: hub.load(weights(path / "a", ["a"], VIT | {"hidden_act": LONG})),
    "a model type": lambda path: hub.load(weights(path / "a", ["a"], {"model_type": LONG})),
    "a folder of files": lambda path: hub.load(files(path / "a")),
    "a shard's name": lambda path: hub.load(sharded(path / "a")),
    "a path": lambda path: hub.load(LONG),
    "a deep path": lambda path: hub.load("/".join(["a" * 200] * 99)),
    "an override": lambda path: hub.load(weights(path / "a", ["a"], VIT), **{LONG: 1}),
    "a format": lambda path: hub.save(hub.Bundle(None, {}, None), path / "a", LONG),
    "a data set": lambda path: sources.source({"name": LONG, "data_dir": path}, "train"),
    "a folder of images": lambda path: sources.source({"name": "folder", "path": LONG}, "train"),
    "captions": lambda path: captions.caption_source({"name": "captions", "path": LONG}, "train"),
    "shards": lambda path: captions.caption_source({"name": "tar", "path": LONG}, "train"),
    "a config file": lambda path: train.make_recipe(f"{LONG}.py", {}),
    "an argument": lambda path: train.make_recipe(f"configs/vit.py:{LONG}=1", {}),
    "a key": lambda path: train.make_recipe("configs/vit.py", {LONG: "1"}),
    "a value": lambda path: train.make_recipe("configs/vit.py", {"batch_size": LONG}),
    "a recipe": lambda path: train.make_recipe("configs/vit.py", {"recipe": LONG}),
    "a regular expression": lambda path: train.make_recipe("configs/vit.py", {"init_from.skip": f"('({LONG}',)"}),
}


@pytest.mark.parametrize("name", LOADED)
def test_errors(tmp_path, name):
    with pytest.raises(ValueError) as caught:
        LOADED[name](tmp_path)
    assert len(str(caught.value)) < 2000


COMMANDS = {
    "train": lambda path: train.main(["--config", f"{LONG}.py", "--workdir", str(path)]),
    "train settings": lambda path: train.main(["--config", "configs/vit.py", "--workdir", str(path), f"--{LONG}"]),
    "hub": lambda path: hub_command([str(weights(path / "a", MANY))]),
    "infer": lambda path: infer(["classify", "--weights", str(weights(path / "a", MANY)), str(path)]),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_commands(tmp_path, name, capsys):
    assert COMMANDS[name](tmp_path) == 1
    error = capsys.readouterr().err
    assert error.startswith("ValueError: ") and len(error) < 2000


def test_what_is_bounded_and_what_stays():
    assert bounded("short") == "short"
    assert bounded("a" * 5000 + "b" * 5000).startswith("aaa") and bounded("a" * 5000 + "b" * 5000).endswith("bbb")
    with pytest.raises(ValueError, match="x: No such file") as caught, bounded_errors():
        raise FileNotFoundError(2, "No such file", LONG)
    assert len(str(caught.value)) < 2000
    with pytest.raises(KeyError, match="'a'"), bounded_errors():
        raise KeyError("a")
    record = logging.LogRecord("omnax", logging.WARNING, __file__, 1, "%s", (LONG,), None)
    assert len(BoundedFormatter("%(levelname)s: %(message)s").format(record)) < 2000
