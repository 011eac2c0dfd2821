"""The recipe of Stable Diffusion: who moves, what a step is made of, resume, sharding, and that it learns."""

import jax
import numpy as np
import pytest
from omnax import hub
from omnax.infer.diffusion import load_diffusion
from omnax.train import main
from omnax.train.recipes.stable_diffusion.data import Drop, PictureConfig
from omnax.train.recipes.stable_diffusion.evaluation import foreground, nearest_color
from omnax.train.rules import flatten

SMALL = {"batch_size": "8", "init_from.required": "()", "model.unet.widths": "(8, 16)"}
STAGES = {"control": "controlnet", "image_prompt": "adapter"}


def make(stage, /, **overrides):
    adapter = {"model.adapter.layer_widths": "(16, 16, 16, 16)"} if stage == "image_prompt" else {}
    return main.make_recipe(f"configs/stable_diffusion.py:stage={stage}", SMALL | adapter | overrides)


def test_an_unlocked_decoder_learns_too():
    config, recipe = make("control", unlock_decoder="True")
    rules = dict(recipe.players[0].optimizer.trainable)
    assert rules == {"unet/decoder/.*": True, "unet/.*": False, "text/.*": False, "controlnet/.*": True}
    assert config.trainable[0] == ("unet/decoder/.*", True)


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
