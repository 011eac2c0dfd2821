"""From an image and a detected face to what a face network takes: deepface's geometry and pixel rules.

As in deepface 0.0.103 (modules/detection.py, preprocessing.py). Images are BGR uint8 [X, Y, 3]; positions are
(x, y): column, row. Left and right eye are the person's. OpenCV makes the pixels, as it does there.
"""

import dataclasses
import math
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8

Point = tuple[float, float]
NORMALIZATIONS = ("base", "raw", "Facenet", "Facenet2018", "VGGFace", "VGGFace2", "ArcFace")
_MEANS = {"VGGFace": (93.5940, 104.7624, 129.1863), "VGGFace2": (91.4953, 103.8827, 131.0912)}


@dataclasses.dataclass(frozen=True)
class FaceArea:
    """Where a face is: a box in pixels, eyes and other points where the detector knows them, its confidence."""

    x: int
    y: int
    w: int
    h: int
    left_eye: Point | None = None
    right_eye: Point | None = None
    nose: Point | None = None
    mouth_left: Point | None = None
    mouth_right: Point | None = None
    confidence: float = 0.0

    def moved(self, columns: int, rows: int) -> "FaceArea":
        """The same face in an image whose corner is elsewhere."""
        points = {
            name: None if (point := getattr(self, name)) is None else (point[0] + columns, point[1] + rows)
            for name in POINTS
        }
        return dataclasses.replace(self, x=self.x + columns, y=self.y + rows, **points)


POINTS = ("left_eye", "right_eye", "nose", "mouth_left", "mouth_right")


def opencv() -> Any:
    """The module cv2; ValueError saying which extra brings it."""
    try:
        import cv2
    except ImportError as error:
        raise ValueError("faces are aligned by OpenCV: pip install 'omnax[faces]'") from error
    return cv2


def bordered(image: UInt8[np.ndarray, "X Y 3"]) -> tuple[UInt8[np.ndarray, "X2 Y2 3"], tuple[int, int]]:
    """The image in a black border of half its size, so that faces at an edge can turn, and the border's (x, y)."""
    rows, columns = image.shape[0] // 2, image.shape[1] // 2
    return np.pad(image, ((rows, rows), (columns, columns), (0, 0))), (columns, rows)


def expanded(area: FaceArea, percent: int, shape: tuple[int, ...]) -> FaceArea:
    """The box grown about its centre by per cent of its size (0: as it is), and cut at the image's edges."""
    x, y, w, h = area.x, area.y, area.w, area.h
    if percent > 0:
        wide, high = w + int(w * percent / 100), h + int(h * percent / 100)
        x, y = max(0, x - int((wide - w) / 2)), max(0, y - int((high - h) / 2))
        w, h = min(shape[1] - x, wide), min(shape[0] - y, high)
    right, bottom = min(shape[1], x + w), min(shape[0], y + h)
    x, y = max(0, x), max(0, y)
    return dataclasses.replace(area, x=x, y=y, w=max(0, right - x), h=max(0, bottom - y))


def cut_face(image: UInt8[np.ndarray, "X Y 3"], area: FaceArea, align: bool) -> UInt8[np.ndarray, "H W 3"]:
    """The pixels of a face; aligned, its surroundings are turned until the eyes are level, and the box follows."""
    if not align:
        return image[area.y : area.y + area.h, area.x : area.x + area.w]
    margins = int(0.5 * area.w), int(0.5 * area.h)
    around = _around(image, area, *margins)
    turned, angle = level(around, area.left_eye, area.right_eye)
    left, top, right, bottom = project((*margins, margins[0] + area.w, margins[1] + area.h), angle, around.shape)
    return turned[top:bottom, left:right]


def _around(image: np.ndarray, area: FaceArea, columns: int, rows: int) -> np.ndarray:
    """The box with margins on every side, black beyond the image's edges."""
    top, left = area.y - rows, area.x - columns
    bottom, right = area.y + area.h + rows, area.x + area.w + columns
    inside = image[max(0, top) : bottom, max(0, left) : right]
    above, beside = max(0, -top), max(0, -left)
    below, behind = bottom - top - above - inside.shape[0], right - left - beside - inside.shape[1]
    return np.pad(inside, [(above, below), (beside, behind), (0, 0)])


def level(image: np.ndarray, left_eye: Point | None, right_eye: Point | None) -> tuple[np.ndarray, float]:
    """The image turned about its centre so that the eyes are level, and the angle in degrees; 0 without both eyes."""
    if left_eye is None or right_eye is None or 0 in image.shape[:2]:
        return image, 0.0
    angle = math.degrees(math.atan2(left_eye[1] - right_eye[1], left_eye[0] - right_eye[0]))
    cv2, (rows, columns) = opencv(), image.shape[:2]
    matrix = cv2.getRotationMatrix2D((columns // 2, rows // 2), angle, 1.0)
    return cv2.warpAffine(image, matrix, (columns, rows), flags=cv2.INTER_CUBIC, borderMode=cv2.BORDER_CONSTANT), angle


def project(box: tuple[int, int, int, int], angle: float, shape: tuple[int, ...]) -> tuple[int, int, int, int]:
    """A box (left, top, right, bottom) after its image was turned by `angle` degrees, of the same size, upright."""
    sign, radians = (1 if angle >= 0 else -1), math.radians(abs(angle) % 360)
    if radians == 0:
        return box
    left, top, right, bottom = box
    rows, columns = shape[:2]
    x, y = (left + right) / 2 - columns / 2, (top + bottom) / 2 - rows / 2
    centre_x = x * math.cos(radians) + y * sign * math.sin(radians) + columns / 2
    centre_y = -x * sign * math.sin(radians) + y * math.cos(radians) + rows / 2
    half_x, half_y = (right - left) / 2, (bottom - top) / 2
    return (
        max(int(centre_x - half_x), 0),
        max(int(centre_y - half_y), 0),
        min(int(centre_x + half_x), columns),
        min(int(centre_y + half_y), rows),
    )


def resized(face: np.ndarray, size: tuple[int, int]) -> Float[np.ndarray, "X Y 3"]:
    """The face in (rows, columns), its aspect kept between black bars, float32 in [0, 1]."""
    factor = min(size[0] / face.shape[0], size[1] / face.shape[1])
    small = opencv().resize(face, (int(face.shape[1] * factor), int(face.shape[0] * factor)))
    rest = size[0] - small.shape[0], size[1] - small.shape[1]
    small = np.pad(small, [(n // 2, n - n // 2) for n in rest] + [(0, 0)] * (small.ndim - 2)).astype(np.float32)
    return small / np.float32(255) if small.max(initial=0) > 1 else small


def normalized(image: Float[np.ndarray, "X Y 3"], normalization: str) -> Float[np.ndarray, "X Y 3"]:
    """What a training's preprocessing made of BGR in [0, 1]; "base" leaves it, and deepface's thresholds assume it."""
    if normalization not in NORMALIZATIONS:
        raise ValueError(f"unimplemented normalization type {normalization!r}, expected one of {NORMALIZATIONS}")
    if normalization == "base":
        return image
    image = image * np.float32(255)
    match normalization:
        case "Facenet":
            return (image - image.mean()) / max(image.std(), 1 / image.size**0.5)
        case "Facenet2018":
            return image / np.float32(127.5) - 1
        case "VGGFace" | "VGGFace2":
            return image - np.array(_MEANS[normalization], np.float32)
        case "ArcFace":
            return (image - np.float32(127.5)) / 128
    return image
