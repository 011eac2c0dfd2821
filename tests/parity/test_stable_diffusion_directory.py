"""A whole pipeline's directory, as diffusers writes it: every component, both text encoders, and back."""

import json

import diffusers
import jax
import numpy as np
import oracles  # noqa: F401
import pytest
import torch
import transformers
from omnax import hub
from references.stable_diffusion import SD15, SDXL, close, randomized

TOKENS = np.array([[3, 7, 11, 5, 98, 98], [4, 98, 98, 98, 98, 98]])
VAE = {
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "block_out_channels": (4, 8),
    "norm_num_groups": 4,
    "scaling_factor": 0.13025,
}


def text_encoder(cls, width, activation):
    config = transformers.CLIPTextConfig(
        hidden_size=width,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=2 * width,
        vocab_size=99,
        max_position_embeddings=8,
        hidden_act=activation,
        projection_dim=12,
        eos_token_id=2,  # as all published configs have it: the largest id is the end of text
    )
    return randomized(cls(config))


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """(the pipeline of diffusers, its directory)."""
    pipeline = diffusers.StableDiffusionXLPipeline(
        unet=randomized(diffusers.UNet2DConditionModel(**SDXL)),
        vae=randomized(diffusers.AutoencoderKL(**VAE)),
        text_encoder=text_encoder(transformers.CLIPTextModel, 24, "quick_gelu"),
        text_encoder_2=text_encoder(transformers.CLIPTextModelWithProjection, 40, "gelu"),
        tokenizer=None,
        tokenizer_2=None,
        scheduler=diffusers.EulerDiscreteScheduler(timestep_spacing="leading", steps_offset=1),
    )
    path = tmp_path_factory.mktemp("pipeline")
    pipeline.save_pretrained(path)
    return pipeline, path


def test_both_text_encoders_condition_alike(directory):
    """SDXL is conditioned on the layers before the last, without their final norm, and on the second's projection."""
    pipeline, path = directory
    bundle = hub.load(path)
    assert set(bundle.components) == {"vae", "text_encoder", "text_encoder_2", "unet"}
    contexts = []
    for name in ("text_encoder", "text_encoder_2"):
        component = bundle.components[name]
        model, params = component.model, component.params
        ours = jax.jit(lambda p, m=model: m.apply({"params": p}, TOKENS, hidden_states=True))(params)
        theirs = getattr(pipeline, name)(torch.tensor(TOKENS), output_hidden_states=True)
        close(ours["hidden_states"][-2], theirs.hidden_states[-2])
        close(ours["tokens"], theirs.last_hidden_state)
        contexts.append(ours["hidden_states"][-2])
    close(ours["projected"], theirs.text_embeds)
    assert np.concatenate(contexts, -1).shape == (2, 6, SDXL["cross_attention_dim"])


def test_the_directory_is_written_back_for_diffusers(directory, tmp_path):
    pipeline, path = directory
    bundle = hub.load(path)
    assert bundle.config["vae"].scaling_factor == 0.13025
    assert json.loads(bundle.processor["scheduler"]["scheduler_config.json"])["steps_offset"] == 1
    hub.save(bundle, tmp_path / "copy")
    copy = diffusers.StableDiffusionXLPipeline.from_pretrained(tmp_path / "copy")
    for name in ("unet", "vae", "text_encoder", "text_encoder_2"):
        state = getattr(copy, name).state_dict()
        for key, tensor in getattr(pipeline, name).state_dict().items():
            assert torch.equal(tensor, state[key]), (name, key)
    assert copy.scheduler.config.timestep_spacing == "leading" and copy.scheduler.config.steps_offset == 1


def test_the_safety_checker_of_published_directories_is_left_out(tmp_path):
    """It looks at finished images, and no model here is one; the copy says that there is none."""
    config = transformers.CLIPConfig(
        vision_config={"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8},
        projection_dim=8,
    )
    checker = diffusers.pipelines.stable_diffusion.StableDiffusionSafetyChecker(config)
    pipeline = diffusers.StableDiffusionPipeline(
        unet=diffusers.UNet2DConditionModel(**SD15),
        vae=diffusers.AutoencoderKL(**VAE),
        text_encoder=text_encoder(transformers.CLIPTextModel, 64, "quick_gelu"),
        tokenizer=None,
        scheduler=diffusers.PNDMScheduler(steps_offset=1, skip_prk_steps=True),
        safety_checker=checker,
        feature_extractor=transformers.CLIPImageProcessor(),
    )
    pipeline.save_pretrained(tmp_path / "in")
    assert json.loads((tmp_path / "in" / "model_index.json").read_text())["safety_checker"][1]
    bundle = hub.load(tmp_path / "in")
    assert "safety_checker" not in bundle.components and "safety_checker" not in bundle.processor
    hub.save(bundle, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "model_index.json").read_text())["safety_checker"] == [None, None]
    assert not (tmp_path / "out" / "safety_checker").exists()
