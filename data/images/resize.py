"""Resizing and centre crops with the exact rules of the published pipelines, on the host (NumPy and Pillow).

Pipelines that agree on "bilinear, 224" still differ by whole grey levels and by a pixel of offset, so every rule has
a name that says whose it is. `RESIZE` makes an image of a given size, `SHORTEST_EDGE` says what size that is when the
aspect ratio is kept, `CENTER_CROP` where a crop begins.
"""

from collections.abc import Callable
from functools import partial

import numpy as np
from PIL import Image
from scipy.sparse import csr_array

from ...kernels.resize_matrices import resize_matrix
from .decode import from_pil, to_pil

Size = tuple[int, int]  # rows, columns
_F32 = np.float32


def _pil(image: np.ndarray, size: Size, method: Image.Resampling) -> np.ndarray:
    """Pillow's resize. Images that are not RGB go channel by channel: Pillow would premultiply an alpha channel."""
    if image.dtype == np.uint8 and image.shape[2] in (1, 3):
        return from_pil(to_pil(image).resize((size[1], size[0]), method))
    channels = [Image.fromarray(np.ascontiguousarray(image[..., c])) for c in range(image.shape[2])]
    return np.stack([np.asarray(channel.resize((size[1], size[0]), method)) for channel in channels], axis=-1)


def _multiply(matrix: np.ndarray, image: np.ndarray, axis: int) -> np.ndarray:
    """Contracts one axis of `image` with a banded [out, in] matrix."""
    moved = np.moveaxis(image, axis, 0)
    result = csr_array(matrix) @ moved.reshape(len(moved), -1)
    return np.moveaxis(result.reshape(-1, *moved.shape[1:]), 0, axis)


def _torch(image: np.ndarray, size: Size, method: str) -> np.ndarray:
    """F.interpolate(align_corners=False), columns before rows; uint8 is rounded and clipped after each of the two.

    torch's uint8 kernels do the same with weights rounded to 16 bits, and so differ by at most one level.
    """
    result = image
    for axis, target in ((1, size[1]), (0, size[0])):
        result = _multiply(resize_matrix(result.shape[axis], target, method), result.astype(_F32), axis)
        if image.dtype == np.uint8:
            result = _cast(np.rint(result), image.dtype)
    return result


def _tf_bilinear(image: np.ndarray, size: Size) -> np.ndarray:
    """tf.image.resize("bilinear", antialias=False): half-pixel centres, float32 result.

    The form a + (b - a) t is TensorFlow's and not an affectation: big_vision truncates the result to uint8, where the
    equal (1 - t) a + t b can fall one level short.
    """
    result = image.astype(_F32)
    for axis, target in ((1, size[1]), (0, size[0])):
        length = result.shape[axis]
        position = (np.arange(target, dtype=_F32) + _F32(0.5)) * (_F32(length) / _F32(target)) - _F32(0.5)
        low = np.floor(position)
        fraction = np.expand_dims(position - low, tuple(a for a in range(result.ndim) if a != axis))
        below = result.take(np.maximum(low, 0).astype(int), axis)
        above = result.take(np.minimum(np.ceil(position), length - 1).astype(int), axis)
        result = below + (above - below) * fraction
    return result


def _tf_area(image: np.ndarray, size: Size) -> np.ndarray:
    """tf.image.resize("area"): the mean over the source rectangle of each pixel, float32 result.

    Source: tensorflow/core/kernels/image/resize_area_op.cc, columns summed before rows, divided at the end.
    """
    columns = _multiply(_coverage(image.shape[1], size[1]), image.astype(_F32), 1)
    area = (_F32(image.shape[0]) / _F32(size[0])) * (_F32(image.shape[1]) / _F32(size[1]))
    return _multiply(_coverage(image.shape[0], size[0]), columns, 0) * _F32(1 / area)


def _coverage(length: int, target: int) -> np.ndarray:
    """[target, length]: how much of each source pixel lies in [i s, (i + 1) s), s = length / target."""
    step = _F32(length) / _F32(target)
    edges = np.arange(target + 1, dtype=_F32) * step
    low, high, pixel = edges[:-1, None], edges[1:, None], np.arange(length, dtype=_F32)
    covered = np.clip(np.minimum(high, pixel + 1) - np.maximum(low, pixel), 0, 1)
    return np.where((pixel < low) & (high < pixel + 1), step, covered)  # high - low would round differently


