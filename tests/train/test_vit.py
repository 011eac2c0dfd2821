"""The ViT recipe: layout of every parameter, meshes against one device, layer decay, fitting given parameters."""

import dataclasses
import types
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh
from jax.sharding import PartitionSpec as P
from omnax import hub
from omnax.kernels.interpolation import resize_grid
from omnax.models import vit
from omnax.train.main import make_recipe
from omnax.train.optimizer import make_optimizer
from omnax.train.program import make_program
from omnax.train.recipes.vit.recipe import adapt, layer_decay_rules, load, sharding_rules
from omnax.train.rules import flatten, match_rules
from omnax.train.settings import MeshConfig
from omnax.train.sharding import MESH_AXES, make_mesh, param_specs

# Key biases have no gradient but for rounding (softmax does not see them), which Adam with its usual eps would blow up
# to steps of the learning rate.
TINY = {"model.depth": "1", "model.width": "32", "model.mlp_dim": "64", "optimizer.eps": "1e-4", "batch_size": "16"}


def shapes(config: vit.ViTConfig) -> dict:
    image = jnp.zeros((1, *config.image_size, config.num_channels))
    return jax.eval_shape(lambda: vit.ViT(config).init(jax.random.key(0), image)["params"])


def test_layout_of_every_parameter():
    config = vit.config("B/16", num_classes=1000, pool="map", class_token=False, scan=True, pre_logits_dim=768)
    mesh = AbstractMesh((2, 4, 4, 1, 1), MESH_AXES)
    found = param_specs(sharding_rules(config), shapes(config), mesh)
    fsdp, tensor = ("fsdp",), ("tensor",)
    expected = {
        "patch_embed/kernel": P(None, None, None, "fsdp"),
        "embed/pos_embed": P(None, None, "fsdp"),
        "encoder/blocks/attn/query/kernel": P(None, fsdp, tensor, None),
        "encoder/blocks/attn/query/bias": P(None, tensor, None),
        "encoder/blocks/attn/out/kernel": P(None, tensor, None, fsdp),
        "encoder/blocks/attn/out/bias": P(),
        "encoder/blocks/mlp/fc1/kernel": P(None, fsdp, tensor),
        "encoder/blocks/mlp/fc1/bias": P(None, tensor),
        "encoder/blocks/mlp/fc2/kernel": P(None, tensor, fsdp),
        "encoder/blocks/norm1/scale": P(),
        "map_head/attn/key/kernel": P(fsdp, tensor, None),
        "map_head/mlp/fc2/kernel": P(tensor, fsdp),
        "pre_logits/kernel": P("fsdp", None),
        "head/kernel": P(fsdp, tensor),
        "head/bias": P(),
        "norm/scale": P(),
    }
    assert {path: found[path] for path in expected} == expected
    assert set(found) == set(flatten(shapes(config)))


@pytest.mark.parametrize("size", vit.SIZES)
def test_published_sizes_are_divisible(size):
    """On the mesh that configs/vit.py gives them, scanned and not, with the class counts of ImageNet-1k and -21k."""
    for scan, classes in ((True, 1000), (False, 21843)):
        config = vit.config(f"{size}/14", num_classes=classes, scan=scan)
        mesh = AbstractMesh((1, 16 if config.width >= 1280 else 8, 1, 1, 1), MESH_AXES)
        param_specs(sharding_rules(config), shapes(config), mesh)


def ten_steps(mesh: MeshConfig, devices: int) -> tuple[list[float], dict]:
    config, recipe = make_recipe("configs/vit.py", TINY)
    rng = np.random.default_rng(0)
    with jax.set_mesh(make_mesh(mesh, jax.devices()[:devices])) as _:
        program = make_program(recipe, dataclasses.replace(config, accumulation=2), jax.sharding.get_mesh())
        state, losses = program.init(jax.random.key(0)), []
        for _ in range(10):
            images = rng.normal(size=(16, 8, 8, 1)).astype(np.float32)
            batch = {"image": images, "label": rng.integers(10, size=16).astype(np.int32)}
            state, metrics = program.update(state, jax.device_put(batch, program.batch["image"].sharding))
            losses.append(float(metrics["loss"]))
    return losses, jax.device_get(state.params)


@pytest.fixture(scope="module")
def one_device():
    return ten_steps(MeshConfig(), devices=1)


