"""The recipe of Qwen-VL: packing, weighting, micro-batches, sharding, published configs."""

import jax
import numpy as np
import pytest
from omnax.configs.qwen_vl import RECIPES
from omnax.train.config import build, run_config_file, typed
from omnax.train.optimizer import make_optimizer
from omnax.train.program import make_program
from omnax.train.recipes import qwen_vl as recipe_module
from omnax.train.rules import flatten
from omnax.train.sharding import MeshConfig, make_mesh, param_specs

SMALL = {
    "text": {"width": 32, "depth": 2, "num_heads": 4, "num_kv_heads": 2, "head_dim": 16, "mlp_dim": 48},
    "vision": {"width": 32, "depth": 2, "num_heads": 2, "mlp_dim": 48, "out_width": 32, "full_blocks": (1,)},
}


def config(**overrides):
    """The smoke run's with a smaller model."""
    settings = run_config_file("configs/qwen_vl.py:stage=2").to_dict()
    model = settings["model"]
    model |= {tower: model[tower] | fields for tower, fields in SMALL.items()}
    data = settings["data"] | {"row": {"tokens": 96, "patches": 96, "segments": 8, "frames": 8}, "tests": ()}
    optimizer = settings["optimizer"]
    settings |= {"model": model, "data": data, "optimizer": optimizer, "batch_size": 8, "total_steps": 4}
    return build(recipe_module.Config, settings | overrides)


def batches(c, number):
    stream = recipe_module.make_recipe(c).data((0, 1))
    return [next(stream) for _ in range(number)]


def run(c, data, devices=1, mesh=None):
    """First state, last state and metrics after training on these batches."""
    mesh = make_mesh(mesh or MeshConfig(), jax.devices()[:devices])
    with jax.set_mesh(mesh):
        program = make_program(recipe_module.make_recipe(c), c, mesh)
        first = state = program.init(jax.random.key(0))
        first, metrics = jax.device_get(first), []
        for batch in data:
            batch = {name: jax.device_put(batch[name], like.sharding) for name, like in program.batch.items()}
            state, out = program.update(state, batch)
            metrics.append(jax.device_get(out))
    return first, jax.device_get(state), metrics


@pytest.fixture(scope="module")
def data():
    return batches(config(), 2)


@pytest.fixture(scope="module")
def trained(data):
    return run(config(weighting="sqrt"), data)


@pytest.mark.parametrize("weighting", ["token", "sqrt", "sample"])
def test_packed_loss_equals_unpacked_loss(weighting):
    """Three conversations in one row, and each in a row of its own."""
    c = config(weighting=weighting)
    recipe = recipe_module.make_recipe(c)
    params, _ = recipe.init(jax.random.key(0))
    packer = recipe_module.make_packer(c)
    streams = [
        recipe_module.open_stream({"name": "drawn", "task": task, "size": 9}, "train")
        for task in ("direction", "describe", "text")
    ]
    examples = [packer.read(packer.prepare(stream[0])) for stream in streams]
    loss = jax.jit(
        lambda batch: recipe.players[0].loss(params, None, recipe_module.prepare(c, None, batch, None), None)[0]
    )
    packed, unpacked = (packer.batch(rows) for rows in ([examples, [], []], [[example] for example in examples]))
    np.testing.assert_allclose(loss(packed), loss(unpacked), rtol=1e-5)


def test_micro_batches_have_one_denominator(trained, data):
    _, state, metrics = run(config(weighting="sqrt", accumulation=4), data)
    for got, expected in zip(metrics, trained[2], strict=True):
        np.testing.assert_allclose([got["loss"], got["accuracy"]], [expected["loss"], expected["accuracy"]], rtol=1e-4)
    for (path, value), expected in zip(flatten(state.params).items(), flatten(trained[1].params).values(), strict=True):
        np.testing.assert_allclose(value, expected, atol=5e-5, err_msg=path)


def test_eight_devices_equal_one(trained, data):
    mesh = MeshConfig(data=2, fsdp=2, tensor=2)
    _, state, metrics = run(config(weighting="sqrt"), data, 8, mesh)
    for got, expected in zip(metrics, trained[2], strict=True):
        for name, value in expected.items():
            np.testing.assert_allclose(got[name], value, rtol=1e-3, atol=1e-6, err_msg=name)
    for (path, value), expected in zip(flatten(state.params).items(), flatten(trained[1].params).values(), strict=True):
        np.testing.assert_allclose(value, expected, atol=1e-4, err_msg=path)


PUBLISHED = [(recipe, stage) for recipe, stages in RECIPES.items() for stage in stages]


@pytest.mark.parametrize(("recipe", "stage"), PUBLISHED)
def test_published_configs_are_whole(recipe, stage):
    """Every rule matches, every shape fits: the abstract state of each stage."""
    c = typed(recipe_module.Config, run_config_file(f"configs/qwen_vl.py:size=7b,recipe={recipe},stage={stage}"), {})
    made = recipe_module.make_recipe(c)
    params, _ = jax.eval_shape(made.init, jax.random.key(0))
    optimizer = make_optimizer(c.optimizer, params, c.total_steps)
    mesh = make_mesh(MeshConfig(data=1, fsdp=2, tensor=4), jax.devices())
    param_specs(made.sharding, params, mesh)
    assert made.flops_per_step > 1e15
    frozen = {"1": "language/", "sft": "visual/encoder/"}.get(stage)
    assert all(
        (path in optimizer.trainable) != bool(frozen and path.startswith(frozen))
        for path in flatten(params)
        if "merger" not in path and "patch_embed" not in path
    )
    assert c.data.row.tokens == (32768 if (recipe, stage) == ("published", "3") else 8192)
    weights = {stream["path"]: stream["weight"] for stream in c.data.streams}
    if stage in ("3", "sft"):  # as many texts as others
        texts = weights["data/texts.jsonl"]
        assert texts == sum(weights.values()) - texts
    assert c.model.vision.global_query_every == (4 if recipe == "notes" else 0)


def test_unknown_stage_is_named():
    with pytest.raises(
        ValueError, match=r"expected one of \['recipe=published,stage=1'.* got recipe=published,stage=4"
    ):
        run_config_file("configs/qwen_vl.py:stage=4")
