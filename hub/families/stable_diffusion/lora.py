"""Low-rank adapters (LoRA, arXiv 2106.09685) for Stable Diffusion, in kohya's names and in those of diffusers.

A file changes the weights of a UNet and of its text encoders: W + scale · alpha / rank · up · down. It is read exactly
or refused: every tensor belongs to a pair for a weight that is there, and other methods are refused by name.
"""

import dataclasses
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ....models.clip import TextConfig
from ....models.stable_diffusion.unet import UNetConfig
from ....storage.paths import as_path
from ...bundle import Bundle, assemble
from ...files.readers import open_tensors, read_metadata
from ...files.tensors import TensorFile, nearest, rename
from ...mapping import Table, add_tensors, save_tensors
from ..clip.formats import transformers_table
from . import formats, ldm

# What the names of a component's tensors begin with.
_COMPONENTS = {
    "lora_unet_": "unet",
    "lora_te1_": "text_encoder",
    "lora_te2_": "text_encoder_2",
    "lora_te_": "text_encoder",
    "unet.": "unet",
    "text_encoder.": "text_encoder",
    "text_encoder_2.": "text_encoder_2",
    "base_model.model.": "unet",
}
# Ends of names (regex): of the factor next to the input, next to the output, and of alpha.
_ENDS = {
    "down": r"\.(lora_down|lora_A|lora_A\.default|lora\.down|lora_linear_layer\.down)\.weight",
    "up": r"\.(lora_up|lora_B|lora_B\.default|lora\.up|lora_linear_layer\.up)\.weight",
    "alpha": r"\.alpha",
}
# Names of early diffusers, whose terms belonged to the attention processors.
_EARLY = (
    (r"\.processor\.to_(q|k|v|out)_lora\.", r".to_\1.lora."),
    (r"\.self_attn\.to_(q|k|v|out)_lora\.", r".self_attn.\1_proj.lora."),
    (r"\.to_out\.lora\.", ".to_out.0.lora."),
)
_OTHERS = {"dora_scale": "DoRA", "lora_magnitude_vector": "DoRA", "hada_": "LoHa", "lokr_": "LoKr"}
_OTHERS |= {"lora_mid": "Tucker factors", "oft_": "OFT", "diff_b": "changes of biases"}
_SHOWN = 3


def add_lora(bundle: Bundle, path: str | Path, scale: float = 1.0) -> Bundle:
    """A pipeline, or a UNet alone, with an adapter's file added to its weights `scale` times.

    Raises ValueError for a file that is no such adapter, for tensors of no weight of this model, naming the nearest,
    and for methods other than plain low-rank terms.
    """
    path = as_path(path)
    file = open_tensors(path)
    changes = _changes(file, _metadata(path), bundle, scale)
    if not bundle.components:
        return dataclasses.replace(bundle, params=_added(bundle, changes.get("unet", {})))
    components = {
        name: dataclasses.replace(component, params=_added(component, changes[name])) if name in changes else component
        for name, component in bundle.components.items()
    }
    return assemble(components, bundle.format, bundle.metadata, bundle.processor)


def _added(bundle: Bundle, changes: Mapping[str, np.ndarray]) -> dict[str, Any]:
    return add_tensors(bundle.params, _table(bundle), changes)


def _table(bundle: Bundle) -> Table:
    if isinstance(bundle.config, UNetConfig):
        return formats.unet_table(bundle.config)
    if isinstance(bundle.config, TextConfig):
        return transformers_table(bundle.config)
    raise ValueError(f"no low-rank terms are known for a {type(bundle.config).__name__}")


def _changes(
    file: TensorFile, metadata: Mapping[str, Any], bundle: Bundle, scale: float
) -> dict[str, dict[str, np.ndarray]]:
    """Component -> published name of a weight -> what is added to it."""
    names: dict[str, dict[str, str]] = {}  # component -> name of a module as files have it -> published name
    shapes: dict[str, dict[str, tuple[int, ...]]] = {}
    parts: dict[tuple[str, str], dict[str, str]] = {}  # (component, published module) -> kind -> name in the file
    unknown: list[str] = []
    for name in file:
        component, module, kind = _parse(file, name)
        own = bundle.components.get(component, bundle if component == "unet" else None)
        if own is None or (not bundle.components and component != "unet"):
            raise ValueError(f"{file.path} changes {component!r}, which this model does not have: {name!r}")
        if component not in names:
            shapes[component] = {key: x.shape for key, x in save_tensors(own.params, _table(own)).items()}
            names[component] = _module_names(own, shapes[component])
        found = names[component].get(module)
        if found is None or kind is None:
            unknown.append(f"{name!r}{nearest(module, names[component])}")
        else:
            parts.setdefault((component, found), {})[kind] = name
    if unknown:
        more = f" and {len(unknown) - _SHOWN} more" if len(unknown) > _SHOWN else ""
        raise ValueError(f"{file.path} has tensors of no weight of this model: {'; '.join(unknown[:_SHOWN])}{more}")
    changes: dict[str, dict[str, np.ndarray]] = {}
    for (component, module), part in parts.items():
        weight = f"{module}.weight"
        change = scale * _product(file, part, metadata, component)
        wanted = shapes[component][weight]
        if change.size == np.prod(wanted) and change.shape[:2] == wanted[:2]:  # linear terms of a 1 x 1 convolution
            change = change.reshape(wanted)
        changes.setdefault(component, {})[weight] = change
    return changes


