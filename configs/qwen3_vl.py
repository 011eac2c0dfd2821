"""Qwen3-VL in stages, dense or with experts: a smoke run on drawn questions, and the published stages.

Smoke run (the default), 2 CPU cores, dense or with eight experts of which two are chosen:
    python -m omnax.train --config configs/qwen3_vl.py --workdir runs/qwen3_vl
    python -m omnax.train --config configs/qwen3_vl.py:size=tiny-moe --workdir runs/qwen3_vl_moe
    python -m omnax.train.export --config configs/qwen3_vl.py --workdir runs/qwen3_vl --out runs/qwen3_vl/weights
    positions and directions above 0.9 are the aim; not yet measured (docs/qwen_vl.md, "What falls short")

Published stages (arXiv 2511.21631, table 1); weights come from --config.init_from.path:
    configs/qwen3_vl.py:size=8b,stage=s0     mergers alone (DeepStack's too), 8,192 tokens
    configs/qwen3_vl.py:size=8b,stage=s1     everything, 8,192 tokens
    configs/qwen3_vl.py:size=8b,stage=s2     everything, 32,768 tokens, more text and video
    configs/qwen3_vl.py:size=8b,stage=s3     everything, 262,144 tokens
    configs/qwen3_vl.py:size=235b-a22b,stage=s1     with experts: over the `expert` axis too
    configs/qwen3_vl.py:size=4b,stage=sft[,lora]    the public fine-tuning script: encoder frozen
Stages of the user's notes (A, B, C; 1.5, 2 and 0.6 T tokens):
    configs/qwen3_vl.py:size=8b,recipe=notes,stage=a     encoder and mergers, 8,192 tokens
    configs/qwen3_vl.py:size=8b,recipe=notes,stage=b     everything, 8,192 tokens
    configs/qwen3_vl.py:size=8b,recipe=notes,stage=c     everything, 32,768 tokens

Losses are weighted by the square root of the answers' lengths, as the report says ("square-root-normalized per-token");
its formula, learning rates, batch sizes and numbers of steps are not published: those here are of the public
fine-tuning scripts (QwenLM/Qwen3-VL, qwen-vl-finetune) where they have one, else ours. Data as in configs/qwen_vl.py.
"""

import dataclasses
from typing import Any

from ml_collections import ConfigDict

from ..models.qwen_vl.model import QwenVLConfig
from ..models.qwen_vl.qwen3 import QWEN3, SIZES, config
from .common import parse_arg
from .qwen_vl import IMAGES, INSTRUCTIONS, TEXTS, VISION, Settings, Stage, drawn, full

MERGERS = (("visual/.*merger.*", True), (".*", False))
ALL_BUT_ENCODER = (("visual/.*merger.*", True), ("visual/.*", False), (".*", True))
VIDEOS = "data/videos.jsonl"
EVERYTHING = ((IMAGES, 1.0), (INSTRUCTIONS, 1.0), (TEXTS, 1.0))
LONG = ((INSTRUCTIONS, 1.0), (VIDEOS, 1.0), (TEXTS, 2.0))

RECIPES = {
    "published": {
        "s0": Stage(8192, ((IMAGES, 1.0),), MERGERS, lr=1e-3),
        "s1": Stage(8192, EVERYTHING),
        "s2": Stage(32768, LONG),
        "s3": Stage(262144, LONG),
        "sft": Stage(32768, ((INSTRUCTIONS, 2.0), (TEXTS, 1.0)), ALL_BUT_ENCODER),
    },
    "notes": {
        "a": Stage(8192, ((IMAGES, 1.0),), VISION, lr=1e-4),
        "b": Stage(8192, EVERYTHING),
        "c": Stage(32768, LONG),
    },
}
# Devices over which experts are spread.
EXPERT_AXIS = {"30B-A3B": 8, "235B-A22B": 16}


def get_config(arg: str | None = None) -> ConfigDict:
    """See the head of this file."""
    chosen: Any = parse_arg(arg, size="tiny", stage="s1", recipe=tuple(RECIPES), lora=False)
    stages = RECIPES[chosen.recipe]
    if chosen.stage not in stages:
        choices = [f"recipe={recipe},stage={stage}" for recipe, known in RECIPES.items() for stage in known]
        raise ValueError(f"expected one of {choices}, got recipe={chosen.recipe},stage={chosen.stage}")
    if chosen.size.startswith("tiny"):
        settings = smoke(chosen.size, chosen.stage, chosen.lora)
    else:
        settings = released(chosen.size.upper(), stages[chosen.stage], chosen.lora)
    return ConfigDict({"recipe": "qwen_vl"} | settings)


def released(size: str, stage: Stage, lora: bool) -> Settings:
    """A stage of a released size."""
    if size not in SIZES:
        raise ValueError(f"expected a size of {['tiny', 'tiny-moe', *map(str.lower, SIZES)]}, got {size.lower()}")
    settings = full(config(size), stage, lora)
    mesh = settings["mesh"] | {"expert": EXPERT_AXIS.get(size, 1)}
    return settings | {"mesh": mesh, "weighting": "sqrt", "balance_weight": 0.001}


def tiny(size: str, lora: bool = False) -> QwenVLConfig:
    """Three vision and three language blocks of width 64; patches of 14 pixels, for the drawn pictures of 56.

    Theta as in configs/qwen_vl.py: a head of 16 channels has few angles.
    """
    from ..data.drawn.visual_questions import vocabulary

    words = vocabulary()
    text = QWEN3 | {
        "width": 64, "depth": 3, "num_heads": 4, "num_kv_heads": 2, "head_dim": 16, "mlp_dim": 128,
        "vocab_size": 64, "tie_embeddings": True, "rope_theta": 20.0, "mrope_section": (4, 2, 2),
        "lora_rank": 8 if lora else 0, "lora_alpha": 16.0,
    }  # fmt: skip
    if size == "tiny-moe":
        text |= {"num_experts": 8, "experts_per_token": 2, "expert_dim": 64}
    elif size != "tiny":
        raise ValueError(f"expected size tiny or tiny-moe, got {size}")
    vision: Settings = {
        "depth": 3, "width": 64, "num_heads": 4, "mlp_dim": 128, "out_width": 64, "patch_size": 14,
        "num_positions": 64, "deepstack_blocks": (0, 1),
    }  # fmt: skip
    body = config("2B", text=text, vision=vision)
    return dataclasses.replace(body, image_token=words["<|image_pad|>"], video_token=words["<|video_pad|>"])


def smoke(size: str, stage: str, lora: bool) -> Settings:
    """A stage on drawn questions that learns in minutes: s0 as the first of configs/qwen_vl.py, s1 as its second."""
    like = {"s0": "1", "a": "1", "s1": "2", "b": "2", "sft": "sft"}.get(stage, "3")
    settings = drawn(tiny(size, lora), like, lora)
    trainable = {"s0": MERGERS, "sft": ALL_BUT_ENCODER}.get(stage, settings["optimizer"]["trainable"])
    if not lora:
        settings["optimizer"] |= {"trainable": trainable}
    return settings | {"weighting": "sqrt", "balance_weight": 0.01}
