"""Every system with published sizes, one line each."""

from collections.abc import Mapping

from . import clip, dinov2, mtcnn, s3fd, vit, wav2lip
from .published import Published
from .qwen_vl import model as qwen_vl

SYSTEMS: dict[str, Mapping[str, Published]] = {
    "vit": vit.PUBLISHED,
    "clip": clip.PUBLISHED,
    "dinov2": dinov2.PUBLISHED,
    "qwen2_5_vl": qwen_vl.PUBLISHED,
    "wav2lip": wav2lip.PUBLISHED,
    "s3fd": s3fd.PUBLISHED,
    "mtcnn": mtcnn.PUBLISHED,
}
