"""Every key of diffusers' config classes: equal outputs with a value that is not its default, or a refusal by name.

One small model a class has all used keys off their defaults at once, and the harmless ones beside them.
"""

import inspect

import diffusers
import jax
import numpy as np
import oracles  # noqa: F401
import pytest
import torch
from omnax import hub
from omnax.hub.families.stable_diffusion import configs
from omnax.hub.keys import HARMLESS, REFUSED, USED, equal
from references.stable_diffusion import CROSS_DOWN, CROSS_UP, DOWN, UP, close, randomized, to_torch

CLASSES = {
    "UNet2DConditionModel": configs.UNET,
    "ControlNetModel": configs.CONTROLNET,
    "AutoencoderKL": configs.VAE,
}
FILE_ONLY = set(configs.COMMON)  # what files say beside the arguments of a class
# Values of the other kind for keys whose choices are few.
OTHER = {
    "mid_block_type": "UNetMidBlock2D",
    "only_cross_attention": True,
    "encoder_hid_dim": 8,
    "encoder_hid_dim_type": "text_proj",
    "num_attention_heads": 4,
    "class_embed_type": "timestep",
    "num_class_embeds": 3,
    "resnet_time_scale_shift": "scale_shift",
    "center_input_sample": True,
    "reverse_transformer_layers_per_block": [1, 1],
    "dual_cross_attention": True,
    "resnet_skip_time_act": True,
    "resnet_out_scale_factor": 2.0,
    "time_embedding_type": "fourier",
    "time_embedding_dim": 64,
    "time_embedding_act_fn": "silu",
    "timestep_post_act": "silu",
    "time_cond_proj_dim": 8,
    "conv_in_kernel": 5,
    "conv_out_kernel": 5,
    "attention_type": "gated",
    "class_embeddings_concat": True,
    "mid_block_only_cross_attention": True,
    "cross_attention_norm": "layer_norm",
    "shift_factor": 0.1,
    "latents_mean": [0.0] * 4,
    "latents_std": [1.0] * 4,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
    "mid_block_add_attention": False,
    "quantization_config": {"quant_method": "bitsandbytes"},
}
HARMLESS_VALUES = {
    "upcast_attention": True,
    "addition_embed_type_num_heads": 32,
    "dropout": 0.3,
    "sample_size": 9,
    "force_upcast": False,
}


def arguments(name):
    found = dict(inspect.signature(getattr(diffusers, name).__init__).parameters)
    return {key: value.default for key, value in found.items() if key != "self"}


@pytest.mark.parametrize("name", CLASSES)
def test_every_argument_of_the_class_has_a_fate_and_its_default(name):
    keys, theirs = CLASSES[name].keys, arguments(name)
    assert keys.keys() - FILE_ONLY == theirs.keys()
    for key, default in theirs.items():
        if keys[key].fate != HARMLESS:
            assert equal(keys[key].default, default), (key, keys[key].default, default)


@pytest.mark.parametrize("name", CLASSES)
def test_refused_and_unknown_keys_are_named(name):
    section = CLASSES[name]
    refused = [key for key, entry in section.keys.items() if entry.fate == REFUSED]
    for key in [*refused, "block_out_chanels"]:
        with pytest.raises(ValueError, match=f"'{key}' is "):
            section.read({key: OTHER.get(key, 8)})
    for key, entry in section.keys.items():
        if entry.fate == USED:
            with pytest.raises(ValueError, match=f"'{key}' is .*expected"):
                section.read({key: float("nan")})
    with pytest.raises(ValueError, match="'AttnDownBlock2D'"):
        configs.READERS[name]({"down_block_types": ["AttnDownBlock2D"] * 4}, "config.json")


ENCODER = {
    "in_channels": 5,
    "flip_sin_to_cos": False,
    "freq_shift": 1,
    "down_block_types": (CROSS_DOWN, DOWN),
    "block_out_channels": (12, 24),
    "layers_per_block": 1,
    "downsample_padding": 0,
    "mid_block_scale_factor": 1.5,
    "act_fn": "gelu",
    "norm_num_groups": 4,
    "norm_eps": 1e-2,
    "cross_attention_dim": 10,
    "transformer_layers_per_block": (2, 0),
    "attention_head_dim": (3, 2),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 4,
    "projection_class_embeddings_input_dim": 31,
}


