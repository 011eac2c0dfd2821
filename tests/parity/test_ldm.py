"""Single files of CompVis' and Stability's code: the names beside diffusers' converter, and small files whole."""

import functools

import diffusers
import jax
import numpy as np
import oracles  # noqa: F401
import pytest
import safetensors.torch
import torch
import transformers
from diffusers.loaders import single_file_utils as converter
from omnax import hub
from omnax.hub.families.stable_diffusion import configs, family, ldm
from omnax.hub.files.source import Source
from omnax.hub.files.tensors import LazyTensor, TensorFile
from omnax.hub.mapping import save_tensors
from omnax.models.stable_diffusion import sizes
from omnax.models.stable_diffusion.unet import UNetConfig
from omnax.models.stable_diffusion.vae import VAEConfig
from references.stable_diffusion import randomized


def to_ldm(names, table):
    """diffusers' names -> those of the file, by the table read backwards."""
    backwards = {new: old for old, new in table.items()}
    return {ldm.renamed(name, backwards): name for name in names}


def numbered(names):
    """A tensor of its own for every name."""
    return {name: torch.full((1, 1, 1, 1), float(i)) for i, name in enumerate(names)}


def check(converted, state, expected):
    """That diffusers' converter gives every tensor our name, and that these are all of the network's."""
    assert {name: tensor.flatten()[0].item() for name, tensor in converted.items()} == {
        expected[old]: tensor.flatten()[0].item() for old, tensor in state.items()
    }


@functools.cache
def shapes_of(config):
    tensors = save_tensors(family.abstract(config), family.NETWORKS[type(config)].table(config))
    return {name: tensor.shape for name, tensor in tensors.items()}


def network_names(config):
    return list(shapes_of(config))


@pytest.mark.parametrize("variant", ["1.5", "1.5-inpainting", "2.1", "XL", "XL-refiner"])
def test_unet_names_are_those_of_the_converter(variant):
    config = sizes.unet(variant)
    theirs = to_ldm(network_names(config), ldm.unet_names(config))
    state = numbered(f"model.diffusion_model.{name}" for name in theirs)
    converted = converter.convert_ldm_unet_checkpoint(state, configs.write_unet(config))
    check(converted, state, {f"model.diffusion_model.{old}": new for old, new in theirs.items()})


@pytest.mark.parametrize(("variant", "prefix"), [("1.5", "control_model."), ("2.1", "")])
def test_controlnet_names_are_those_of_the_converter(variant, prefix):
    config = sizes.controlnet(variant)
    theirs = to_ldm(network_names(config), ldm.controlnet_names(config))
    state = numbered(f"{prefix}{name}" for name in theirs)
    converted = converter.convert_controlnet_checkpoint(state, configs.write_controlnet(config))
    check(converted, state, {f"{prefix}{old}": new for old, new in theirs.items()})


def test_vae_names_are_those_of_the_converter():
    theirs = to_ldm(network_names(VAEConfig()), ldm.vae_names(VAEConfig()))
    state = numbered(f"first_stage_model.{name}" for name in theirs)
    converted = converter.convert_ldm_vae_checkpoint(state, configs.write_vae(VAEConfig()))
    check(converted, state, {f"first_stage_model.{old}": new for old, new in theirs.items()})


def text_tower_of_open_clip(width, depth):
    rng = np.random.default_rng(0)
    draw = lambda *shape: torch.tensor(rng.normal(size=shape), dtype=torch.float32)  # noqa: E731
    state = {"positional_embedding": draw(7, width), "token_embedding.weight": draw(11, width)}
    state |= {"text_projection": draw(width, width), "ln_final.weight": draw(width), "ln_final.bias": draw(width)}
    for i in range(depth):
        block = f"transformer.resblocks.{i}"
        state |= {f"{block}.{n}.{x}": draw(width) for n in ("ln_1", "ln_2") for x in ("weight", "bias")}
        state |= {f"{block}.attn.in_proj_weight": draw(3 * width, width), f"{block}.attn.in_proj_bias": draw(3 * width)}
        shapes = {"attn.out_proj": (width, width), "mlp.c_fc": (4 * width, width), "mlp.c_proj": (width, 4 * width)}
        for name, shape in shapes.items():
            state |= {f"{block}.{name}.weight": draw(*shape), f"{block}.{name}.bias": draw(shape[0])}
    return state


