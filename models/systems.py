"""Every system with published sizes, one line each."""

import importlib
from collections.abc import Mapping

from .published import Published

# Name on the command line -> module of this folder with a `PUBLISHED`.
MODULES = {
    "vit": "vit",
    "clip": "clip",
    "dinov2": "dinov2",
    "qwen2_5_vl": "qwen_vl.model",
    "qwen3_vl": "qwen_vl.qwen3",
    "wav2lip": "wav2lip",
    "s3fd": "s3fd",
    "mtcnn": "mtcnn",
    "t5": "t5",
    "bert": "bert",
    "opt": "opt",
    "stable_diffusion": "stable_diffusion.sizes",
    "deepface": "faces",
    "blip2": "blip2.model",
}
SYSTEMS: dict[str, Mapping[str, Published]] = {
    name: importlib.import_module(f".{module}", __package__).PUBLISHED for name, module in MODULES.items()
}
