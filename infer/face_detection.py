"""Faces in frames: MTCNN's cascade, S3FD, and the tracks of boxes that Wav2Lip cuts by.

A detector maps RGB frames [T, X, Y, 3] uint8 to one box per frame, (top, bottom, left, right) in whole pixels, or None.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from .. import hub
from ..hub.families.mtcnn import load_mtcnn
from ..models import s3fd
from ..models.mtcnn import ONET, RNET, PNet

Box = tuple[int, int, int, int]
Detector = Callable[[np.ndarray], Sequence[Box | None]]


def make_detector(weights: str = "", *, min_face: int = 20) -> Detector:
    """MTCNN, or with the path of `s3fd.pth` the published detector of Wav2Lip; `min_face` in pixels is MTCNN's."""
    if weights:
        bundle = hub.load(weights)
        if not isinstance(bundle.model, s3fd.S3FD):
            raise ValueError(f"{weights} holds a {type(bundle.model).__name__}, expected the face detector S3FD")
        return S3FDDetector(bundle).first
    return Mtcnn(load_mtcnn(), min_face=min_face).largest


class Mtcnn:
    """The cascade as in facenet-pytorch (MIT) models/utils/detect_face.py, numerically equal to it.

    The pyramid compiles once per frame size; candidates are padded to powers of two.
    """

    def __init__(self, params: dict[str, Any], *, min_face: int = 20, thresholds: Sequence[float] = (0.6, 0.7, 0.7)):
        self._params, self._min_face, self._thresholds = params, min_face, thresholds

    def largest(self, frames: np.ndarray) -> list[Box | None]:
        """The box of the largest face in each frame, cut at the frame's edges."""
        found = []
        for frame in frames:
            boxes, _, _ = self.detect(frame)
            found.append(_whole_pixels(boxes[0], frame.shape) if len(boxes) else None)
        return found

    def detect(self, frame: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Faces, the largest first: boxes [n, 4] (left, top, right, bottom), scores [n], points [n, 5, 2] (x, y)."""
        boxes = squares(self._propose(frame))
        scores, offsets, _ = self._look("rnet", RNET, frame, boxes, 24)
        kept = np.flatnonzero(scores > self._thresholds[1])
        kept = kept[suppress(boxes[kept], scores[kept], 0.7)]
        boxes = squares(moved(boxes[kept], offsets[kept], extra=1))
        scores, offsets, points = self._look("onet", ONET, frame, boxes, 48)
        kept = np.flatnonzero(scores > self._thresholds[2])
        boxes, scores, offsets, points = boxes[kept], scores[kept], offsets[kept], points[kept]
        size = boxes[:, 2:] - boxes[:, :2] + 1
        points = points.reshape(-1, 2, 5).swapaxes(1, 2) * size[:, None] + boxes[:, None, :2] - 1
        boxes = moved(boxes, offsets, extra=1)
        kept = suppress(boxes, scores, 0.7, of_smaller=True)
        boxes, scores, points = boxes[kept], scores[kept], points[kept]
        order = np.argsort(-np.prod(boxes[:, 2:] - boxes[:, :2], axis=1), kind="stable")
        return boxes[order], scores[order], points[order]

    def _propose(self, frame: np.ndarray) -> np.ndarray:
        """P-Net's boxes over the pyramid, moved by its offsets."""
        found, scales = [], _scales(frame.shape[:2], self._min_face)
        matrices = [tuple(_area_matrix(n, int(n * scale + 1)) for n in frame.shape[:2]) for scale in scales]
        levels = jax.device_get(_propose(self._params["pnet"], frame, matrices))
        for scale, (probability, offsets) in zip(scales, levels, strict=True):
            rows, columns = np.nonzero(probability >= self._thresholds[0])
            cells = np.stack([columns, rows], axis=1)
            corners = [np.floor((2 * cells + 1) / scale), np.floor((2 * cells + 12) / scale)]
            boxes, scores = np.concatenate(corners, axis=1), probability[rows, columns]
            kept = suppress(boxes, scores, 0.5)
            found.append(np.concatenate([boxes, scores[:, None], offsets[rows, columns]], axis=1)[kept])
        proposals = np.concatenate(found) if found else np.empty((0, 9))
        proposals = proposals[suppress(proposals[:, :4], proposals[:, 4], 0.7)]
        return moved(proposals[:, :4], proposals[:, 5:], extra=0)

    def _look(
        self, name: str, network: Any, frame: np.ndarray, boxes: np.ndarray, side: int
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(scores [n], offsets [n, 4], points [n, 10]) of R-Net or O-Net for the crops under the boxes."""
        crops = [_crop(frame, box, side) for box in boxes]
        if not crops:
            return np.empty(0), np.empty((0, 4)), np.empty((0, 10))
        padded = np.zeros((1 << (len(crops) - 1).bit_length(), side, side, 3), np.float32)
        padded[: len(crops)] = crops
        scores, offsets, points = jax.device_get(_apply(network, self._params[name], padded))
        points = np.zeros((len(padded), 10)) if points is None else points
        return scores[: len(crops)], offsets[: len(crops)], points[: len(crops)]


class S3FDDetector:
    """The published detector, on batches of frames of one size (Rudrabha/Wav2Lip face_detection/detection/sfd)."""

    def __init__(self, bundle: hub.Bundle):
        model, self._params = bundle.model, bundle.params
        self._apply = jax.jit(lambda params, image: model.apply({"params": params}, image))

    def first(self, frames: np.ndarray) -> list[Box | None]:
        """The box of the surest face in each frame, cut at the frame's edges."""
        found = self.detect(frames)
        return [_whole_pixels(boxes[0], frames[0].shape) if len(boxes) else None for boxes, _ in found]

    def detect(self, frames: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
        """Per RGB frame its faces, the surest first: boxes [n, 4] (left, top, right, bottom) and scores above 0.5."""
        image = frames.astype(np.float32) - np.array(s3fd.MEAN, np.float32)
        levels = jax.device_get(self._apply(self._params, image))
        return [self._choose([(p[i], o[i]) for p, o in levels]) for i in range(len(frames))]

    def _choose(self, levels: Sequence[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
        boxes, scores = [], []
        for stride, (probability, offsets) in zip(s3fd.STRIDES, levels, strict=True):
            rows, columns = np.nonzero(probability > 0.05)
            boxes.append(s3fd.decode(offsets[rows, columns], rows, columns, stride))
            scores.append(probability[rows, columns])
        every, sure = np.concatenate(boxes), np.concatenate(scores)
        kept = suppress(every, sure, 0.3, extra=1)
        kept = kept[sure[kept] > 0.5]
        return every[kept], sure[kept]


def _scales(size: tuple[int, int], min_face: int) -> list[float]:
    first, shortest = 12 / min_face, min(size)
    count = max(0, math.floor(math.log(12 / (shortest * first), 0.709)) + 1) if shortest * first >= 12 else 0
    return [first * 0.709**i for i in range(count)]


@jax.jit
def _propose(params: Any, frame: Array, matrices: Any) -> list[tuple[Float[Array, "X Y"], Float[Array, "X Y 4"]]]:
    """P-Net on the frame as each pair of matrices resizes it: one program for the whole pyramid."""
    pixels, found = frame.astype(jnp.float32), []
    for rows, columns in matrices:
        resized = jnp.einsum("xi,ijc,yj->xyc", rows, pixels, columns, precision="highest")
        level: Any = PNet().apply({"params": params}, ((resized - 127.5) / 128)[None])
        found.append((level[0][0], level[1][0]))
    return found


@functools.partial(jax.jit, static_argnums=0)
def _apply(network: Any, params: Any, crops: Array) -> Any:
    return network.apply({"params": params}, crops)


def _area_matrix(length: int, target: int) -> np.ndarray:
    """[target, length]: output i is the mean of pixels floor(i n / m) … ceil((i + 1) n / m) (adaptive averages)."""
    cell = np.arange(target)
    low, high = cell * length // target, -(-(cell + 1) * length // target)
    pixel = np.arange(length)
    inside = (pixel >= low[:, None]) & (pixel < high[:, None])
    return (inside / (high - low)[:, None]).astype(np.float32)


def _crop(frame: np.ndarray, box: np.ndarray, side: int) -> np.ndarray:
    """The pixels of a box, counted from 1 and cut at the edges, averaged to [side, side, 3] and normalised."""
    left, top, right, bottom = np.trunc(box).astype(int)
    crop = frame[max(top, 1) - 1 : min(bottom, frame.shape[0]), max(left, 1) - 1 : min(right, frame.shape[1])]
    if not crop.size:
        return np.zeros((side, side, 3), np.float32)
    rows, columns = (_area_matrix(n, side) for n in crop.shape[:2])
    resized = np.einsum("xi,ijc,yj->xyc", rows, crop.astype(np.float32), columns, optimize=True)
    return (resized - 127.5) / 128


def moved(boxes: np.ndarray, offsets: np.ndarray, *, extra: int) -> np.ndarray:
    """Boxes moved by offsets in units of their size, of which the pixel at the end is part where `extra` is 1."""
    size = boxes[:, 2:] - boxes[:, :2] + extra
    return boxes + offsets * np.concatenate([size, size], axis=1)


def squares(boxes: np.ndarray) -> np.ndarray:
    """The smallest squares around boxes, with the same centres."""
    size = boxes[:, 2:] - boxes[:, :2]
    side = size.max(axis=1, keepdims=True, initial=0)
    corner = boxes[:, :2] + size / 2 - side / 2
    return np.concatenate([corner, corner + side], axis=1)


def suppress(
    boxes: np.ndarray, scores: np.ndarray, threshold: float, *, of_smaller: bool = False, extra: int | None = None
) -> np.ndarray:
    """Indices of the boxes that stay, best first: none overlaps a better one by more than `threshold`.

    Overlap is intersection over union, or over the smaller area. `extra` 1 counts the pixel at a box's end.
    """
    extra = int(of_smaller) if extra is None else extra
    areas = np.prod(boxes[:, 2:] - boxes[:, :2] + extra, axis=1)
    order, kept = np.argsort(-scores, kind="stable"), []
    while len(order):
        best, order = order[0], order[1:]
        kept.append(best)
        low, high = np.maximum(boxes[best, :2], boxes[order, :2]), np.minimum(boxes[best, 2:], boxes[order, 2:])
        shared = np.prod(np.maximum(0, high - low + extra), axis=1)
        whole = np.minimum(areas[best], areas[order]) if of_smaller else areas[best] + areas[order] - shared
        order = order[shared <= threshold * whole]
    return np.array(kept, np.int64)


def _whole_pixels(box: np.ndarray, shape: Sequence[int]) -> Box | None:
    """Cut at the frame's edges; None where nothing is left."""
    left, top, right, bottom = (int(v) for v in box)
    cut = max(0, top), min(shape[0], bottom), max(0, left), min(shape[1], right)
    return cut if cut[0] < cut[1] and cut[2] < cut[3] else None


def smooth(boxes: Sequence[Box], window: int = 5) -> list[Box]:
    """Means over the boxes from each frame on, in order and in place, cut to whole pixels; at the end the last ones.

    As published (Rudrabha/Wav2Lip inference.py get_smoothened_boxes): near the end, boxes smoothed before are averaged
    again.
    """
    track = np.array(boxes)
    for i in range(len(track)):
        part = track[len(track) - window :] if i + window > len(track) else track[i : i + window]
        track[i] = part.mean(axis=0)
    return [tuple(box) for box in track.tolist()]


def pad(box: Box, pads: Sequence[int], size: tuple[int, int]) -> Box:
    """The box with pads (top, bottom, left, right) added, inside a frame of (rows, columns); ValueError if empty."""
    (top, bottom, left, right), (rows, columns) = box, size
    top, bottom, left, right = top - pads[0], bottom + pads[1], left - pads[2], right + pads[3]
    padded = max(0, top), min(rows, bottom), max(0, left), min(columns, right)
    if padded[0] >= padded[1] or padded[2] >= padded[3]:
        raise ValueError(f"pads {tuple(pads)} (top, bottom, left, right) leave nothing of a face's box {box}")
    return padded


def fill_gaps(boxes: Sequence[Box | None]) -> list[Box]:
    """Boxes for all frames: gaps are bridged in straight lines, ends take the nearest; ValueError if all are None."""
    known = [i for i, box in enumerate(boxes) if box is not None]
    if not known:
        raise ValueError("no face in any frame")
    values = np.array([boxes[i] for i in known])
    sides = [np.interp(np.arange(len(boxes)), known, values[:, side]) for side in range(4)]
    return [tuple(box) for box in np.rint(np.stack(sides, axis=1)).astype(int).tolist()]
