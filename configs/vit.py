"""ViT image classification: a smoke run on real handwritten digits, and the published recipes.

Smoke run (the default), 2 CPU cores:
    python -m omnax.train --config configs/vit.py --workdir runs/vit
    about 130 CPU seconds, so a minute and a half alone; test accuracy 0.98 to 0.99 on 360 held-out digits.

The argument chooses size, data and hyper-parameters; data sets are prepared by TFDS beforehand (data.data_dir):
    configs/vit.py:size=s16,data=i1k                     ImageNet-1k as google-research/big_vision, 300 epochs
    configs/vit.py:size=b16,data=i21k                    ImageNet-21k as big_vision, 300 epochs
    configs/vit.py:size=b16,data=i21k,hyper=original     as the ViT paper, 90 epochs (arXiv 2010.11929, table 3)
    configs/vit.py:size=s16,data=i1k,hyper=baseline      "Better plain ViT baselines", 90 epochs: 76.5 % top-1 on
                                                         ImageNet-1k in 6.5 h on a TPU v3-8 (arXiv 2205.01580)
    configs/vit.py:size=b16,data=i1k,hyper=finetune --config.init_from.path=DIR
                                                         AugReg's transfer at 384 px: 85.5 % top-1 from its i21k
                                                         weights (arXiv 2106.10270)
    configs/vit.py:size=b16,data=digits                  any size on the digits, enlarged to 4 x 4 patches
"""

import dataclasses
import re
from typing import Any

from ml_collections import ConfigDict, FieldReference

from ..models import vit
from .common import only_with, parse_arg

Settings = dict[str, Any]

# name in TFDS, classes, training images, splits
DATA = {
    "digits": ("digits", 10, 1437, "train", "test"),
    "i1k": ("imagenet2012", 1000, 1268355, "train[:99%]", "validation"),
    "i21k": ("imagenet21k", 21843, 14145997, "full[51200:]", "full[:51200]"),
}

# Augmentation levels of AugReg (arXiv 2106.10270): mixup parameter, RandAugment layers and magnitude.
AUGMENTATION = {
    "none": (0.0, 0, 0),
    "light1": (0.0, 2, 0),
    "light2": (0.2, 2, 10),
    "medium1": (0.2, 2, 15),
    "medium2": (0.5, 2, 15),
}
# Levels of big_vision's configs vit_i21k.py and vit_i1k.py by size; other sizes take the last.
LEVELS = {
    "i21k": {"Ti/16": "none", "S/32": "none", "S/16": "light1", "B/32": "light2", "B/16": "light2", "": "medium2"},
    "i1k": {"Ti/16": "light1", "S/32": "medium1", "": "medium2"},
}
END = ("value_range", ("keep", {"keys": ("image", "label")}))


def get_config(arg: str | None = None) -> ConfigDict:
    """See the head of this file."""
    # "smoke" is the default
    chosen = parse_arg(arg, smoke=False, size="tiny", data=("", *DATA), hyper=tuple(HYPERS))
    data = chosen.data or ("digits" if chosen.size == "tiny" else "i1k")
    only_with(chosen, data != "digits", "a published data set (data=i1k, data=i21k)", "hyper")
    if data == "digits":
        return ConfigDict({"recipe": "vit"} | smoke(chosen.size))
    settings = HYPERS[chosen.hyper](data, variant(chosen.size))
    # Sizes from H (0.6 G parameters, 16 bytes each in training) on are split over 16 devices, which divide all widths.
    fsdp = 16 if settings["model"]["width"] >= 1280 else 1
    return ConfigDict({"recipe": "vit", "mesh": {"fsdp": fsdp}} | settings)


def variant(size: str) -> str:
    """ "b16", "so400m14", "g-opt16" as the size table has it: "B/16", ... (g and G differ, all else may be small)."""
    name, patch = re.fullmatch(r"(.*?)/?(\d*)", size).groups()  # type: ignore[union-attr]  # matches anything
    same = [known for known in vit.SIZES if known == name] or [k for k in vit.SIZES if k.lower() == name.lower()]
    return f"{same[0] if same else name}/{patch}"


def smoke(size: str) -> Settings:
    """A run on the digits that learns in a minute or two."""
    fields: Settings = {"num_channels": 1, "num_classes": 10, "pool": "gap", "class_token": False}
    if size == "tiny":
        shape: Settings = {"width": 64, "depth": 3, "num_heads": 4, "mlp_dim": 256}
        body, enlarge = vit.ViTConfig(**shape, patch_size=(2, 2), image_size=(8, 8), **fields), ()
    else:
        pixels = 4 * vit.config(variant(size)).patch_size[0]
        body = vit.config(variant(size), image_size=(pixels, pixels), **fields)
        enlarge = (("resize", {"size": body.image_size, "method": "pil_bilinear"}),)
    move = ("random_affine", {"degrees": 10.0, "translate": 0.1, "scale": (0.9, 1.1), "shear": 5.0})
    return {
        "batch_size": 64,
        "total_steps": 2000,  # 89 epochs
        "model": dataclasses.asdict(body),
        "data": {
            "name": "digits",
            "preprocess": (("decode", {"channels": 1}), move, *enlarge, *END),
            "preprocess_test": (("decode", {"channels": 1}), *enlarge, *END),
            "threads": 2,
        },
        "optimizer": adam(lr=2e-3, weight_decay=0.05, warmup=100, clip_norm=1.0),
        "ema": {"decay": 0.998, "warmup": True},
        "evaluators": ("accuracy", "knn", "linear_probe"),
        "evaluate_every": 500,
        "save_every": 500,
    }


