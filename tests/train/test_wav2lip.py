"""The recipe of Wav2Lip: who moves what, the late sync weight, statistics, resume, sharding, and that it learns."""

import json
import os
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from omnax import hub
from omnax.hub.families import wav2lip as formats
from omnax.models.wav2lip import Discriminator, Generator, SyncNet, Wav2LipConfig
from omnax.train import main
from omnax.train.checkpoint import Checkpointer
from omnax.train.optimizer import make_optimizer
from omnax.train.program import make_program
from omnax.train.recipes.wav2lip import lip_sync
from omnax.train.rules import flatten, select
from omnax.train.sharding import MeshConfig, make_mesh

SMALL = {"model.width_mult": "0.0625", "batch_size": "8"}


def make(arg, **overrides):
    return main.make_recipe(f"configs/wav2lip.py:{arg}", SMALL | overrides)


def batch(recipe, seed=0):
    rng = np.random.default_rng(seed)

    def draw(array):
        if array.dtype == np.uint8:
            return rng.integers(0, 256, array.shape, dtype=np.uint8)
        return rng.uniform(-4, 4, array.shape).astype(np.float32)

    return {name: draw(array) for name, array in recipe.batch.items()}


def run(config, recipe, devices=1, steps=1, sync_weight=0.0):
    """States before and after some steps, and their metrics."""
    mesh = make_mesh(MeshConfig(), jax.devices()[:devices])
    with jax.set_mesh(mesh):
        program = make_program(recipe, config, mesh)
        state = program.init(jax.random.key(0))
        weight = jax.device_put(jnp.float32(sync_weight), state.variables["sync_weight"].sharding)
        state = state.replace(variables=state.variables | {"sync_weight": weight})
        states, metrics = [jax.device_get(state)], []
        for step in range(steps):
            rows = {k: jax.device_put(x, program.batch[k].sharding) for k, x in batch(recipe, step).items()}
            state, out = program.update(state, rows)
            states.append(jax.device_get(state))
            metrics.append(jax.device_get(out))
    return states, metrics


@pytest.fixture(scope="module")
def gan():
    config, recipe = make("stage=gan", **{"optimizer.lr": "1e-4", "sync_below": "0.75"})
    return config, recipe, *run(config, recipe, sync_weight=0.03)


def test_players_move_their_own_networks(gan):
    """Generator and discriminator move, the expert and its statistics do not; the generator's statistics do."""
    _, _, states, metrics = gan
    old, new = (flatten(state.params) for state in states)
    changed = {path for path in old if not np.array_equal(old[path], new[path])}
    assert {path.split("/")[0] for path in changed} == {"generator", "discriminator"}
    statistics = {path for path in old if path.endswith(("norm/mean", "norm/var"))}
    assert {path for path in statistics if path.startswith("generator/")} <= changed
    assert all(np.isfinite(list(metrics[0].values())))
    slots = flatten(states[0].opt_state["generator"].mu)
    assert slots and not any("expert" in path or path.endswith(("mean", "var")) for path in slots)


def test_terms_of_a_step_by_hand(gan):
    """Every term from the modules themselves, on the parameters before the step."""
    config, recipe, states, metrics = gan
    params, data, c = states[0].params, batch(recipe), config.model

    def apply(name, module, *inputs, **options):
        own, statistics = formats.split(params[name])
        return module.apply({"params": own, "batch_stats": statistics}, *inputs, **options)

    @jax.jit
    def terms():
        target, reference = data["target"] / jnp.float32(255), data["reference"] / jnp.float32(255)
        masked = jnp.concatenate([target[:, :, :48], jnp.zeros_like(target[:, :, 48:])], axis=2)
        face = jnp.concatenate([masked, reference], axis=-1)
        generated, _ = apply("generator", Generator(c), data["mels"], face, train=True, mutable=["batch_stats"])
        lower = generated[:, :, 48:]
        stacked = jnp.concatenate([lower[:, t] for t in range(5)], axis=-1)
        found = apply("expert", SyncNet(c), data["mel"], stacked)
        cosine = (found["audio"] * found["face"]).sum(-1)
        fake = jax.nn.sigmoid(apply("discriminator", Discriminator(c), lower.reshape(-1, 48, 96, 3)))
        real = jax.nn.sigmoid(apply("discriminator", Discriminator(c), target[:, :, 48:].reshape(-1, 48, 96, 3)))
        return {
            "generator/l1": jnp.abs(generated - target).mean(),
            "generator/sync": -jnp.log(cosine).mean(),
            "generator/adversarial": -jnp.log(fake).mean(),
            "discriminator/real": -jnp.log(real).mean(),
            "discriminator/fake": -jnp.log(1 - fake).mean(),
        }

    got = metrics[0]
    for name, value in terms().items():
        np.testing.assert_allclose(got[name], value, rtol=1e-4, err_msg=name)
    total = 0.03 * got["generator/sync"] + 0.07 * got["generator/adversarial"] + 0.9 * got["generator/l1"]
    np.testing.assert_allclose(got["generator/loss"], total, rtol=1e-5)
    np.testing.assert_allclose(
        got["discriminator/loss"], got["discriminator/real"] + got["discriminator/fake"], rtol=1e-5
    )


