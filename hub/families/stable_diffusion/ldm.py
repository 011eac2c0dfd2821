"""Single files of CompVis' and Stability's code ("ldm"), taken apart into components under diffusers' names.

Which published model a file holds, its tensors tell, by the marks that diffusers goes by (loaders/single_file_utils.py
infer_diffusers_model_type); what its components' config.json would say is that of the published directory.
"""

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ....models.clip import TextConfig
from ....models.stable_diffusion import sizes
from ....models.stable_diffusion.controlnet import ControlNetConfig
from ....models.stable_diffusion.unet import EncoderConfig, UNetConfig
from ....models.stable_diffusion.vae import VAEConfig
from ...bundle import Bundle
from ...components import Parts
from ...files.source import Source
from ...files.tensors import LazyTensor, TensorFile, nearest
from ...files.torch_writer import write_torch
from ...mapping import save_tensors
from ..clip.formats import transformers_table
from . import configs, formats

FORMAT = "ldm"
TORCH_SUFFIXES = (".ckpt", ".pth", ".pt")
Names = Mapping[str, str]  # prefix of names in the file -> prefix of diffusers' names

_UNET, _VAE, _CONTROL = "model.diffusion_model.", "first_stage_model.", "control_model."
_CLIP_L = ("cond_stage_model.transformer.", "conditioner.embedders.0.transformer.")
_V2_MARK = f"{_UNET}input_blocks.2.1.transformer_blocks.0.attn2.to_k.weight"
_BIG_G = ("conditioner.embedders.1.model.", "conditioner.embedders.0.model.")  # of the base and of the refiner
_V2_TEXT = "cond_stage_model.model."
# What holds no parameter of any component: schedules, buffers, temperatures, EMA copies, losses.
_IGNORED = re.compile(
    r"model_ema\..*|(sqrt_|log_)?(one_minus_)?(sqrt_)?(recip_|recipm1_)?(alphas_cumprod|one_minus_alphas_cumprod)(_prev)?|"
    r"betas|sqrt_(recip|recipm1)_alphas_cumprod|posterior_(variance|log_variance_clipped|mean_coef[12])|lvlb_weights|"
    r"logvar|scale_factor|denoiser\.sigmas|first_stage_model\.loss\..*|.*\.position_ids|.*\.logit_scale|.*\.attn_mask"
)

_RESNET = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}


def _resnet(theirs: str, ours: str) -> dict[str, str]:
    return {f"{theirs}.{old}": f"{ours}.{new}" for old, new in _RESNET.items()}


def encoder_names(c: EncoderConfig) -> dict[str, str]:
    """What UNets and ControlNets share."""
    names = {"time_embed.0": "time_embedding.linear_1", "time_embed.2": "time_embedding.linear_2"}
    names |= {"label_emb.0.0": "add_embedding.linear_1", "label_emb.0.2": "add_embedding.linear_2"}
    for i, (kind, level, j) in enumerate(c.steps):
        block = f"down_blocks.{level}"
        if kind == "conv_in":
            names["input_blocks.0.0"] = "conv_in"
        elif kind == "downsample":
            names[f"input_blocks.{i}.0.op"] = f"{block}.downsamplers.0.conv"
        else:
            names |= _resnet(f"input_blocks.{i}.0", f"{block}.resnets.{j}")
            names[f"input_blocks.{i}.1"] = f"{block}.attentions.{j}"
    names |= _resnet("middle_block.0", "mid_block.resnets.0") | _resnet("middle_block.2", "mid_block.resnets.1")
    return names | {"middle_block.1": "mid_block.attentions.0"}


def unet_names(c: UNetConfig) -> dict[str, str]:
    """Module by module."""
    names, i = encoder_names(c) | {"out.0": "conv_norm_out", "out.2": "conv_out"}, 0
    for u, level in enumerate(reversed(range(len(c.widths)))):
        for j in range(c.layers[level] + 1):
            names |= _resnet(f"output_blocks.{i}.0", f"up_blocks.{u}.resnets.{j}")
            if c.up_attention[level]:
                names[f"output_blocks.{i}.1"] = f"up_blocks.{u}.attentions.{j}"
            if j == c.layers[level] and level:
                place = 2 if c.up_attention[level] else 1
                names[f"output_blocks.{i}.{place}.conv"] = f"up_blocks.{u}.upsamplers.0.conv"
            i += 1
    return names


