"""Weights of the face detector S3FD (s3fd.pth, a plain state dict), both ways."""

from pathlib import Path

import jax
import jax.numpy as jnp

from ...models.s3fd import S3FD, S3FDConfig
from ..bundle import Bundle
from ..family import Checkpoint, Family
from ..files.placement import Tree
from ..files.source import Source
from ..files.torch_writer import in_order, write_torch
from ..files.writers import MAX_SHARD_SIZE, write_file, write_safetensors
from ..mapping import Row, Table, save_tensors
from ..rows import conv

_LAYERS = ("conv{i}_{j}", "fc{i}")
_HEADED = ("conv{i}_{j}_norm", "conv{i}_{j}", "fc{i}")
_TABLE = Table(
    rows=(
        *(row for name in _LAYERS for row in conv(name, name)),
        *(row for name in _HEADED for kind in ("loc", "conf") for row in conv(*[f"{name}_mbox_{kind}"] * 2)),
        Row("conv{i}_{j}_norm.weight", "conv{i}_{j}_norm/scale"),
    )
)


def recognise(source: Source) -> str | None:
    """The format of an S3FD checkpoint; None if it is not one."""
    if "conv3_3_norm_mbox_conf.weight" not in source.tensors:
        return None
    return "safetensors" if source.tensors.path.suffix == ".safetensors" else "torch"


def bundle(checkpoint: Checkpoint, params: Tree) -> Bundle:
    """The detector; the order of its tensors is kept for saving."""
    names = tuple(checkpoint.source.tensors)
    return Bundle(S3FD(), params, checkpoint.config, format=checkpoint.format, metadata={"names": names})


def save(bundle: Bundle, path: Path, format: str, max_shard_size: int = MAX_SHARD_SIZE) -> None:
    """Writes one file, "torch" or "safetensors". See `omnax.hub.save`."""
    tensors = save_tensors(bundle.params, _TABLE)
    if format == "safetensors":
        return write_file(path, tensors, write_safetensors)
    write_torch(path, in_order(tensors, bundle.metadata.get("names", ())))


def abstract() -> Tree:
    """Shapes of the parameters."""
    image = jax.ShapeDtypeStruct((1, 256, 256, 3), jnp.float32)
    return jax.eval_shape(S3FD().init, jax.random.key(0), image)["params"]


FAMILY = Family(
    name="S3FD",
    config=S3FDConfig,
    formats=("torch", "safetensors"),
    recognise=recognise,
    read=lambda source, format, overrides: S3FDConfig(),
    table=lambda source, format, config: _TABLE,
    shapes=lambda source, config: abstract(),
    bundle=bundle,
    save=save,
)