@pytest.mark.parametrize("prefix", ["conditioner.embedders.1.model.", "cond_stage_model.model."])
def test_text_towers_of_open_clip_are_taken_apart_alike(prefix):
    depth = 24 if prefix.startswith("cond_stage") else 2  # diffusers leaves out the 24th layer of SD 2's
    state = text_tower_of_open_clip(4, depth)
    config = transformers.CLIPTextConfig(hidden_size=4, num_attention_heads=1, vocab_size=11, num_hidden_layers=1)
    checkpoint = {f"{prefix}{name}": tensor for name, tensor in state.items()}
    if depth == 24:  # its projection is ignored, but read for its size: that of the width
        checkpoint[f"{prefix}text_projection"] = torch.zeros(4, 4)
    theirs = converter.convert_open_clip_checkpoint(transformers.CLIPTextModel(config), checkpoint, prefix)
    lazy = {name: LazyTensor(tuple(x.shape), np.dtype(np.float32), lambda x=x: x.numpy()) for name, x in state.items()}
    ours = ldm.open_clip_tensors(lazy, min(depth, 23), projection=depth < 23)
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert tensor.shape == tuple(theirs[name].shape), name
        np.testing.assert_array_equal(tensor.view(), theirs[name].numpy(), err_msg=name)
    if depth == 2:
        again = ldm.open_clip_state(ours)
        assert again.keys() == state.keys()
        for name, tensor in again.items():
            assert tensor.shape == tuple(state[name].shape), name
            np.testing.assert_array_equal(tensor.view(), state[name].numpy(), err_msg=name)


# SD 1.5 in small: as many levels and layers.
UNET = UNetConfig(widths=(8, 8, 16, 16), num_heads=(2, 2, 2, 2), context_dim=16, groups=4)
VAE = VAEConfig(widths=(4, 4, 8, 8), groups=4)
POSITION_IDS = "cond_stage_model.transformer.text_model.embeddings.position_ids"
TEXT = {"width": 16, "depth": 2, "num_heads": 2, "mlp_dim": 32, "vocab_size": 99, "context_length": 9}


@pytest.fixture(scope="module")
def parts():
    """diffusers' and transformers' own components."""
    text = transformers.CLIPTextConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        vocab_size=99,
        max_position_embeddings=9,
        hidden_act="quick_gelu",
        eos_token_id=2,
    )
    unet = randomized(diffusers.UNet2DConditionModel.from_config(configs.write_unet(UNET)))
    vae = randomized(diffusers.AutoencoderKL.from_config(configs.write_vae(VAE)))
    return {"unet": unet, "vae": vae, "text_encoder": randomized(transformers.CLIPTextModel(text))}


def text_state(model):
    """Under the names of the published files, whatever the version of transformers calls them."""
    return {f"text_model.{name.removeprefix('text_model.')}": x for name, x in model.state_dict().items()}


def ldm_state(parts):
    state = {}
    for name, old in to_ldm(parts["unet"].state_dict(), ldm.unet_names(UNET)).items():
        state[f"model.diffusion_model.{name}"] = parts["unet"].state_dict()[old]
    for name, old in to_ldm(parts["vae"].state_dict(), ldm.vae_names(VAE)).items():
        tensor = parts["vae"].state_dict()[old]
        square = ".attn_1." in name and tensor.ndim == 2
        state[f"first_stage_model.{name}"] = tensor[..., None, None].contiguous() if square else tensor
    state |= {f"cond_stage_model.transformer.{name}": x for name, x in text_state(parts["text_encoder"]).items()}
    ema = {f"model_ema.{name.replace('.', '')}": torch.zeros(1) for name in state if name.startswith("model.")}
    schedules = ["betas", "alphas_cumprod", "alphas_cumprod_prev", "sqrt_alphas_cumprod", "model_ema.decay"]
    schedules += ["sqrt_one_minus_alphas_cumprod", "log_one_minus_alphas_cumprod", "sqrt_recip_alphas_cumprod"]
    schedules += ["sqrt_recipm1_alphas_cumprod", "posterior_variance", "posterior_log_variance_clipped"]
    schedules += ["posterior_mean_coef1", "posterior_mean_coef2"]
    return state | ema | {POSITION_IDS: torch.arange(9)[None]} | {name: torch.zeros(10) for name in schedules}


def small(path):
    unet = {"widths": UNET.widths, "num_heads": UNET.num_heads, "context_dim": 16, "groups": 4}
    text = {name: value for name, value in TEXT.items() if name != "context_length"}
    return hub.load(path, unet=unet, vae={"widths": VAE.widths, "groups": 4}, text_encoder=text)