def controlnet_names(c: EncoderConfig) -> dict[str, str]:
    """Module by module; the hint's convolutions alternate with activations."""
    hint = "controlnet_cond_embedding"
    names = encoder_names(c) | {"middle_block_out.0": "controlnet_mid_block"}
    names |= {f"zero_convs.{i}.0": f"controlnet_down_blocks.{i}" for i in range(len(c.steps))}
    names |= {f"input_hint_block.{2 * i}": f"{hint}.blocks.{i - 1}" for i in range(1, 7)}
    return names | {"input_hint_block.0": f"{hint}.conv_in", "input_hint_block.14": f"{hint}.conv_out"}


def vae_names(c: VAEConfig) -> dict[str, str]:
    """Module by module; the decoder counts its levels from the finest."""
    names: dict[str, str] = {}
    last = len(c.widths) - 1
    for half, blocks, sampler in (("encoder", "down", "downsample"), ("decoder", "up", "upsample")):
        for level in range(last + 1):
            theirs, count = f"{half}.{blocks}.{level}", c.layers + (half == "decoder")
            ours = f"{half}.{blocks}_blocks.{level if half == 'encoder' else last - level}"
            for j in range(count):
                names[f"{theirs}.block.{j}"] = f"{ours}.resnets.{j}"
                names[f"{theirs}.block.{j}.nin_shortcut"] = f"{ours}.resnets.{j}.conv_shortcut"
            names[f"{theirs}.{sampler}.conv"] = f"{ours}.{sampler}rs.0.conv"
        names |= {f"{half}.mid.block_{n}": f"{half}.mid_block.resnets.{n - 1}" for n in (1, 2)}
        attention = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}
        names |= {f"{half}.mid.attn_1.{a}": f"{half}.mid_block.attentions.0.{b}" for a, b in attention.items()}
        names[f"{half}.norm_out"] = f"{half}.conv_norm_out"
    return names


def open_clip_names(depth: int) -> dict[str, str]:
    """Of OpenCLIP's text tower, all but the packed projections and the transposed one."""
    names = {"token_embedding": "text_model.embeddings.token_embedding", "ln_final": "text_model.final_layer_norm"}
    parts = {"ln_1": "layer_norm1", "ln_2": "layer_norm2", "attn.out_proj": "self_attn.out_proj"}
    parts |= {"mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2"}
    for i in range(depth):
        theirs, ours = f"transformer.resblocks.{i}", f"text_model.encoder.layers.{i}"
        names |= {f"{theirs}.{old}": f"{ours}.{new}" for old, new in parts.items()}
    return names


def renamed(name: str, names: Names) -> str:
    """The name with its longest prefix that the table knows replaced; as it is where there is none."""
    parts = name.split(".")
    for end in range(len(parts), 0, -1):
        if (new := names.get(".".join(parts[:end]))) is not None:
            return ".".join([new, *parts[end:]])
    return name


def flattened(tensor: LazyTensor) -> LazyTensor:
    """A 1 x 1 convolution as the linear layer that diffusers makes of it."""
    if len(tensor.shape) != 4 or tensor.shape[2:] != (1, 1):
        return tensor
    return LazyTensor(tensor.shape[:2], tensor.dtype, lambda: tensor.view()[:, :, 0, 0])


def vae_tensors(tensors: Mapping[str, LazyTensor], c: VAEConfig) -> dict[str, LazyTensor]:
    """Under diffusers' names, the attention's convolutions as linear layers."""
    names = vae_names(c)
    found = {renamed(name, names): tensor for name, tensor in tensors.items()}
    return {name: flattened(tensor) if ".attentions." in name else tensor for name, tensor in found.items()}


