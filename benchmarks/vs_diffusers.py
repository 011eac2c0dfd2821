"""Stable Diffusion beside diffusers: same random weights, same input, same machine, taking turns.

    python -m omnax.benchmarks.vs_diffusers

A UNet's forward pass, decoding latents, and a training step (noise prediction, AdamW), in float32: SD 1.5's networks at
half the width, latents of 32 x 32. What is printed, and what bounds it, is said in vs_torch.py.
"""

import argparse
import importlib
import tempfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .. import hub
from ..kernels.flops import count_flops
from ..models.stable_diffusion.vae import VAE
from .vs_torch import LEARNING_RATE, WEIGHT_DECAY, Comparison, Run, System, compare, oracles, training_step

WIDTHS, SIDE = (160, 320, 640, 640), 32


def stable_diffusion(batch: int) -> System:
    """diffusers with its default attention, which is fused."""
    torch, _ = oracles()
    diffusers: Any = importlib.import_module("diffusers")  # after the oracles, which mend torchvision
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    latents, target = rng.normal(size=(2, batch, SIDE, SIDE, 4)).astype(np.float32)
    context = rng.normal(size=(batch, 77, 768)).astype(np.float32)
    types = ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",), ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3
    unet = diffusers.UNet2DConditionModel(
        block_out_channels=WIDTHS, down_block_types=types[0], up_block_types=types[1], cross_attention_dim=768
    )
    vae = diffusers.AutoencoderKL(
        block_out_channels=(64, 128, 256, 256),
        layers_per_block=2,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
    )
    with tempfile.TemporaryDirectory() as folder:
        for name, network in (("unet", unet), ("vae", vae)):
            network.save_pretrained(Path(folder) / name)
        ours, decoder = (hub.load(Path(folder) / name) for name in ("unet", "vae"))
    tensors = tuple(torch.from_numpy(x.transpose(0, 3, 1, 2).copy()) for x in (latents, target))
    text = torch.from_numpy(context)
    arrays = {name: jnp.asarray(x) for name, x in (("latents", latents), ("target", target), ("context", context))}

    def predict(params: Any, x: Any) -> Any:
        return ours.model.apply({"params": params}, x["latents"], 500, x["context"])

    def decode(params: Any, x: Any) -> Any:
        return decoder.model.apply({"params": params}, x["latents"], method=VAE.decode)

    def loss(params: Any, state: Any, x: Any, rng: Any) -> Any:
        return jnp.square(predict(params, x) - x["target"]).mean(), ({}, {})

    def theirs(network: Any, *inputs: Any) -> Run:
        def run() -> Any:
            with torch.inference_mode():
                return network(*inputs).sample.permute(0, 2, 3, 1)

        return run

    forward = {"omnax": jitted(predict, ours.params, arrays), "diffusers": theirs(unet, tensors[0], 500, text)}
    decoding = {"omnax": jitted(decode, decoder.params, arrays), "diffusers": theirs(vae.decode, tensors[0])}
    step = {"omnax": training_step(ours.params, loss, arrays), "diffusers": torch_step(torch, unet, tensors, text)}
    unet_flops, vae_flops = flops(predict, ours.params, arrays), flops(decode, decoder.params, arrays)
    return System(
        [
            Comparison("UNet step", unet_flops, forward),
            Comparison("VAE decode", vae_flops, decoding),
            Comparison("training step", 3 * unet_flops, step),
        ],
        product=(batch * SIDE**2, 9 * WIDTHS[0], WIDTHS[0]),  # a convolution of the finest level
    )


def jitted(function: Any, params: Any, arrays: Any) -> Run:
    """A function of ours, compiled."""
    compiled = jax.jit(function)
    return lambda: compiled(params, arrays).block_until_ready()


def flops(function: Any, *inputs: Any) -> float:
    """Of the products of one call."""
    return float(count_flops(jax.make_jaxpr(function)(*inputs).jaxpr))


def torch_step(torch: Any, network: Any, tensors: Any, text: Any) -> Run:
    """The training step in torch."""
    optimizer = torch.optim.AdamW(network.parameters(), LEARNING_RATE, weight_decay=WEIGHT_DECAY)

    def run() -> Any:
        network.train()
        optimizer.zero_grad()
        with torch.enable_grad():
            loss = torch.nn.functional.mse_loss(network(tensors[0], 500, text).sample, tensors[1])
            loss.backward()
        optimizer.step()
        return loss.detach()

    return run


def main() -> None:
    """Prints the comparisons."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    system = stable_diffusion(arguments.batch)
    rows, inner, columns = system.product
    print(f"Stable Diffusion, batch {arguments.batch}; products of [{rows}, {inner}] x [{inner}, {columns}]")
    for comparison in system.comparisons:
        compare(comparison, system.product, arguments.rounds)


if __name__ == "__main__":
    main()
