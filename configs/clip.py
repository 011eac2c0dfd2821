"""Contrastive image-text training: smoke runs on drawn shapes and on digits, and the published recipes.

Smoke runs, 2 CPU cores:
    python -m omnax.train --config configs/clip.py --workdir runs/clip
    about 75 s of processor time; 0.955 of the pictures of 16 held-out combinations find their caption among 128.
    python -m omnax.train --config configs/clip.py:data=digits --workdir runs/clip_digits
    about 180 s of processor time; zero-shot accuracy 0.989 on 360 held-out digits.
    configs/clip.py:loss=sigmoid                         the first with SigLIP's loss

Published recipes; the pairs come from `--config.data.name` (any TFDS caption set, "tar" shards, a "captions" folder):
    configs/clip.py:size=b32,hyper=openai                arXiv 2103.00020, tables 18-20
    configs/clip.py:size=h14,hyper=openclip              OpenCLIP's LAION-2B runs (arXiv 2212.07143)
    configs/clip.py:size=eva02-l14,hyper=eva --config.init_from.path=DIR
                                                         EVA-CLIP (arXiv 2303.15389) from EVA's image weights
    configs/clip.py:size=siglip-b16,hyper=siglip         arXiv 2303.15343
    configs/clip.py:size=b16,hyper=lit --config.init_from.path=DIR
                                                         LiT: a frozen image tower (arXiv 2111.07991)
"""

import dataclasses
from typing import Any

from ml_collections import ConfigDict, FieldReference

from ..models import clip, eva
from .common import only_with, parse_arg

Settings = dict[str, Any]

OPENAI = {"mean": (0.48145466, 0.4578275, 0.40821073), "std": (0.26862954, 0.26130258, 0.27577711)}
KEEP = ("keep", {"keys": ("image", "tokens")})
KEEP_TEST = ("keep", {"keys": ("image", "tokens", "label")})
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
DIGIT_TEMPLATES = ("a photo of the digit {}.", "the number {}, written by hand.", "a handwritten {}.")
# open_clip decays what has two dimensions or more and is no norm; its class token has one.
DECAYED = ((r".*(kernel|embedding|pos_embed|probe)", 1.0), (".*", 0.0))


def get_config(arg: str | None = None) -> ConfigDict:
    """See the head of this file."""
    losses, forms = ("", "info_nce", "sigmoid"), ("ring", "full", "rows")
    chosen = parse_arg(arg, size="tiny", data="", hyper=("", *HYPERS), loss=losses, form=forms, chunks=1)
    only_with(chosen, chosen.size != "tiny" or chosen.hyper == "siglip", "a published size", "hyper")
    if (chosen.loss or "sigmoid") != "sigmoid" and chosen.hyper == "siglip":
        raise ValueError(f"hyper=siglip trains with the sigmoid loss, got loss={chosen.loss}")
    sigmoid = chosen.loss == "sigmoid" or chosen.hyper == "siglip"
    if chosen.size == "tiny":
        makers = {"": shapes, "shapes": shapes, "digits": digits}
        if chosen.data not in makers:
            raise ValueError(f"data of size=tiny is one of {[*makers][1:]}, got {chosen.data!r}")
        settings = makers[chosen.data]()
        if sigmoid:
            settings["model"] |= {"logit_scale_init": 2.3025851, "logit_bias_init": -10.0}
    else:
        settings = HYPERS[chosen.hyper or "openai"](variant(str(chosen.size)))
        settings["data"]["name"] = chosen.data or "tar"
        settings["mesh"] = {"fsdp": 16 if settings["model"]["text"]["width"] >= 1024 else 1}
    spread = {"loss": "sigmoid" if sigmoid else "info_nce", "form": chosen.form, "chunks": chosen.chunks}
    return ConfigDict({"recipe": "clip"} | settings | spread)


def variant(size: str) -> str:
    """ "b32", "l14@336", "eva02-e14+" as the size table has it: "B/32", ... ."""
    names = {name.lower().replace("/", ""): name for name in clip.SIZES}
    if size.lower() not in names:
        raise ValueError(f"unknown size {size!r}, expected tiny or one of {list(names)}")
    return names[size.lower()]


