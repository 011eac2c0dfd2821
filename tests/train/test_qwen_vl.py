"""The recipe of Qwen-VL: packing, weighting, micro-batches, sharding, frozen parts, resume, low rank, configs."""

import json
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from omnax import hub
from omnax.configs import qwen3_vl as qwen3_config
from omnax.configs.qwen_vl import RECIPES
from omnax.models.qwen_vl.model import QwenVL, forward
from omnax.train import main
from omnax.train.checkpoint import Checkpointer
from omnax.train.config import build, run_config_file, typed
from omnax.train.optimizer import make_optimizer
from omnax.train.program import make_program
from omnax.train.recipes.qwen_vl import recipe as recipe_module
from omnax.train.rules import flatten, unflatten
from omnax.train.sharding import MeshConfig, make_mesh, param_specs

SMALL = {
    "text": {"width": 32, "depth": 2, "num_heads": 4, "num_kv_heads": 2, "head_dim": 16, "mlp_dim": 48},
    "vision": {"width": 32, "depth": 2, "num_heads": 2, "mlp_dim": 48, "out_width": 32, "full_blocks": (1,)},
}


SMALL_QWEN3 = {
    "text": SMALL["text"] | {"num_experts": 4, "expert_dim": 24},
    "vision": SMALL["vision"] | {"full_blocks": None, "deepstack_blocks": (0,)},
}


def config(file="configs/qwen_vl.py:stage=2", small=SMALL, **overrides):
    """The smoke run's with a smaller model."""
    settings = run_config_file(file).to_dict()
    model = settings["model"]
    for tower, fields in small.items():
        kept = {name: value for name, value in (model[tower] | fields).items() if value is not None}
        model |= {tower: kept}
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


@pytest.mark.parametrize("arg", ["stage=3", "recipe=notes,stage=2"])
def test_smoke_batches_have_the_declared_shapes(arg):
    """And the loss takes them (traced, not run)."""
    _, recipe = main.make_recipe(f"configs/qwen_vl.py:{arg}", {"batch_size": "2"})
    batch = next(recipe.data((0, 1)))
    declared = {name: (like.shape, like.dtype) for name, like in recipe.batch.items()}
    assert {name: (array.shape, array.dtype) for name, array in batch.items()} == declared
    assert ("shifted_window_token" in declared) == ("notes" in arg)

    def loss(key, batch):
        return recipe.players[0].loss(recipe.init(key)[0], None, recipe.prepare(None, batch, None), key)[0]

    assert jax.eval_shape(loss, jax.random.key(0), batch).shape == ()


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


def test_nothing_is_predicted_across_conversations(data):
    """The last token of each has no target, all others the one behind them."""
    batch = {name: jnp.asarray(array) for name, array in data[0].items()} | {"labels": data[0]["tokens"]}
    targets = np.asarray(recipe_module.prepare(config(), None, batch, None)["targets"])
    segments, tokens = data[0]["segment_ids"], data[0]["tokens"]
    inside = (segments[:, 1:] == segments[:, :-1]) & (segments[:, 1:] > 0)
    assert inside.sum() > 100 and segments.max() > 2
    np.testing.assert_array_equal(targets[:, :-1][inside], tokens[:, 1:][inside])
    assert (targets[:, :-1][segments[:, 1:] != segments[:, :-1]] == -100).all() and (targets[:, -1] == -100).all()


def test_micro_batches_have_one_denominator(trained, data):
    _, state, metrics = run(config(weighting="sqrt", accumulation=4), data)
    for got, expected in zip(metrics, trained[2], strict=True):
        np.testing.assert_allclose([got["loss"], got["accuracy"]], [expected["loss"], expected["accuracy"]], rtol=1e-4)
    for (path, value), expected in zip(flatten(state.params).items(), flatten(trained[1].params).values(), strict=True):
        np.testing.assert_allclose(value, expected, atol=5e-5, err_msg=path)


