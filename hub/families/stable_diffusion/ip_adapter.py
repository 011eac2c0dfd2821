"""IP-Adapter files in all published variants, `.bin` and safetensors: recognised by their tensors, read, written.

What a file does not say (FaceID plus's shortcut of its version 2, one softmax or two) is an override:
`hub.load(path, shortcut=True)`. Source of the rules: diffusers loaders/unet.py _convert_ip_adapter_image_proj_…
"""

import re
from pathlib import Path
from typing import Any

import jax

from ....models.published import floats
from ....models.stable_diffusion.ip_adapter import IPAdapter, IPAdapterConfig
from ...bundle import Bundle
from ...family import Checkpoint, Family, Overrides, fields_of
from ...files.placement import Tree
from ...files.source import Source
from ...files.tensors import TensorFile
from ...files.torch_writer import in_order, write_torch
from ...files.writers import MAX_SHARD_SIZE, follow, write_file, write_safetensors
from ...mapping import Row, Table, save_tensors
from ...rows import dense, heads, merge_heads, norm, packed_heads

_PREFIXES = ("image_proj", "ip_adapter")
# The names in checkpoints of the published training scripts.
_RENAMES = ((r"^(module\.)?image_proj_model\.", "image_proj."), (r"^(module\.)?adapter_modules\.", "ip_adapter."))
_LAYER = re.compile(r"ip_adapter\.(\d+)\.to_k_ip\.weight")
_PERCEIVER = "image_proj.perceiver_resampler"
_HEAD_DIM = 64  # of every published resampler; diffusers counts heads by it


def recognise(source: Source) -> str | None:
    """The format of an adapter's file; None if it is none."""
    names = list(source.tensors.renamed(_RENAMES))
    if not names or any(name.split(".")[0] not in _PREFIXES for name in names):
        return None
    return "safetensors" if source.tensors.path.suffix == ".safetensors" else "torch"


def read(source: Source, format: str, overrides: Overrides) -> IPAdapterConfig:
    """The config, by the shapes of the tensors that make up each variant."""
    file = source.tensors.renamed(_RENAMES)
    numbers = sorted(int(match[1]) for name in file if (match := _LAYER.fullmatch(name)))
    shapes = [_matrix(file, f"ip_adapter.{n}.to_k_ip.weight") for n in numbers]
    lora = "ip_adapter.0.to_q_lora.down.weight"
    fields = _projection(file) | {
        "layer_widths": tuple(rows for rows, _ in shapes),
        "rank": _matrix(file, lora)[0] if lora in file else 0,
        "mode": "decoupled" if shapes else "appended",
    }
    return IPAdapterConfig(**fields | {k: v for k, v in overrides.items() if k in fields_of(IPAdapterConfig)})


def _matrix(file: TensorFile, name: str) -> tuple[int, int]:
    """[rows, columns] of a tensor; ValueError for one of another kind."""
    shape = file.shape(name)
    if len(shape) != 2 or not all(shape):
        raise ValueError(f"{file.path}: {name!r} has shape {shape}, expected a matrix")
    return shape[0], shape[1]


def _projection(file: TensorFile) -> dict[str, Any]:
    """The fields of the image projection, in the order in which diffusers looks for its marks."""
    if "image_proj.proj.weight" in file:
        rows, features = _matrix(file, "image_proj.proj.weight")
        context, _ = divmod(rows, 4)
        return {"projection": "linear", "features": features, "tokens": 4, "context_dim": context}
    if "image_proj.proj.3.weight" in file:
        hidden, features = _matrix(file, "image_proj.proj.0.weight")
        context = file.shape("image_proj.proj.3.weight")[0]
        return {"projection": "mlp", "features": features, "tokens": 0, "hidden": hidden, "context_dim": context}
    if f"{_PERCEIVER}.proj_in.weight" in file:
        hidden, features = _matrix(file, f"{_PERCEIVER}.proj_in.weight")
        return {
            "projection": "identity_resampler",
            "features": features,
            "hidden": hidden,
            "identity_dim": _matrix(file, "image_proj.proj.0.weight")[1],
            "context_dim": _matrix(file, f"{_PERCEIVER}.proj_out.weight")[0],
            "tokens": _matrix(file, "image_proj.proj.2.weight")[0] // hidden,
            "depth": _depth(file, _PERCEIVER),
        }
    if "image_proj.norm.weight" in file:
        hidden, features = _matrix(file, "image_proj.proj.0.weight")
        context = file.shape("image_proj.norm.weight")[0]
        tokens = _matrix(file, "image_proj.proj.2.weight")[0] // context
        fields = {"features": features, "hidden": hidden, "context_dim": context, "tokens": tokens}
        return {"projection": "identity", **fields}
    hidden, features = _matrix(file, "image_proj.proj_in.weight")
    return {
        "projection": "resampler",
        "features": features,
        "hidden": hidden,
        "context_dim": _matrix(file, "image_proj.proj_out.weight")[0],
        "tokens": file.shape("image_proj.latents")[1],
        "depth": _depth(file, "image_proj"),
    }