def tiny(image_size: int, patch: int, channels: int, width: int, text_width: int, length: int, vocab: int) -> Settings:
    """Two small towers of three layers."""
    trunk = clip.image_trunk(image_size, patch, width, 3, 4, 4 * width, num_channels=channels)
    text = clip.TextConfig(text_width, 3, 2, 4 * text_width, vocab_size=vocab, context_length=length, projection_dim=64)
    return dataclasses.asdict(clip.CLIPConfig(clip.ImageConfig(trunk, 64), text))


def shapes() -> Settings:
    """Drawn shapes: 112 captions for training, in batches of half of them; 16 combinations held out."""
    normal = "value_range"
    return {
        "batch_size": 56,
        "total_steps": 400,
        "model": tiny(image_size=32, patch=8, channels=3, width=96, text_width=64, length=16, vocab=768),
        "data": {
            "name": "shapes",
            "distinct": True,
            "tokenizer": "learn",
            "preprocess": ("decode", normal, KEEP),
            "preprocess_test": ("decode", normal, KEEP_TEST),
            "threads": 2,
        },
        "optimizer": adam(1e-3, 0.1, warmup=50, clip_norm=1.0),
        "evaluators": ("zero_shot", "retrieval"),
        "log_every": 20,
        "evaluate_every": 100,
        "save_every": 100,
    }


def digits() -> Settings:
    """Handwritten digits with captions made from their labels."""
    decode = ("decode", {"channels": 1})
    move = ("random_affine", {"degrees": 10.0, "translate": 0.1, "scale": (0.9, 1.1), "shear": 5.0})
    return {
        "batch_size": 64,
        "total_steps": 1500,
        "model": tiny(image_size=8, patch=2, channels=1, width=64, text_width=48, length=16, vocab=768),
        "data": {
            "name": "digits",
            "templates": DIGIT_TEMPLATES,
            "class_names": DIGITS,
            "tokenizer": "learn",
            "preprocess": (decode, move, "value_range", KEEP),
            "preprocess_test": (decode, "value_range", KEEP_TEST),
            "threads": 2,
        },
        "prompts": DIGIT_TEMPLATES,
        "optimizer": adam(2e-3, 0.1, warmup=100, clip_norm=1.0),
        "evaluate_every": 500,
        "save_every": 500,
    }


def openai(size: str) -> Settings:
    """OpenAI's CLIP: 32 epochs of 400 M pairs."""
    rate = {"B/32": 5e-4, "B/16": 5e-4, "L/14": 4e-4, "L/14@336": 2e-5}.get(size, 5e-4)
    pairs = 400_000_000 * (1 if size == "L/14@336" else 32)
    settings = published(size, pairs, 32768, activation="quick_gelu")
    crop = ("resize_shortest", {"size": image_size(size), "method": "pil_bicubic"})
    augment = (crop, ("random_crop", {"size": image_size(size)}))
    return settings | {
        "data": data(size, augment),
        "optimizer": adam(rate, 0.2, warmup=2000),
    }


def openclip(size: str) -> Settings:
    """OpenCLIP on LAION-2B: 34 G pairs."""
    crop = ("random_resized_crop", {"size": image_size(size), "scale": (0.9, 1.0), "method": "pil_bicubic"})
    settings = published(size, 34_000_000_000, 32768 if size in ("B/32", "B/16") else 81920)
    return settings | {"data": data(size, (crop,)), "optimizer": adam(5e-4, 0.2, warmup=2000)}