def open_clip_tensors(tensors: Mapping[str, LazyTensor], depth: int, projection: bool) -> dict[str, LazyTensor]:
    """A text tower of OpenCLIP under transformers' names, without the layers beyond `depth`."""
    names, found = open_clip_names(depth), {}
    for name, tensor in tensors.items():
        if packed := re.fullmatch(r"transformer\.resblocks\.(\d+)\.attn\.in_proj_(weight|bias)", name):
            if int(packed[1]) < depth:
                target = f"text_model.encoder.layers.{packed[1]}.self_attn"
                parts = zip("qkv", _thirds(tensor), strict=True)
                found |= {f"{target}.{x}_proj.{packed[2]}": part for x, part in parts}
        elif name == "positional_embedding":
            found["text_model.embeddings.position_embedding.weight"] = tensor
        elif name == "text_projection":
            if projection:
                found["text_projection.weight"] = _transposed(tensor)
        elif not (layer := re.match(r"transformer\.resblocks\.(\d+)\.", name)) or int(layer[1]) < depth:
            found[renamed(name, names)] = tensor
    return found


def _thirds(tensor: LazyTensor) -> Iterator[LazyTensor]:
    size = tensor.shape[0] // 3 if tensor.shape else 0
    for i in range(3):
        part = slice(i * size, (i + 1) * size)
        yield LazyTensor((size, *tensor.shape[1:]), tensor.dtype, lambda part=part: tensor.view()[part])


def _transposed(tensor: LazyTensor) -> LazyTensor:
    return LazyTensor(tensor.shape[::-1], tensor.dtype, lambda: np.transpose(tensor.view()))


def open_clip_state(tensors: Mapping[str, LazyTensor]) -> dict[str, LazyTensor]:
    """The inverse: a text tower under OpenCLIP's names, queries, keys and values packed."""
    names = {new: old for old, new in open_clip_names(len(tensors)).items()}
    found: dict[str, LazyTensor] = {}
    for name, tensor in tensors.items():
        if part := re.fullmatch(r"text_model\.encoder\.layers\.(\d+)\.self_attn\.q_proj\.(weight|bias)", name):
            thirds = [tensors[name.replace(".q_proj.", f".{x}_proj.")] for x in "qkv"]
            found[f"transformer.resblocks.{part[1]}.attn.in_proj_{part[2]}"] = _packed(thirds)
        elif name == "text_model.embeddings.position_embedding.weight":
            found["positional_embedding"] = tensor
        elif name == "text_projection.weight":
            found["text_projection"] = _transposed(tensor)
        elif not re.search(r"\.self_attn\.[kv]_proj\.", name):
            found[renamed(name, names)] = tensor
    return found


def _packed(thirds: list[LazyTensor]) -> LazyTensor:
    first = thirds[0]
    shape = (3 * first.shape[0], *first.shape[1:])
    return LazyTensor(shape, first.dtype, lambda: np.concatenate([x.view() for x in thirds]))


def _text(width: int, depth: int, heads: int, activation: str, projection: int, *, projects: bool) -> dict[str, Any]:
    """The config.json of a text encoder in the published directories."""
    return {
        "model_type": "clip_text_model",
        "architectures": ["CLIPTextModelWithProjection" if projects else "CLIPTextModel"],
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_hidden_layers": depth,
        "num_attention_heads": heads,
        "hidden_act": activation,
        "projection_dim": projection,
        "vocab_size": 49408,
        "max_position_embeddings": 77,
        "layer_norm_eps": 1e-5,
        "eos_token_id": 2,
    }


