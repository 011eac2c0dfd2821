"""Runs, weights and data in a bucket: a store of the tests' own that the real clients speak to (object_store.py)."""

import dataclasses
import itertools
import json

import jax
import numpy as np
import pytest
from omnax import hub
from omnax.hub.__main__ import main as describe
from omnax.storage import paths
from omnax.storage.paths import as_path

from .blanks import image_tower, one_of_each, text_tower

NUMBERS = itertools.count()
# aiohttp says so of gcsfs's uploads of a megabyte and more.
pytestmark = pytest.mark.filterwarnings("ignore:Sending a large body:ResourceWarning")


@pytest.fixture
def place(bucket):
    """A folder of its own in the bucket, as a user writes it."""
    return f"gs://bucket/test{next(NUMBERS)}"


@pytest.mark.parametrize("family", ["CLIP", "DINOv2", "Qwen-VL", "S3FD", "ViT", "Wav2Lip network"])
def test_a_checkpoint_of_every_family_goes_to_a_bucket_and_back(family, place, tmp_path, capsys):
    bundle = one_of_each()[family]
    name = "weights.pth" if bundle.format == "torch" else "weights"
    path = f"{place}/{name}"
    for folder in (place, str(tmp_path)):
        hub.save(bundle, f"{folder}/{name}", max_shard_size=100_000)
    read, local = hub.load(path), hub.load(tmp_path / name)
    assert (read.config, read.processor) == (local.config, local.processor)
    jax.tree.map(np.testing.assert_array_equal, read.params, local.params)
    assert describe([path]) == 0 and f"family    {family}" in capsys.readouterr().out


def test_shards_their_index_and_npz(place, bucket):
    bundle = one_of_each()["ViT"]
    hub.save(bundle, f"{place}/sharded", max_shard_size=2000)
    names = bucket.names("bucket", place.removeprefix("gs://bucket/"))
    assert sum(name.endswith(".safetensors") for name in names) > 3
    mesh = jax.make_mesh((8,), ("fsdp",), axis_types=(jax.sharding.AxisType.Auto,))
    sharded = hub.load(f"{place}/sharded", mesh=mesh)
    jax.tree.map(np.testing.assert_array_equal, sharded.params, bundle.params)

    hub.save(bundle, f"{place}/sharded")  # one file in place of many: the old shards and their index go
    names = bucket.names("bucket", f"{place.removeprefix('gs://bucket/')}/sharded/model")
    assert [name.rpartition("/")[2] for name in names] == ["model.safetensors"]

    config = dataclasses.replace(bundle.config, activation="gelu_tanh")
    hub.save(dataclasses.replace(bundle, config=config), f"{place}/weights.npz", "npz")
    read = hub.load(f"{place}/weights.npz", num_heads=2, activation="gelu_tanh")
    jax.tree.map(np.testing.assert_array_equal, read.params, bundle.params)


def test_the_command_converts_within_the_bucket(place, bucket, capsys):
    hub.save(one_of_each()["ViT"], f"{place}/old")
    assert describe([f"{place}/old", "--to", "timm", "--out", f"{place}/new"]) == 0
    assert "format    timm" in capsys.readouterr().out
    assert hub.load(f"{place}/new").format == "timm"


def test_components(place, tmp_path):
    pipe = tmp_path / "pipe"
    index = {"_class_name": "Pipe", "text_encoder": ["a", "B"], "image_encoder": ["a", "B"], "scheduler": ["a", "B"]}
    hub.save(text_tower(), pipe / "text_encoder")
    hub.save(image_tower(), pipe / "image_encoder")
    (pipe / "scheduler").mkdir()
    (pipe / "scheduler" / "scheduler_config.json").write_text("{}")
    (pipe / "model_index.json").write_text(json.dumps(index))
    bundle = hub.load(pipe)
    hub.save(bundle, f"{place}/pipe")
    read = hub.load(f"{place}/pipe")
    assert read.components.keys() == bundle.components.keys() and read.processor == bundle.processor
    jax.tree.map(np.testing.assert_array_equal, read.params, bundle.params)
    assert describe([f"{place}/pipe"]) == 0


def test_one_line_says_what_is_wrong_with_a_place(place, capsys, monkeypatch):
    for path, said in {
        f"{place}/nowhere": "no such file or directory: 'gs://bucket/",
        "ftp://host/model": "'ftp://host/model' begins with ftp://, expected a local path or gs://, s3://, az://",
        "gs://": "'gs://' names no bucket",
        "s3://bucket/model": "s3:// needs the package s3fs: pip install 's3fs'",
    }.items():
        assert describe([path]) == 1
        assert capsys.readouterr().err.startswith(f"ValueError: {said}")
    monkeypatch.setitem(paths.CLIENTS, "gs", ("no_such_module", "omnax[gcs]"))
    paths._check_client.cache_clear()
    with pytest.raises(ValueError, match=r"gs:// needs the package .*: pip install 'omnax\[gcs\]'"):
        hub.load(place)
    paths._check_client.cache_clear()


def test_what_is_damaged_in_a_bucket_is_named(place):
    path = as_path(f"{place}/model.safetensors")
    for data in (b"", b"\x08\x00\x00\x00\x00\x00\x00\x00{}", b"PK\x03\x04 nothing else"):
        path.write_bytes(data)
        with pytest.raises(ValueError, match=r"model\.safetensors"):
            hub.load(path)
