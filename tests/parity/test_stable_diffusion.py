"""Stable Diffusion's networks beside diffusers: small random models through the directories that it writes."""

import json
import math

import diffusers
import jax
import numpy as np
import oracles  # noqa: F401
import pytest
import safetensors.torch
import torch
from omnax import hub
from omnax.hub.families.stable_diffusion import configs, family
from omnax.hub.mapping import save_tensors
from omnax.models.stable_diffusion import sizes
from omnax.models.stable_diffusion.controlnet import add_controls
from references.stable_diffusion import (
    CROSS_DOWN,
    CROSS_UP,
    DOWN,
    FORMS,
    TOLERANCE,
    UP,
    added,
    apply,
    close,
    inputs,
    randomized,
    to_torch,
    write_unets,
)


@pytest.fixture(scope="session")
def unets(tmp_path_factory):
    """form -> (form, oracle, what `hub` makes of its directory, the directory)."""
    made = write_unets(tmp_path_factory.mktemp("unets"))
    return {name: (name, oracle, hub.load(path), path) for name, (oracle, path) in made.items()}


@pytest.fixture(params=FORMS)
def unet(request, unets):
    return unets[request.param]


@pytest.mark.parametrize("timestep", [7, 946.4211])
def test_unet_equals(unet, timestep):
    name, oracle, bundle, _ = unet
    arrays = inputs(name)
    theirs = oracle(to_torch(arrays["latents"]), timestep, to_torch(arrays["context"]), added_cond_kwargs=added(arrays))
    close(apply(bundle, arrays, timestep), theirs.sample)


def test_unet_of_latents_that_do_not_halve_evenly(unets):
    """Upsampling goes to the size of the skip connection; one timestep an example."""
    name, oracle, bundle, _ = unets["2.1"]
    arrays, times = inputs(name, (7, 9)), np.array([3, 800])
    theirs = oracle(
        to_torch(arrays["latents"]), torch.tensor(times), to_torch(arrays["context"]), added_cond_kwargs=added(arrays)
    )
    close(apply(bundle, arrays, times), theirs.sample)


def test_unet_with_scanned_and_recomputed_layers(unets):
    name, _, bundle, path = unets["XL"]
    other = hub.load(path, scan=True, remat="full")
    arrays = inputs(name)
    np.testing.assert_allclose(apply(other, arrays, 5), apply(bundle, arrays, 5), atol=TOLERANCE)


def test_unet_export_is_read_back(unet, tmp_path):
    name, oracle, bundle, _ = unet
    hub.save(bundle, tmp_path / "copy")
    copy = diffusers.UNet2DConditionModel.from_pretrained(tmp_path / "copy")
    assert (tmp_path / "copy" / "diffusion_pytorch_model.safetensors").is_file()
    for key, tensor in oracle.state_dict().items():
        assert torch.equal(tensor, copy.state_dict()[key]), key
    written = {key: value for key, value in copy.config.items() if not key.startswith("_")}
    assert json.loads(json.dumps(written)) == json.loads(
        json.dumps({key: value for key, value in oracle.config.items() if not key.startswith("_")})
    )
    hub.save(bundle, tmp_path / "shards", max_shard_size=50_000)
    assert len(list((tmp_path / "shards").glob("diffusion_pytorch_model-*-of-*.safetensors"))) > 1
    arrays = inputs(name)
    np.testing.assert_array_equal(apply(hub.load(tmp_path / "shards"), arrays, 5), apply(bundle, arrays, 5))


def test_wrong_inputs_are_named(unet):
    name, _, bundle, _ = unet
    arrays = inputs(name)
    with pytest.raises(ValueError, match=r"latents have 3 channels, expected 4"):
        apply(bundle, arrays | {"latents": arrays["latents"][..., :3]}, 5)
    with pytest.raises(ValueError, match=r"hidden states have 7 channels, expected 64"):
        apply(bundle, arrays | {"context": arrays["context"][..., :7]}, 5)
    if name == "XL":
        with pytest.raises(ValueError, match="conditioned on pooled text and sizes"):
            apply(bundle, {key: arrays[key] for key in ("latents", "context")}, 5)
        with pytest.raises(ValueError, match="pooled text of 5 and 6 sizes of 8 channels are 53, expected 60"):
            apply(bundle, arrays | {"pooled": arrays["pooled"][:, :5]}, 5)