TEXT_L = _text(768, 12, 12, "quick_gelu", 768, projects=False)
TEXT_H = _text(1024, 23, 16, "gelu", 512, projects=False)  # the layer before the last is what conditions: 23 of 24
TEXT_G = _text(1280, 32, 20, "gelu", 1280, projects=True)
_BETAS = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "num_train_timesteps": 1000}
_BETAS |= {"clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1, "trained_betas": None}
SCHEDULERS: dict[str, dict[str, Any]] = {
    "1.5": {"_class_name": "PNDMScheduler", "skip_prk_steps": True} | _BETAS,
    "2.1": {"_class_name": "DDIMScheduler", "prediction_type": "v_prediction"} | _BETAS,
    "XL": {"_class_name": "EulerDiscreteScheduler", "prediction_type": "epsilon", "timestep_spacing": "leading"}
    | {"interpolation_type": "linear"}
    | _BETAS,
}


def split(source: Source) -> Parts | None:
    """The components of an ldm file, each as its own source; None for everything else.

    ValueError for tensors that belong to none of them, naming the first.
    """
    file = source.tensors
    if f"{_UNET}time_embed.0.weight" in file:
        variant = _variant(file)
        sources = _pipeline(source, variant)
    elif f"{_CONTROL}time_embed.0.weight" in file:
        variant, sources = "", {}
    elif "zero_convs.0.0.weight" in file and "time_embed.0.weight" in file:
        return Parts({}, {"controlnet": _controlnet(source, _taken(file, ""))}, {})
    else:
        return None
    if f"{_CONTROL}time_embed.0.weight" in file:
        sources["controlnet"] = _controlnet(source, _taken(file, _CONTROL))
    _check_all_taken(file, variant)
    return Parts(_index(variant, sources), sources, _documents(variant))


def joined(bundle: Bundle) -> dict[str, LazyTensor]:
    """The tensors of a pipeline's components, or of a ControlNet alone, under the names of the file.

    ValueError for a component that such files have no place for.
    """
    components = dict(bundle.components) or {"controlnet": bundle}
    unet = components["unet"].config if "unet" in components else None
    two = "text_encoder_2" in components
    found: dict[str, LazyTensor] = {}
    for name, component in components.items():
        config = component.config
        if isinstance(config, TextConfig):
            open_clip = name == "text_encoder_2" or (unet is not None and unet.context_dim == TEXT_H["hidden_size"])
            tensors = save_tensors(component.params, transformers_table(config))
            tensors = open_clip_state(tensors) if open_clip else tensors
            prefix = _BIG_G["text_encoder" not in components] if name == "text_encoder_2" else _CLIP_L[two]
            prefix = _V2_TEXT if open_clip and name == "text_encoder" else prefix
        elif isinstance(config, UNetConfig | VAEConfig | ControlNetConfig):
            table, prefix, names = _WRITTEN[type(config)]
            backwards = {new: old for old, new in names(config).items()}
            tensors = save_tensors(component.params, table(config))
            tensors = {renamed(key, backwards): tensor for key, tensor in tensors.items()}
        else:
            raise ValueError(f"an ldm file has no place for {name!r}, a {type(config).__name__}")
        found |= {f"{prefix}{key}": _square(key, tensor) for key, tensor in tensors.items()}
    return found


def write_checkpoint(path: Path, tensors: Mapping[str, LazyTensor]) -> None:
    """As training code saves it."""
    write_torch(path, {"state_dict": tensors})


def check_schedule(bundle: Bundle, documents: Mapping[str, Mapping[str, bytes]], path: Path) -> None:
    """ValueError where a pipeline predicts something else than readers of its file will take for granted."""

    def prediction(files: Mapping[str, Mapping[str, bytes]]) -> str:
        content = files.get("scheduler", {}).get("scheduler_config.json", b"{}")
        return json.loads(content).get("prediction_type", "epsilon")

    if bundle.components and "scheduler" in bundle.processor:
        expected, got = prediction(bundle.processor), prediction(documents)
        if expected != got:
            raise ValueError(f"{path}: an ldm file cannot say prediction_type={expected!r}, it reads as {got!r}")


def _square(name: str, tensor: LazyTensor) -> LazyTensor:
    """The projections of the VAE's attention as 1 x 1 convolutions."""
    if ".attn_1." not in name or len(tensor.shape) != 2:
        return tensor
    return LazyTensor((*tensor.shape, 1, 1), tensor.dtype, lambda: tensor.view()[:, :, None, None])


# Config -> its table, the prefix of its names in a file, the table of its names.
_WRITTEN: dict[type, tuple[Any, str, Any]] = {
    UNetConfig: (formats.unet_table, _UNET, unet_names),
    VAEConfig: (formats.vae_table, _VAE, vae_names),
    ControlNetConfig: (formats.controlnet_table, _CONTROL, controlnet_names),
}


def _variant(file: TensorFile) -> str:
    """The published UNet that the marks stand for."""
    inpainting = file.shape(f"{_UNET}input_blocks.0.0.weight")[1] == 9
    if _V2_MARK in file and file.shape(_V2_MARK)[-1] == 1024:
        return "2.1"
    if any(name.startswith(_BIG_G[0]) for name in file):
        return "XL"
    if any(name.startswith(_BIG_G[1]) for name in file):
        return "XL-refiner"
    return "1.5-inpainting" if inpainting else "1.5"


def _taken(file: TensorFile, prefix: str) -> dict[str, LazyTensor]:
    """The tensors below a prefix, without it, and without what holds no parameter."""
    return {
        name.removeprefix(prefix): file[name]
        for name in file
        if name.startswith(prefix) and not _IGNORED.fullmatch(name)
    }


def _part(source: Source, tensors: Mapping[str, LazyTensor], config: Mapping[str, Any]) -> Source:
    return Source(TensorFile(source.tensors.path, tensors), dict(config), {})


def _pipeline(source: Source, variant: str) -> dict[str, Source]:
    file = source.tensors
    channels = file.shape(f"{_UNET}input_blocks.0.0.weight")[1]
    unet = sizes.unet(variant, in_channels=channels if channels == 9 else sizes.unet(variant).in_channels)
    vae = VAEConfig(scaling_factor=0.13025 if variant.startswith("XL") else 0.18215)
    names = unet_names(unet)
    tensors = {renamed(name, names): tensor for name, tensor in _taken(file, _UNET).items()}
    sources = {
        "unet": _part(source, tensors, configs.write_unet(unet)),
        "vae": _part(source, vae_tensors(_taken(file, _VAE), vae), configs.write_vae(vae)),
    }
    if variant == "2.1":
        text = open_clip_tensors(_taken(file, _V2_TEXT), TEXT_H["num_hidden_layers"], projection=False)
        return sources | {"text_encoder": _part(source, text, TEXT_H)}
    if variant != "XL-refiner":
        prefix = _CLIP_L[variant == "XL"]
        sources["text_encoder"] = _part(source, _taken(file, prefix), TEXT_L)
    if variant.startswith("XL"):
        text = _taken(file, _BIG_G[variant == "XL-refiner"])
        text = open_clip_tensors(text, TEXT_G["num_hidden_layers"], projection=True)
        sources["text_encoder_2"] = _part(source, text, TEXT_G)
    return sources


def _controlnet(source: Source, tensors: Mapping[str, LazyTensor]) -> Source:
    """SD 1.5's, or 2.1's where its text has 1024 channels."""
    mark = tensors.get("input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight")
    config = sizes.controlnet("2.1" if mark is not None and mark.shape[-1] == 1024 else "1.5")
    names = controlnet_names(config)
    found = {renamed(name, names): tensor for name, tensor in tensors.items()}
    return _part(source, found, configs.write_controlnet(config))


def _check_all_taken(file: TensorFile, variant: str) -> None:
    """ValueError naming a tensor outside the components."""
    prefixes = [_CONTROL]
    if variant:
        prefixes += [_UNET, _VAE, "conditioner." if variant.startswith("XL") else "cond_stage_model."]
    for name in file:
        if not name.startswith(tuple(prefixes)) and not _IGNORED.fullmatch(name):
            raise ValueError(f"{file.path}: unexpected {name!r}, got {file.shape(name)}{nearest(name, prefixes)}")


def _index(variant: str, sources: Mapping[str, Source]) -> dict[str, Any]:
    """What the model_index.json of the published directory says of these components."""
    document: dict[str, Any] = {"_class_name": "StableDiffusionPipeline"}
    if variant.startswith("XL"):
        document = {"_class_name": "StableDiffusionXLPipeline", "force_zeros_for_empty_prompt": variant == "XL"}
    for name, part in sources.items():
        text = part.config.get("architectures")
        document[name] = ["transformers", text[0]] if text else ["diffusers", part.config["_class_name"]]
    if variant:
        document["scheduler"] = ["diffusers", _scheduler(variant)["_class_name"]]
    return document


def _scheduler(variant: str) -> dict[str, Any]:
    return SCHEDULERS[variant.partition("-")[0]]


def _documents(variant: str) -> dict[str, dict[str, bytes]]:
    """The files of components without weights: how the published model samples."""
    if not variant:
        return {}
    return {"scheduler": {"scheduler_config.json": configs.json_bytes(_scheduler(variant))}}
