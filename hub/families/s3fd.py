"""Weights of the face detector S3FD (s3fd.pth, a plain state dict), both ways."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.typing import DTypeLike

from ...models.s3fd import S3FD, S3FDConfig
from ..bundle import Bundle
from ..files.placement import Layout, Tree, placed
from ..files.source import Source
from ..files.torch_writer import in_order, write_torch
from ..files.writers import MAX_SHARD_SIZE, write_file, write_safetensors
from ..mapping import Row, Table, load_params, save_tensors
from ..rows import conv

Config = S3FDConfig
FORMATS = ("torch", "safetensors")
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


def load(
    source: Source,
    format: str,
    *,
    dtype: DTypeLike | None = None,
    mesh: Mesh | None = None,
    layout: Layout | None = None,
    overrides: Mapping[str, Any],
) -> Bundle:
    """Loads what `recognise` found; there is nothing to override. See `omnax.hub.load`."""
    if overrides:
        raise ValueError(f"S3FD has no settings, got {sorted(overrides)}")
    params = load_params(source.tensors, _TABLE, placed(abstract(), mesh, layout), dtype=dtype)
    return Bundle(S3FD(), params, S3FDConfig(), format=format, metadata={"names": tuple(source.tensors)})


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
