"""Weights of the three Wav2Lip networks under their published names (wav2lip.pth, lipsync_expert.pth, …), both ways.

The files are torch dicts {"state_dict", "optimizer", "global_step", "global_epoch"}. Which network a file holds and of
what size (width, resolution, clip length) shows in its tensors.
"""

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from ...models import wav2lip
from ...models.wav2lip import Discriminator, Generator, SyncNet, Wav2LipConfig
from ..bundle import Bundle
from ..family import Checkpoint, Family, Overrides, fields_of
from ..files.placement import Tree
from ..files.source import Source
from ..files.tensors import LazyTensor, TensorFile
from ..files.torch_writer import in_order, write_torch
from ..files.writers import MAX_SHARD_SIZE, write_file, write_safetensors
from ..mapping import Row, Table, save_tensors
from ..rows import conv, norm

_COUNTER = "num_batches_tracked"
_RENAMES = ((r"^(module\.)+", ""),)


def _block(source: str, target: str) -> tuple[Row, ...]:
    """One block; transposed kernels [in, out, rows, columns] lie in our layout as those of plain convolutions do."""
    statistics = [Row(f"{source}.1.running_{name}", f"{target}/norm/{name}") for name in ("mean", "var")]
    return *conv(f"{source}.0", f"{target}/conv"), *norm(f"{source}.1", f"{target}/norm"), *statistics


def _encoder(source: str, target: str) -> tuple[Row, ...]:
    return _block(f"{source}.{{j}}.conv_block", f"{target}/layer_{{j}}")


@dataclasses.dataclass(frozen=True)
class Network:
    """One of the published networks: how it is built, recognised and named."""

    model: type[nn.Module]
    inputs: Callable[[Wav2LipConfig], Sequence[tuple[int, ...]]]  # shapes of one example
    marks: str  # regex of names that only this network has
    widest: str  # a tensor whose dimension 0 is 512 channels
    rows: tuple[Row, ...]


def _half(c: Wav2LipConfig, channels: int) -> tuple[int, ...]:
    return (1, c.image_size // 2, c.image_size, channels)


NETWORKS = {
    "generator": Network(
        Generator,
        lambda c: [(1, 80, 16, 1), (1, c.image_size, c.image_size, 6)],
        r"face_decoder_blocks\..*",
        "audio_encoder.12.conv_block.0.weight",
        (
            *_encoder("face_encoder_blocks.{i}", "face_encoder_{i}"),
            *_encoder("face_decoder_blocks.{i}", "face_decoder_{i}"),
            *_encoder("audio_encoder", "audio_encoder"),
            *_block("output_block.0.conv_block", "output/layer_0"),
            *conv("output_block.1", "output_conv"),
        ),
    ),
    "expert": Network(
        SyncNet,
        lambda c: [(1, 80, c.mel_steps, 1), _half(c, 3 * c.clip_len)],
        r"face_encoder\..*",
        "audio_encoder.13.conv_block.0.weight",
        (*_encoder("face_encoder", "face_encoder"), *_encoder("audio_encoder", "audio_encoder")),
    ),
    "discriminator": Network(
        Discriminator,
        lambda c: [_half(c, 3)],
        r"binary_pred\..*",
        "face_encoder_blocks.4.1.conv_block.0.weight",
        (
            *conv("face_encoder_blocks.{i}.{j}.conv_block.0", "face_encoder_{i}/layer_{j}/conv"),
            *conv("binary_pred.0", "binary_pred"),
        ),
    ),
}


def recognise(source: Source) -> str | None:
    """The format of a Wav2Lip checkpoint; None if it is not one."""
    if _network(source.tensors) is None:
        return None
    return "safetensors" if source.tensors.path.suffix == ".safetensors" else "torch"


def read(source: Source, format: str, overrides: Overrides) -> Wav2LipConfig:
    """The size of the network in the file, from its depth and the shapes of its first and widest layer."""
    config = _config(source.tensors.renamed(_RENAMES), _found(source))
    known = {key: value for key, value in overrides.items() if key in fields_of(config)}
    return dataclasses.replace(config, **known)


def bundle(checkpoint: Checkpoint, params: Tree) -> Bundle:
    """The network with its batch statistics and torch's batch counters."""
    file, options = checkpoint.source.tensors.renamed(_RENAMES), checkpoint.options
    dtype = {} if options.dtype is None else {"dtype": options.dtype}
    params, statistics = split(params)
    counters = {key: int(file.read(key)) for key in file if key.endswith(_COUNTER)}
    return Bundle(
        model=NETWORKS[_found(checkpoint.source)].model(checkpoint.config, **dtype),
        params=params,
        config=checkpoint.config,
        format=checkpoint.format,
        metadata={_COUNTER: counters, "names": tuple(file)},
        variables={"batch_stats": statistics} if statistics else {},
    )


def save(bundle: Bundle, path: Path, format: str, max_shard_size: int = MAX_SHARD_SIZE) -> None:
    """Writes one file, "torch" or "safetensors". See `omnax.hub.save`."""
    name = network_name(bundle.model)
    tensors = save_tensors(join(bundle.params, bundle.variables.get("batch_stats", {})), _table(name))
    tensors |= {key: _scalar(value) for key, value in _counters(tensors, bundle.metadata).items()}
    if format == "safetensors":
        return write_file(path, tensors, write_safetensors)
    state = in_order(tensors, bundle.metadata.get("names", ()))
    write_torch(path, {"state_dict": state, "optimizer": None, "global_step": 0, "global_epoch": 0})


def network_name(model: nn.Module) -> str:
    """The key of `NETWORKS` of a module."""
    return next(name for name, network in NETWORKS.items() if isinstance(model, network.model))


def abstract(name: str, config: Wav2LipConfig) -> Tree:
    """Shapes of a network's parameters and batch statistics, in one tree (`norm/mean` beside `norm/scale`)."""
    network = NETWORKS[name]
    inputs = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in network.inputs(config)]
    variables = jax.eval_shape(network.model(config).init, jax.random.key(0), *inputs)
    return join(variables["params"], variables.get("batch_stats", {}))


