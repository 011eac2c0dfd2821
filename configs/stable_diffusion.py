"""Stable Diffusion: the base UNet, ControlNet, IP-Adapter; smoke runs on drawn shapes, and the published settings.

Smoke runs (the default), 16x16 pixels without an autoencoder; the last two begin from the first:
    python -m omnax.train --config configs/stable_diffusion.py --workdir runs/sd/base
    python -m omnax.train --config configs/stable_diffusion.py:stage=control --workdir runs/sd/control \\
        --config.init_from.path=runs/sd/base
    python -m omnax.train --config configs/stable_diffusion.py:stage=image_prompt --workdir runs/sd/image_prompt \\
        --config.init_from.path=runs/sd/base
Figures are in docs/stable_diffusion.md.

Published settings: size=1.5, 2.1-base or XL and data=FOLDER, with captions.jsonl (see data/captions.py). All stages
but the base begin from a published directory, --config.init_from.path=DIR:
    stage=base             CompVis' and Stability's schedules; of XL with offset noise
    stage=control          lllyasviel/ControlNet: Canny edges, or with condition=file the field "condition" of the lines
    stage=image_prompt     tencent-ailab/IP-Adapter with OpenCLIP's ViT-H/14; plus=True for patches and a resampler
"""

import dataclasses
from typing import Any

from ml_collections import ConfigDict

from ..data.drawn.control_shapes import COLORS
from ..models import clip
from ..models.stable_diffusion import sizes
from ..models.stable_diffusion.vae import VAEConfig
from .common import only_with, parse_arg

Settings = dict[str, Any]
STAGES = ("base", "control", "image_prompt")
_MEAN, _STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def get_config(arg: str | None = None) -> ConfigDict:
    """See the head of this file."""
    published_sizes, conditions = ("", "1.5", "2.1-base", "XL"), ("canny", "file")
    chosen = parse_arg(arg, stage=STAGES, size=published_sizes, data="", condition=conditions, plus=False)
    only_with(chosen, bool(chosen.size), "size=", "data", "condition", "plus")
    only_with(chosen, chosen.stage == "control", "stage=control", "condition")
    only_with(chosen, chosen.stage == "image_prompt", "stage=image_prompt", "plus")
    settings = published(chosen) if chosen.size else smoke(chosen.stage)
    # What a stage builds upon may not begin at random.
    required = () if chosen.stage == "base" else ("(unet|vae|text|text_2)/.*" if chosen.size else "(unet|text)/.*",)
    own = {"recipe": "stable_diffusion", "stage": chosen.stage, "init_from": {"required": required}}
    return ConfigDict(own | settings)


def smoke(stage: str) -> Settings:
    """Half a million parameters on pixels; the text encoder learns with the base, where published ones are CLIP's."""
    unet = {
        "in_channels": 3,
        "out_channels": 3,
        "widths": (24, 48),
        "layers": (1, 1),
        "attention": (False, True),
        "up_attention": (False, True),
        "depths": (1, 1),
        "num_heads": (4, 4),
        "context_dim": 32,
        "groups": 8,
        "sample_size": 16,
    }
    text = {"width": 32, "depth": 1, "num_heads": 4, "mlp_dim": 64, "vocab_size": 600, "context_length": 8}
    model: Settings = {"unet": unet, "text": text, "hint_widths": (16,)}
    geometry = {"preprocess": ("decode",), "preprocess_test": ("decode",)}
    data: Settings = {"name": "control_shapes", "tokenizer": "learn", "threads": 2} | geometry
    settings: Settings = {"batch_size": 32, "log_every": 50, "evaluate_every": 1000, "save_every": 300}
    settings |= {"image_size": 16, "model": model, "data": data}
    if stage == "base":
        data |= {"drop_text": 0.1, "drop_words": tuple(COLORS), "drop_words_share": 0.25}
        own = {"total_steps": 1000, "train_text": True, "optimizer": adamw(1e-3), "evaluators": ("samples", "text")}
    elif stage == "control":
        data |= {"condition": "file", "drop_text": 0.5}
        own = {"total_steps": 600, "optimizer": adamw(5e-4), "evaluators": ("samples", "control")}
    else:
        prompt = ("decode", ("normalize", {"mean": _MEAN, "std": _STD}))
        data |= {"prompt": "prompt", "preprocess_prompt": prompt, "drop_words": tuple(COLORS), "drop_words_share": 1.0}
        data |= dict.fromkeys(("drop_text", "drop_image", "drop_both"), 0.05)
        trunk = clip.image_trunk((16, 16), (4, 4), 64, 2, 4, 128)  # type: ignore[arg-type]
        model["image"] = dataclasses.asdict(clip.ImageConfig(trunk, 48))
        model["adapter"] = {"features": 48, "context_dim": 32, "layer_widths": (48,) * 4}
        own = {"total_steps": 600, "optimizer": adamw(1e-3), "evaluators": ("samples", "image_prompt")}
    return settings | own


