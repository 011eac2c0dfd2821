"""Qwen2.5-VL in stages: a smoke run on drawn questions, and the published stages.

Smoke run (the default), 2 CPU cores, all three stages in a row:
    for n in 1 2 3; do python -m omnax.train --config configs/qwen_vl.py:stage=$n --workdir runs/qwen_vl/$n \\
        --config.init_from.path=$(test $n = 1 || echo runs/qwen_vl/$((n - 1))); done
    python -m omnax.train.export --config configs/qwen_vl.py:stage=3 --workdir runs/qwen_vl/3 --out runs/qwen_vl/weights
    6 minutes (150 + 1200 + 100 steps of 0.1 to 0.3 s, and compiling); at the end all of the held-out positions and
    directions are right, 0.995 of the colours and 0.63 of the shapes (blind, with all pixels at zero: none)

Published stages; weights come from --config.init_from.path (a checkpoint directory, or the run of the stage before):
    configs/qwen_vl.py:size=7b,stage=1     visual pre-training: encoder alone, 8,192 tokens (arXiv 2502.13923, table 2)
    configs/qwen_vl.py:size=7b,stage=2     multimodal: everything, 8,192 tokens, with plain text
    configs/qwen_vl.py:size=7b,stage=3     long context: everything, 32,768 tokens
    configs/qwen_vl.py:size=7b,stage=sft   instructions: all but the encoder, as many texts as images (section 2.3)
    configs/qwen_vl.py:size=7b,stage=sft,lora      the same with LoRA of rank 64 on the language model, for one chip
The stages of the user's notes (600 M pairs and 400 M OCR pairs; 200 M instructions; 20 M texts 1:1), encoder included:
    configs/qwen_vl.py:size=7b,recipe=notes,stage=1     encoder and neck, language model frozen
    configs/qwen_vl.py:size=7b,recipe=notes,stage=2     everything, on instructions
    configs/qwen_vl.py:size=7b,recipe=notes,stage=3     the same with as many plain texts

Learning rates, batch sizes and numbers of steps are not published; those here are of the public fine-tuning scripts
(QwenLM/Qwen3-VL, qwen-vl-finetune) where they have one, else ours. Data: --config.data.streams, JSONL conversations,
TFDS caption sets and texts with weights; see data/conversations/turns.py.
"""

import dataclasses
from typing import Any

from ml_collections import ConfigDict

from ..models.qwen_vl.model import NOTES_VISION, QwenVLConfig, config
from .common import parse_arg

Settings = dict[str, Any]

ALL = ((".*", True),)
VISION = (("visual/.*", True), (".*", False))
LANGUAGE_AND_MERGER = (("visual/merger.*", True), ("visual/.*", False), (".*", True))
LORA = ((".*_lora/.*", True), (".*", False))
KERNELS = ((".*(kernel|embedding)", 1.0), (".*", 0.0))
IMAGES, INSTRUCTIONS, TEXTS = "data/captions.jsonl", "data/instructions.jsonl", "data/texts.jsonl"


@dataclasses.dataclass(frozen=True)
class Stage:
    """What differs between the stages: data by weight, tokens of a row, what is trained."""

    tokens: int
    streams: tuple[tuple[str, float], ...]
    trainable: tuple[tuple[str, bool], ...] = ALL
    lr: float = 1e-5


RECIPES = {
    "published": {
        "1": Stage(8192, ((IMAGES, 1.0),), VISION, lr=1e-4),
        "2": Stage(8192, ((IMAGES, 1.0), (INSTRUCTIONS, 1.0), (TEXTS, 1.0))),
        "3": Stage(32768, ((INSTRUCTIONS, 1.0), (TEXTS, 1.0))),
        "sft": Stage(8192, ((INSTRUCTIONS, 1.0), (TEXTS, 1.0)), LANGUAGE_AND_MERGER),
    },
    "notes": {
        "1": Stage(8192, ((IMAGES, 0.6), ("data/ocr.jsonl", 0.4)), VISION, lr=1e-4),
        "2": Stage(8192, ((INSTRUCTIONS, 1.0),)),
        "3": Stage(8192, ((INSTRUCTIONS, 1.0), (TEXTS, 1.0))),
    },
}


def get_config(arg: str | None = None) -> ConfigDict:
    """See the head of this file."""
    chosen: Any = parse_arg(arg, size="tiny", stage="1", recipe=tuple(RECIPES), lora=False)
    stages = RECIPES[chosen.recipe]
    if chosen.stage not in stages:
        choices = [f"recipe={recipe},stage={stage}" for recipe, known in RECIPES.items() for stage in known]
        raise ValueError(f"expected one of {choices}, got recipe={chosen.recipe},stage={chosen.stage}")
    if chosen.size == "tiny":
        return ConfigDict({"recipe": "qwen_vl"} | smoke(chosen.stage, chosen.recipe, chosen.lora))
    return ConfigDict(
        {"recipe": "qwen_vl"} | full(published(chosen.size.upper(), chosen.recipe), stages[chosen.stage], chosen.lora)
    )


