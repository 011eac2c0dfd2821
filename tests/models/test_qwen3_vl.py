"""Experts over devices, DeepStack in scanned stacks, figures of the sizes, and configs that do not fit."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec
from omnax import hub
from omnax.configs.qwen3_vl import tiny
from omnax.hub.families.qwen_vl import qwen3 as formats
from omnax.models.__main__ import main
from omnax.models.qwen_vl.deepstack import DeepStackConfig
from omnax.models.qwen_vl.experts import Experts
from omnax.models.qwen_vl.language import TextConfig, add_deep
from omnax.models.qwen_vl.model import QwenVL, init_params
from omnax.models.qwen_vl.qwen3 import QWEN3
from omnax.train.recipes.qwen_vl.recipe import sharding_rules
from omnax.train.rules import flatten
from omnax.train.sharding import MeshConfig, make_mesh, param_specs

EXPERTS = Experts(8, 2, 12, "silu", jax.nn.initializers.normal(0.3))
RNG = np.random.default_rng(0)
X = jnp.asarray(RNG.normal(size=(8, 6, 16)), jnp.float32)
MASK = jnp.asarray(np.arange(6) < RNG.integers(1, 7, (8, 1)))
WANTED = RNG.normal(size=X.shape).astype(np.float32)


@functools.cache
def parameters(load):
    """ "even", or with a router that sends (nearly) every token to experts 3 and 5."""
    params = EXPERTS.init(jax.random.key(0), X, MASK)["params"]
    if load == "all to two":
        kernel = np.zeros((16, 8), np.float32)
        return params | {"router": {"kernel": kernel + 1e-3 * RNG.normal(size=kernel.shape).astype(np.float32)}}
    return params


def run(params, x, mask):
    def loss(params, x):
        y, load = EXPERTS.apply({"params": params}, x, mask)
        return (y * WANTED[: len(x)]).sum(), (y, load)

    (_, out), grads = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(params, x)
    return out, grads


@pytest.mark.parametrize("load", ["even", "all to two"])
@pytest.mark.parametrize("axes", [{"expert": 8}, {"expert": 2, "fsdp": 2, "tensor": 2}, {"expert": 4, "context": 2}])
def test_experts_over_eight_devices_equal_one(axes, load):
    """Values and gradients: tokens gathered and scattered back, columns over `tensor`, rows kept where they are."""
    params = parameters(load)
    expected = jax.jit(run)(params, X, MASK)
    mesh = make_mesh(MeshConfig(**{"data": 1} | axes))
    with jax.set_mesh(mesh):
        got = jax.jit(run)(params, X, MASK)
    for one, other in zip(jax.tree.leaves(expected), jax.tree.leaves(got), strict=True):
        np.testing.assert_allclose(other, one, atol=1e-5 * max(1, np.abs(one).max()))


def test_a_batch_that_does_not_divide_stays_whole():
    """As in decoding one prompt: every device does its experts' part of all tokens."""
    params = parameters("even")
    expected, _ = jax.jit(run)(params, X[:1], MASK[:1])
    with jax.set_mesh(make_mesh(MeshConfig(data=1, expert=8))):
        got, _ = jax.jit(run)(params, X[:1], MASK[:1])
    np.testing.assert_allclose(got[0], expected[0], atol=1e-5)


def test_experts_that_do_not_divide_are_named():
    mesh = make_mesh(MeshConfig(data=1, expert=3, fsdp=2), jax.devices()[:6])
    with jax.set_mesh(mesh), pytest.raises(ValueError, match="8 experts are not divisible by the 3 devices"):
        jax.eval_shape(run, parameters("even"), X, MASK)


@pytest.mark.parametrize("format", formats.FORMATS)
def test_weights_stream_into_an_expert_sharded_mesh(tmp_path, format):
    """From every layout, scanned or not, each expert on its device; saved again they are the same."""
    model = QwenVL(tiny("tiny-moe"))
    params = init_params(model, jax.random.key(0))
    hub.save(hub.Bundle(model, params, model.config, {}, format), tmp_path / "in")
    mesh = make_mesh(MeshConfig(data=1, expert=4, fsdp=2))
    rules = functools.partial(param_specs, sharding_rules(model.config))
    for scan in (False, True):
        bundle = hub.load(tmp_path / "in", mesh=mesh, rules=rules, scan=scan)
        assert bundle.format == format
        kernels = {path: leaf for path, leaf in flatten(bundle.params).items() if path.endswith("/mlp/down")}
        assert kernels
        for leaf in kernels.values():
            spec = PartitionSpec(*[None] * scan, "expert", None, "fsdp")
            assert leaf.sharding.is_equivalent_to(jax.NamedSharding(mesh, spec), leaf.ndim)
            assert leaf.addressable_shards[0].data.shape[scan] == 2
    hub.save(bundle, tmp_path / "out")
    again = hub.load(tmp_path / "out").params
    jax.tree.map(np.testing.assert_array_equal, again, params)


def test_deepstack_features_are_added_behind_the_first_layers_only():
    x, deep = jnp.ones((1, 2, 3)), jnp.arange(2.0)[:, None, None, None] + jnp.ones((2, 1, 2, 3))
    for number, expected in enumerate([2, 3, 1]):
        np.testing.assert_array_equal(add_deep(x, np.int64(number), deep), np.full(x.shape, expected))
        scanned = jax.jit(lambda number: add_deep(x, number, deep))(jnp.int32(number))
        np.testing.assert_array_equal(scanned, np.full(x.shape, expected))
    assert add_deep(x, np.int64(0), None) is x


def test_the_notes_figures_are_explained(capsys):
    assert main(["qwen3_vl:235b-a22b"]) == 0
    lines = capsys.readouterr().out.splitlines()
    for words, number in {
        '"ViT", 576.39 M': "576,388,336 (576.39 M)",
        '"merger", 160.50 M': "160,496,896 (160.50 M)",
        '"LM without lm_head", 233.85 B': "233,848,974,848 (233.85 B)",
        '"lm_head", 622.33 M': "622,329,856 (622.33 M)",
        '"total", 235.09 B': "235,093,634,560 (235.09 B)",
        "everything": "235,670,022,896 (235.67 B)",
    }.items():
        assert any(words in line and line.endswith(number) for line in lines), words


@pytest.mark.parametrize(
    "fields,words",
    [
        ({"num_experts": 4, "experts_per_token": 5, "expert_dim": 8}, "experts_per_token 5 .* num_experts 4"),
        ({"num_experts": 4, "experts_per_token": 2}, "expert_dim 0"),
        ({"mrope_section": (24, 20, 16)}, "does not sum to half of head_dim"),
    ],
)
def test_language_models_that_do_not_fit_are_named(fields, words):
    sizes = {"vocab_size": 9, "width": 8, "depth": 1, "num_heads": 1, "num_kv_heads": 1, "head_dim": 128, "mlp_dim": 8}
    with pytest.raises(ValueError, match=words):
        TextConfig(**sizes | QWEN3 | fields)


def test_encoders_that_do_not_fit_are_named():
    with pytest.raises(ValueError, match=r"deepstack_blocks \(3, 3\) are not all different"):
        DeepStackConfig(deepstack_blocks=(3, 3))
    with pytest.raises(ValueError, match=r"deepstack_blocks \(27,\) are not .* among the 27 blocks"):
        DeepStackConfig(deepstack_blocks=(27,))
    with pytest.raises(ValueError, match="width 1000 is not divisible"):
        DeepStackConfig(width=1000)
