"""Images from bytes to what a model sees; the two ends are public names: `decode_image` and `encode_png`."""

from .decode import CorruptExample, decode_image, encode_png

__all__ = ["CorruptExample", "decode_image", "encode_png"]
