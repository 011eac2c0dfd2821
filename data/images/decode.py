"""Encoded bytes, uint8 arrays and Pillow images: the conversions the other files of this room share."""

import io
import zlib
from typing import Literal, get_args

import numpy as np
from PIL import ExifTags, Image, ImageOps

MODES = {1: "L", 3: "RGB", 4: "RGBA"}
Alpha = Literal["white", "drop"]
ALPHAS = get_args(Alpha)


class CorruptExample(ValueError):
    """An example that cannot be read: its name, and why. The pipeline skips it; every other error stops the run."""

    def __init__(self, name: str, reason: str):
        super().__init__(name, reason)
        self.name, self.reason = name, reason

    def __str__(self) -> str:
        return f"{self.name}: {self.reason}"


def decode_image(
    data: bytes, channels: int = 3, name: str = "image", *, upright: bool = True, alpha: Alpha = "white"
) -> np.ndarray:
    """Decodes JPEG, PNG or any other format of Pillow into uint8 [X, Y, channels].

    Photographs stand upright as their EXIF turn says, as every viewer shows them; `upright=False` gives the pixels as
    they are stored, which is what Pillow and the published training loaders hand on. See `to_channels` for `alpha`.
    Raises CorruptExample, naming `name`, for bytes that are damaged, truncated, no image or of no mode with colours.
    """
    try:
        _check_png(data)
        with Image.open(io.BytesIO(data)) as image:
            image.load()
            turned = ImageOps.exif_transpose(image) if upright and _orientation(image) != 1 else image
            return from_pil(to_channels(turned, channels, alpha))
    except Exception as error:  # Pillow's decoders raise anything from OSError to struct.error on damaged bytes
        raise CorruptExample(name, f"not a readable image ({error})") from error


def _check_png(data: bytes) -> None:
    """ValueError for a PNG whose pixels have another CRC than they should: Pillow looks at other chunks only."""
    view, position = memoryview(data), 8
    while data.startswith(b"\x89PNG") and position + 8 <= len(data):
        end = position + 8 + int.from_bytes(view[position : position + 4], "big")
        pixels = view[position + 4 : position + 8] == b"IDAT"
        if pixels and zlib.crc32(view[position + 4 : end]) != int.from_bytes(view[end : end + 4], "big"):
            raise ValueError("its pixels have another CRC than they should")
        position = end + 4


def to_channels(image: Image.Image, channels: int = 3, alpha: Alpha = "white") -> Image.Image:
    """An image of any mode as L, RGB or RGBA, by Pillow's own conversions: greys of 16 bits are cut off at 255.

    What is transparent shows white behind it, as transformers' processors have it (image_transforms.convert_to_rgb);
    alpha="drop" shows the colours beneath, as `image.convert("RGB")` of timm's and open_clip's loaders does.
    """
    if alpha not in ALPHAS:
        raise ValueError(f"alpha is {alpha!r}, expected one of {ALPHAS}")
    transparent = "A" in image.getbands() or "transparency" in image.info
    if transparent:
        image = image.convert("RGBA")  # Pillow warns when a palette with transparency goes to RGB directly
    if transparent and alpha == "white" and channels < 4:
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    if image.mode == "LAB":  # of which Pillow knows no direct way to greys
        image = image.convert("RGB")
    return image.convert(MODES[channels])


def stored_size(image: Image.Image) -> tuple[int, int]:
    """(rows, columns) of an opened image as `decode_image` gives it, without decoding its pixels."""
    turned = _orientation(image) in range(5, 9)  # by a quarter, mirrored or not
    return (image.width, image.height) if turned else (image.height, image.width)


def _orientation(image: Image.Image) -> int:
    """EXIF's number, 1 for upright; a photograph whose EXIF data are damaged stays as it is stored."""
    try:
        return image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # Pillow's readers raise anything from SyntaxError to struct.error on damaged bytes
        return 1


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
