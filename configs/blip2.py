"""BLIP-2 in two stages: a smoke run on drawn tiles, and the published stages.

Smoke run (the default), 2 CPU cores, with a small language model that is made between them:
    for s in 1 words 2; do python -m omnax.train --config configs/blip2.py:stage=$s --workdir runs/blip2/$s \\
        --config.init_from.path=$(test $s = 1 || echo runs/blip2/$(test $s = 2 && echo words || echo 1)); done
    python -m omnax.train.export --config configs/blip2.py:stage=2 --workdir runs/blip2/2 --out runs/blip2/weights

Published stages (paper, section 3.4; rates and their ends as its authors gave them in LAVIS issue 243):
    configs/blip2.py:size=g,stage=1 --config.init_from.path=vision=EVA,bert=google-bert/bert-base-uncased
        250k steps of 1,680 images (size=L: OpenAI's ViT-L, 2,320), rate 1e-4 to 1e-5 after 2k steps
    configs/blip2.py:size=g,language=opt2.7b,stage=2 --config.init_from.path=blip2=STAGE1,vision=EVA,language=OPT
        80k steps of 1,920 images (OPT) or 1,520 (flant5xl, flant5xxl), rate 1e-4 to 5e-5
Further encoders, which the publication does not have: size=openclip_g, size=eva02_E. Data are the user's:
--config.data.path=FOLDER with captions.jsonl, or any name of data/captions.py.
"""

import dataclasses
from typing import Any

from ml_collections import ConfigDict

from ..models import vit
from ..models.blip2.model import LANGUAGES, Blip2Config, config, qformer, scanned
from ..models.opt import OPTConfig
from .common import parse_arg

Settings = dict[str, Any]

NORMAL = {"mean": (0.48145466, 0.4578275, 0.40821073), "std": (0.26862954, 0.26130258, 0.27577711)}
# What each stage reads of an example.
KEYS = {
    "1": ("image", "tokens"),
    "words": ("tokens", "learnt", "words"),
    "2": ("image", "tokens", "learnt"),
    "2, T5": ("image", "tokens", "labels"),
}
STAGE_1 = (("(vision|language|language_proj)/.*", False), (".*", True))
WORDS = (("language/.*", True), (".*", False))
# Queries and what they pass through; the text side of the first stage rests, where it is still there.
STAGE_2 = (
    (r"(vision|language)/.*", False),
    (r"qformer/(token_embed|pos_embed|head_\w+)(/.*)?|qformer/blocks_\d+/(mlp|norm2)/.*", False),
    (r"(image_proj|text_proj|match_head)/.*|temperature", False),
    (".*", True),
)
SIZES = {"g": "eva_clip_g", "L": "clip_L", "openclip_g": "openclip_g", "eva02_E": "eva02_clip_E"}


def get_config(arg: str | None = None) -> ConfigDict:
    """See the head of this file."""
    chosen: Any = parse_arg(arg, size=("tiny", *SIZES), stage=("1", "words", "2"), language=("opt2.7b", *LANGUAGES))
    if chosen.size == "tiny":
        return ConfigDict({"recipe": "blip2"} | smoke(chosen.stage))
    if chosen.stage == "words":
        raise ValueError("stage=words is of the smoke run alone, expected stage=1 or stage=2")
    return ConfigDict({"recipe": "blip2"} | full(SIZES[chosen.size], chosen.stage, chosen.language))