def _depth(file: TensorFile, prefix: str) -> int:
    pattern = re.compile(rf"{re.escape(prefix)}\.layers\.(\d+)\.0\.to_q\.weight")
    return sum(bool(pattern.fullmatch(name)) for name in file)


def _resampler(source: str) -> tuple[Row, ...]:
    target = "image_proj/resampler"
    layer, own = f"{source}.layers.{{j}}", f"{target}/layers_{{j}}"
    return (
        Row(f"{source}.latents", f"{target}/latents"),
        *dense(f"{source}.proj_in", f"{target}/proj_in"),
        *dense(f"{source}.proj_out", f"{target}/proj_out"),
        *norm(f"{source}.norm_out", f"{target}/norm_out"),
        *norm(f"{layer}.0.norm1", f"{own}/norm1"),
        *norm(f"{layer}.0.norm2", f"{own}/norm2"),
        *heads(f"{layer}.0.to_q", f"{own}/attn/query"),
        *packed_heads(f"{layer}.0.to_kv", f"{own}/attn", ("key", "value")),
        *merge_heads(f"{layer}.0.to_out", f"{own}/attn/out"),
        *norm(f"{layer}.1.0", f"{own}/norm3"),
        *dense(f"{layer}.1.1", f"{own}/mlp/fc1"),
        *dense(f"{layer}.1.3", f"{own}/mlp/fc2"),
    )


def table(c: IPAdapterConfig) -> Table:
    """The published names; a layer's number is that of its attention processor: cross-attention has the odd ones."""
    rows = [
        *_resampler(_PERCEIVER if c.projection == "identity_resampler" else "image_proj"),
        *norm("image_proj.proj.3" if c.projection == "mlp" else "image_proj.norm", "image_proj/norm"),
        *dense("image_proj.proj", "image_proj/proj"),
        *dense("image_proj.proj.0", "image_proj/proj/fc1"),
        *dense("image_proj.proj.2", "image_proj/proj/fc2"),
    ]
    for i in range(len(c.layer_widths)):
        for theirs, ours in (("to_k_ip", "key"), ("to_v_ip", "value")):
            rows += dense(f"ip_adapter.{2 * i + 1}.{theirs}", f"layers_{i}_{ours}")
    for theirs, ours in (("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out", "out")):
        rows.append(Row(f"ip_adapter.{{n}}.{theirs}_lora.down.weight", f"lora_{{n}}/{ours}_a", "R D -> D R"))
        rows.append(Row(f"ip_adapter.{{n}}.{theirs}_lora.up.weight", f"lora_{{n}}/{ours}_b", "D R -> R D"))
    return Table(rows, _RENAMES)


def abstract(c: IPAdapterConfig) -> Tree:
    """Shapes of the parameters; ValueError where a resampler's width is no multiple of its heads' 64 channels."""
    if c.depth and c.hidden % _HEAD_DIM:
        raise ValueError(f"a resampler of {c.hidden} channels, expected a multiple of {_HEAD_DIM}")
    patches = () if c.projection in ("linear", "identity") else (1,)
    inputs = [floats(1, 1, *patches, c.features)]
    if c.projection == "identity_resampler":
        inputs.append(floats(1, 1, c.identity_dim))
    return jax.eval_shape(IPAdapter(c).init, jax.random.key(0), *inputs)["params"]


def bundle(checkpoint: Checkpoint, params: Tree) -> Bundle:
    """The adapter; the order of its tensors is kept for saving."""
    config = checkpoint.config
    names = tuple(checkpoint.source.tensors.renamed(_RENAMES))
    model = IPAdapter(config, checkpoint.options.compute_dtype)
    return Bundle(model, params, config, format=checkpoint.format, metadata={"names": names})


def save(bundle: Bundle, path: Path, format: str, max_shard_size: int = MAX_SHARD_SIZE) -> None:
    """Writes one file, "torch" (of two dicts) or "safetensors" (flat). See `omnax.hub.save`."""
    tensors = save_tensors(bundle.params, table(bundle.config))
    if format == "safetensors":
        return write_file(path, tensors, write_safetensors)
    if follow(tensors):
        return None
    parts: dict[str, dict[str, Any]] = {prefix: {} for prefix in _PREFIXES}
    for name, tensor in in_order(tensors, bundle.metadata.get("names", ())).items():
        prefix, _, rest = name.partition(".")
        parts[prefix][rest] = tensor
    return write_torch(path, parts)


FAMILY = Family(
    name="IP-Adapter",
    config=IPAdapterConfig,
    formats=("torch", "safetensors"),
    recognise=recognise,
    read=read,
    table=lambda source, format, config: table(config),
    shapes=lambda source, config: abstract(config),
    bundle=bundle,
    save=save,
    unsaid=lambda config, format: {name: getattr(config, name) for name in ("shortcut", "mode")},
)