def _parse(file: TensorFile, name: str) -> tuple[str, str, str | None]:
    """(component, module, kind) of a tensor; the kind is None where the name ends otherwise."""
    for mark, method in _OTHERS.items():
        if mark in name:
            raise ValueError(f"{file.path} holds {method} ({name!r}), expected plain low-rank terms")
    canonical = rename(name, _EARLY)
    prefix = next((prefix for prefix in _COMPONENTS if canonical.startswith(prefix)), None)
    if prefix is None:
        raise ValueError(f"{file.path}: {name!r} begins with none of {list(_COMPONENTS)}")
    rest = canonical.removeprefix(prefix)
    for kind, end in _ENDS.items():
        if match := re.search(f"{end}$", rest):
            return _COMPONENTS[prefix], rest[: match.start()], kind
    return _COMPONENTS[prefix], rest, None


def _module_names(bundle: Bundle, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, str]:
    """Every spelling of a module with a matrix -> its published name."""
    modules = [name.removesuffix(".weight") for name, shape in shapes.items() if len(shape) > 1]
    spellings = {module: module for module in modules}
    backwards: dict[str, str] = {}
    if isinstance(bundle.config, UNetConfig):
        backwards = {new: old for old, new in ldm.unet_names(bundle.config).items()}
    for module in modules:
        spellings[module.replace(".", "_")] = module
        if isinstance(bundle.config, TextConfig):
            bare = module.removeprefix("text_model.")
            for prefix in ("", "text_model."):
                spellings |= {f"{prefix}{bare}": module, f"{prefix}{bare}".replace(".", "_"): module}
        else:
            spellings[ldm.renamed(module, backwards).replace(".", "_")] = module
    return spellings


def _product(file: TensorFile, part: Mapping[str, str], metadata: Mapping[str, Any], component: str) -> np.ndarray:
    """alpha / rank · up · down, shaped as the weight; ValueError where half a pair is missing, or they do not fit."""
    if {"down", "up"} - part.keys():
        raise ValueError(f"{file.path}: {next(iter(part.values()))!r} lacks its other half")
    down, up = (file.read(part[kind]).astype(np.float32) for kind in ("down", "up"))
    rank = down.shape[0]
    if down.ndim < 2 or up.ndim < 2 or up.shape[1] != rank or up.shape[2:] not in ((), (1,) * (up.ndim - 2)):
        raise ValueError(f"{file.path}: {part['up']!r} {up.shape} does not fit {part['down']!r} {down.shape}")
    alpha = float(file.read(part["alpha"])) if "alpha" in part else _alpha(file, metadata, component, rank)
    product = up.reshape(up.shape[:2]) @ down.reshape(rank, -1)
    return alpha / rank * product.reshape(up.shape[0], *down.shape[1:])


def _alpha(file: TensorFile, metadata: Mapping[str, Any], component: str, rank: int) -> float:
    """What the file's own metadata says of a component's scale, else the rank: a factor of one."""
    own = {key.removeprefix(f"{component}."): value for key, value in metadata.items() if key.startswith(component)}
    for name in ("use_dora", "use_rslora", "alpha_pattern"):
        if own.get(name):
            raise ValueError(f"{file.path}: its metadata has {name!r}: {str(own[name])[:60]}, expected none")
    return float(own.get("lora_alpha", rank))


def _metadata(path: Path) -> dict[str, Any]:
    """PEFT's settings, as diffusers puts them into the header."""
    text = read_metadata(path).get("lora_adapter_metadata")
    document = json.loads(text) if isinstance(text, str) else {}
    return document if isinstance(document, dict) else {}