def _network(file: TensorFile) -> str | None:
    names = [re.sub(r"^(module\.)+", "", name) for name in file]
    found = (key for key, network in NETWORKS.items() if any(re.fullmatch(network.marks, name) for name in names))
    return next(found, None) if any(".conv_block." in name for name in names) else None


def _found(source: Source) -> str:
    """The network in a file that was recognised."""
    name = _network(source.tensors)
    assert name is not None
    return name


def _config(file: TensorFile, name: str) -> Wav2LipConfig:
    face = re.compile(r"face_encoder(?:_blocks)?\.(\d+)\..*")
    depth = 1 + max(int(match[1]) for key in file if (match := face.fullmatch(key)))
    doublings = depth - (17 if name == "expert" else 7)
    first, widest = "face_encoder.0.conv_block.0.weight", NETWORKS[name].widest
    clip_len = file.shape(first)[1] // 3 if name == "expert" else wav2lip.PUBLISHED_CLIP
    return Wav2LipConfig(
        image_size=wav2lip.BASE_SIZE << max(doublings, 0), width_mult=file.shape(widest)[0] / 512, clip_len=clip_len
    )


def _table(name: str) -> Table:
    return Table(NETWORKS[name].rows, _RENAMES, ignore=(rf".*\.{_COUNTER}",))


def _counters(tensors: Mapping[str, Any], metadata: Mapping[str, Any]) -> dict[str, int]:
    """torch's batch counters, one per batch norm: as they were read, else 0."""
    names = [key.replace("running_mean", _COUNTER) for key in tensors if key.endswith("running_mean")]
    return {name: metadata.get(_COUNTER, {}).get(name, 0) for name in names}


def _scalar(value: int) -> LazyTensor:
    array = np.array(value, np.int64)
    return LazyTensor((), array.dtype, lambda: array)


def join(params: Tree, statistics: Tree) -> Tree:
    """Parameters and batch statistics in one tree, `norm/mean` beside `norm/scale`."""
    flat = traverse_util.flatten_dict
    return traverse_util.unflatten_dict(flat(params) | flat(statistics))


def split(tree: Tree) -> tuple[Tree, Tree]:
    """(parameters, batch statistics), the inverse of `join`."""
    leaves: dict[tuple[str, ...], Any] = traverse_util.flatten_dict(tree)
    statistics = {path: leaf for path, leaf in leaves.items() if path[-1] in ("mean", "var")}
    params = {path: leaf for path, leaf in leaves.items() if path not in statistics}
    return traverse_util.unflatten_dict(params), traverse_util.unflatten_dict(statistics)


FAMILY = Family(
    name="Wav2Lip network",
    config=Wav2LipConfig,
    formats=("torch", "safetensors"),
    recognise=recognise,
    read=read,
    table=lambda source, format, config: _table(_found(source)),
    shapes=lambda source, config: abstract(_found(source), config),
    bundle=bundle,
    save=save,
    unsaid=lambda config, format: {"clip_len": config.clip_len},  # only the expert's first layer shows it
)
