"""The recipe of CLIP: losses of the whole batch, chunks, rates, clamping, sharding, resume, zero-shot and retrieval."""

import json
import math
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from omnax import hub
from omnax.data.text.bpe import tokenizer_of
from omnax.models import clip as models
from omnax.objectives import contrastive
from omnax.train import main
from omnax.train.checkpoint import Checkpointer
from omnax.train.config import run_config_file, typed
from omnax.train.evaluation import zero_shot
from omnax.train.export import export
from omnax.train.optimizer import make_optimizer
from omnax.train.program import make_program
from omnax.train.recipes.clip import recipe as recipe_module
from omnax.train.rules import flatten, match_rules
from omnax.train.sharding import MeshConfig, make_mesh, param_specs

SMALL = {
    "batch_size": "16",
    "model.image.trunk.depth": "1",
    "model.text.depth": "1",
    "model.text.vocab_size": "600",
    "data.merges": "60",
}


def config(arg="", **overrides):
    return main.make_recipe(f"configs/clip.py:{arg}", SMALL | {k: str(v) for k, v in overrides.items()})[0]


def published(arg):
    return typed(recipe_module.Config, run_config_file(f"configs/clip.py:{arg}"), {})


def batch(c, seed=0):
    rng = np.random.default_rng(seed)
    trunk, text = c.model.image.trunk, c.model.text
    tokens = rng.integers(1, 590, (c.batch_size, text.context_length)).astype(np.int32)
    image = rng.normal(size=(c.batch_size, *trunk.image_size, trunk.num_channels)).astype(np.float32)
    return {"image": jnp.asarray(image), "tokens": jnp.asarray(tokens)}


def parameters(c):
    return jax.jit(recipe_module.make_recipe(c).init)(jax.random.key(0))[0]


def run(c, devices=1, steps=2, **axes):
    """State and metrics of some steps on random batches."""
    mesh = make_mesh(MeshConfig(**axes), jax.devices()[:devices])
    with jax.set_mesh(mesh):
        program = make_program(recipe_module.make_recipe(c), c, mesh)
        state, metrics = program.init(jax.random.key(0)), []
        for step in range(steps):
            rows = {k: jax.device_put(x, program.batch[k].sharding) for k, x in batch(c, step).items()}
            state, out = program.update(state, rows)
            metrics.append(jax.device_get(out))
    return jax.device_get(state), metrics


@pytest.fixture(scope="module")
def trained():
    return run(config(form="full"))


@pytest.mark.parametrize(
    "form,axes", [("ring", {"data": 8}), ("rows", {"data": 2, "fsdp": 2, "tensor": 2})], ids=["ring", "rows-tensor"]
)
def test_eight_devices_equal_one(trained, form, axes):
    state, metrics = run(config(form=form), devices=8, **axes)
    for got, expected in zip(metrics, trained[1], strict=True):
        for name, value in expected.items():
            np.testing.assert_allclose(got[name], value, rtol=2e-5, atol=1e-6, err_msg=name)
    for (path, value), expected in zip(flatten(state.params).items(), flatten(trained[0].params).values(), strict=True):
        # Adam divides by the root of tiny second moments in its first steps: 1e-6 of a gradient shows as 1e-5 here.
        np.testing.assert_allclose(value, expected, atol=2e-5, err_msg=path)


def test_loss_and_metrics_of_a_step(trained):
    c = config()
    model, data = models.CLIP(c.model), batch(c)
    params = parameters(c)
    data["tokens"] = data["tokens"].at[3].set(data["tokens"][0])
    loss = recipe_module.make_loss(c, model)
    total, (terms, _) = jax.jit(loss, static_argnums=1)(params, None, data, jax.random.key(0))
    out = jax.jit(model.apply)({"params": params}, data["image"], data["tokens"])
    expected, _ = contrastive.info_nce(out["image_embeds"], out["text_embeds"], out["logit_scale"])
    np.testing.assert_allclose(total, expected, rtol=1e-5)
    assert terms["duplicate_captions"] == 1
    np.testing.assert_allclose(terms["logit_scale"], 1 / 0.07, rtol=1e-5)
    assert trained[1][0]["duplicate_captions"] == 0


@pytest.mark.parametrize("arg", ["", "loss=sigmoid"], ids=["info_nce", "sigmoid"])
def test_chunks_have_the_gradient_of_the_whole_batch(arg):
    """GradCache: one pass and four chunks; also eight devices, where every device keeps its rows."""
    data = batch(config(arg))
    gradients = []
    for chunks in (1, 4):
        c = config(arg, chunks=chunks)
        params = parameters(c)
        loss = recipe_module.make_loss(c, models.CLIP(c.model))
        step = jax.jit(jax.value_and_grad(lambda p, loss=loss: loss(p, None, data, jax.random.key(0))[0]))
        gradients.append(step(params))
    (value, gradient), (chunked_value, chunked) = gradients
    np.testing.assert_allclose(chunked_value, value, rtol=1e-6)
    largest = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(gradient))
    for (path, ours), theirs in zip(flatten(chunked).items(), flatten(gradient).values(), strict=True):
        # float32 sums in another order; relative to the tree, since the gradient of a key's bias is 0 but for noise
        np.testing.assert_allclose(ours, theirs, atol=5e-6 * max(largest, 1.0), err_msg=path)


