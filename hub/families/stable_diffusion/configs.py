"""The config.json of diffusers' UNet2DConditionModel, ControlNetModel and AutoencoderKL, both ways."""

import json
from collections.abc import Callable, Mapping
from typing import Any

from ....models.stable_diffusion.controlnet import CHANNEL_ORDERS, ControlNetConfig
from ....models.stable_diffusion.unet import EncoderConfig, UNetConfig
from ....models.stable_diffusion.vae import VAEConfig
from ...keys import Key, Section, brief, harmless, only, used

# diffusers' names of activations (models/activations.py) -> ours.
_ACTIVATIONS = {"silu": "silu", "swish": "silu", "mish": "mish", "gelu": "gelu", "relu": "relu"}
_ATTENDS, _PLAIN = ("CrossAttnDownBlock2D", "CrossAttnUpBlock2D"), ("DownBlock2D", "UpBlock2D")


def _all(key: Key, *names: str) -> dict[str, Key]:
    return dict.fromkeys(names, key)


# What every model of diffusers may have in its config.json; the last ones are those of EMA weights.
COMMON: dict[str, Key] = {
    "_class_name": used("text", None),
    **_all(
        harmless("bookkeeping"),
        *("_diffusers_version", "_name_or_path", "_commit_hash", "_use_default_values", "_use_empty_init"),
    ),
    **_all(
        harmless("ignored"),
        *("decay", "inv_gamma", "min_decay", "optimization_step", "power", "update_after_step", "use_ema_warmup"),
    ),
    "quantization_config": only(None),
}
_ENCODER: dict[str, Key] = {
    **COMMON,
    "in_channels": used("count", 4),
    "flip_sin_to_cos": used("flag", True),
    "freq_shift": used("number", 0),
    "down_block_types": used("texts", (*[_ATTENDS[0]] * 3, _PLAIN[0])),
    "mid_block_type": only("UNetMidBlock2DCrossAttn"),
    "only_cross_attention": only(False),
    "block_out_channels": used("counts", (320, 640, 1280, 1280)),
    "layers_per_block": used("counts", 2),
    "downsample_padding": used("integer", 1, choices=(0, 1)),
    "mid_block_scale_factor": used("positive", 1),
    "act_fn": used("text", "silu", choices=_ACTIVATIONS),
    "norm_num_groups": used("count", 32),
    "norm_eps": used("positive", 1e-5),
    "cross_attention_dim": used("count", 1280),
    "transformer_layers_per_block": used("wholes", 1),
    "encoder_hid_dim": only(None),
    "encoder_hid_dim_type": only(None),
    "attention_head_dim": used("counts", 8),  # the number of heads, whatever it is called (diffusers issue 2011)
    "num_attention_heads": only(None),
    "use_linear_projection": used("flag", False),
    "class_embed_type": only(None),
    "num_class_embeds": only(None),
    "addition_embed_type": used("text", None, choices=("text_time",)),
    "addition_time_embed_dim": used("count", None),
    "projection_class_embeddings_input_dim": used("count", None),
    "upcast_attention": harmless("runtime"),  # the softmax is float32 here in any case
    "resnet_time_scale_shift": only("default"),
    "addition_embed_type_num_heads": harmless("ignored"),  # of another addition_embed_type
}
UNET = Section(
    {
        **_ENCODER,
        "out_channels": used("count", 4),
        "up_block_types": used("texts", (_PLAIN[1], *[_ATTENDS[1]] * 3)),
        "sample_size": used("count", None),
        "dropout": harmless("training"),
        "center_input_sample": only(False),
        "reverse_transformer_layers_per_block": only(None),
        "dual_cross_attention": only(False),
        "resnet_skip_time_act": only(False),
        "resnet_out_scale_factor": only(1.0),
        "time_embedding_type": only("positional"),
        "time_embedding_dim": only(None),
        "time_embedding_act_fn": only(None),
        "timestep_post_act": only(None),
        "time_cond_proj_dim": only(None),
        "conv_in_kernel": only(3),
        "conv_out_kernel": only(3),
        "attention_type": only("default"),
        "class_embeddings_concat": only(False),
        "mid_block_only_cross_attention": only(None, False),
        "cross_attention_norm": only(None),
    }
)

