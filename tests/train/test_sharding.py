"""Meshes, layouts, and equality of every mesh with one device."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy_recipe as toy
from jax.sharding import PartitionSpec as P
from omnax.train.settings import EmaConfig, MeshConfig
from omnax.train.sharding import make_mesh, param_specs

PARAMS = {
    "attn": {"kernel": jax.ShapeDtypeStruct((6, 8, 2), jnp.float32)},
    "blocks": {"attn": {"kernel": jax.ShapeDtypeStruct((3, 6, 8, 2), jnp.float32)}},
    "table": jax.ShapeDtypeStruct((1, 128, 160), jnp.float32),
    "small": jax.ShapeDtypeStruct((128, 2), jnp.float32),
}


def specs(layout: str, path: str = ".*", **mesh: int) -> dict[str, P]:
    rules = ((path, layout),) if path == ".*" else ((path, layout), (".*", "-"))
    return param_specs(rules, PARAMS, make_mesh(MeshConfig(**(mesh or {"fsdp": 2, "tensor": 4}))))


def test_mesh_sizes():
    assert make_mesh(MeshConfig()).shape == {"data": 8, "fsdp": 1, "tensor": 1, "context": 1, "expert": 1}
    assert make_mesh(MeshConfig(data=1, fsdp=-1, tensor=2)).shape["fsdp"] == 4
    for wrong in (MeshConfig(data=3), MeshConfig(fsdp=3), MeshConfig(fsdp=-1)):
        with pytest.raises(ValueError, match="does not fit 8 devices"):
            make_mesh(wrong)


def test_layouts_align_to_the_right():
    found = specs("fsdp tensor -", r".*attn/kernel")
    assert found["attn/kernel"] == P(("fsdp",), ("tensor",), None)
    assert found["blocks/attn/kernel"] == P(None, ("fsdp",), ("tensor",), None)
    assert specs("data+fsdp -", "small")["small"] == P(("data", "fsdp"), None)


def test_layouts_must_divide_or_name_a_fallback():
    with pytest.raises(ValueError, match=r"sharding of 'attn/kernel': '- tensor' does not divide \(6, 8, 2\)"):
        specs("- tensor", "attn/kernel")
    assert specs("- tensor|tensor -", "attn/kernel")["attn/kernel"] == P(None, ("tensor",), None)
    with pytest.raises(ValueError, match=r"unknown mesh axes \['tensr'\]"):
        specs("tensr -", "small")
    with pytest.raises(ValueError, match="has 3 dimensions"):
        specs("- - -", "small")


def test_auto_splits_the_largest_dimension_of_large_parameters():
    found = specs("auto")
    assert found["table"] == P(None, None, "fsdp")
    assert found["small"] == P()  # below MIN_AUTO_SIZE
    assert specs("auto", fsdp=8)["table"] == P(None, None, "fsdp")


def test_optimizer_state_and_average_follow_the_parameters():
    program, state, _ = toy.run(toy.recipe(), toy.config(ema=EmaConfig(decay=0.9)), 1)
    kernel = state.params["in"]["kernel"].sharding
    assert kernel.spec == P(("fsdp",), ("tensor",))
    adam = state.opt_state[""]
    for tree in (adam.mu, adam.nu, state.ema):
        assert tree["in"]["kernel"].sharding.is_equivalent_to(kernel, 2)
    assert adam.count.sharding.is_fully_replicated
    assert program.batch["image"].sharding.spec == P(("data", "fsdp", "expert"))


@pytest.fixture(scope="module")
def one_device():
    return _ten_steps(MeshConfig(data=1), devices=1)


def _ten_steps(mesh: MeshConfig, devices: int):
    original = jax.devices
    jax.devices = lambda *args: original(*args)[:devices]
    try:
        return toy.run(toy.recipe(), toy.config(mesh=mesh, accumulation=2), 10)
    finally:
        jax.devices = original


@pytest.mark.parametrize(
    "mesh",
    [
        MeshConfig(data=8),
        MeshConfig(data=1, fsdp=8),
        MeshConfig(data=2, tensor=4),
        MeshConfig(data=2, fsdp=2, tensor=2),
    ],
    ids=["data", "fsdp", "tensor", "all"],
)
def test_every_mesh_equals_one_device(mesh, one_device):
    _, expected, expected_metrics = one_device
    _, state, metrics = _ten_steps(mesh, devices=8)
    np.testing.assert_allclose([m["loss"] for m in metrics], [m["loss"] for m in expected_metrics], atol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, np.asarray(b), atol=1e-5), state, expected)