def big_vision(data: str, size: str) -> Settings:
    """big_vision/configs/vit_i21k.py and vit_i1k.py."""
    level = LEVELS[data].get(size, LEVELS[data][""])
    mixup, layers, magnitude = AUGMENTATION[level]
    i21k = data == "i21k"
    return {
        **epochs(data, 300, batch_size=4096),
        "model": model(size, data, pool="gap" if i21k else "token", represent=not i21k),
        "dtype": "bfloat16",
        "data": images(data, 224, layers, magnitude),
        "loss": "sigmoid",
        "mixup": mixup,
        "optimizer": adam(1e-3, 1e-4, warmup=10_000, decay_times_lr=False, mu_dtype="bfloat16", clip_norm=1.0),
    }


def original(data: str, size: str) -> Settings:
    """The ViT paper, table 3: Adam, linear decay on ImageNet-21k, cosine and clipping on ImageNet-1k."""
    if data == "i21k":
        length, optimizer = 90, adam(1e-3, 0.03, warmup=10_000, kind="linear")
    else:
        length, optimizer = 300, adam(3e-3, 0.3, warmup=10_000, clip_norm=1.0)
    return {
        **epochs(data, length, batch_size=4096),
        "model": model(size, data, pool="token", represent=True, dropout=0.1),
        "dtype": "bfloat16",
        "data": images(data, 224),
        "loss": "sigmoid",
        "optimizer": optimizer,
    }


def baseline(data: str, size: str) -> Settings:
    """big_vision/configs/vit_s16_i1k.py."""
    return {
        **epochs(data, 90, batch_size=1024),
        "model": model(size, data, pool="gap", represent=True, pos_embed="sincos2d", head_bias_init=0.0),
        "dtype": "bfloat16",
        "data": images(data, 224, layers=2, magnitude=10),
        "mixup": 0.2,
        "optimizer": adam(1e-3, 1e-4, warmup=10_000, decay_times_lr=False, mu_dtype="bfloat16", clip_norm=1.0),
    }


def finetune(data: str, size: str) -> Settings:
    """vision_transformer's vit_jax/configs and big_vision/configs/transfer.py: SGD at 384 px, a new zero head.

    Patches of 14 pixels do not divide 384: the ViT paper's H/14 was tuned at 518.
    """
    pixels = 518 if size.endswith("/14") else 384
    schedule = {"kind": "cosine", "warmup": 500}
    return {
        "batch_size": 512,
        "total_steps": 20_000,
        "model": model(size, data, pool="token", represent=False, image_size=(pixels, pixels), head_bias_init=0.0),
        "dtype": "bfloat16",
        "data": images(data, pixels, resize=round(pixels * 7 / 6)),
        "optimizer": {"name": "sgd", "lr": 0.03, "schedule": schedule, "mu_dtype": "bfloat16", "clip_norm": 1.0},
        "init_from": {"skip": ("head/.*", "pre_logits/.*")},
    }


HYPERS = {"big_vision": big_vision, "original": original, "baseline": baseline, "finetune": finetune}


def epochs(data: str, number: int, batch_size: int) -> Settings:
    """Batch size, and the number of steps as a function of it: overriding the one moves the other."""
    reference = FieldReference(batch_size)
    return {"batch_size": reference, "total_steps": number * DATA[data][2] // reference}


def model(size: str, data: str, pool: str, represent: bool, **fields: Any) -> Settings:
    """The published body with the head of a data set; scanned and rematerialised, which big sizes need."""
    fields = {"head_bias_init": -10.0 if data == "i21k" else -6.9, "class_token": pool == "token"} | fields
    body = vit.config(size, num_classes=DATA[data][1], pool=pool, scan=True, remat="full", **fields)
    return dataclasses.asdict(dataclasses.replace(body, pre_logits_dim=body.width if represent else 0))


def adam(lr: float, weight_decay: float, warmup: int, kind: str = "cosine", **fields: Any) -> Settings:
    """Adam with decoupled weight decay on kernels only."""
    schedule = {"kind": kind, "warmup": warmup}
    kernels = ((".*/kernel", 1.0), (".*", 0.0))
    return {"lr": lr, "schedule": schedule, "weight_decay": weight_decay, "decay_multiplier": kernels} | fields


def images(data: str, size: int, layers: int = 0, magnitude: float = 0, resize: int = 256) -> Settings:
    """Inception crop, flip and RandAugment for training; big_vision's resize_small and central_crop for evaluation."""
    name, _, _, train_split, test_split = DATA[data]
    augment = [("randaugment", {"layers": layers, "magnitude": magnitude})] if layers else []
    shrink = ("resize_shortest", {"size": resize, "method": "bv_area", "rounding": "big_vision"})
    centre = ("center_crop", {"size": size, "rule": "floor"})
    return {
        "name": name,
        "train_split": train_split,
        "test_split": test_split,
        "preprocess": ("decode", ("inception_crop", {"size": size}), "flip", *augment, *END),
        "preprocess_test": ("decode", shrink, centre, *END),
        "workers": -1,
    }