TINY_VAE = {
    "down_block_types": ("DownEncoderBlock2D",) * 3,
    "up_block_types": ("UpDecoderBlock2D",) * 3,
    "block_out_channels": (8, 8, 16),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "scaling_factor": 0.3,
}
EARLY_NAMES = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}


@pytest.fixture(scope="session")
def vae(tmp_path_factory):
    """(oracle, what `hub` makes of its directory, the directory)."""
    oracle = randomized(diffusers.AutoencoderKL(**TINY_VAE))
    path = tmp_path_factory.mktemp("vae")
    oracle.save_pretrained(path)
    return oracle, hub.load(path), path


def test_vae_encodes_and_decodes_alike(vae, tmp_path):
    oracle, bundle, path = vae
    image = np.random.default_rng(0).normal(size=(2, 8, 12, 3)).astype(np.float32)
    posterior = oracle.encode(to_torch(image)).latent_dist
    run = jax.jit(lambda params, x, method: bundle.model.apply({"params": params}, x, method=method), static_argnums=2)
    ours = run(bundle.params, image, "encode")
    close(ours.mean, posterior.mean)
    close(ours.logvar, posterior.logvar)
    close(ours.kl(), posterior.kl())
    latents = np.moveaxis(posterior.mean.numpy(), 1, -1)
    close(run(bundle.params, latents, "decode"), oracle.decode(posterior.mean).sample)
    close(run(bundle.params, 0.3 * latents, "decode_scaled"), oracle.decode(posterior.mean).sample)
    np.testing.assert_allclose(run(bundle.params, image, "encode_scaled"), 0.3 * ours.mean, rtol=1e-6)
    with pytest.raises(ValueError, match="image of 8 x 6 pixels, expected multiples of 4"):
        run(bundle.params, image[:, :, :6], "encode")
    # The files of Stable Diffusion 1.x and 2.x have the names of early diffusers.
    state = oracle.state_dict()
    for new, old in EARLY_NAMES.items():
        state = {key.replace(f"attentions.0.{new}.", f"attentions.0.{old}."): x for key, x in state.items()}
    assert "encoder.mid_block.attentions.0.proj_attn.weight" in state
    (tmp_path / "config.json").write_text((path / "config.json").read_text())
    safetensors.torch.save_file(state, tmp_path / "diffusion_pytorch_model.safetensors")
    jax.tree.map(np.testing.assert_array_equal, hub.load(tmp_path).params, bundle.params)


def test_vae_export_is_read_back(vae, tmp_path):
    oracle, bundle, _ = vae
    hub.save(bundle, tmp_path / "copy")
    copy = diffusers.AutoencoderKL.from_pretrained(tmp_path / "copy")
    assert all(torch.equal(tensor, copy.state_dict()[key]) for key, tensor in oracle.state_dict().items())
    assert copy.config.scaling_factor == 0.3


def controlnet_oracle(name, **settings):
    unet = diffusers.UNet2DConditionModel(**FORMS[name])
    oracle = diffusers.ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(4, 8), **settings)
    return randomized(oracle, seed=1)


@pytest.fixture(scope="session")
def controlnets(tmp_path_factory):
    """form -> (oracle, what `hub` makes of its directory)."""
    made = {}
    for name, settings in {"1.5": {}, "XL": {"controlnet_conditioning_channel_order": "bgr"}}.items():
        oracle = controlnet_oracle(name, **settings)
        path = tmp_path_factory.mktemp("controlnet")
        oracle.save_pretrained(path)
        made[name] = oracle, hub.load(path)
    return made


def hint(shape=(16, 16), batch=2, seed=3):
    return np.random.default_rng(seed).random((batch, *shape, 3), dtype=np.float32)


@pytest.mark.parametrize("guess_mode", [False, True])
@pytest.mark.parametrize("name", ["1.5", "XL"])
def test_controlnet_residuals_equal(controlnets, name, guess_mode):
    oracle, bundle = controlnets[name]
    arrays, image = inputs(name), hint()
    tensors = to_torch(arrays["latents"]), 500, to_torch(arrays["context"]), to_torch(image)
    theirs = oracle(*tensors, conditioning_scale=0.7, guess_mode=guess_mode, added_cond_kwargs=added(arrays))
    arguments = arrays | {"timestep": np.float32(500), "hint": image, "scale": np.float32(0.7)}
    run = jax.jit(lambda params, arguments: bundle.model.apply({"params": params}, **arguments, guess_mode=guess_mode))
    ours = run(bundle.params, arguments)
    for one, other in zip(ours.skips, theirs.down_block_res_samples, strict=True):
        close(one, other)
    close(ours.middle, theirs.mid_block_res_sample)