def of_class(name, settings):
    """A model of diffusers, all of whose used keys are off their defaults."""
    harmless = {key: value for key, value in HARMLESS_VALUES.items() if key in arguments(name)}
    model = randomized(getattr(diffusers, name)(**{**harmless, **settings}))
    for key, entry in CLASSES[name].keys.items():
        if entry.fate == USED and key not in FILE_ONLY:
            assert not equal(model.config[key], entry.default), f"{key} is at its default"
    return model


def network_inputs():
    rng = np.random.default_rng(0)
    draw = lambda *shape: rng.normal(size=shape).astype(np.float32)  # noqa: E731
    arrays = {"latents": draw(2, 6, 4, 5), "timestep": np.float32(30), "context": draw(2, 3, 10)}
    return arrays | {"pooled": draw(2, 7), "sizes": rng.integers(1, 99, (2, 6)).astype(np.float32)}


def theirs_of(arrays):
    added = {"text_embeds": torch.tensor(arrays["pooled"]), "time_ids": torch.tensor(arrays["sizes"])}
    return (to_torch(arrays["latents"]), 30, to_torch(arrays["context"])), added


def ours(bundle, arrays):
    return jax.jit(lambda params, x: bundle.model.apply({"params": params}, **x))(bundle.params, arrays)


def test_unet(tmp_path):
    own = {"out_channels": 3, "up_block_types": (UP, CROSS_UP), "sample_size": 6, "layers_per_block": (2, 1)}
    model = of_class("UNet2DConditionModel", ENCODER | own)
    model.save_pretrained(tmp_path / "in")
    bundle, arrays = hub.load(tmp_path / "in"), network_inputs()
    inputs, added = theirs_of(arrays)
    close(ours(bundle, arrays), model(*inputs, added_cond_kwargs=added).sample)
    hub.save(bundle, tmp_path / "out")
    again = diffusers.UNet2DConditionModel.from_pretrained(tmp_path / "out").eval()
    assert torch.equal(again(*inputs, added_cond_kwargs=added).sample, model(*inputs, added_cond_kwargs=added).sample)


def test_controlnet(tmp_path):
    own = {
        "conditioning_channels": 2,
        "controlnet_conditioning_channel_order": "bgr",
        "conditioning_embedding_out_channels": (4, 6),
        "global_pool_conditions": True,
    }
    model = of_class("ControlNetModel", ENCODER | own)
    model.save_pretrained(tmp_path / "in")
    bundle, arrays = hub.load(tmp_path / "in"), network_inputs()
    inputs, added = theirs_of(arrays)
    image = np.random.default_rng(1).random((2, 12, 8, 2), dtype=np.float32)
    theirs = model(*inputs, to_torch(image), added_cond_kwargs=added)
    got = ours(bundle, arrays | {"hint": image})
    close(got.middle, theirs.mid_block_res_sample)
    for one, other in zip(got.skips, theirs.down_block_res_samples, strict=True):
        close(one, other)
    hub.save(bundle, tmp_path / "out")
    again = diffusers.ControlNetModel.from_pretrained(tmp_path / "out").eval()
    assert torch.equal(again(*inputs, to_torch(image), added_cond_kwargs=added)[1], theirs.mid_block_res_sample)


def test_vae(tmp_path):
    settings = {
        "in_channels": 2,
        "out_channels": 4,
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
        "block_out_channels": (6, 9),
        "layers_per_block": 2,
        "act_fn": "relu",
        "latent_channels": 3,
        "norm_num_groups": 3,
        "scaling_factor": 0.5,
    }
    model = of_class("AutoencoderKL", settings)
    model.save_pretrained(tmp_path / "in")
    bundle = hub.load(tmp_path / "in")
    image = np.random.default_rng(1).normal(size=(2, 4, 6, 2)).astype(np.float32)
    close(ours(bundle, {"image": image}), model(to_torch(image)).sample)
    assert bundle.config.scaling_factor == 0.5
    hub.save(bundle, tmp_path / "out")
    again = diffusers.AutoencoderKL.from_pretrained(tmp_path / "out").eval()
    assert torch.equal(again(to_torch(image)).sample, model(to_torch(image)).sample)