def adamw(lr: float, warmup: int = 50) -> Settings:
    """The rate is constant after the warm-up."""
    return {"lr": lr, "weight_decay": 0.01, "clip_norm": 1.0, "schedule": {"kind": "constant", "warmup": warmup}}


def published(chosen: Any) -> Settings:
    """A published size in a stage."""
    xl, plus = chosen.size == "XL", chosen.plus
    unet = dataclasses.replace(sizes.unet(chosen.size), remat="full")
    vae = VAEConfig(scaling_factor=0.13025 if xl else 0.18215)
    side = vae.factor * (unet.sample_size or 64)
    model: Settings = {"unet": dataclasses.asdict(unet), "vae": dataclasses.asdict(vae)} | texts(chosen.size)
    shortest = ("resize_shortest", {"size": side, "method": "pil_bilinear"})
    whole = ("decode", shortest, ("center_crop", {"size": side}))
    data: Settings = {"name": "captions", "path": chosen.data, "preprocess_test": whole, "preprocess": whole}
    settings: Settings = {"dtype": "bfloat16", "image_size": side, "model": model, "data": data}
    settings |= {"mesh": {"fsdp": 16 if xl else 1}, "samples": 8, "guidance": 5.0 if xl else 7.5, "sample_steps": 50}
    if chosen.stage == "base":  # 32 machines of 8 A100; SDXL saw offset noise of 0.05 in its last stage
        data["drop_text"] = 0.1
        own = {"batch_size": 2048, "total_steps": 500_000, "optimizer": adamw(1e-4, 10_000) | {"clip_norm": None}}
        return settings | own | {"noise_offset": 0.05 if xl else 0.0, "ema": {"decay": 0.9999}}
    if chosen.stage == "control":  # the prompts' half is empty (arXiv 2302.05543, section 3.4); thresholds are random
        data |= {"condition": chosen.condition, "drop_text": 0.5}
        data |= {"canny_low": (50.0, 150.0), "canny_high": (150.0, 250.0)}
        own = {"batch_size": 64 if xl else 256, "total_steps": 15_000 if xl else 10_000, "optimizer": adamw(1e-5, 500)}
        return settings | own
    tower = clip.config("H/14").image
    clip_image = ("decode", ("resize_shortest", {"size": 224}), ("center_crop", {"size": 224}))
    data |= {"prompt": "image", "preprocess_prompt": (*clip_image, ("normalize", {"mean": _MEAN, "std": _STD}))}
    data |= dict.fromkeys(("drop_text", "drop_image", "drop_both"), 0.05)
    name = f"ip-adapter{'-plus' * plus}_{'sdxl_vit-h' if xl else 'sd15'}"
    fields = {} if chosen.size != "2.1-base" else {"context_dim": unet.context_dim}
    adapter = dataclasses.replace(sizes.ip_adapter(name), **fields)
    model |= {"image": dataclasses.asdict(tower), "adapter": dataclasses.asdict(adapter)}
    own = {"batch_size": 64, "total_steps": 1_000_000, "optimizer": adamw(1e-4, 0) | {"clip_norm": None}}
    return settings | own


def texts(size: str) -> Settings:
    """The text encoders: CLIP's, OpenCLIP's without its last block, or both with the input of the last."""
    openai = dataclasses.replace(clip.config("L/14", activation="quick_gelu").text, projection_dim=0)
    if size == "1.5":
        return {"text": dataclasses.asdict(openai)}
    if size == "2.1-base":
        text = clip.config("H/14").text
        return {"text": dataclasses.asdict(dataclasses.replace(text, depth=text.depth - 1, projection_dim=0))}
    second = clip.config("bigG/14").text
    return {"text": dataclasses.asdict(openai), "text_2": dataclasses.asdict(second), "penultimate": True}
