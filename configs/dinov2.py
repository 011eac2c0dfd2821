"""DINO, iBOT and DINOv2: a smoke run on procedural textures, and the published recipes.

Smoke run (the default), 2 CPU cores:
    python -m omnax.train --config configs/dinov2.py --workdir runs/dinov2
    900 steps, 5 minutes on one core. 20-nearest-neighbour accuracy on held-out textures: raw pixels 0.47, untrained
    0.40, 300 steps 0.74, 900 steps 0.78; DINO cross-entropy about 3.5 from step 400 on (ln K: 4.16).

The argument chooses the recipe; data sets are prepared by TFDS beforehand (data.data_dir, data.name):
    configs/dinov2.py:recipe=dino,size=S/16          DINO (arXiv 2104.14294), 100 epochs of ImageNet-1k: k-NN 69.3 %
    configs/dinov2.py:recipe=ibot,size=S/16          iBOT (arXiv 2111.07832), 800 epochs: k-NN 75.2 %
    configs/dinov2.py:recipe=ibot_rand,size=B/16     iBOT with random masks, 400 epochs: k-NN 77.3 %
    configs/dinov2.py:recipe=short,size=L/16         DINOv2's ssl_default_config.yaml, 125k steps of batch 2048 on
                                                     ImageNet-1k: k-NN 81.6 %, a day on 32 A100
    configs/dinov2.py:recipe=full,size=L/14          vitl14.yaml, 625k steps of batch 3072 on ImageNet-22k: k-NN 82.0 %
    configs/dinov2.py:recipe=full,size=g/14          vitg14.yaml
    configs/dinov2.py:recipe=high_res,size=L/14 --config.init_from.path=WORKDIR
                                                     10k steps at 518 px after the above (arXiv 2304.07193, B.2)
    configs/dinov2.py:recipe=distill,size=S/14,teacher=g/14 --config.init_from.path=WORKDIR
                                                     the student of a frozen, larger teacher (section 5)
    configs/dinov2.py:recipe=notes,size=B/16         iBOT as the notes describe it: 40-75 % random masks
Smoke runs of the others: recipe=smoke,objective=dino|ibot|dinov2.
"""

import dataclasses
import math
from typing import Any

from ml_collections import ConfigDict

from ..data.images.multicrop import IMAGENET_MEAN, IMAGENET_STD
from ..models import dinov2
from .common import only_with, parse_arg

Settings = dict[str, Any]

EPOCH = 1250  # steps of DINOv2's "official epoch"
IMAGENET = 1_281_167  # training images of ImageNet-1k


def get_config(arg: str | None = None) -> ConfigDict:
    """See the head of this file."""
    chosen = parse_arg(arg, recipe=tuple(RECIPES), size="", teacher="g/14", objective=("dinov2", "dino", "ibot"))
    only_with(chosen, chosen.recipe != "smoke", "a published recipe", "size")
    only_with(chosen, chosen.recipe == "smoke", "recipe=smoke", "objective")
    only_with(chosen, chosen.recipe == "distill", "recipe=distill", "teacher")
    return ConfigDict({"recipe": "dinov2"} | RECIPES[chosen.recipe](chosen))