def test_eight_devices_equal_one(trained, data):
    mesh = MeshConfig(data=1, fsdp=2, tensor=2, context=2)
    _, state, metrics = run(config(weighting="sqrt"), data, 8, mesh)
    for got, expected in zip(metrics, trained[2], strict=True):
        for name, value in expected.items():
            np.testing.assert_allclose(got[name], value, rtol=1e-3, atol=1e-6, err_msg=name)
    for (path, value), expected in zip(flatten(state.params).items(), flatten(trained[1].params).values(), strict=True):
        np.testing.assert_allclose(value, expected, atol=1e-4, err_msg=path)


def with_experts(**overrides):
    return config("configs/qwen3_vl.py:size=tiny-moe", SMALL_QWEN3, **overrides)


def test_qwen3_with_experts_trains_alike_on_eight_devices():
    """Over `expert`, `fsdp` and `context` (packed rows); the balance of the experts is in the loss and the metrics."""
    c = with_experts()
    data = batches(c, 2)
    assert "grid_sizes" in data[0] and "window_token" not in data[0]
    _, alone, metrics = run(c, data)
    for each in metrics:
        np.testing.assert_allclose(each["loss"], each["next_token"] + 0.01 * each["load_balance"], rtol=1e-5)
        assert 1.9 < each["load_balance"] < 4
    _, state, sharded = run(c, data, 8, MeshConfig(data=1, fsdp=2, context=2, expert=2))
    for got, expected in zip(sharded, metrics, strict=True):
        for name, value in expected.items():
            np.testing.assert_allclose(got[name], value, rtol=1e-3, atol=1e-6, err_msg=name)
    for (path, value), expected in zip(flatten(state.params).items(), flatten(alone.params).values(), strict=True):
        np.testing.assert_allclose(value, expected, atol=1e-4, err_msg=path)


def test_what_does_not_divide_over_its_axis_is_named():
    for fields, words in (
        ({"mesh": {"expert": 3}}, "model.text.num_experts is 4, expected a multiple of mesh.expert 3"),
        ({"mesh": {"context": 5}}, "data.row.tokens is 96, expected a multiple of mesh.context 5"),
    ):
        with pytest.raises(ValueError, match=words):
            recipe_module.make_recipe(with_experts(**fields))


QWEN3_STAGES = [
    *(("8b", recipe, stage) for recipe, stages in qwen3_config.RECIPES.items() for stage in stages),
    ("235b-a22b", "published", "s3"),
]


@pytest.mark.parametrize(("size", "recipe", "stage"), QWEN3_STAGES)
def test_published_configs_of_qwen3_are_whole(size, recipe, stage):
    """Every rule matches, every shape fits, and what is trained is what the report and the notes say."""
    spec = f"configs/qwen3_vl.py:size={size},recipe={recipe},stage={stage}"
    c = typed(recipe_module.Config, run_config_file(spec), {})
    made = recipe_module.make_recipe(c)
    params, _ = jax.eval_shape(made.init, jax.random.key(0))
    trainable = make_optimizer(c.optimizer, params, c.total_steps).trainable
    axes = {"expert": 4, "fsdp": 2} if c.model.text.num_experts else {"tensor": 4, "fsdp": 2}
    param_specs(made.sharding, params, make_mesh(MeshConfig(data=1, **axes), jax.devices()))
    parts = {"s0": r"visual/.*merger.*", "a": "visual/.*", "sft": "language/.*|visual/.*merger.*"}
    expected = {path for path in flatten(params) if re.fullmatch(parts.get(stage, ".*"), path)}
    assert trainable == expected and c.weighting == "sqrt"
    assert c.data.row.tokens == {"s2": 32768, "s3": 262144, "sft": 32768, "c": 32768}.get(stage, 8192)
    assert made.flops_per_step > 1e15


ONE_BLOCK = {"batch_size": "4", "model.text.depth": "1", "model.vision.depth": "1", "model.vision.full_blocks": "(0,)"}
ONE_BLOCK |= {"log_every": "1", "save_every": "2", "data.row.tokens": "64", "data.row.patches": "64"}
ONE_BLOCK |= {"data.tests": "()"}


