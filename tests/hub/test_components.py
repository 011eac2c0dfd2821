"""Directories of several models (`model_index.json`): loaded, run, sharded, saved by component."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from omnax import hub

from .blanks import image_tower, text_tower

INDEX = {
    "_class_name": "StableDiffusionPipeline",
    "_diffusers_version": "0.42.1",
    "text_encoder": ["transformers", "CLIPTextModelWithProjection"],
    "image_encoder": ["transformers", "CLIPVisionModelWithProjection"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "scheduler": ["diffusers", "PNDMScheduler"],
    "safety_checker": [None, None],  # published, and not there
    "requires_safety_checker": False,  # a setting, no component
}
FILES = {"tokenizer": {"vocab.json": b'{"a": 0}', "merges.txt": b"a b\n"}, "scheduler": {"s.json": b'{"beta": 0.1}\n'}}


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    """A directory with two towers of drawn numbers, a tokeniser and a scheduler."""
    folder, rng = tmp_path_factory.mktemp("pipeline"), np.random.default_rng(0)
    hub.save(text_tower(rng), folder / "text_encoder")
    hub.save(image_tower(rng), folder / "image_encoder")
    for component, files in FILES.items():
        (folder / component).mkdir()
        for name, content in files.items():
            (folder / component / name).write_bytes(content)
    (folder / "model_index.json").write_text(json.dumps(INDEX, indent=2) + "\n")
    return folder


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_components_load_run_and_save_byte_for_byte(pipeline, tmp_path):
    bundle = hub.load(pipeline)
    assert list(bundle.components) == ["text_encoder", "image_encoder"] and bundle.format == "diffusers"
    assert bundle.processor == FILES and bundle.metadata == INDEX
    tokens, image = jnp.array([[3, 4, 49]]), jnp.ones((1, 8, 8, 3))
    for name, inputs in (("text_encoder", tokens), ("image_encoder", image)):
        alone = hub.load(pipeline / name)
        expected = alone.model.apply({"params": alone.params}, inputs)["projected"]
        together = bundle.model.apply({"params": bundle.params}, name, inputs)["projected"]
        np.testing.assert_array_equal(together, expected)
        assert np.abs(expected).max() > 0.1
    hub.save(bundle, tmp_path / "saved")
    saved = contents(tmp_path / "saved")
    assert saved == contents(pipeline)
    hub.save(hub.load(tmp_path / "saved"), tmp_path / "saved")  # over what is there
    assert contents(tmp_path / "saved") == saved


def test_overrides_are_named_as_components(pipeline):
    bundle = hub.load(pipeline, image_encoder={"image_size": 16}, text_encoder={"scan": True})
    assert bundle.config["image_encoder"].trunk.image_size == (16, 16) and bundle.config["text_encoder"].scan
    assert bundle.params["image_encoder"]["trunk"]["embed"]["pos_embed"].shape == (1, 17, 16)
    assert "blocks" in bundle.params["text_encoder"]["encoder"]
    with pytest.raises(ValueError, match=r"unknown component 'text_encode' .*nearest: 'text_encoder'"):
        hub.load(pipeline, text_encode={"scan": True})
    with pytest.raises(ValueError, match=r"component 'text_encoder': unknown field 'scam'.*'scan'"):
        hub.load(pipeline, text_encoder={"scam": True})


def test_every_component_is_sharded(pipeline, tmp_path):
    mesh = jax.make_mesh((8,), ("fsdp",), axis_types=(AxisType.Auto,))
    bundle = hub.load(pipeline, mesh=mesh, dtype=jnp.bfloat16)
    for name in ("text_encoder", "image_encoder"):
        leaves = jax.tree.leaves(bundle.params[name])
        assert {leaf.dtype for leaf in leaves} == {jnp.dtype(jnp.bfloat16)}
        assert any(not leaf.sharding.is_fully_replicated for leaf in leaves), name
        assert all(leaf.sharding.mesh == mesh for leaf in leaves)
    hub.save(hub.load(pipeline, mesh=mesh), tmp_path / "saved")
    assert contents(tmp_path / "saved") == contents(pipeline)


@pytest.mark.parametrize(
    "component,message",
    [
        ("unet", "names the component 'unet', and there is no such folder"),
        ("../elsewhere", r"names the component '\.\./elsewhere', and there is no such folder"),
    ],
)
def test_missing_components_are_named(pipeline, tmp_path, component, message):
    (tmp_path / "elsewhere").mkdir()
    folder = tmp_path / "damaged"
    hub.save(hub.load(pipeline), folder)
    (folder / "model_index.json").write_text(json.dumps(INDEX | {component: ["diffusers", "UNet2DConditionModel"]}))
    with pytest.raises(ValueError, match=message):
        hub.load(folder)


def test_damage_is_said_with_its_component_and_formats_are_checked(pipeline, tmp_path):
    bundle = hub.load(pipeline)
    hub.save(bundle, tmp_path / "damaged")
    (tmp_path / "damaged" / "text_encoder" / "model.safetensors").write_bytes(b"no tensors")
    with pytest.raises(ValueError, match=r"component 'text_encoder': .*model\.safetensors is not a tensor file"):
        hub.load(tmp_path / "damaged")
    with pytest.raises(ValueError, match="unknown format 'timm' of several components, expected 'diffusers'"):
        hub.save(bundle, tmp_path / "other", "timm")
    assert not (tmp_path / "other").exists()
