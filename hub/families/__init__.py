"""Every family of models that `hub` knows, one line each; the first that recognises a checkpoint loads it."""

from ..family import Family
from . import dinov2, s3fd, t5, wav2lip
from .clip.family import FAMILY as CLIP
from .qwen_vl.family import FAMILY as QWEN_VL
from .vit.family import FAMILY as VIT

FAMILIES: tuple[Family, ...] = (CLIP, dinov2.FAMILY, QWEN_VL, s3fd.FAMILY, t5.FAMILY, VIT, wav2lip.FAMILY)
