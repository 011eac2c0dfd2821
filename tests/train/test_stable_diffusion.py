"""The recipe of Stable Diffusion: who moves, what a step is made of, resume, sharding, and that it learns."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from omnax import hub
from omnax.infer.diffusion import load_diffusion
from omnax.kernels.diffusion import add_noise
from omnax.models.stable_diffusion.controlnet import ControlNet
from omnax.models.stable_diffusion.pipeline import Prompt
from omnax.models.stable_diffusion.unet import UNet
from omnax.train import main
from omnax.train.checkpoint import Checkpointer
from omnax.train.program import make_program
from omnax.train.recipes.stable_diffusion import recipe as module
from omnax.train.recipes.stable_diffusion.data import Drop, PictureConfig
from omnax.train.recipes.stable_diffusion.evaluation import foreground, nearest_color
from omnax.train.rules import flatten
from omnax.train.sharding import MeshConfig, make_mesh

SMALL = {"batch_size": "8", "init_from.required": "()", "model.unet.widths": "(16, 32)"}
STAGES = {"control": "controlnet", "image_prompt": "adapter"}


def make(stage, /, **overrides):
    adapter = {"model.adapter.layer_widths": "(32, 32, 32, 32)"} if stage == "image_prompt" else {}
    return main.make_recipe(f"configs/stable_diffusion.py:stage={stage}", SMALL | adapter | overrides)


def batch(recipe, seed=0):
    rng = np.random.default_rng(seed)

    def draw(array):
        if array.dtype == np.int32:
            return rng.integers(0, 600, array.shape).astype(np.int32)
        return rng.uniform(0, 1, array.shape).astype(np.float32)

    return {name: draw(array) for name, array in recipe.batch.items()}


def as_trained(params):
    """The base with no parameter at its initial zero, as training leaves it: behind these nothing else would learn."""
    rng = np.random.default_rng(1)
    unet = jax.tree.map(lambda x: x + 0.1 * rng.normal(size=x.shape).astype(np.float32), params["unet"])
    if "controlnet" not in params:
        return params | {"unet": unet}
    return params | {"unet": unet, "controlnet": params["controlnet"] | {"encoder": unet["encoder"]}}


def run(config, recipe, devices=1, steps=2, **axes):
    """Parameters before some steps, the state after them, and metrics."""
    mesh = make_mesh(MeshConfig(**axes), jax.devices()[:devices])
    with jax.set_mesh(mesh):
        program = make_program(recipe, config, mesh)
        state = program.init(jax.random.key(0))
        state = program.replace_params(state, as_trained(jax.device_get(state.params)))
        before, metrics = jax.device_get(state.params), []
        for step in range(steps):
            rows = {k: jax.device_put(x, program.batch[k].sharding) for k, x in batch(recipe, step).items()}
            state, out = program.update(state, rows)
            metrics.append(jax.device_get(out))
    return before, jax.device_get(state), metrics


@pytest.fixture(scope="module", params=["control"])
def trained(request):
    config, recipe = make(request.param, **{"optimizer.schedule.warmup": "0", "optimizer.weight_decay": "0.0"})
    return request.param, config, recipe, *run(config, recipe)


@pytest.mark.long
def test_only_the_stage_moves(trained):
    """Frozen parts are bit-equal after training and have no slots; everything of the trained network moves."""
    stage, _, _, before, state, metrics = trained
    old, new = flatten(before), flatten(state.params)
    changed = {path for path in old if not np.array_equal(old[path], new[path])}
    assert {path.split("/")[0] for path in changed} == {STAGES[stage]}
    slots = set(flatten(state.opt_state[""].mu))
    assert slots == {path for path in old if path.startswith(f"{STAGES[stage]}/")}
    # The first step moves the zero convolutions, the second what is before them, the third the hint's first layers.
    still = slots - changed
    assert all("hint_encoder" in path and "conv_out" not in path for path in still), sorted(still)[:4]
    assert bool(still) == (stage == "control")
    assert all(np.isfinite(list(out.values())).all() for out in metrics)


def test_loss_of_a_step_by_hand(trained):
    """The ControlNet's part in the loss, from the modules and the random numbers themselves."""
    stage, config, recipe, before, _, metrics = trained
    if stage != "control":
        return
    state_rng = jax.random.split(jax.random.key(0))[1]
    rng = jax.random.split(jax.random.fold_in(state_rng, 0))[1]
    _, step_rng, noise_rng, _, _ = jax.random.split(rng, 5)
    data = batch(recipe)
    step = jax.random.randint(step_rng, (8,), 0, 1000)
    noise = jax.random.normal(noise_rng, data["image"].shape)
    noisy = add_noise(jnp.asarray(data["image"]), noise, config.sampler.alphas, step)
    networks = module.Networks(config)
    prompt: Prompt = networks.prompt(before, jnp.asarray(data["tokens"]))
    unet, net = UNet(config.model.unet), ControlNet(networks.controlnet.config)

    @jax.jit
    def loss():
        control = net.apply({"params": before["controlnet"]}, noisy, step, prompt.context, data["condition"])
        output = unet.apply({"params": before["unet"]}, noisy, step, prompt.context, control=control)
        return jnp.square(output - noise).mean()

    np.testing.assert_allclose(metrics[0]["loss"], loss(), rtol=1e-5)