def test_controlled_unet_equals_with_two_controlnets_one_of_them_pooled(unets, controlnets, tmp_path):
    _, oracle, bundle, _ = unets["1.5"]
    pooled = controlnet_oracle("1.5")
    pooled.register_to_config(global_pool_conditions=True)
    pooled.save_pretrained(tmp_path)
    pairs = [controlnets["1.5"], (pooled, hub.load(tmp_path))]
    arrays, images = inputs("1.5"), [hint(seed=4), hint(seed=5)]
    tensors = to_torch(arrays["latents"]), 30, to_torch(arrays["context"])
    outs = [net(*tensors, to_torch(image), 0.5) for (net, _), image in zip(pairs, images, strict=True)]
    theirs = oracle(
        *tensors,
        down_block_additional_residuals=[sum(x) for x in zip(*(out[0] for out in outs), strict=True)],
        mid_block_additional_residual=sum(out[1] for out in outs),
    )
    ours = [apply(b, arrays, 30, hint=image, scale=0.5) for (_, b), image in zip(pairs, images, strict=True)]
    close(apply(bundle, arrays, 30, control=add_controls(ours)), theirs.sample)


def test_controlnet_export_and_its_hint(controlnets, tmp_path):
    oracle, bundle = controlnets["XL"]
    hub.save(bundle, tmp_path / "copy")
    copy = diffusers.ControlNetModel.from_pretrained(tmp_path / "copy")
    assert all(torch.equal(tensor, copy.state_dict()[key]) for key, tensor in oracle.state_dict().items())
    assert copy.config.controlnet_conditioning_channel_order == "bgr"
    for wrong, message in ((hint((12, 16)), "has about .12, 16. pixels, expected .16, 16."), (None, "needs a control")):
        with pytest.raises(ValueError, match=message):
            apply(bundle, inputs("XL"), 5, hint=wrong)
    with pytest.raises(ValueError, match="control image has 1 channels, expected 3"):
        apply(bundle, inputs("XL"), 5, hint=hint()[..., :1])


# The published configs, as their files have them, and what they count (spec controlnet_ip_adapter.md 2.1).
XL_UNET = {
    "block_out_channels": (320, 640, 1280),
    "down_block_types": (DOWN, CROSS_DOWN, CROSS_DOWN),
    "up_block_types": (CROSS_UP, CROSS_UP, UP),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
REFINER = XL_UNET | {
    "block_out_channels": (384, 768, 1536, 1536),
    "down_block_types": (DOWN, CROSS_DOWN, CROSS_DOWN, DOWN),
    "up_block_types": (UP, CROSS_UP, CROSS_UP, UP),
    "transformer_layers_per_block": 4,
    "attention_head_dim": (6, 12, 24, 24),
    "cross_attention_dim": 1280,
    "projection_class_embeddings_input_dim": 2560,
}
V21 = {"attention_head_dim": (5, 10, 20, 20), "cross_attention_dim": 1024, "use_linear_projection": True}
UNETS = {
    "1.5": ({"cross_attention_dim": 768, "sample_size": 64}, 859_520_964, 686),
    "1.5-inpainting": ({"cross_attention_dim": 768, "in_channels": 9, "sample_size": 64}, 859_535_364, 686),
    "2.1": (V21 | {"sample_size": 96}, 865_910_724, 686),
    "2.1-base": (V21 | {"sample_size": 64}, 865_910_724, 686),
    "XL": (XL_UNET | {"sample_size": 128}, 2_567_463_684, 1680),
    "XL-refiner": (REFINER | {"sample_size": 128}, 2_259_526_660, 1220),
}


def published_names(config):
    """Names and shapes of the tensors that we would write of a config's network."""
    shapes = family.abstract(config)
    return {
        key: tensor.shape for key, tensor in save_tensors(shapes, family.NETWORKS[type(config)].table(config)).items()
    }


def oracle_names(cls, config):
    with torch.device("meta"):
        model = cls(**config)
    return {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}


@pytest.mark.parametrize("name", UNETS)
def test_published_unets_have_the_published_keys_and_counts(name):
    document, parameters, tensors = UNETS[name]
    config = configs.read_unet(document, "config.json")
    assert config == sizes.unet(name)
    ours = published_names(config)
    assert ours == oracle_names(diffusers.UNet2DConditionModel, document)
    assert len(ours) == tensors and sum(map(math.prod, ours.values())) == parameters