def test_a_whole_file_is_the_directory_that_diffusers_makes_of_it(parts, tmp_path):
    path, state = tmp_path / "model.ckpt", ldm_state(parts)
    state["cond_stage_model.transformer.text_model.embeddings.position_embedding.weight"] = torch.zeros(77, 16)
    torch.save({"state_dict": state, "global_step": 3}, path)
    bundle = small(path)
    assert list(bundle.components) == ["unet", "vae", "text_encoder"]
    assert bundle.metadata["scheduler"] == ["diffusers", "PNDMScheduler"]
    hub.save(bundle, tmp_path / "directory")
    for name, cls in (("unet", diffusers.UNet2DConditionModel), ("vae", diffusers.AutoencoderKL)):
        copy = cls.from_pretrained(tmp_path / "directory" / name).state_dict()
        assert all(torch.equal(x, copy[key]) for key, x in parts[name].state_dict().items())
    scheduler = diffusers.PNDMScheduler.from_pretrained(tmp_path / "directory" / "scheduler")
    assert scheduler.config.steps_offset == 1 and scheduler.config.skip_prk_steps
    # And back: the same tensors under the same names; a file without configs can only be of a published size.
    written = ldm.joined(bundle)
    assert written.keys() == {name for name in state if name.startswith(("model.", "first_", "cond_"))} - {POSITION_IDS}
    for name, tensor in written.items():
        np.testing.assert_array_equal(tensor.view(), state[name].numpy(), err_msg=name)
    with pytest.raises(ValueError, match=r"cannot say.* widths="):
        hub.save(bundle, tmp_path / "small.safetensors", "ldm")
    assert not (tmp_path / "small.safetensors").exists()


def test_a_file_says_its_published_model_and_no_other(tmp_path):
    """What a name-only pipeline would write for each published size is read as that size."""
    for variant in ("1.5", "1.5-inpainting", "2.1", "XL", "XL-refiner"):
        config = sizes.unet(variant)
        names = to_ldm(network_names(config), ldm.unet_names(config))
        tensors = {
            f"model.diffusion_model.{name}": LazyTensor(shape, np.dtype(np.float32), lambda: np.zeros(1))
            for name, shape in ((x, shapes_of(config)[old]) for x, old in names.items())
        }
        marks = {"XL": "conditioner.embedders.1.model.ln_final.bias", "XL-refiner": "conditioner.embedders.0.model.ln"}
        if variant in marks:
            tensors[marks[variant]] = LazyTensor((1,), np.dtype(np.float32), lambda: np.zeros(1))
        found = ldm.split(Source(TensorFile(tmp_path / "x.ckpt", tensors), {}, {}))
        assert configs.read_unet(found.sources["unet"].config, "") == config
        assert found.document["scheduler"][1] == ldm.SCHEDULERS[variant.partition("-")[0]]["_class_name"]


def test_a_controlnet_alone_is_a_bundle_of_its_own(tmp_path):
    config = configs.write_controlnet(sizes.controlnet("1.5", widths=UNET.widths, groups=4, context_dim=16))
    oracle = randomized(diffusers.ControlNetModel.from_config(config))
    state = oracle.state_dict()
    names = to_ldm(state, ldm.controlnet_names(sizes.controlnet("1.5")))
    torch.save({f"control_model.{name}": state[old] for name, old in names.items()}, tmp_path / "control.pth")
    bundle = hub.load(tmp_path / "control.pth", widths=UNET.widths, groups=4, context_dim=16)
    oracle.save_pretrained(tmp_path / "own")
    jax.tree.map(np.testing.assert_array_equal, bundle.params, hub.load(tmp_path / "own").params)


def test_what_no_component_has_is_named(parts, tmp_path):
    state = ldm_state(parts) | {"model.diffusion_modl.out.2.bias": torch.zeros(4)}
    safetensors.torch.save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"unexpected 'model.diffusion_modl.out.2.bias', got \(4,\)"):
        small(tmp_path / "model.safetensors")
    del state["model.diffusion_modl.out.2.bias"], state["first_stage_model.encoder.mid.attn_1.q.bias"]
    safetensors.torch.save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"(?s)component 'vae': .*missing 'encoder.mid_block.attentions.0.to_q.bias'"):
        small(tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="unknown component 'unett'"):
        hub.load(tmp_path / "model.safetensors", unett={})
