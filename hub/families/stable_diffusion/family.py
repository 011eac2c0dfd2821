"""The networks of Stable Diffusion, each a directory as diffusers writes it."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
from jax.typing import DTypeLike

from ....models.published import floats
from ....models.stable_diffusion.controlnet import ControlNet, ControlNetConfig
from ....models.stable_diffusion.unet import EncoderConfig, UNet, UNetConfig
from ....models.stable_diffusion.vae import VAE, VAEConfig
from ...bundle import Bundle
from ...family import Checkpoint, Family, Overrides, fields_of
from ...files.placement import Tree
from ...files.source import Source
from ...files.writers import MAX_SHARD_SIZE, write_directory
from ...mapping import Table, save_tensors
from . import configs, formats

STEM = "diffusion_pytorch_model"


@dataclasses.dataclass(frozen=True)
class Network:
    """What differs from network to network: the module, its inputs, and how files describe it."""

    build: Callable[[Any, DTypeLike], nn.Module]
    inputs: Callable[[Any], dict[str, Any]]  # abstract arguments of `init`
    table: Callable[[Any], Table]
    write: Callable[[Any], dict[str, Any]]  # config -> its entries of config.json


def _unet_inputs(c: EncoderConfig) -> dict[str, Any]:
    side = 2 ** len(c.widths)
    inputs = {"latents": floats(1, side, side, c.in_channels), "timestep": floats()}
    inputs["context"] = floats(1, 1, c.context_dim)
    if c.added_dim:  # how much of it is pooled text makes no difference to the parameters
        inputs |= {"pooled": floats(1, c.added_dim % c.size_dim), "sizes": floats(1, c.added_dim // c.size_dim)}
    return inputs


def _controlnet_inputs(c: ControlNetConfig) -> dict[str, Any]:
    inputs = _unet_inputs(c)
    side = c.factor * inputs["latents"].shape[1]
    return inputs | {"hint": floats(1, side, side, c.hint_channels)}


NETWORKS: dict[type, Network] = {
    UNetConfig: Network(UNet, _unet_inputs, formats.unet_table, configs.write_unet),
    ControlNetConfig: Network(ControlNet, _controlnet_inputs, formats.controlnet_table, configs.write_controlnet),
    VAEConfig: Network(
        VAE,
        lambda c: {"image": floats(1, c.factor, c.factor, c.in_channels)},
        formats.vae_table,
        configs.write_vae,
    ),
}


def recognise(source: Source) -> str | None:
    """The format of a network of Stable Diffusion; None if it is none."""
    return "diffusers" if source.config.get("_class_name") in configs.READERS else None


def read(source: Source, format: str, overrides: Overrides) -> Any:
    """The config, with the overrides."""
    config = configs.READERS[source.config["_class_name"]](source.config, source.where)
    return dataclasses.replace(config, **{k: v for k, v in overrides.items() if k in fields_of(config)})


def bundle(checkpoint: Checkpoint, params: Tree) -> Bundle:
    """The network."""
    config = checkpoint.config
    model = NETWORKS[type(config)].build(config, checkpoint.options.compute_dtype)
    return Bundle(model, params, config, format=checkpoint.format, metadata=checkpoint.source.config)


def save(bundle: Bundle, path: Path, format: str, max_shard_size: int = MAX_SHARD_SIZE) -> None:
    """Writes a directory as diffusers does. See `omnax.hub.save`."""
    network = NETWORKS[type(bundle.config)]
    documents = {"config.json": dict(bundle.metadata) | network.write(bundle.config)}
    tensors = save_tensors(bundle.params, network.table(bundle.config))
    write_directory(path, tensors, documents, max_shard_size, STEM)


def abstract(config: Any) -> Tree:
    """Shapes of the parameters."""
    network = NETWORKS[type(config)]
    module = network.build(config, "float32")
    return jax.eval_shape(module.init, jax.random.key(0), **network.inputs(config))["params"]


FAMILY = Family(
    name="Stable Diffusion network",
    config=tuple(NETWORKS),
    formats=("diffusers",),
    recognise=recognise,
    read=read,
    table=lambda source, format, config: NETWORKS[type(config)].table(config),
    shapes=lambda source, config: abstract(config),
    bundle=bundle,
    save=save,
    keys={
        "diffusers: UNet2DConditionModel": configs.UNET,
        "diffusers: ControlNetModel": configs.CONTROLNET,
        "diffusers: AutoencoderKL": configs.VAE,
    },
)