@pytest.mark.long
def test_eight_devices_equal_one(gan):
    """Batch statistics are those of the global batch; the deepest maps have one pixel and amplify rounding."""
    config, recipe, states, metrics = gan
    got_states, got = run(config, recipe, devices=8, sync_weight=0.03)
    for name, value in metrics[0].items():
        np.testing.assert_allclose(got[0][name], value, rtol=1e-3, err_msg=name)
    expected, found = (flatten(s[-1].variables["statistics"]) for s in (states, got_states))
    for path, value in expected.items():
        np.testing.assert_allclose(found[path], value, atol=1e-4, err_msg=path)


def test_sync_weight_waits_for_an_evaluation(gan):
    """Zero, without the term, until an evaluation finds less than 0.75; then on for good."""
    _, recipe, states, _ = gan
    state = states[0].replace(variables=states[0].variables | {"sync_weight": jnp.float32(0)})
    switch = recipe.after_evaluation
    assert float(switch(state, {"sync": {"sync": 0.75}}).variables["sync_weight"]) == 0
    on = switch(state, {"sync": {"sync": 0.74}})
    assert float(on.variables["sync_weight"]) == pytest.approx(0.03)
    assert float(switch(on, {"sync": {"sync": 2.0}}).variables["sync_weight"]) == pytest.approx(0.03)


@pytest.mark.long
def test_resumed_run_is_bit_equal(tmp_path):
    """Both players, statistics, the sync weight and the data: stopped after two steps and continued, or in one go."""
    small = {"total_steps": "3", "save_every": "2", "evaluate_every": "2", "log_every": "1", "sync_below": "1e9"}
    small |= {"evaluators": "('sync',)", "batch_size": "8", "data.train_clips": "3", "data.test_clips": "2"}
    config, recipe = make("stage=gan", **small, **{"init_from.skip": "('.*',)", "init_from.required": "()"})

    def train():
        main.train(config, recipe, tmp_path)
        lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
        losses = [line["train/generator/loss"] for line in lines if "train/generator/loss" in line]
        mesh = make_mesh(config.mesh)
        with Checkpointer(tmp_path / "checkpoints", None) as checkpoints, jax.set_mesh(mesh):
            return losses, jax.device_get(checkpoints.restore(make_program(recipe, config, mesh).state).state)

    losses, whole = train()
    assert float(whole.variables["sync_weight"]) == pytest.approx(0.03)  # switched on by the evaluation at step 2
    shutil.rmtree(tmp_path / "checkpoints" / "3")
    again, continued = train()
    assert again[-1] == losses[-1]
    jax.tree.map(np.testing.assert_array_equal, continued, whole)


def test_published_settings():
    for arg, players in (("expert", 1), ("generator", 1), ("gan", 2)):
        config, recipe = main.make_recipe(f"configs/wav2lip.py:stage={arg},size=published", {})
        assert len(recipe.players) == players and config.optimizer.lr == 1e-4
        params, _ = jax.eval_shape(recipe.init, jax.random.key(0))
        for player in recipe.players:
            own = select(params, [path for path in flatten(params) if path.startswith(player.parameters[:-3])])
            make_optimizer(player.optimizer, own, config.total_steps)
        if arg == "gan":
            sizes = {name: sum(x.size for x in jax.tree.leaves(tree)) for name, tree in params.items()}
            assert sizes == {
                "generator": 36_298_035 + 22_752,
                "expert": 16_435_072 + 14_080,
                "discriminator": 14_113_793,
            }
            assert (config.sync_weight, config.adversarial_weight, config.optimizer.b1) == (0.03, 0.07, 0.5)