CONTROLNET = Section(
    {
        **_ENCODER,
        "conditioning_channels": used("count", 3),
        "controlnet_conditioning_channel_order": used("text", "rgb", choices=CHANNEL_ORDERS),
        "conditioning_embedding_out_channels": used("counts", (16, 32, 96, 256)),
        "global_pool_conditions": used("flag", False),
    }
)
VAE = Section(
    {
        **COMMON,
        "in_channels": used("count", 3),
        "out_channels": used("count", 3),
        "down_block_types": used("texts", ("DownEncoderBlock2D",)),
        "up_block_types": used("texts", ("UpDecoderBlock2D",)),
        "block_out_channels": used("counts", (64,)),
        "layers_per_block": used("count", 1),
        "act_fn": used("text", "silu", choices=_ACTIVATIONS),
        "latent_channels": used("count", 4),
        "norm_num_groups": used("count", 32),
        "sample_size": harmless("runtime"),  # of tiles, where an image is coded in tiles
        "scaling_factor": used("positive", 0.18215),
        "shift_factor": only(None),
        "latents_mean": only(None),
        "latents_std": only(None),
        "force_upcast": harmless("runtime"),
        "use_quant_conv": only(True),
        "use_post_quant_conv": only(True),
        "mid_block_add_attention": only(True),
    }
)


def _levels(value: Any, count: int) -> tuple[int, ...]:
    """A number for every level, where a config gives one for all."""
    return tuple(value) if isinstance(value, list | tuple) else (value,) * count


def _attends(key: str, types: list[str], index: int) -> tuple[bool, ...]:
    known = _ATTENDS[index], _PLAIN[index]
    for name in types:
        if name not in known:
            raise ValueError(f"{key!r} has {brief(name)}, expected {known[0]!r} or {known[1]!r}")
    return tuple(name == known[0] for name in types)


def _encoder_fields(c: Mapping[str, Any]) -> dict[str, Any]:
    count = len(c["down_block_types"])
    extra = c["addition_embed_type"] is not None
    return {
        "in_channels": c["in_channels"],
        "widths": _levels(c["block_out_channels"], count),
        "layers": _levels(c["layers_per_block"], count),
        "attention": _attends("down_block_types", c["down_block_types"], 0),
        "depths": _levels(c["transformer_layers_per_block"], count),
        "num_heads": _levels(c["attention_head_dim"], count),
        "context_dim": c["cross_attention_dim"],
        "linear_projection": c["use_linear_projection"],
        "size_dim": c["addition_time_embed_dim"] or 0 if extra else 0,
        "added_dim": c["projection_class_embeddings_input_dim"] or 0 if extra else 0,
        "groups": c["norm_num_groups"],
        "eps": float(c["norm_eps"]),
        "activation": _ACTIVATIONS[c["act_fn"]],
        "middle_divisor": float(c["mid_block_scale_factor"]),
        "downsample_padding": c["downsample_padding"],
        "cosines_first": c["flip_sin_to_cos"],
        "frequency_shift": float(c["freq_shift"]),
    }


def read_unet(document: Mapping[str, Any], where: str) -> UNetConfig:
    """The config of a UNet2DConditionModel."""
    c = UNET.read(document, where)
    up = _attends("up_block_types", c["up_block_types"], 1)[::-1]
    config = UNetConfig(
        **_encoder_fields(c), up_attention=up, out_channels=c["out_channels"], sample_size=c["sample_size"]
    )
    if len(up) != len(config.widths):
        raise ValueError(f"{where}: 'up_block_types' has {len(up)} entries, expected {len(config.widths)}")
    return config


def read_controlnet(document: Mapping[str, Any], where: str) -> ControlNetConfig:
    """The config of a ControlNetModel."""
    c = CONTROLNET.read(document, where)
    return ControlNetConfig(
        **_encoder_fields(c),
        hint_channels=c["conditioning_channels"],
        hint_widths=_levels(c["conditioning_embedding_out_channels"], 1),
        channel_order=c["controlnet_conditioning_channel_order"],
        global_pool=c["global_pool_conditions"],
    )


