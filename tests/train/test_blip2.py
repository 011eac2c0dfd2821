"""The recipe of BLIP-2: what each stage reads, trains and leaves, resume, devices, parts of checkpoints, exports."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from omnax import hub
from omnax.configs.blip2 import tiny
from omnax.data.drawn import tiles
from omnax.data.text.tokenizer_file import TokenizerFile
from omnax.models import bert, clip, t5
from omnax.models.blip2.model import Blip2, init_params
from omnax.train import main
from omnax.train.checkpoint import Checkpointer
from omnax.train.config import run_config_file, typed
from omnax.train.optimizer import make_optimizer
from omnax.train.program import make_program
from omnax.train.recipes.blip2 import recipe as recipe_module
from omnax.train.recipes.blip2 import weights
from omnax.train.recipes.blip2.texts import PrefixTexts, ReaderTexts, SplitTexts
from omnax.train.rules import flatten
from omnax.train.sharding import MeshConfig, make_mesh, param_specs

SMALL = {"model.qformer.depth": "2", "model.opt.depth": "1", "batch_size": "20", "evaluators": "()"}
LANGUAGE = TokenizerFile(tiles.language_tokenizer())


def make(number, **overrides):
    return main.make_recipe(f"configs/blip2.py:stage={number}", SMALL | overrides)


@pytest.mark.parametrize("stage", ["1", "words", "2"])
def test_batches_have_the_declared_shapes(stage):
    """And the loss takes them (traced, not run)."""
    _, recipe = make(stage)
    batch = next(recipe.data((0, 1)))
    declared = {name: (like.shape, like.dtype) for name, like in recipe.batch.items()}
    assert {name: (batch[name].shape, batch[name].dtype) for name in declared} == declared
    assert batch.keys() <= declared.keys() | {"index", "mask"}
    loss = lambda key, batch: recipe.players[0].loss(recipe.init(key)[0], None, batch, key)[0]  # noqa: E731
    assert jax.eval_shape(loss, jax.random.key(0), {name: batch[name] for name in declared}).shape == ()
    assert recipe.flops_per_step > 0


def test_rows_of_each_text_model():
    """What stands where, and what is learnt: a first token where there is no prompt, never a prompt or padding."""
    rng, caption = np.random.default_rng(0), {"captions": ("A red RING, at the top left!",)}
    reader = TokenizerFile(tiles.reader_tokenizer())
    text = "a red ring at the top left"
    row = ReaderTexts(reader, 12)({"captions": (text,)}, rng)["tokens"]
    assert row.tolist() == [2, *reader.encode(text), 3, 0, 0, 0]
    words = LANGUAGE.encode("a red ring at the top left")
    out = PrefixTexts(LANGUAGE, 12)({"captions": (text,)}, rng)
    assert out["tokens"].tolist() == [2, *words, LANGUAGE.id("\n"), 1, 1, 1]
    assert out["learnt"].tolist() == [True] * 9 + [False] * 3
    prompted = PrefixTexts(LANGUAGE, 12, prompt="the white")({"captions": (text,)}, rng)
    assert prompted["learnt"].tolist() == [False] * 3 + [True] * 8 + [False]
    assert len(PrefixTexts(LANGUAGE, 12)(caption, rng)["tokens"]) == 12
    cuts = set()
    for _ in range(50):
        parts = SplitTexts(LANGUAGE, 12)({"captions": (text,)}, rng)
        kept = [row[row != 0].tolist() for row in (parts["tokens"], parts["labels"])]
        assert [part[-1] for part in kept] == [1, 1]
        assert kept[0][:-1] + kept[1][:-1] == words
        cuts.add(len(kept[0]) - 1)
    assert cuts == {1, 2, 3}  # of seven words: to the middle
    asked = SplitTexts(LANGUAGE, 12, prompt="a")({"captions": (text,)}, rng)
    assert asked["tokens"][:2].tolist() == [*LANGUAGE.encode("a"), 1] and asked["labels"][:8].tolist() == [*words, 1]
    with pytest.raises(ValueError, match="text of 9 tokens, expected at most 5"):
        ReaderTexts(reader, 5, overflow="error")({"captions": (text,)}, rng)


def test_a_t5_learns_what_follows_a_split():
    """Its loss takes rows of both sides (traced); OPT's rows are not asked for."""
    small = t5.T5Config(24, 64, 1, 1, 4, 16, 96, activation="gelu", dropout=0.0)
    c, _ = make("2")
    c = dataclasses.replace(c, model=dataclasses.replace(c.model, opt=None, t5=small))
    recipe = recipe_module.make_recipe(c)
    assert recipe.batch.keys() == {"image", "tokens", "labels"}
    loss = lambda key, batch: recipe.players[0].loss(recipe.init(key)[0], None, batch, key)[0]  # noqa: E731
    assert jax.eval_shape(loss, jax.random.key(0), dict(recipe.batch)).shape == ()


