"""Files in half precision: what is made of their tensors is what it would be of the same numbers in float32."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from omnax import hub
from omnax.models import dinov2, vit
from omnax.models.published import floats, integers

from . import blanks


def drawn(module, format, **inputs):
    """A bundle whose numbers all fit into bfloat16."""
    bundle = blanks.blank(module, format, np.random.default_rng(0), **inputs)
    return dataclasses.replace(bundle, params=half(bundle.params))


def half(tree):
    return jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), tree)


def single(tree):
    return jax.tree.map(lambda leaf: np.asarray(leaf, np.float32), tree)


def models():
    fields = blanks.TRUNK | {"image_size": (16, 16), "patch_size": (4, 4)}
    plain = vit.ViTConfig(**fields, num_classes=5, activation="gelu", eps=1e-6)
    dino = dinov2.Dinov2Config(32, 2, 2, 128, 14, image_size=56, num_registers=2)
    image = {"image": floats(1, 16, 16, 3)}
    trunk = dataclasses.replace(blanks.IMAGE.trunk, image_size=(16, 16))
    pair = blanks.clip.CLIPConfig(dataclasses.replace(blanks.IMAGE, trunk=trunk), blanks.TEXT)
    return {
        "ViT": (drawn(vit.ViT(plain), "transformers", **image), {"image_size": (24, 16)}),
        "ViT, other patches": (drawn(vit.ViT(plain), "timm", **image), {"patch_size": (8, 8)}),
        "DINOv2": (drawn(dinov2.Dinov2(dino), "timm", image=floats(1, 56, 56, 3)), {"image_size": 70}),
        "CLIP": (
            drawn(blanks.clip.CLIP(pair), "open_clip", tokens=integers(1, 10), **image),
            {"image_size": (24, 16), "context_length": 14},
        ),
    }


@pytest.mark.parametrize("name", ["ViT", "ViT, other patches", "DINOv2", "CLIP"])
def test_resized_tables_are_those_of_a_file_in_float32(tmp_path, name):
    bundle, overrides = models()[name]
    loaded = {}
    for dtype, params in (("half", bundle.params), ("single", single(bundle.params))):
        hub.save(dataclasses.replace(bundle, params=params), tmp_path / dtype)
        loaded[dtype] = hub.load(tmp_path / dtype, **overrides).params
    jax.tree.map(np.testing.assert_array_equal, single(loaded["half"]), loaded["single"])
    resized = {leaf.dtype for leaf in jax.tree.leaves(loaded["half"])}
    assert resized == {jnp.dtype("float32"), jnp.dtype("bfloat16")}  # the others stay as the file has them
    asked = hub.load(tmp_path / "half", dtype=jnp.bfloat16, **overrides).params
    assert {leaf.dtype for leaf in jax.tree.leaves(asked)} == {jnp.dtype("bfloat16")}


def test_positions_that_a_format_stores_elsewhere_are_not_rounded(tmp_path):
    """DINOv2's class token takes its position with it to timm, big_vision's class token gets one in transformers."""
    bundle, _ = models()["DINOv2"]
    own = dinov2.Dinov2Config(32, 2, 2, 128, 14, image_size=56, num_registers=2, class_position=True)
    bundle = drawn(dinov2.Dinov2(own), "transformers", image=floats(1, 56, 56, 3))
    hub.save(bundle, tmp_path / "timm", format="timm")
    embed = single(bundle.params["embed"])
    again = hub.load(tmp_path / "timm").params["embed"]
    np.testing.assert_array_equal(again["cls_token"], embed["cls_token"] + embed["pos_embed"][:, :1])