def test_chunks_keep_less_memory():
    def temporaries(chunks):
        c = config(chunks=chunks, batch_size=64)
        loss = recipe_module.make_loss(c, models.CLIP(c.model))
        params = jax.eval_shape(recipe_module.make_recipe(c).init, jax.random.key(0))[0]
        step = jax.jit(jax.value_and_grad(lambda p, b: loss(p, None, b, jax.random.key(0))[0]))
        return step.lower(params, batch(c)).compile().memory_analysis().temp_size_in_bytes

    assert temporaries(8) < 0.4 * temporaries(1)


def test_logit_scale_is_clamped_after_every_step():
    c = config()
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    with jax.set_mesh(mesh):
        program = make_program(recipe_module.make_recipe(c), c, mesh)
        state = program.init(jax.random.key(0))
        high = program.replace_params(state, state.params | {"logit_scale": jnp.float32(7)})
        after, _ = program.update(high, batch(c))
    np.testing.assert_allclose(after.params["logit_scale"], math.log(100), rtol=1e-6)
    assert recipe_module.make_recipe(config("loss=sigmoid")).after_update is None


def test_locked_image_tower_has_no_slots_and_does_not_move():
    c = config(**{"optimizer.trainable": '(("image/trunk/.*", False), (".*", True))'})
    (before, _), (after, _) = run(c, steps=1), run(c, steps=2)
    for path, value in flatten(before.params).items():
        moved = not np.array_equal(value, flatten(after.params)[path])
        assert moved != path.startswith("image/trunk/"), path
    moments = [leaf.shape for leaf in jax.tree.leaves(after.opt_state) if leaf.ndim]
    assert (32, 32, 3) not in moments and before.params["image"]["trunk"]["patch_embed"]["kernel"].shape not in moments


def test_rates_of_the_eva_recipe():
    """EVA-CLIP's README: image 4e-4 with decay 0.85, text 4e-5 with 0.75, all else 5e-4 (spec B5)."""
    c = published("size=eva02-l14,hyper=eva")
    params, _ = jax.eval_shape(recipe_module.make_recipe(c).init, jax.random.key(0))
    rates = match_rules(recipe_module.rates(c), flatten(params), "rates")
    lr = c.optimizer.lr
    np.testing.assert_allclose(lr * rates["image/trunk/norm/scale"], 4e-4, rtol=1e-6)
    np.testing.assert_allclose(lr * rates["image/trunk/embed/pos_embed"], 4e-4 * 0.85**25, rtol=1e-6)
    blocks = rates["image/trunk/encoder/blocks/mlp/gate/kernel"]
    np.testing.assert_allclose(lr * np.array(blocks), 4e-4 * 0.85 ** np.arange(24, 0, -1), rtol=1e-6)
    np.testing.assert_allclose(lr * rates["text/token_embed/embedding"], 4e-5 * 0.75**13, rtol=1e-6)
    np.testing.assert_allclose(lr * rates["logit_scale"], 5e-4, rtol=1e-6)


@pytest.mark.parametrize(
    "arg",
    [
        "size=b32,hyper=openai",
        "size=l14@336",
        "size=h14,hyper=openclip",
        "size=bigg14,hyper=openclip,form=rows",
        "size=eva02-e14+,hyper=eva",
        "size=eva02-b16,hyper=eva",
        "size=siglip-b16,hyper=siglip",
        "size=b16,hyper=lit,chunks=8",
    ],
)
def test_published_configs_are_whole(arg):
    """Every rule matches, every shape fits: the abstract state of each recipe."""
    c = published(arg)
    recipe = recipe_module.make_recipe(c)
    params, _ = jax.eval_shape(recipe.init, jax.random.key(0))
    make_optimizer(recipe.players[0].optimizer, params, c.total_steps)
    mesh = make_mesh(MeshConfig(data=1, fsdp=4, tensor=2), jax.devices())
    param_specs(recipe.sharding, params, mesh)
    if arg.startswith("size=b32"):
        assert (c.batch_size, c.total_steps, c.optimizer.lr) == (32768, 390625, 5e-4)
        assert c.model.image.trunk.activation == c.model.text.activation == "quick_gelu"


@pytest.mark.parametrize(
    "overrides,message",
    [
        ({"loss": "triplet"}, "loss 'triplet', form 'ring': expected one of"),
        ({"accumulation": "2"}, "a contrastive loss sees the whole batch: use chunks="),
        ({"chunks": "3"}, "batch_size 56 is not divisible into 3 chunks"),
        ({"loss": "sigmoid"}, "loss 'sigmoid' and model.logit_bias_init go together"),
        ({"model.text.scan": "True"}, "must be the same"),
        ({"evaluators": "('zeroshot',)"}, "unknown evaluator 'zeroshot', did you mean 'zero_shot'"),
    ],
)
def test_bad_settings_are_named(overrides, message):
    with pytest.raises(ValueError, match=message):
        main.make_recipe("configs/clip.py", overrides)