def test_an_unlocked_decoder_learns_too():
    config, recipe = make("control", unlock_decoder="True")
    rules = dict(recipe.players[0].optimizer.trainable)
    assert rules == {"unet/decoder/.*": True, "unet/.*": False, "text/.*": False, "controlnet/.*": True}
    assert config.trainable[0] == ("unet/decoder/.*", True)


@pytest.mark.long
def test_a_base_run_becomes_each_stage():
    """A ControlNet begins as the UNet's encoder, an adapter's keys and values as the UNet's for text."""
    base = jax.eval_shape(make("base")[1].init, jax.random.key(0))[0]
    rng = np.random.default_rng(0)
    base = jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), base)
    control = make("control")[1].adapt(base)
    jax.tree.map(np.testing.assert_array_equal, control["controlnet"]["encoder"], base["unet"]["encoder"])
    assert not any(np.any(x) for x in jax.tree.leaves(control["controlnet"]["zero_middle"]))
    prompted = make("image_prompt")[1].adapt(base)
    places = ("encoder/down_1_0", "decoder/up_0_0", "decoder/up_0_1", "encoder/middle")
    for i, place in enumerate(places):
        text = flatten(base["unet"])[f"{place}/attention/transformer/blocks_0/attn2/key/kernel"]
        np.testing.assert_array_equal(prompted["adapter"][f"layers_{i}_key"]["kernel"], text.reshape(32, -1))
    for params, stage in ((control, "control"), (prompted, "image_prompt")):
        wanted = jax.eval_shape(make(stage)[1].init, jax.random.key(0))[0]
        assert jax.tree.map(np.shape, params) == jax.tree.map(lambda x: x.shape, wanted)


@pytest.mark.long
def test_resumed_run_is_bit_equal(tmp_path):
    """Stopped after two steps and continued, or in one go: the loss and the whole state."""
    small = {"total_steps": "3", "save_every": "2", "evaluate_every": "9", "log_every": "1", "evaluators": "()"}
    config, recipe = make("base", **small)

    def train():
        main.train(config, recipe, tmp_path)
        lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
        mesh = make_mesh(config.mesh)
        with Checkpointer(tmp_path / "checkpoints", None) as checkpoints, jax.set_mesh(mesh):
            state = jax.device_get(checkpoints.restore(make_program(recipe, config, mesh).state).state)
        return [line["train/loss"] for line in lines if "train/loss" in line], state

    losses, whole = train()
    shutil.rmtree(tmp_path / "checkpoints" / "3")
    again, continued = train()
    assert again[-1] == losses[-1]
    jax.tree.map(np.testing.assert_array_equal, continued, whole)


@pytest.mark.long
def test_a_run_is_drawn_with(tmp_path):
    """The export of a ControlNet's run is a directory that `infer draw` reads, of diffusers' format."""
    config, recipe = make("control", **{"model.unet.sample_size": "16"})
    params = jax.jit(lambda: recipe.init(jax.random.key(0))[0])()
    hub.save(recipe.bundle(params), tmp_path / "out")
    back = recipe.load(str(tmp_path / "out"))
    jax.tree.map(np.testing.assert_array_equal, back, jax.device_get(params))
    loaded = load_diffusion(tmp_path / "out", num_controls=1)
    assert loaded.size() == (16, 16) and loaded.factor == 1
    assert loaded.sampler() == config.sampler
    assert loaded.tokenizers[0]("red disc")[0].tolist() == recipe_tokens("red disc", config)
    _, prompted = make("image_prompt")
    bundle = prompted.bundle(jax.jit(lambda: prompted.init(jax.random.key(0))[0])())
    hub.save(bundle, tmp_path / "ip-adapter.safetensors")
    assert hub.load(tmp_path / "ip-adapter.safetensors").config == bundle.config


