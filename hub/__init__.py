"""Published weights, both ways: `load` a checkpoint as a `Bundle`, `save` it back in its published format."""

from .api import load, save
from .bundle import Bundle

__all__ = ["Bundle", "load", "save"]