def train(stage, workdir, **overrides):
    """Losses, the first state and the saved one."""
    settings = {"log_every": "1", "save_every": "1", "total_steps": "2"}
    c, recipe = make(stage, **settings | overrides)
    workdir.mkdir(exist_ok=True)
    mesh = make_mesh(c.mesh, jax.devices()[:1])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(main, "make_mesh", lambda config: mesh)  # eight devices compile for longer
        main.train(c, recipe, workdir)
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    with Checkpointer(workdir / "checkpoints", None) as checkpoints, jax.set_mesh(mesh):
        program = make_program(recipe, c, mesh)
        states = program.init(jax.random.key(c.seed)), checkpoints.restore(program.state).state
    return recipe, [line["train/loss"] for line in lines if "train/loss" in line], *jax.device_get(states)


def test_the_second_stage_trains_the_queries_alone_and_resumes_bit_equal(tmp_path):
    """Neither encoder nor language model moves or has an optimiser slot; the export is the model that was trained."""
    recipe, losses, begin, end = train("2", tmp_path / "run")
    before, after = flatten(begin.params), flatten(end.params)
    moved = {path for path in before if (before[path] != after[path]).any()}
    assert not any(path.startswith(("vision/", "language/", "match_head")) for path in moved)
    assert {"queries", "vision_norm/scale", "language_proj/kernel", "qformer/blocks_0/cross/key/kernel"} <= moved
    slots = {jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(end.opt_state)}
    assert any("query_mlp" in slot for slot in slots)
    assert not any(
        name in slot for slot in slots for name in ("'vision'", "'language'", "'token_embed'", "'match_head'")
    )

    shutil.rmtree(tmp_path / "run" / "checkpoints" / "2")
    _, again, _, same = train("2", tmp_path / "run")
    assert len(losses) == 2 and again[-1] == losses[-1]
    jax.tree.map(np.testing.assert_array_equal, same, end)

    hub.save(recipe.bundle(end.params), tmp_path / "weights")
    bundle = hub.load(tmp_path / "weights")
    assert bundle.config.opt and not bundle.config.embed_dim and not bundle.config.qformer.text_mlp
    assert bundle.processor.tokenizer["tokenizer.json"] == tiles.language_tokenizer()
    np.testing.assert_array_equal(bundle.params["queries"], end.params["queries"])


def run(c, batches, devices, **axes):
    mesh = make_mesh(MeshConfig(**axes), jax.devices()[:devices])
    with jax.set_mesh(mesh):
        program = make_program(recipe_module.make_recipe(c), c, mesh)
        state, metrics = program.init(jax.random.key(0)), []
        for batch in batches:
            rows = {name: jax.device_put(batch[name], like.sharding) for name, like in program.batch.items()}
            state, out = program.update(state, rows)
            metrics.append(jax.device_get(out))
    return jax.device_get(state), metrics


@pytest.mark.long
def test_eight_devices_equal_one():
    """Stage 1, whose negatives come from all devices."""
    c, recipe = make("1", **{"batch_size": "16", "data.distinct": "False", "model.qformer.depth": "1"})
    stream = recipe.data((0, 1))
    data = [next(stream) for _ in range(2)]
    one, expected = run(c, data, 1)
    eight, found = run(c, data, 8, data=2, fsdp=2, tensor=2)
    for got, wanted in zip(found, expected, strict=True):
        for name, value in wanted.items():
            np.testing.assert_allclose(got[name], value, rtol=1e-4, atol=1e-6, err_msg=name)
    for (path, value), wanted in zip(flatten(eight.params).items(), flatten(one.params).values(), strict=True):
        # Adam divides by the root of tiny second moments in its first steps: rounding of a gradient shows
        np.testing.assert_allclose(value, wanted, atol=1e-4, err_msg=path)


PUBLISHED = [("g", "1", "opt2.7b"), ("g", "2", "opt6.7b"), ("L", "2", "flant5xl"), ("eva02_E", "1", "opt2.7b")]