def _cast(image: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Clips to the range of an integer dtype and truncates, as tf.cast does; floats pass."""
    if np.issubdtype(dtype, np.floating):
        return image.astype(dtype)
    return np.clip(image, np.iinfo(dtype).min, np.iinfo(dtype).max).astype(dtype)


# name -> (image [X, Y, C], (rows, columns)) -> image. The dtype stays, but for tf_*, which give float32.
def _cv2_bilinear(image: np.ndarray, size: Size) -> np.ndarray:
    """cv2.resize(INTER_LINEAR) of uint8, bit for bit: weights of 11 bits, rows first shifted by 4, then by 16 and 2."""
    if image.dtype != np.uint8:
        raise ValueError(f"cv2_bilinear is the rule for uint8 images, got {image.dtype}")
    if image.shape[:2] == tuple(size):
        return image
    left, right, x0, x1 = _cv2_taps(image.shape[1], size[1], clamp_weight=True)
    above, below, y0, y1 = _cv2_taps(image.shape[0], size[0], clamp_weight=False)
    wide = image.astype(np.int32)
    rows = left[:, None] * wide[:, x0] + right[:, None] * wide[:, x1]  # X Y2 C
    upper, lower = rows[y0] >> 4, rows[y1] >> 4
    mixed = (above[:, None, None] * upper >> 16) + (below[:, None, None] * lower >> 16) + 2
    return (mixed >> 2).astype(np.uint8)


def _cv2_taps(length: int, target: int, *, clamp_weight: bool) -> tuple[np.ndarray, ...]:
    """(weight, weight, index, index) of the two source pixels; columns outside take one pixel, rows keep weights."""
    scale = length / target
    position = ((np.arange(target) + 0.5) * scale - 0.5).astype(_F32)
    low = np.floor(position)
    fraction = (position - low).astype(_F32)
    if clamp_weight:
        fraction = np.where((low < 0) | (low >= length - 1), _F32(0), fraction)
    weights = (np.rint((1 - fraction) * 2048).astype(np.int32), np.rint(fraction * 2048).astype(np.int32))
    return *weights, *(np.clip(low.astype(int) + offset, 0, length - 1) for offset in (0, 1))


RESIZE: dict[str, Callable[[np.ndarray, Size], np.ndarray]] = {
    # PIL.Image.resize, antialiased: timm, open_clip, torchvision on PIL images, transformers' PIL processors
    "pil_nearest": partial(_pil, method=Image.Resampling.NEAREST),
    "pil_bilinear": partial(_pil, method=Image.Resampling.BILINEAR),
    "pil_bicubic": partial(_pil, method=Image.Resampling.BICUBIC),
    "pil_box": partial(_pil, method=Image.Resampling.BOX),
    "pil_hamming": partial(_pil, method=Image.Resampling.HAMMING),
    "pil_lanczos": partial(_pil, method=Image.Resampling.LANCZOS),
    # F.interpolate(antialias=True): transformers' default (torchvision) processors
    "torch_bilinear": partial(_torch, method="bilinear_antialias"),
    "torch_bicubic": partial(_torch, method="bicubic_antialias"),
    # F.interpolate(antialias=False)
    "torch_bilinear_aliased": partial(_torch, method="bilinear"),
    "torch_bicubic_aliased": partial(_torch, method="bicubic"),
    # tf.image.resize: google-research/vision_transformer
    "tf_bilinear": _tf_bilinear,
    "tf_area": _tf_area,
    # the same truncated to the input's dtype: big_vision/pp/ops_image.py get_resize, _resize_factor
    "bv_bilinear": lambda image, size: _cast(_tf_bilinear(image, size), image.dtype),
    "cv2_bilinear": _cv2_bilinear,  # OpenCV, on which Wav2Lip and deepface stand
    "bv_area": lambda image, size: _cast(_tf_area(image, size), image.dtype),
}


def _torchvision_shortest_edge(shape: Size, size: int) -> Size:
    short, long = min(shape), max(shape)
    scaled = int(size * long / short)
    return (size, scaled) if shape[0] <= shape[1] else (scaled, size)


def _big_vision_shortest_edge(shape: Size, size: int) -> Size:
    factor = _F32(size) / _F32(min(shape))
    rows, columns = (int(np.rint(_F32(side) * factor)) for side in shape)
    return rows, columns


# name -> ((rows, columns), length of the shorter side) -> (rows, columns)
SHORTEST_EDGE: dict[str, Callable[[Size, int], Size]] = {
    "torchvision": _torchvision_shortest_edge,  # also transformers, timm, open_clip: the longer side is cut to int
    "big_vision": _big_vision_shortest_edge,  # resize_small: both sides rounded, halves to even, in float32
}

# name -> pixels beside the crop -> how many of them come before it
CENTER_CROP: dict[str, Callable[[int], int]] = {
    "torchvision": lambda margin: round(margin / 2),  # halves to even, so 3 -> 2 but 5 -> 2
    "floor": lambda margin: margin // 2,  # transformers, big_vision central_crop
}


def center_crop(image: np.ndarray, size: Size, rule: str) -> np.ndarray:
    """The middle (rows, columns) of `image` by a rule of `CENTER_CROP`; ValueError where the image is smaller."""
    if image.shape[0] < size[0] or image.shape[1] < size[1]:
        raise ValueError(f"centre crop: image {image.shape[:2]} is smaller than the crop {tuple(size)}")
    top, left = (CENTER_CROP[rule](image.shape[axis] - size[axis]) for axis in (0, 1))
    return image[top : top + size[0], left : left + size[1]]