def recipe_tokens(text, config):
    return config.data.make_tokenizers([config.model.text.context_length])[0](text)[0].tolist()


def test_shares_of_what_is_dropped():
    steps = ("decode",)
    config = PictureConfig(
        name="control_shapes",
        preprocess=steps,
        preprocess_test=steps,
        prompt="prompt",
        preprocess_prompt=steps,
        drop_text=0.2,
        drop_image=0.1,
        drop_both=0.3,
        drop_words=("red",),
        drop_words_share=0.5,
    )
    rng, drop = np.random.default_rng(0), Drop(config)
    found = [drop({"captions": ("red disc on gray",)}, rng) for _ in range(4000)]
    kinds = [(bool(x["captions"][0]), bool(x["keep_prompt"])) for x in found]
    shares = {kind: kinds.count(kind) / 4000 for kind in set(kinds)}
    expected = {(False, True): 0.2, (True, False): 0.1, (False, False): 0.3, (True, True): 0.4}
    assert shares == pytest.approx(expected, abs=0.03)
    words = [x["captions"][0] for x in found if x["captions"][0]]
    assert words.count("disc on gray") / len(words) == pytest.approx(0.5, abs=0.03)
    assert set(words) == {"disc on gray", "red disc on gray"}


def test_what_is_measured_of_drawn_shapes():
    picture = np.full((6, 6, 3), 10 / 127.5 - 1)  # black ground
    picture[1:5, 1:5] = np.array([230, 30, 30]) / 127.5 - 1
    area = foreground(picture, 0)
    assert area.sum() == 16 and area[1:5, 1:5].all()
    assert nearest_color(picture, area) == 0
    assert nearest_color(picture, np.zeros((6, 6), bool)) == -1


@pytest.mark.parametrize(
    ("arg", "sizes"),
    [
        ("stage=base,size=1.5", {"unet": 859_520_964, "vae": 83_653_863, "text": 123_060_480}),
        ("stage=control,size=1.5", {"controlnet": 361_279_120}),
        ("stage=control,size=XL", {"unet": 2_567_463_684, "text_2": 694_659_840, "controlnet": 1_251_014_160}),
        ("stage=image_prompt,size=1.5,plus", {"adapter": 49_087_488, "image": 632_076_800}),
        ("stage=control,size=2.1-base", {"text": 340_387_840, "controlnet": 364_228_240}),
    ],
)
def test_published_settings(arg, sizes):
    """Built on shapes alone; every network has the published number of parameters."""
    _, recipe = main.make_recipe(f"configs/stable_diffusion.py:{arg},data=x", {})
    params, _ = jax.eval_shape(recipe.init, jax.random.key(0))
    counted = {name: sum(x.size for x in jax.tree.leaves(tree)) for name, tree in params.items()}
    assert counted == counted | sizes


@pytest.mark.parametrize(
    ("stage", "overrides", "message"),
    [
        ("base", {"stage": "control"}, "train_text is of stage 'base', got stage 'control'"),
        ("control", {"data.condition": ""}, "they go together"),
        ("base", {"unlock_decoder": "True"}, "unlock_decoder is of stage 'control'"),
        ("control", {"data.condition": "depth"}, "data.condition is 'depth', expected one of"),
        ("image_prompt", {"model.adapter.context_dim": "48"}, "adapter of another base model"),
        ("image_prompt", {"data.prompt": ""}, "go together"),
        ("base", {"data.drop_text": "0.6", "data.drop_both": "0.6"}, "add up to more than 1"),
        ("base", {"sampler.prediction": "flow"}, "prediction of a sampler is 'flow'"),
        ("base", {"stage": "distill"}, "stage is 'distill', expected one of"),
    ],
)
def test_settings_that_do_not_fit(stage, overrides, message):
    with pytest.raises(ValueError, match=message):
        make(stage, **overrides)