def smoke(chosen: Any) -> Settings:
    """Ten kinds of texture, told apart without labels in a few minutes."""
    body = dinov2.Dinov2Config(
        width=64, depth=3, num_heads=4, mlp_dim=256, patch_size=4, image_size=24, layer_scale=1.0, init_std=0.125
    )
    head = {"prototypes": 64, "hidden": 256, "bottleneck": 64, "init_std": 0.09}
    weights = {"dino": (1.0, 0.0, 0.0), "ibot": (1.0, 1.0, 0.0), "dinov2": (1.0, 1.0, 0.1)}[chosen.objective]
    steps = 900
    return {
        "batch_size": 48,
        "total_steps": steps,
        "model": dataclasses.asdict(body),
        "dino_head": head,
        "ibot_head": head if chosen.objective == "dinov2" else None,
        "teacher": {"centering": "sinkhorn_knopp", "temperature": (0.04, 0.04)},
        "losses": dict(zip(("dino", "ibot", "koleo"), weights, strict=True)),
        "ema": {"decay": 0.9, "decay_end": 1.0},
        "crops": {
            "global_size": 24,
            "local_size": 12,
            "local_count": 4,
            "global_scale": (0.4, 1.0),
            "local_scale": (0.1, 0.4),
            "style": "textures",
            "upscale": False,
        },
        "mask": {"group": 48},
        "data": {
            "name": "textures",
            "preprocess": ("decode",),
            "preprocess_test": (
                "decode",
                ("normalize", {"mean": IMAGENET_MEAN, "std": IMAGENET_STD}),
                ("keep", {"keys": ("image", "label")}),
            ),
            "threads": 2,
        },
        "optimizer": adamw(3e-3, warmup=steps // 10, end=0.0, weight_decay=(0.04, 0.04), clip_norm=3.0),
        "evaluators": ("knn", "pca"),
        "log_every": 10,
        "evaluate_every": 100,
        "save_every": 100,
    }


def dino(chosen: Any) -> Settings:
    """dino:main_dino.py, the run of its README for ViT-S/16 with 8 GPUs: 100 epochs, batch 512."""
    batch, length = 512, 100
    return {
        **v1(chosen.size or "S/16", batch, length, warmup=10),
        "dino_head": {"prototypes": 65536},
        "losses": {"dino": 1.0, "ibot": 0.0, "koleo": 0.0},
        "teacher": {"centering": "centering", "temperature": (0.04, 0.04)},
        "crops": crops_v1((0.4, 1.0), (0.05, 0.4), 8),
    }


def ibot(chosen: Any) -> Settings:
    """bytedance/ibot README, ViT-S/16: 800 epochs, batch 1024, block-wise masks of 10-50 % on half of the crops."""
    batch, length = 1024, 800
    base = v1(chosen.size or "S/16", batch, length, warmup=10, mask_token=True)
    return {
        **base,
        "dino_head": {"prototypes": 8192},
        "losses": {"dino": 1.0, "ibot": 1.0, "koleo": 0.0},
        "teacher": {
            "centering": "centering",
            "temperature": (0.04, 0.07),
            "warmup": 30 * epoch(batch),
            "center_all_patches": True,
        },
        "crops": crops_v1((0.25, 1.0), (0.05, 0.25), 10),
        "mask": {"kind": "ibot_block", "ratio": (0.1, 0.5), "share": 0.5, "stratified": False, "group": 64},
    }


def ibot_rand(chosen: Any) -> Settings:
    """iBOT's ViT-B/16 with random masks of 65-75 % on half of the crops: 400 epochs, gradients clipped to 0.3."""
    batch, length = 1024, 400
    base = v1(chosen.size or "B/16", batch, length, warmup=10, mask_token=True, clip_norm=0.3, min_lr=2e-6)
    settings = ibot(chosen) | base
    settings["freeze_last_layer"] = 3 * epoch(batch)
    settings["teacher"] = settings["teacher"] | {"warmup": 50 * epoch(batch)}
    settings["crops"] = crops_v1((0.32, 1.0), (0.05, 0.32), 10)
    settings["mask"] = settings["mask"] | {"kind": "random", "ratio": (0.65, 0.75)}
    return settings


def notes(chosen: Any) -> Settings:
    """iBOT as the user's notes have it: 40-75 % random masks on every crop, temperature 0.04, a plain softmax."""
    settings = ibot(chosen)
    settings["mask"] = settings["mask"] | {"kind": "random", "ratio": (0.4, 0.75), "share": 1.0}
    settings["teacher"] = {"centering": "none", "temperature": (0.04, 0.04)}
    return settings


def short(chosen: Any) -> Settings:
    """dinov2:dinov2/configs/ssl_default_config.yaml and train/vitl16_short.yaml."""
    size = chosen.size or "L/16"
    return {
        **v2(size, gated=False, batch=2048, length=100, base_lr=4e-3, warmup=10, weight_decay_end=0.4, momentum=0.992),
        "dino_head": {"prototypes": 65536},
        "teacher": {"centering": "centering", "temperature": (0.04, 0.07), "warmup": 30 * EPOCH},
        "model": model(size, gated=False, drop_path=0.3),
        "crops": {"local_size": 96 if size.endswith("16") else 98},
        "mask": {"group": 64},
        "layer_decay": 0.9,
    }


def full(chosen: Any) -> Settings:
    """dinov2:dinov2/configs/train/vitl14.yaml and vitg14.yaml (the data were ImageNet-22k; LVD-142M is not public)."""
    size = chosen.size or "L/14"
    return {
        **v2(size, gated=True, batch=3072, length=500, base_lr=2e-4, warmup=80, weight_decay_end=0.2, momentum=0.994),
        "dino_head": {"prototypes": 131072, "bottleneck": 384},
        "ibot_head": {"prototypes": 131072, "bottleneck": 256},
        "teacher": {"centering": "sinkhorn_knopp", "temperature": (0.04, 0.07), "warmup": 30 * EPOCH},
        "model": model(size, gated=True, drop_path=0.4),
        "mask": {"group": 12},
    }


def high_res(chosen: Any) -> Settings:
    """The last 10k steps at 518 px, schedules compressed (arXiv 2304.07193, B.2; the rate is not published)."""
    settings = full(chosen)
    steps = 10_000
    settings["total_steps"] = steps
    settings["model"] = settings["model"] | {"image_size": 518 // 14 * 14}
    settings["crops"] = {"global_size": 518, "local_size": 98}
    settings["teacher"] = settings["teacher"] | {"warmup": 600}
    settings["freeze_last_layer"] = 20
    settings["optimizer"] = settings["optimizer"] | {"schedule": {"kind": "cosine", "warmup": 1600, "inclusive": True}}
    settings["init_from"] = {"skip": ()}
    return settings


def distill(chosen: Any) -> Settings:
    """A student of a frozen teacher: no masks, no drop path; its average is the result (arXiv 2304.07193, sec. 5)."""
    size = chosen.size or "S/14"
    settings: Settings = full(chosen) | {"batch_size": 2048}
    return settings | {
        "model": model(size, gated=size.startswith("g"), drop_path=0.0),
        "teacher_model": model(chosen.teacher, gated=True, drop_path=0.0),
        "teacher": settings["teacher"] | {"frozen": True},
        "optimizer": settings["optimizer"] | {"lr": 1e-3},
        "mask": {"group": 8},
        "init_from": {"skip": ("(backbone|dino_head|ibot_head)/.*",), "required": ("teacher/.*",)},
    }


RECIPES = {
    "smoke": smoke,
    "dino": dino,
    "ibot": ibot,
    "ibot_rand": ibot_rand,
    "notes": notes,
    "short": short,
    "full": full,
    "high_res": high_res,
    "distill": distill,
}


def epoch(batch: int) -> int:
    """Steps per pass over ImageNet-1k; incomplete batches are dropped."""
    return IMAGENET // batch


def v1(
    size: str,
    batch: int,
    length: int,
    warmup: int,
    mask_token: bool = False,
    clip_norm: float = 3.0,
    min_lr: float = 1e-6,
) -> Settings:
    """What DINO and iBOT share; lengths in epochs."""
    lr = 5e-4 * batch / 256
    body = dinov2.config_v1(size, drop_path=0.1, mask_token=mask_token, scan=True, remat="full")
    return {
        "batch_size": batch,
        "total_steps": length * epoch(batch),
        "model": dataclasses.asdict(body),
        "dtype": "bfloat16",
        "ema": {"decay": 0.996, "decay_end": 1.0},
        "data": imagenet("imagenet2012"),
        "optimizer": adamw(lr, warmup * epoch(batch), min_lr / lr, (0.04, 0.4), clip_norm),
        "clip_each": True,
        "freeze_last_layer": epoch(batch),
        "freeze_gain": size[0] != "S",  # --norm_last_layer false in the recipes for S/16
        "evaluate_every": 10 * epoch(batch),
        "mask": {"group": 64},
    }


def v2(
    size: str,
    gated: bool,
    batch: int,
    length: int,
    base_lr: float,
    warmup: int,
    weight_decay_end: float,
    momentum: float,
) -> Settings:
    """What DINOv2's configs share; lengths in official epochs, the learning rate is that of batch 1024."""
    lr = base_lr * math.sqrt(batch / 1024)
    return {
        "batch_size": batch,
        "total_steps": length * EPOCH,
        "dtype": "bfloat16",
        "ema": {"decay": momentum, "decay_end": 1.0},
        "data": imagenet("imagenet2012" if batch == 2048 else "imagenet21k"),
        "optimizer": adamw(lr, warmup * EPOCH, 1e-6 / lr, (0.04, weight_decay_end), 3.0),
        "patch_embed_rate": 0.2,
        "freeze_last_layer": EPOCH,
        "evaluate_every": 10 * EPOCH,
        "mesh": {"data": 1, "fsdp": -1},
    }


def model(size: str, gated: bool, drop_path: float) -> Settings:
    """A backbone for training: positions of 224 px, layer scale from 1e-5, scanned and rematerialised."""
    fields = {"image_size": 224, "drop_path": drop_path, "scan": True, "remat": "full"}
    return dataclasses.asdict(dinov2.config(size, gated=gated, **fields))


def crops_v1(global_scale: tuple[float, float], local_scale: tuple[float, float], local_count: int) -> Settings:
    """Crops of 224 and 96 px with DINO's blur and its true probabilities."""
    return {
        "local_size": 96,
        "local_count": local_count,
        "global_scale": global_scale,
        "local_scale": local_scale,
        "style": "dino",
        "blur": (1.0, 0.1, 0.5),
    }


def adamw(lr: float, warmup: int, end: float, weight_decay: tuple[float, float], clip_norm: float) -> Settings:
    """AdamW with warm-up and cosine to `end` · lr; weight decay follows a cosine, too."""
    return {
        "lr": lr,
        "schedule": {"kind": "cosine", "warmup": warmup, "inclusive": True, "end": end},
        "weight_decay": weight_decay[0],
        "weight_decay_end": weight_decay[1],
        "clip_norm": clip_norm,
    }


def imagenet(name: str) -> Settings:
    """Decoded images for training; shorter side 256, centre 224 for evaluation (dinov2:dinov2/data/transforms.py)."""
    return {
        "name": name,
        "test_split": "validation" if name == "imagenet2012" else "train[:51200]",
        "preprocess": ("decode",),
        "preprocess_test": (
            "decode",
            ("resize_shortest", {"size": 256, "method": "pil_bicubic"}),
            ("center_crop", {"size": 224}),
            ("normalize", {"mean": IMAGENET_MEAN, "std": IMAGENET_STD}),
            ("keep", {"keys": ("image", "label")}),
        ),
        "workers": -1,
    }
