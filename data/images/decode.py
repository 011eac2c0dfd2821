"""Encoded bytes, uint8 arrays and Pillow images: the conversions the other files of this room share."""

import io

import numpy as np
from PIL import Image, ImageOps

MODES = {1: "L", 3: "RGB", 4: "RGBA"}


class CorruptExample(ValueError):
    """An example that cannot be read: its name, and why. The pipeline skips it; every other error stops the run."""

    def __init__(self, name: str, reason: str):
        super().__init__(name, reason)
        self.name, self.reason = name, reason

    def __str__(self) -> str:
        return f"{self.name}: {self.reason}"


def decode_image(data: bytes, channels: int = 3, name: str = "image", *, upright: bool = False) -> np.ndarray:
    """Decodes JPEG, PNG or any other format of Pillow into uint8 [X, Y, channels]; `upright` applies EXIF's rotation.

    Raises CorruptExample, naming `name`, for bytes that are damaged, truncated or no image.
    """
    try:
        with Image.open(io.BytesIO(data)) as image:
            image.load()
            image = ImageOps.exif_transpose(image) if upright else image
    except Exception as error:  # Pillow's decoders raise anything from OSError to struct.error on damaged bytes
        raise CorruptExample(name, f"not a readable image ({error})") from error
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    elif "transparency" in image.info:
        image = image.convert("RGBA")  # Pillow warns when a palette with transparency goes to RGB directly
    return from_pil(image.convert(MODES[channels]))


def encode_png(image: np.ndarray) -> bytes:
    """Encodes uint8 [X, Y, C] with 1, 3 or 4 channels as PNG."""
    buffer = io.BytesIO()
    to_pil(image).save(buffer, "png")
    return buffer.getvalue()


def to_pil(image: np.ndarray) -> Image.Image:
    """uint8 [X, Y, C] with 1, 3 or 4 channels -> Pillow image; ValueError for anything else."""
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] not in MODES:
        raise ValueError(f"expected a uint8 image [X, Y, 1 | 3 | 4], got {image.dtype} {image.shape}")
    return Image.fromarray(image[..., 0] if image.shape[2] == 1 else image)


def from_pil(image: Image.Image) -> np.ndarray:
    """Pillow image of mode L, RGB or RGBA -> uint8 [X, Y, C]."""
    array = np.asarray(image)
    return array[..., None] if array.ndim == 2 else array