def train(stage, workdir, file="configs/qwen_vl.py", small=ONE_BLOCK, **overrides):
    """Losses by step, the first state and the saved one, of a smoke stage with one block a tower."""
    c, recipe = main.make_recipe(f"{file}:stage={stage}", small | overrides)
    workdir.mkdir(exist_ok=True)
    mesh = make_mesh(c.mesh, jax.devices()[:1])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(main, "make_mesh", lambda config: mesh)  # eight devices compile for longer
        main.train(c, recipe, workdir)
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    with Checkpointer(workdir / "checkpoints", None) as checkpoints, jax.set_mesh(mesh):
        program = make_program(recipe, c, mesh)
        states = program.init(jax.random.key(c.seed)), checkpoints.restore(program.state).state
    return [line["train/loss"] for line in lines if "train/loss" in line], *jax.device_get(states)


def test_stages_freeze_resume_bit_equal_and_follow_each_other(tmp_path):
    losses, begin, end = train("1", tmp_path / "1", total_steps="4")
    before, after = flatten(begin.params), flatten(end.params)
    moved = {path for path in before if (before[path] != after[path]).any()}
    assert moved == {path for path in before if path.startswith("visual/")} != set(before)
    slots = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(end.opt_state)]
    assert any("visual" in slot for slot in slots) and not any("language" in slot for slot in slots)

    shutil.rmtree(tmp_path / "1" / "checkpoints" / "4")
    losses_again, _, again = train("1", tmp_path / "1", total_steps="4")
    assert len(losses) == 4 and losses_again[-2:] == losses[-2:]
    jax.tree.map(np.testing.assert_array_equal, again, end)

    # At rate 0 the second stage ends where the first did
    still = {"init_from.path": str(tmp_path / "1"), "optimizer.lr": "0.0", "total_steps": "1"}
    _, _, following = train("2", tmp_path / "2", **still)
    jax.tree.map(np.testing.assert_array_equal, following.params, end.params)


def test_qwen3_with_experts_resumes_bit_equal(tmp_path):
    """Its first stage trains the mergers alone, DeepStack's with them."""
    small = ONE_BLOCK | {"model.vision.deepstack_blocks": "(0,)", "batch_size": "2"}
    del small["model.vision.full_blocks"]
    options = {"file": "configs/qwen3_vl.py", "small": small, "total_steps": "4"}
    losses, begin, end = train("s0,size=tiny-moe", tmp_path, **options)
    before, after = flatten(begin.params), flatten(end.params)
    assert {path for path in before if (before[path] != after[path]).any()} <= {p for p in before if "merger" in p}
    shutil.rmtree(tmp_path / "checkpoints" / "4")
    losses_again, _, again = train("s0,size=tiny-moe", tmp_path, **options)
    assert len(losses) == 4 and losses_again[-2:] == losses[-2:]
    jax.tree.map(np.testing.assert_array_equal, again, end)


def test_low_rank_terms_alone_are_trained_and_merge(data, tmp_path):
    """The exported model has none and gives the same scores."""
    c, recipe = main.make_recipe("configs/qwen_vl.py:stage=sft,lora", ONE_BLOCK)
    params, _ = jax.jit(recipe.init)(jax.random.key(0))
    terms = {
        f"language/decoder/blocks_0/attn/{x}_lora/{leaf}" for x in ("query", "key", "value", "out") for leaf in "ab"
    }
    assert make_optimizer(c.optimizer, params, 1).trainable == terms
    rng = np.random.default_rng(0)
    learnt = {path: rng.normal(0, 0.1, leaf.shape).astype(np.float32) for path, leaf in flatten(params).items()}
    params = unflatten({path: learnt[path] if path in terms else leaf for path, leaf in flatten(params).items()})
    hub.save(recipe.bundle(params), tmp_path / "saved")
    loaded = hub.load(tmp_path / "saved")
    assert loaded.config.text.lora_rank == 0 and "tokenizer.json" in loaded.processor
    inputs = [data[0][name][:1, :24] for name in ("tokens", "positions")]
    scores = jax.jit(lambda model, params: forward(model, params, *inputs).logits, static_argnums=0)
    expected = scores(QwenVL(c.model), params)
    np.testing.assert_allclose(scores(loaded.model, loaded.params), expected, atol=1e-4)
    assert abs(expected - scores(loaded.model, params)).max() > 0.01


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