def eva_clip(size: str) -> Settings:
    """EVA-CLIP: LAMB with rates and decays by tower, patch dropout in the largest."""
    batch = {"EVA01-g/14": 41_000, "EVA01-g/14+": 114_000, "EVA02-L/14@336": 61_000}.get(size, 131_072)
    drop = {"patch_dropout": 0.5} if size in ("EVA01-g/14+", "EVA02-E/14", "EVA02-E/14+") else {}
    crop = ("random_resized_crop", {"size": image_size(size), "scale": (0.9, 1.0), "method": "pil_bicubic"})
    base = size == "EVA02-B/16"
    decays = {"EVA02-B/16": (0.75, 0.75), "EVA02-L/14@336": (0.75, 0.65)}
    decays |= {"EVA02-E/14": (0.9, 0.75), "EVA02-E/14+": (0.9, 0.75)}
    image_decay, text_decay = decays.get(size, (0.85, 0.75))
    return published(size, 4_000_000_000, batch // 1024 * 1024, **drop) | {
        "data": data(size, (crop,)),
        "optimizer": adam(5e-4, 0.05, warmup=2000, name="lamb", clip_norm=5.0),
        "image_rate": 0.4 if base else 0.8,
        "text_rate": 0.04 if base else 0.08,
        "image_layer_decay": image_decay,
        "text_layer_decay": text_decay,
        "init_from": {"skip": (r"(image|text)/projection/.*", "logit_scale")},
    }


def siglip(size: str) -> Settings:
    """SigLIP: weight decay decoupled from the learning rate, as everywhere in big_vision."""
    normal = {"mean": (0.5,) * 3, "std": (0.5,) * 3}
    resize = (("resize", {"size": (image_size(size),) * 2, "method": "pil_bicubic"}),)
    return published(size, 40_000_000_000, 32768) | {
        # A directory with SigLIP's tokenizer.json or spiece.model, as every checkpoint ships them.
        "data": data(size, resize, normal) | {"tokenizer": "data/siglip_tokenizer"},
        "optimizer": adam(1e-3, 1e-4, warmup=20_000, b2=0.95, decay_times_lr=False),
    }


def lit(size: str) -> Settings:
    """OpenAI's recipe with the image tower locked."""
    settings = openai(size)
    settings["optimizer"] |= {"trainable": (("image/trunk/.*", False), (".*", True)), "lr": 1e-3}
    skip = ("text/.*", "image/projection/.*", "logit_scale")
    settings["init_from"] = {"skip": skip, "required": ("image/trunk/.*",)}
    return settings


HYPERS = {"openai": openai, "openclip": openclip, "eva": eva_clip, "siglip": siglip, "lit": lit}


def image_size(size: str) -> int:
    """Pixels per side."""
    return clip.config(size).image.trunk.image_size[0]


def published(size: str, pairs: int, batch_size: int, **fields: Any) -> Settings:
    """The published towers, scanned and rematerialised, in bfloat16; overriding the batch size moves the steps."""
    model = clip.config(size, scan=True, remat="full", **fields)
    reference = FieldReference(batch_size)
    return {
        "batch_size": reference,
        "total_steps": pairs // reference,
        "model": as_settings(model),
        "dtype": "bfloat16",
        "evaluators": ("retrieval",),
        "evaluate_every": 5000,
        "save_every": 5000,
    }


def as_settings(model: clip.CLIPConfig) -> Settings:
    """A nested dict whose every field can be overridden, but for an EVA trunk, whose fields are not those of a ViT."""
    settings = dataclasses.asdict(model)
    if isinstance(model.image.trunk, eva.EvaConfig):
        settings["image"]["trunk"] = model.image.trunk
    return settings


def adam(lr: float, weight_decay: float, warmup: int, **fields: Any) -> Settings:
    """AdamW with CLIP's betas and eps, decay on matrices only."""
    schedule = {"kind": "cosine", "warmup": warmup}
    betas = {"b1": 0.9, "b2": 0.98, "eps": 1e-6}
    return {"lr": lr, "schedule": schedule, "weight_decay": weight_decay, "decay_multiplier": DECAYED} | betas | fields


def data(size: str, augment: tuple[Any, ...], normal: Settings = OPENAI) -> Settings:
    """Pairs with an augmentation for training, resize and centre crop for evaluation.

    The crop is that of the library in whose format a trained model is written: it says so exactly.
    """
    side = image_size(size)
    centre = (
        ("resize_shortest", {"size": side, "method": "pil_bicubic"}),
        ("center_crop", {"size": side, "rule": "torchvision" if size.startswith("EVA") else "floor"}),
    )
    return {
        "path": "data/pairs",
        "train_split": "train",
        "test_split": "test",
        "preprocess": ("decode", *augment, ("normalize", normal), KEEP),
        "preprocess_test": ("decode", *centre, ("normalize", normal), KEEP),
        "workers": -1,
    }
