"""Every family of models that `hub` knows, one line each; the first that recognises a checkpoint loads it."""

import importlib

from ..family import Family

# Modules of this folder with a `FAMILY`.
MODULES = (
    "bert",
    "blip2.family",
    "clip.family",
    "dinov2",
    "faces.family",
    "opt",
    "qwen_vl.family",
    "s3fd",
    "stable_diffusion.family",
    "stable_diffusion.ip_adapter",
    "t5",
    "vit.family",
    "wav2lip",
)
FAMILIES: tuple[Family, ...] = tuple(importlib.import_module(f".{name}", __package__).FAMILY for name in MODULES)
