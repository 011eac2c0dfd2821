"""Small Stable Diffusion networks of diffusers with random weights, and what they and ours are fed with."""

import functools
import math

import diffusers
import jax
import numpy as np
import oracles  # noqa: F401
import torch

TOLERANCE = 1e-5
DOWN, CROSS_DOWN, UP, CROSS_UP = "DownBlock2D", "CrossAttnDownBlock2D", "UpBlock2D", "CrossAttnUpBlock2D"
SD15 = {
    "sample_size": 8,
    "block_out_channels": (16, 32),
    "down_block_types": (CROSS_DOWN, DOWN),
    "up_block_types": (UP, CROSS_UP),
    "layers_per_block": 1,
    "cross_attention_dim": 64,
    "attention_head_dim": 4,
    "norm_num_groups": 8,
}
SD21 = SD15 | {
    "sample_size": 12,
    "attention_head_dim": (2, 4),
    "use_linear_projection": True,
    "upcast_attention": True,
    "layers_per_block": 2,
}
SDXL = SD21 | {
    "block_out_channels": (16, 32, 32),
    "down_block_types": (DOWN, CROSS_DOWN, CROSS_DOWN),
    "up_block_types": (CROSS_UP, CROSS_UP, UP),
    "layers_per_block": 1,
    "transformer_layers_per_block": (1, 2, 3),
    "attention_head_dim": (1, 2, 4),
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 60,  # 12 of pooled text, 6 sizes of 8
}
FORMS = {"1.5": SD15, "2.1": SD21, "XL": SDXL}


def randomized(model, seed=0):
    """Every parameter off its initial value, biases and scales too, of a size that keeps activations near one."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.eval().named_parameters():
            fan_in = math.prod(parameter.shape[1:]) if parameter.ndim > 1 else 25
            parameter.normal_(0, fan_in**-0.5, generator=generator)
            if parameter.ndim == 1 and "norm" in name and name.endswith("weight"):
                parameter.add_(1)
    return model


def to_torch(array):
    """Images [B, X, Y, C] become [B, C, X, Y]."""
    tensor = torch.tensor(np.asarray(array))
    return tensor.permute(0, 3, 1, 2) if tensor.ndim == 4 else tensor


def close(ours, theirs, tolerance=TOLERANCE):
    """Of images ours are NHWC, theirs NCHW."""
    theirs = theirs.detach().numpy()
    theirs = np.moveaxis(theirs, 1, -1) if theirs.ndim == 4 else theirs
    np.testing.assert_allclose(ours, theirs, atol=tolerance * max(1, np.abs(theirs).max()), rtol=0)


def inputs(name, shape=(8, 8), batch=2, seed=0):
    """Latents, text and further conditions, as NumPy arrays by our names."""
    rng = np.random.default_rng(seed)
    draw = lambda *shape: rng.normal(size=shape).astype(np.float32)  # noqa: E731
    arrays = {"latents": draw(batch, *shape, 4), "context": draw(batch, 5, FORMS[name]["cross_attention_dim"])}
    if name == "XL":
        arrays["pooled"] = draw(batch, 12)
        arrays["sizes"] = rng.integers(0, 1024, (batch, 6)).astype(np.float32)
    return arrays


def added(arrays):
    """diffusers' words for SDXL's conditions."""
    if "pooled" not in arrays:
        return None
    return {"text_embeds": to_torch(arrays["pooled"]), "time_ids": to_torch(arrays["sizes"])}


@functools.partial(jax.jit, static_argnums=0)
def _run(model, params, arguments):
    return model.apply({"params": params}, **arguments)


def apply(bundle, arrays, timestep, **more):
    """One of our networks on such inputs, compiled once for all values."""
    return _run(bundle.model, bundle.params, arrays | {"timestep": np.float32(timestep)} | more)


def write_unets(folder):
    """form -> (oracle, the directory that it wrote)."""
    made = {}
    for name, config in FORMS.items():
        oracle = randomized(diffusers.UNet2DConditionModel(**config))
        oracle.save_pretrained(folder / name)
        made[name] = oracle, folder / name
    return made