def full(vision: str, stage: str, language: str) -> Settings:
    """A published stage: towers scanned and frozen in half precision, everything fully sharded."""
    t5 = "t5" in language
    if stage == "1":
        batch, steps, low = 2320 if vision == "clip_L" else 1680, 250_000, 0.1
        model = config(vision, vision_eps=1e-5)
        skip = (r"queries|temperature|(image_proj|text_proj|match_head|vision_norm)/.*", r"qformer/.*/cross.*")
        trainable = (("vision/.*", False), (".*", True))
    else:
        batch, steps, low = 1520 if t5 else 1920, 80_000, 0.5
        body, _ = LANGUAGES[language]
        body = dataclasses.replace(body, vocab_size=50272) if isinstance(body, OPTConfig) else body
        model = config(vision, language, vision_eps=1e-5, image_token=None, **{"t5" if t5 else "opt": body})
        skip, trainable = (r"language_proj/.*",), ((r"(vision|language)/.*", False), (".*", True))
    normal = ("normalize", NORMAL), ("keep", {"keys": KEYS["2, T5" if stage == "2" and t5 else stage]})
    crop = ("random_resized_crop", {"size": 224, "scale": (0.5, 1.0), "method": "pil_bicubic"})
    return {
        "stage": stage,
        "batch_size": batch,
        "total_steps": steps,
        "mesh": {"data": 1, "fsdp": -1},
        "model": scanned(model, remat="full"),
        "dtype": "bfloat16",
        "frozen_dtype": "bfloat16",
        "data": {
            "name": "captions",
            "path": "data/captions",
            "reader": "data/bert-base-uncased-dec",
            "language": "data/language",
            "preprocess": ("decode", crop, "flip", *normal),
            "preprocess_test": ("decode", ("resize", {"size": 224, "method": "pil_bicubic"}), *normal),
        },
        "optimizer": adam(1e-4, trainable, warmup=2000, low=low),
        "evaluators": ("retrieval", "match") if stage == "1" else (),
        "init_from": {"skip": skip, "required": (r"(vision|language)/.*",)},
        "evaluate_every": 5000,
        "save_every": 2000,
    }


def adam(lr: float, trainable: tuple[tuple[str, bool], ...], warmup: int, low: float, **fields: Any) -> Settings:
    """AdamW of the publication: no decay of vectors, but of queries, embeddings and the temperature (LAVIS)."""
    return {
        "lr": lr,
        "b2": 0.98,
        "weight_decay": 0.05,
        "schedule": {"kind": "cosine", "warmup": warmup, "end": low},
        "trainable": trainable,
        "decay_multiplier": ((r".*/(bias|scale)|qformer/head_bias|.*/cls_token", 0.0), (".*", 1.0)),
    } | fields


def tiny() -> Blip2Config:
    """Eight queries of width 96 that read a drawn tile's patches, both stages' heads, a small OPT."""
    trunk = vit.ViTConfig(
        width=201, depth=1, num_heads=1, mlp_dim=8, patch_size=(8, 8), image_size=(24, 24), num_classes=0, pool="none",
        final_norm=False, activation="gelu", eps=1e-5, pos_interpolation="bicubic",
    )  # fmt: skip
    reader = qformer(
        trunk, text=True, lm_head=True, width=96, depth=4, num_heads=4, mlp_dim=192, vocab_size=23, max_positions=16,
        dropout=0.0, attention_dropout=0.0,
    )  # fmt: skip
    language = OPTConfig(width=64, depth=2, num_heads=4, mlp_dim=128, vocab_size=24, max_positions=64, dropout=0.0)
    heads: Settings = {"embed_dim": 32, "temperature": True, "opt": language, "language_width": 64}
    return Blip2Config(qformer=reader, vision=trunk, num_queries=8, vision_eps=1e-5, **heads)


# Steps, peak rate, warm-up, what is trained, evaluators.
SMOKE: dict[str, tuple[int, float, int, Any, tuple[str, ...]]] = {
    "1": (800, 2e-3, 50, STAGE_1, ("retrieval", "match", "captions")),
    "words": (1000, 3e-3, 50, WORDS, ()),
    "2": (200, 1e-3, 40, STAGE_2, ("answers",)),
}


def smoke(stage: str) -> Settings:
    """A stage on drawn tiles that learns in minutes; every batch holds 60 of the 180 captions, none twice."""
    steps, lr, warmup, trainable, evaluators = SMOKE[stage]
    keep = ("keep", {"keys": KEYS[stage]})
    pixels = () if stage == "words" else ("decode", ("normalize", NORMAL))
    return {
        "stage": stage,
        "batch_size": 60,
        "total_steps": steps,
        "model": dataclasses.asdict(tiny()),
        "patch_tower": True,
        "export": "transformers",
        "data": {
            "name": "tiles",
            "distinct": True,
            "length": 12,
            "preprocess": (*pixels, keep),
            "preprocess_test": (*pixels, keep),
            "threads": 2,
        },
        "optimizer": adam(lr, trainable, warmup, low=0.1),
        "evaluators": evaluators,
        "log_every": 50,
        "evaluate_every": 200,
        "save_every": 200,
    }