@pytest.mark.parametrize(("size", "stage", "language"), PUBLISHED)
def test_published_configs_are_whole(size, stage, language):
    """Every rule matches, every shape fits, what is frozen lies in half precision: the abstract state of each."""
    spec = f"configs/blip2.py:size={size},stage={stage},language={language}"
    c = typed(recipe_module.Config, run_config_file(spec), {})
    recipe = recipe_module.make_recipe(c)
    params, _ = jax.eval_shape(recipe.init, jax.random.key(0))
    optimizer = make_optimizer(c.optimizer, params, c.total_steps)
    param_specs(recipe.sharding, params, make_mesh(MeshConfig(data=1, fsdp=2, tensor=4), jax.devices()))
    for path, leaf in flatten(params).items():
        frozen = path.startswith(("vision/", "language/"))
        assert (path in optimizer.trainable) != frozen and leaf.dtype == (jnp.bfloat16 if frozen else jnp.float32)
    batches = {("g", "1"): 1680, ("g", "2"): 1920, ("L", "2"): 1520, ("eva02_E", "1"): 1680}
    assert c.batch_size == batches[size, stage] and c.total_steps == (250_000 if stage == "1" else 80_000)
    end = c.optimizer.lr * c.optimizer.schedule.end
    assert c.optimizer.b2 == 0.98 and end == pytest.approx(1e-5 if stage == "1" else 5e-5)
    assert recipe.flops_per_step > 1e14


def test_parts_of_other_checkpoints(tmp_path):
    """An image tower without its last block, a BERT whose text layers the queries copy, from a file each."""
    model = tiny()
    trunk = dataclasses.replace(model.vision, depth=2, final_norm=True)
    tower = clip.ImageTower(clip.ImageConfig(trunk))
    text = bert.Bert(bert.BertConfig(96, 4, 4, 192, vocab_size=22, max_positions=16, lm_head=True))
    rng = np.random.default_rng(0)

    def draw(shapes):
        return jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), jnp.float32), shapes["params"])

    image = draw(jax.eval_shape(tower.init, jax.random.key(0), jnp.zeros((1, 24, 24, 3))))
    words = draw(jax.eval_shape(text.init, jax.random.key(0), jnp.zeros((1, 2), jnp.int32)))
    found = weights.adapt({"vision": image["trunk"]}, model)["vision"]["encoder"]
    assert set(found) == {"blocks_0"}
    reader = weights.wanted({"qformer": weights.from_bert(words, model)}, model)["qformer"]
    np.testing.assert_array_equal(
        reader["blocks_1"]["query_mlp"]["fc1"]["kernel"], words["blocks_1"]["mlp"]["fc1"]["kernel"]
    )
    assert reader["token_embed"]["embedding"].shape == (23, 96) and reader["head_bias"].shape == (23,)
    np.testing.assert_array_equal(reader["token_embed"]["embedding"][:22], words["token_embed"]["embedding"])
    shapes = jax.eval_shape(lambda: init_params(Blip2(model), jax.random.key(0)))
    missing = flatten(shapes["qformer"]).keys() - flatten(reader).keys()
    assert missing and all("cross" in path for path in missing)
    hub.save(hub.Bundle(text, words, text.config), tmp_path / "bert")
    loaded = weights.load(f"bert={tmp_path / 'bert'}", model)
    np.testing.assert_array_equal(loaded["qformer"]["head_bias"], reader["head_bias"])
    with pytest.raises(ValueError, match=r"names 'berth', expected some of \('blip2', 'vision'"):
        weights.load("berth=somewhere", model)
    with pytest.raises(ValueError, match=r"2 tokens more than model\.qformer\.vocab_size"):
        large = words | {"token_embed": {"embedding": jnp.zeros((25, 96))}}
        weights.from_bert(large, model)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"stage": "3"}, "unknown stage '3'"),
        ({"accumulation": "2"}, "accumulation has to be 1"),
        ({"model.embed_dim": "0"}, "stage 1 needs model.embed_dim"),
        ({"model.qformer.context_width": "8"}, "context_width is 8, the image encoder has 201"),
        ({"model.language_width": "32"}, "language_width is 32, that of the language model 64"),
    ],
)
def test_settings_that_do_not_fit_are_named(overrides, message):
    with pytest.raises(ValueError, match=message):
        make("1", **overrides)


def test_a_vocabulary_larger_than_the_models_is_refused():
    c, _ = make("1", **{"model.qformer.vocab_size": "20"})
    with pytest.raises(ValueError, match=r"has 23 ids, model.qformer.vocab_size is 20"):
        recipe_module.train_batches(c, (0, 1))