def test_variants_of_the_notes():
    """Sixteen frames, a trained second discriminator, mouth crops: shapes, players, and what the generator sees."""
    overrides = {"model.clip_len": "16", "train_expert": "True", "crop": "mouth", "adversarial_weight": "0.07"}
    config, recipe = make("stage=gan", **overrides)
    assert [player.name for player in recipe.players] == ["generator", "discriminator", "expert"]
    shapes = {name: array.shape for name, array in recipe.batch.items()}
    assert shapes["mel"] == (8, 80, 51, 1) and shapes["mels"] == (8, 16, 80, 16, 1)
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    with jax.set_mesh(mesh):
        program = make_program(recipe, config, mesh)
        _, metrics = jax.eval_shape(program.update, program.state, program.batch)
    assert {"expert/accuracy", "generator/l1", "discriminator/fake"} <= metrics.keys()
    seen = []
    modules = {"generator": type("Spy", (), {"apply": lambda self, v, mels, face, train: seen.append(face)})()}
    networks = lip_sync.Networks(modules, masked_from=0)
    networks.generate(
        {"generator": {}}, {k: jnp.full((1, 1, 4, 4, 3), 255) for k in ("target", "reference", "mels")}, train=False
    )
    assert not seen[0][..., :3].any() and (seen[0][..., 3:] == 1).all()


def test_weights_start_a_run_and_leave_it(tmp_path):
    """A folder of published files gives the parameters with their statistics; a run exports its generator."""
    config = Wav2LipConfig(width_mult=0.0625)
    trees = {}
    for name in ("generator", "expert"):
        shapes = formats.abstract(name, config)
        values = np.random.default_rng(0).random(sum(x.size for x in jax.tree.leaves(shapes)), np.float32)
        parts = iter(np.split(values, np.cumsum([x.size for x in jax.tree.leaves(shapes)])))
        trees[name] = jax.tree.map(lambda x, parts=parts: next(parts).reshape(x.shape), shapes)
        params, statistics = formats.split(trees[name])
        bundle = hub.Bundle(formats.NETWORKS[name].model(config), params, config, variables={"batch_stats": statistics})
        hub.save(bundle, tmp_path / "weights" / f"{name}.pth", "torch")
    _, recipe = make("stage=generator")
    loaded = recipe.load(str(tmp_path / "weights"))
    jax.tree.map(np.testing.assert_array_equal, loaded, trees)
    hub.save(recipe.bundle(loaded), tmp_path / "out.pth")
    assert isinstance(hub.load(tmp_path / "out.pth").model, Generator)


@pytest.mark.parametrize(
    "arg,overrides,message",
    [
        ("stage=generator", {"accumulation": "2"}, "accumulation must be 1"),
        ("stage=generator", {"crop": "nose"}, "crop 'nose' of"),
        ("stage=generator", {"evaluators": "('sync', 'fid')"}, "unknown evaluator 'fid'"),
        ("stage=sync", {}, "unknown value of config argument 'stage': 'sync'"),
        ("stage=warmup,data=one", {}, "stage=warmup is for size=smoke and data=many"),
    ],
)
def test_bad_settings_are_named(arg, overrides, message):
    with pytest.raises(ValueError, match=message):
        make(arg, **overrides)


@pytest.mark.parametrize(
    "arg,fresh",
    [
        ("stage=expert", set()),
        ("stage=warmup", {"generator"}),
        ("stage=generator", set()),
        ("stage=generator,data=one", {"generator"}),
        ("stage=gan", {"discriminator"}),
    ],
)
def test_stages_begin_from_the_one_before(arg, fresh):
    """The first stage with a network makes it; on many persons the warm-up is the first with a generator."""
    config, _ = make(arg)
    assert {pattern.split("/")[0] for pattern in config.init_from.skip} == fresh


@pytest.mark.long
def test_both_phases_learn(tmp_path):
    """One drawn person: the expert tells in-sync clips apart, then the mouth follows the sound of other clips."""
    expert, generator = tmp_path / "expert", tmp_path / "generator"
    train("expert", expert)
    train("generator", generator, f"--config.init_from.path={expert}")
    lines = {path: read(path / "metrics.jsonl") for path in (expert, generator)}
    assert max(line.get("sync/accuracy", 0) for line in lines[expert]) > 0.7
    assert max(line.get("cross_audio/r", 0) for line in lines[generator]) > 0.6
    assert [line["sync/l1"] for line in lines[generator] if "sync/l1" in line][-1] < 0.08
    names = {"training.png", "contact_sheet.png", "side_by_side.mp4"}
    assert names <= {path.name for path in generator.iterdir()}


def train(stage, workdir, *overrides):
    """The command, on one device, evaluated half as often."""
    command = [sys.executable, "-m", "omnax.train", "--config", f"configs/wav2lip.py:stage={stage},data=one"]
    overrides = ("--config.evaluate_every=100", "--config.save_every=100", *overrides)
    environment = os.environ | {"XLA_FLAGS": ""}
    done = subprocess.run(
        [*command, "--workdir", str(workdir), *overrides], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]