@pytest.mark.parametrize(
    "mesh", [MeshConfig(), MeshConfig(fsdp=8), MeshConfig(data=2, fsdp=2, tensor=2)], ids=["data", "fsdp", "tensor"]
)
def test_every_mesh_equals_one_device(mesh, one_device):
    losses, params = ten_steps(mesh, devices=8)
    np.testing.assert_allclose(losses, one_device[0], atol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), params, one_device[1])


def test_layer_decay():
    """Depth 2, decay 0.5: embeddings 1/8, blocks 1/4 and 1/2, everything behind them 1."""
    for scan, blocks in (
        (False, {"encoder/blocks_0": 0.25, "encoder/blocks_1": 0.5}),
        (True, {"encoder/blocks": (0.25, 0.5)}),
    ):
        config = dataclasses.replace(make_recipe("configs/vit.py", TINY)[0].model, depth=2, scan=scan)
        found = match_rules(layer_decay_rules(config, 0.5), flatten(shapes(config)), "x")
        expected = blocks | {"embed": 0.125, "patch_embed": 0.125, "norm": 1.0, "head": 1.0}
        for prefix, value in expected.items():
            assert {v for path, v in found.items() if path.startswith(f"{prefix}/")} == {value}
    config, recipe = make_recipe("configs/vit.py", TINY | {"layer_decay": "0.5"})
    make_optimizer(recipe.players[0].optimizer, shapes(config.model), total_steps=10)


def test_given_parameters_are_fitted():
    """A 2x2 grid with a class position becomes 4x4: the class row as it was, the mean kept; layers are stacked."""
    small = vit.ViTConfig(width=8, depth=2, num_heads=2, mlp_dim=16, patch_size=(4, 4), image_size=(8, 8))
    large = dataclasses.replace(small, image_size=(16, 16), scan=True)
    params = vit.ViT(small).init(jax.random.key(0), jnp.zeros((1, 8, 8, 3)))["params"]
    fitted = adapt(params, large)
    assert {p: x.shape for p, x in flatten(fitted).items()} == {p: x.shape for p, x in flatten(shapes(large)).items()}
    old, new = params["embed"]["pos_embed"], fitted["embed"]["pos_embed"]
    np.testing.assert_array_equal(new[:, 0], old[:, 0])
    np.testing.assert_allclose(new[:, 1:].mean(1), old[:, 1:].mean(1), atol=1e-5)
    back = adapt(fitted, large)
    jax.tree.map(np.testing.assert_array_equal, back, fitted)
    wrong = params | {"embed": params["embed"] | {"pos_embed": jnp.zeros((1, 4, 8))}}
    with pytest.raises(ValueError, match=r"pos_embed has 3 patch positions, expected a square or those .* \(4, 4\)"):
        adapt(wrong, large)


def test_given_parameters_of_a_wide_grid():
    """A grid of another run is known only where the number of patches tells it; published weights say theirs."""
    wide = vit.ViTConfig(width=8, depth=1, num_heads=2, mlp_dim=16, patch_size=(4, 4), image_size=(8, 12))
    params = vit.ViT(wide).init(jax.random.key(0), jnp.zeros((1, 8, 12, 3)))["params"]
    jax.tree.map(np.testing.assert_array_equal, adapt(params, wide), params)
    large = dataclasses.replace(wide, image_size=(16, 24))
    with pytest.raises(ValueError, match="pos_embed has 6 patch positions"):
        adapt(params, large)
    patches = params["embed"]["pos_embed"][0, 1:].reshape(2, 3, 8)
    table = adapt(params, large, (2, 3))["embed"]["pos_embed"]
    expected = resize_grid(patches, (4, 6), large.pos_interpolation).reshape(24, 8)
    np.testing.assert_array_equal(table[0, 1:], expected)


def test_published_weights_that_are_another_function_are_warned_of(monkeypatch, caplog):
    config = vit.ViTConfig(width=8, depth=1, num_heads=2, mlp_dim=16, patch_size=(4, 4), image_size=(8, 8))
    published = types.SimpleNamespace(
        params={"head": {"bias": 1}},
        config=dataclasses.replace(config, activation="gelu", eps=1e-12),
        processor=None,
    )
    monkeypatch.setattr(hub, "load", lambda path: published)
    settings: Any = types.SimpleNamespace(model=config, data=types.SimpleNamespace(preprocess=("value_range",)))
    assert load("somewhere", settings) == {"head": {"bias": 1}}
    assert "published with activation='gelu', the config has 'gelu_tanh'" in caplog.text and "eps=1e-12" in caplog.text