def read_vae(document: Mapping[str, Any], where: str) -> VAEConfig:
    """The config of an AutoencoderKL."""
    c = VAE.read(document, where)
    widths = _levels(c["block_out_channels"], 1)
    for key, name in (("down_block_types", "DownEncoderBlock2D"), ("up_block_types", "UpDecoderBlock2D")):
        if c[key] != [name] * len(widths) and c[key] != (name,) * len(widths):
            raise ValueError(f"{where}: {key!r} is {brief(c[key])}, expected {name!r} for each of {len(widths)} levels")
    return VAEConfig(
        in_channels=c["in_channels"],
        out_channels=c["out_channels"],
        widths=widths,
        layers=c["layers_per_block"],
        latent_channels=c["latent_channels"],
        groups=c["norm_num_groups"],
        activation=_ACTIVATIONS[c["act_fn"]],
        scaling_factor=c["scaling_factor"],
    )


def _write_levels(values: tuple[int, ...]) -> int | list[int]:
    return values[0] if len(set(values)) == 1 else list(values)


def _write_encoder(c: EncoderConfig) -> dict[str, Any]:
    added: dict[str, Any] = {"addition_embed_type": None}
    if c.added_dim:
        added = {
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": c.size_dim,
            "projection_class_embeddings_input_dim": c.added_dim,
        }
    return added | {
        "in_channels": c.in_channels,
        "flip_sin_to_cos": c.cosines_first,
        "freq_shift": c.frequency_shift,
        "down_block_types": [(_ATTENDS if attends else _PLAIN)[0] for attends in c.attention],
        "block_out_channels": list(c.widths),
        "layers_per_block": _write_levels(c.layers),
        "downsample_padding": c.downsample_padding,
        "mid_block_scale_factor": c.middle_divisor,
        "act_fn": c.activation,
        "norm_num_groups": c.groups,
        "norm_eps": c.eps,
        "cross_attention_dim": c.context_dim,
        "transformer_layers_per_block": _write_levels(c.depths),
        "attention_head_dim": _write_levels(c.num_heads),
        "use_linear_projection": c.linear_projection,
    }


def write_unet(c: UNetConfig) -> dict[str, Any]:
    """The entries of config.json that a UNet's config speaks about."""
    return {
        "_class_name": "UNet2DConditionModel",
        **_write_encoder(c),
        "out_channels": c.out_channels,
        "up_block_types": [(_ATTENDS if attends else _PLAIN)[1] for attends in c.up_attention[::-1]],
        "sample_size": c.sample_size,
    }


def write_controlnet(c: ControlNetConfig) -> dict[str, Any]:
    """The entries of config.json that a ControlNet's config speaks about."""
    return {
        "_class_name": "ControlNetModel",
        **_write_encoder(c),
        "conditioning_channels": c.hint_channels,
        "controlnet_conditioning_channel_order": c.channel_order,
        "conditioning_embedding_out_channels": list(c.hint_widths),
        "global_pool_conditions": c.global_pool,
    }


def write_vae(c: VAEConfig) -> dict[str, Any]:
    """The entries of config.json that a VAE's config speaks about."""
    return {
        "_class_name": "AutoencoderKL",
        "in_channels": c.in_channels,
        "out_channels": c.out_channels,
        "down_block_types": ["DownEncoderBlock2D"] * len(c.widths),
        "up_block_types": ["UpDecoderBlock2D"] * len(c.widths),
        "block_out_channels": list(c.widths),
        "layers_per_block": c.layers,
        "act_fn": c.activation,
        "latent_channels": c.latent_channels,
        "norm_num_groups": c.groups,
        "scaling_factor": c.scaling_factor,
    }


Read = Callable[[Mapping[str, Any], str], Any]
# Class of diffusers -> how its config.json is read.
READERS: dict[str, Read] = {
    "UNet2DConditionModel": read_unet,
    "ControlNetModel": read_controlnet,
    "AutoencoderKL": read_vae,
}


def json_bytes(document: Mapping[str, Any]) -> bytes:
    """A JSON file as diffusers writes it."""
    return f"{json.dumps(document, indent=2, sort_keys=True)}\n".encode()