def test_resumed_run_is_bit_equal_and_exports(tmp_path):
    """A run of four steps in one go, and stopped after two and continued; then as transformers' files."""
    small = SMALL | {"log_every": "1", "save_every": "2", "total_steps": "4", "evaluate_every": "4", "chunks": "2"}
    small |= {"data.train_split": "train[:224]", "data.test_split": "test[:16]", "evaluators": "('zero_shot',)"}
    c, recipe = main.make_recipe("configs/clip.py", small)

    def train():
        main.train(c, recipe, tmp_path)
        lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
        with Checkpointer(tmp_path / "checkpoints", None) as checkpoints, jax.set_mesh(make_mesh(c.mesh)):
            program = make_program(recipe, c, make_mesh(c.mesh))
            return lines, jax.device_get(checkpoints.restore(program.state).state)

    lines, state = train()
    shutil.rmtree(tmp_path / "checkpoints" / "4")
    lines_again, state_again = train()
    losses, again = ([line["train/loss"] for line in ls if "train/loss" in line][-2:] for ls in (lines, lines_again))
    assert losses == again
    jax.tree.map(np.testing.assert_array_equal, state_again, state)
    assert (tmp_path / "training.png").is_file()
    export(c, recipe, tmp_path, tmp_path / "out")
    bundle = hub.load(tmp_path / "out")
    tokens = tokenizer_of(bundle.processor.tokenizer)(["a red circle in the upper left"])
    assert tokens.shape == (1, 16)
    encode = jax.jit(
        lambda model, params: model.apply({"params": params}, tokens, method=models.CLIP.encode_text), static_argnums=0
    )
    ours, theirs = encode(bundle.model, bundle.params), encode(models.CLIP(c.model), state.params)
    np.testing.assert_allclose(ours["embeds"], theirs["embeds"], atol=1e-6)


def test_class_weights_and_retrieval_metrics_by_hand():
    def encode(params, tokens):
        x = params[tokens[:, 0]]
        return x / jnp.linalg.norm(x, axis=-1, keepdims=True)

    params = jnp.array([[3.0, 0], [0, 2], [1, 1]])
    weights = zero_shot.class_weights(encode, params, jnp.array([[[0], [1]], [[2], [2]]]))
    np.testing.assert_allclose(weights, np.full((2, 2), 0.5**0.5), rtol=1e-6)

    image, text = np.eye(3, dtype=np.float32)[[0, 1, 1]], np.eye(3, dtype=np.float32)
    # Images 0 and 1 find their texts first; image 2 belongs to text 0, which it finds behind text 1, tied with text 2.
    own = np.array([[True, False, False], [False, True, False], [True, False, False]])
    metrics = zero_shot.retrieval_metrics(image, text, own)
    assert metrics["image_to_text_recall_1"] == pytest.approx(2 / 3) and metrics["image_to_text_recall_5"] == 1
    assert metrics["image_to_text_mean_rank"] == pytest.approx(5 / 3) and metrics["image_to_text_median_rank"] == 1
    # Text 0 finds image 0; text 1 finds image 1 tied with image 2, a stranger; text 2 has no image.
    assert metrics["text_to_image_recall_1"] == 0.5


def test_retrieval_takes_any_caption_and_gives_ties_and_nan_nothing():
    """Image 0 has captions 0 and 3, of which the second is nearest; equal embeddings find the last place."""
    own = np.eye(4, dtype=bool)[:3]
    own[0, 3] = True
    image = np.eye(3, dtype=np.float32)
    text = np.float32([[0, 0, 0.5], [0, 1, 0], [0, 0, 1], [1, 0, 0]])
    metrics = zero_shot.retrieval_metrics(image, text, own)
    assert metrics["image_to_text_recall_1"] == 1
    assert metrics["text_to_image_recall_1"] == 3 / 4  # caption 0 is nearer to image 2
    equal = zero_shot.retrieval_metrics(np.ones((3, 2)), np.ones((4, 2)), own)
    assert equal["image_to_text_recall_1"] == equal["text_to_image_recall_1"] == 0
    assert equal["image_to_text_mean_rank"] == pytest.approx((3 + 4 + 4) / 3)
    with pytest.raises(FloatingPointError, match="1 of 8 embeddings of texts are not finite"):
        zero_shot.retrieval_metrics(np.ones((3, 2)), np.array([[1, 1], [1, np.nan], [0, 1], [1, 0]]), own)


def test_prompts_without_classes_are_an_error():
    tokenize = lambda texts, context_length: np.zeros((len(texts), context_length), np.int32)  # noqa: E731
    assert zero_shot.prompt_tokens(tokenize, ["a", "b"], ["{}", "the {}"], 5).shape == (2, 2, 5)
    with pytest.raises(ValueError, match="got 0 and 1"):
        zero_shot.prompt_tokens(tokenize, [], ["{}"], 5)
    with pytest.raises(ValueError, match=r"class names \[1\] are empty"):
        zero_shot.prompt_tokens(tokenize, ["a", " "], ["{}"], 5)