def published(size: str, recipe: str) -> QwenVLConfig:
    """A released size, or one with the encoder of the notes."""
    return config(size, vision=NOTES_VISION if recipe == "notes" else {})


def full(body: QwenVLConfig, stage: Stage, lora: bool) -> Settings:
    """A stage of a released size: scanned, rematerialised, fully sharded; long rows also over `context`."""
    depth = {"scan": True, "remat": "full"}
    adapters = {"lora_rank": 64, "lora_alpha": 128.0} if lora else {}
    text, vision = (dataclasses.asdict(tower) | depth for tower in (body.text, body.vision))
    return {
        "batch_size": 64 * 8192 // stage.tokens,  # as many tokens in a step, however long the rows
        "total_steps": 10_000,
        "mesh": {"data": 1, "fsdp": -1, "context": stage.tokens // 8192},
        "model": dataclasses.asdict(body) | {"text": text | adapters, "vision": vision},
        "dtype": "bfloat16",
        "weighting": "token",
        "data": {
            "streams": tuple({"name": "jsonl", "path": path, "weight": weight} for path, weight in stage.streams),
            # Half of a row may be visual tokens, of 4 patches each
            "row": {"tokens": stage.tokens, "patches": 2 * stage.tokens, "segments": 64, "frames": 256},
        },
        "optimizer": adam(stage.lr, LORA if lora else stage.trainable, warmup=300),
        "init_from": {"skip": (".*_lora/.*",) if lora else (), "required": ("(?!.*_lora/).*",)},
    }


def adam(lr: float, trainable: tuple[tuple[str, bool], ...], warmup: int, **fields: Any) -> Settings:
    """AdamW without decay of norms and biases."""
    schedule = {"kind": "cosine", "warmup": warmup}
    return {"lr": lr, "schedule": schedule, "trainable": trainable, "clip_norm": 1.0, "weight_decay": 0.0} | fields


# Questions of the later smoke stages by weight; texts join them one to one.
QUESTIONS = {"position": 2.0, "direction": 2.0, "color": 1.0, "shape": 1.0}
MIXED = QUESTIONS | {"text": 6.0}
# Steps, peak rate, what is trained, streams of the drawn questions by weight, tokens and patches of a row.
SMOKE = {
    "1": (150, 2e-3, VISION, {"describe": 1.0, "position": 1.0, "direction": 1.0}, 128, 192),
    "2": (1200, 2e-3, ALL, QUESTIONS, 128, 192),
    "3": (100, 5e-4, ALL, MIXED, 256, 384),
    "sft": (100, 5e-4, LANGUAGE_AND_MERGER, MIXED, 128, 192),
}


def tiny(recipe: str, lora: bool = False) -> QwenVLConfig:
    """Three vision and three language blocks of width 64.

    A head of 16 channels has few angles: with the published theta its rows and columns turn too slowly to be told
    apart in minutes, with 20 they are learnt.
    """
    from ..data.drawn.visual_questions import vocabulary

    words = vocabulary()
    text = {
        "width": 64, "depth": 3, "num_heads": 4, "num_kv_heads": 2, "head_dim": 16, "mlp_dim": 128,
        "vocab_size": 64, "tie_embeddings": True, "rope_theta": 20.0, "mrope_section": (2, 3, 3),
        "lora_rank": 8 if lora else 0, "lora_alpha": 16.0,
    }  # fmt: skip
    vision: Settings = {"depth": 3, "width": 64, "num_heads": 4, "mlp_dim": 128, "out_width": 64, "full_blocks": (2,)}
    if recipe == "notes":
        vision |= NOTES_VISION | {"patch_size": 14, "window": 3, "depth": 4}
    body = config("3B", text=text, vision=vision)
    return dataclasses.replace(body, image_token=words["<|image_pad|>"], video_token=words["<|video_pad|>"])


def smoke(stage: str, recipe: str, lora: bool) -> Settings:
    """A stage on drawn questions that learns in minutes."""
    return drawn(tiny(recipe, lora), stage, lora)


def drawn(body: QwenVLConfig, stage: str, lora: bool) -> Settings:
    """The same of any small model."""
    steps, lr, trainable, tasks, tokens, patches = SMOKE[stage]
    questions = {"name": "drawn", "size": 100_000}
    return {
        "batch_size": 8,
        "total_steps": steps,
        "model": dataclasses.asdict(body),
        "init_by_inputs": True,
        "data": {
            "streams": tuple(questions | {"task": task, "weight": weight} for task, weight in tasks.items()),
            "tests": tuple(questions | {"task": task, "size": 400} for task in QUESTIONS),
            "row": {"tokens": tokens, "patches": patches, "segments": 32, "frames": 64},
        },
        "optimizer": adam(lr, LORA if lora else trainable, warmup=20, b2=0.95),
        "init_from": {"skip": (".*_lora/.*",)} if lora else {},
        "log_every": 25,
        "evaluate_every": 1000,
        "save_every": 1000,
    }
