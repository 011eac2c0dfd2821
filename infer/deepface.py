"""The functions of the deepface package (0.0.103), in JAX: same names, arguments, result dictionaries and exceptions.

    from omnax.infer import deepface
    deepface.verify("a.jpg", "b.jpg", model_name="Dlib")["verified"]

Weights are looked for where deepface keeps them, `$DEEPFACE_HOME/.deepface/weights`, as `.pth` or `.h5`; dlib's network
also in the package face_recognition_models. The default detector is "mtcnn", which needs no download; "skip" takes the
whole image; precomputed boxes are given as `areas`. Faces of all images are embedded in one batch.
"""

import base64
import binascii
import functools
import importlib.util
import io
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path, PurePath
from typing import IO, Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from ..hub import Bundle, load
from ..hub.families.mtcnn import load_mtcnn
from ..models.faces import FILES, SIZES
from ..storage.paths import as_path, read_whole
from .face_alignment import POINTS, FaceArea, bordered, cut_face, expanded, normalized, opencv, resized
from .face_detection import Mtcnn
from .face_distances import Metric, find_confidence, find_distance, find_threshold

Image = str | Path | np.ndarray | IO[bytes]
RECOGNIZERS = ("VGG-Face", "Facenet", "Facenet512", "OpenFace", "DeepFace", "DeepID", "ArcFace", "GhostFaceNet", "Dlib")
ATTRIBUTES = {"emotion": "Emotion", "age": "Age", "gender": "Gender", "race": "Race"}
LABELS = {
    "emotion": ("angry", "disgust", "fear", "happy", "sad", "surprise", "neutral"),
    "gender": ("Woman", "Man"),
    "race": ("asian", "indian", "black", "white", "middle eastern", "latino hispanic"),
}
SPOOFING = (("MiniFASNetV2", 2.7), ("MiniFASNetV1SE", 4.0))  # network, size of its crop in faces
_BATCHES = (1, 4, 16, 32)  # sizes that a network is compiled for
_SUFFIXES = (".pth", ".h5", "")


class ImgNotFound(ValueError):
    """An image that is not there."""


class FaceNotDetected(ValueError):
    """An image without a face."""


class SpoofDetected(ValueError):
    """A picture of a face."""


class DimensionMismatchError(ValueError):
    """An embedding of another model."""


class DataTypeError(ValueError):
    """Something that is no image."""


class UnimplementedError(ValueError):
    """A choice that does not exist."""


def weights_folder() -> Path:
    """Where deepface keeps its weights."""
    return as_path(os.environ.get("DEEPFACE_HOME", Path.home())) / ".deepface" / "weights"


@functools.cache
def build_model(model_name: str, task: str = "facial_recognition", weights: str = "") -> Bundle:
    """The network of a name of deepface, out of its weights folder or of `weights`; loaded once.

    Tasks: "facial_recognition", "facial_attribute" and "spoofing". Raises ValueError where there are no weights, or
    they are those of another network.
    """
    tasks = {
        "facial_recognition": RECOGNIZERS,
        "facial_attribute": tuple(ATTRIBUTES.values()),
        "spoofing": tuple(name for name, _ in SPOOFING),
    }
    if task not in tasks:
        raise UnimplementedError(f"unimplemented task {task!r}, expected one of {', '.join(tasks)}")
    if model_name not in tasks[task]:
        raise UnimplementedError(f"invalid model_name {model_name!r} of {task}, expected one of {tasks[task]}")
    bundle = load(weights or _weights(model_name))
    found, expected = bundle.config, SIZES[model_name]
    if (found.network, found.width) != (expected.network, expected.width):
        raise ValueError(f"{weights or model_name} holds a {found.network} of width {found.width}, expected {expected}")
    return bundle


def _weights(model_name: str) -> Path:
    folder, name = weights_folder(), FILES[model_name]
    for path in (folder / f"{name}{suffix}" for suffix in _SUFFIXES):
        if path.is_file():
            return path
    package = importlib.util.find_spec("face_recognition_models") if model_name == "Dlib" else None
    if package is not None and package.submodule_search_locations:
        return Path(package.submodule_search_locations[0]) / "models" / name
    stem = name if name.endswith((".pth", ".dat")) else f"{name}.pth (or .h5)"
    raise ValueError(f"no weights of {model_name}: expected {stem} in {folder} (github.com/serengil/deepface_models)")


def load_image(image: Any) -> np.ndarray:
    """BGR [X, Y, 3] of a path, a base64 `data:image/…`, a binary file object, or an array, which is taken as it is.

    Pixels of files are read as OpenCV's IMREAD_COLOR does: grey ones get three equal channels, 16 bits become 8.
    """
    if isinstance(image, np.ndarray):
        if image.ndim != 3 or image.shape[2] != 3 or 0 in image.shape:
            raise DataTypeError(f"got an array of shape {image.shape}, expected an image [rows, columns, 3], BGR")
        return image
    if isinstance(image, PurePath) or (isinstance(image, str) and not image.startswith("data:image/")):
        path = as_path(image)
        if not path.is_file():
            raise ImgNotFound(f"Confirm that {image} exists")
        name, data = str(image), read_whole(path)
    elif isinstance(image, str):
        name, (_, _, text) = "a base64 image", image.partition(",")
        try:
            data = base64.b64decode(text, validate=True)
        except binascii.Error as error:
            raise DataTypeError(f"{image[:60]!r}… is no base64 image: {error}") from error
    elif isinstance(image, io.IOBase) and not isinstance(image, io.TextIOBase):
        name, data = "a file object", image.read()
    else:
        raise DataTypeError(f"got a {type(image).__name__}, expected a path, an array, or a file opened in binary mode")
    cv2 = opencv()
    pixels = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR) if data else None
    if pixels is None:
        raise DataTypeError(f"Exception while loading {name}: no image that OpenCV reads")
    return pixels


@functools.cache
def _mtcnn() -> Mtcnn:
    return Mtcnn(load_mtcnn())


def detect(image: np.ndarray, detector_backend: str) -> list[FaceArea]:
    """The faces that a detector finds in a BGR image, the largest first."""
    if detector_backend != "mtcnn":
        raise UnimplementedError(f"detector_backend {detector_backend!r} is not built, expected 'mtcnn' or 'skip'")
    boxes, scores, points = _mtcnn().detect(np.ascontiguousarray(image[..., ::-1]))
    found = []
    for (left, top, right, bottom), score, five in zip(boxes, scores, points, strict=True):
        # MTCNN's points: left and right of the observer.
        right_eye, left_eye, nose, mouth_right, mouth_left = ((int(x), int(y)) for x, y in five)
        box = int(left), int(top), int(right - left), int(bottom - top)
        found.append(FaceArea(*box, left_eye, right_eye, nose, mouth_left, mouth_right, float(score)))
    return found


def extract_faces(
    img_path: Image | Sequence[Any],
    detector_backend: str = "mtcnn",
    enforce_detection: bool = True,
    align: bool = True,
    expand_percentage: int = 0,
    color_face: str = "rgb",
    normalize_face: bool = True,
    anti_spoofing: bool = False,
    max_faces: int | None = None,
    areas: Sequence[FaceArea] | None = None,
) -> list[Any]:
    """The faces of an image, or a list of such lists for several images.

    Each is {"face": pixels, "facial_area": {x, y, w, h, left_eye, right_eye, …}, "confidence": two decimals}, with
    "is_real" and "antispoof_score" where `anti_spoofing` asks for it. Without a face an image raises FaceNotDetected,
    unless `enforce_detection` is off: then it is one face as a whole. `areas` are boxes found elsewhere.
    """
    if isinstance(img_path, list | tuple) or (isinstance(img_path, np.ndarray) and img_path.ndim == 4):
        options = (detector_backend, enforce_detection, align, expand_percentage, color_face, normalize_face)
        return [extract_faces(each, *options, anti_spoofing, max_faces) for each in img_path]
    if color_face not in ("rgb", "bgr", "gray"):
        raise UnimplementedError(f"The color_face can be rgb, bgr or gray, but it is {color_face}.")
    if expand_percentage < 0:
        raise ValueError(f"expand_percentage is {expand_percentage}, expected at least 0")
    image = load_image(img_path)
    rows, columns = image.shape[:2]
    whole = [(image, FaceArea(0, 0, columns, rows))]
    name = img_path if isinstance(img_path, str | Path) else "the image"
    if detector_backend == "skip":
        faces = whole
    else:
        faces = _found(image, detector_backend, align, expand_percentage, max_faces, areas)
    if not faces and enforce_detection:
        raise FaceNotDetected(f"Face could not be detected in {name}. Consider to set enforce_detection to False.")
    results = []
    for pixels, area in faces or whole:
        if 0 in pixels.shape[:2]:
            continue
        place = _place(area, rows, columns)
        result = {"face": _coloured(pixels, color_face, normalize_face), "facial_area": place}
        result["confidence"] = round(float(area.confidence), 2)
        if anti_spoofing:
            box = place["x"], place["y"], place["w"], place["h"]
            result["is_real"], result["antispoof_score"] = is_real(image, box)
        results.append(result)
    if not results and enforce_detection:
        raise ImgNotFound(f"Exception while extracting faces from {name}: nothing of them lies inside the image")
    return results


def _check_real(faces: Sequence[dict[str, Any]]) -> None:
    if any(face.get("is_real") is False for face in faces):
        raise SpoofDetected("Spoof detected in the given image.")


def _found(
    image: np.ndarray, backend: str, align: bool, percent: int, most: int | None, areas: Sequence[FaceArea] | None
) -> list[tuple[np.ndarray, FaceArea]]:
    """Pixels and place of every face; detection sees the image in its border, places are those in the image."""
    canvas, (left, top) = bordered(image) if align else (image, (0, 0))
    found = detect(canvas, backend) if areas is None else [area.moved(left, top) for area in areas]
    if most is not None and most < len(found):
        found = sorted(found, key=lambda area: -area.w * area.h)[:most]
    found = [expanded(area, percent, canvas.shape) for area in found]
    return [(cut_face(canvas, area, align), area.moved(-left, -top)) for area in found]


def _coloured(pixels: np.ndarray, color: str, normalize: bool) -> np.ndarray:
    if color == "gray":
        cv2 = opencv()
        pixels = cv2.cvtColor(pixels, cv2.COLOR_BGR2GRAY)
    elif color == "rgb":
        pixels = pixels[:, :, ::-1]
    return pixels / 255 if normalize and pixels.max() > 1 else pixels


def _place(area: FaceArea, rows: int, columns: int) -> dict[str, Any]:
    """A face's box inside its image, and its points, None where they lie outside."""
    x, y = max(0, area.x), max(0, area.y)
    place: dict[str, Any] = {"x": x, "y": y, "w": min(columns - x - 1, area.w), "h": min(rows - y - 1, area.h)}
    for name in POINTS:
        point = getattr(area, name)
        if point is not None:
            column, row = int(point[0]), int(point[1])
            place[name] = (column, row) if 0 <= column < columns and 0 <= row < rows else None
        elif name in ("left_eye", "right_eye"):
            place[name] = None
    return place


def is_real(image: np.ndarray, box: tuple[int, int, int, int]) -> tuple[bool, float]:
    """Whether the face in the box (x, y, w, h) of a BGR image is one, or a picture of one, and how sure that is."""
    total = np.zeros(3)
    for name, scale in SPOOFING:
        crop = spoofing_crop(image, box, scale).astype(np.float32)
        total += jax.nn.softmax(_apply(build_model(name, "spoofing"), crop[None], "logits")[0])
    label = int(total.argmax())
    return label == 1, float(total[label] / 2)


def spoofing_crop(image: np.ndarray, box: tuple[int, int, int, int], scale: float) -> np.ndarray:
    """The face with `scale` times its size around it, shifted inside the image where it can be, as 80 x 80 pixels."""
    (x, y, w, h), (rows, columns) = box, image.shape[:2]
    scale = min((rows - 1) / h, (columns - 1) / w, scale)
    wide, high = w * scale, h * scale
    left, top = x + w / 2 - wide / 2, y + h / 2 - high / 2
    right, bottom = left + wide, top + high
    left, right = (0, right - left) if left < 0 else (left, right)
    top, bottom = (0, bottom - top) if top < 0 else (top, bottom)
    left, right = (left - (right - columns + 1), columns - 1) if right > columns - 1 else (left, right)
    top, bottom = (top - (bottom - rows + 1), rows - 1) if bottom > rows - 1 else (top, bottom)
    return opencv().resize(image[int(top) : int(bottom) + 1, int(left) : int(right) + 1], (80, 80))


def _apply(bundle: Bundle, images: Float[np.ndarray, "B X Y C"], output: str) -> np.ndarray:
    """An output of a network for images, in batches of few sizes, so that it is compiled as often."""
    found = []
    for start in range(0, len(images), _BATCHES[-1]):
        part = images[start : start + _BATCHES[-1]]
        size = next(size for size in _BATCHES if size >= len(part))
        padded = np.zeros((size, *part.shape[1:]), np.float32)
        padded[: len(part)] = part
        variables = {"params": bundle.params} | bundle.variables
        found.append(np.asarray(_forward(bundle.model, output)(variables, padded))[: len(part)])
    return np.concatenate(found)


@functools.cache
def _forward(model: Any, output: str) -> Callable[..., jax.Array]:
    return jax.jit(lambda variables, images: jnp.asarray(model.apply(variables, images)[output], jnp.float32))


def embed(bundle: Bundle, images: Float[np.ndarray, "B X Y 3"]) -> Float[np.ndarray, "B D"]:
    """Embeddings [B, D] of BGR images in [0, 1] (or as normalised): float64, of length 1 for VGG-Face."""
    network = bundle.config.network
    if network == "dlib":  # takes RGB of whole numbers
        images = (images * 255 if images.max() <= 1 else images).astype(np.uint8)[..., ::-1].astype(np.float32)
    found = _apply(bundle, images, "embedding").astype(np.float64)
    return found / (np.linalg.norm(found, axis=1, keepdims=True) + 1e-10) if network == "vgg_face" else found


def represent(
    img_path: Image | Sequence[Any],
    model_name: str = "VGG-Face",
    enforce_detection: bool = True,
    detector_backend: str = "mtcnn",
    align: bool = True,
    expand_percentage: int = 0,
    normalization: str = "base",
    anti_spoofing: bool = False,
    max_faces: int | None = None,
    l2_normalize: bool = False,
    minmax_normalize: bool = False,
    return_face: bool = False,
) -> list[Any]:
    """Embeddings of the faces of an image, or a list of such lists; all faces go through the network together.

    Each is {"embedding": list, "facial_area": …, "face_confidence": …[, "face": what the network saw]}.
    """
    bundle = build_model(model_name)
    several = isinstance(img_path, list | tuple) or (isinstance(img_path, np.ndarray) and img_path.ndim == 4)
    images: list[Any] = list(img_path) if isinstance(img_path, list | tuple | np.ndarray) and several else [img_path]
    faces, owners = [], []
    for i, image in enumerate(images):
        if detector_backend == "skip":
            pixels = load_image(image)
            # As published: rows stand as the width.
            area = {"x": 0, "y": 0, "w": pixels.shape[0], "h": pixels.shape[1]}
            found = [{"face": pixels[:, :, ::-1], "facial_area": area, "confidence": 0}]
        else:
            found = extract_faces(
                image, detector_backend, enforce_detection, align, expand_percentage,
                anti_spoofing=anti_spoofing, max_faces=max_faces,
            )  # fmt: skip
        _check_real(found)
        faces += found
        owners += [i] * len(found)
    results: list[list[dict[str, Any]]] = [[] for _ in images]
    if faces:
        batch = _prepared(bundle, faces, normalization)
        embeddings = embed(bundle, batch)
        embeddings = minmax(model_name, embeddings) if minmax_normalize else embeddings
        if l2_normalize:
            embeddings = embeddings / (np.linalg.norm(embeddings, axis=1, keepdims=True) + 1e-10)
        for owner, face, embedding, seen in zip(owners, faces, embeddings, batch, strict=True):
            result = {"embedding": embedding.tolist(), "facial_area": face["facial_area"]}
            result["face_confidence"] = face["confidence"]
            results[owner].append(result | ({"face": seen} if return_face else {}))
    return results if several and len(images) > 1 else results[0]


def _prepared(bundle: Bundle, faces: Sequence[dict[str, Any]], normalization: str) -> np.ndarray:
    """What a network sees of faces as `extract_faces` gives them, RGB."""
    size = bundle.config.image_size
    return np.stack([normalized(resized(face["face"][:, :, ::-1], size), normalization) for face in faces])


# Smallest and largest number of embeddings (deepface config/minmax.py); other models are left as they are.
_RANGES = {
    "VGG-Face": (0.0, 0.27054874177488775),
    "Facenet": (-3.541942596435547, 3.247769594192505),
    "Facenet512": (-4.388302803039551, 3.643190622329712),
    "OpenFace": (-0.34191709756851196, 0.26318004727363586),
    "DeepFace": (0.0, 17.294939041137695),
    "DeepID": (0.0, 127.86836242675781),
    "Dlib": (-0.41398656368255615, 0.5201137661933899),
    "ArcFace": (-2.945136308670044, 2.087090015411377),
}


def minmax(model_name: str, embeddings: np.ndarray) -> np.ndarray:
    """Embeddings brought to [0, 1] by the range that a model's have; those of other models unchanged."""
    if model_name not in _RANGES:
        return embeddings
    low, high = _RANGES[model_name]
    return (embeddings.clip(low, high) - low) / (high - low)


def verify(
    img1_path: Image | list[float],
    img2_path: Image | list[float],
    model_name: str = "VGG-Face",
    detector_backend: str = "mtcnn",
    distance_metric: Metric = "cosine",
    enforce_detection: bool = True,
    align: bool = True,
    expand_percentage: int = 0,
    normalization: str = "base",
    silent: bool = False,
    threshold: float | None = None,
    anti_spoofing: bool = False,
) -> dict[str, Any]:
    """Whether two images (or embeddings) show one person: the nearest pair of their faces decides.

    {"verified", "distance", "threshold", "confidence", "model", "detector_backend", "similarity_metric",
    "facial_areas": {"img1", "img2"}, "time"}.
    """
    if not isinstance(distance_metric, str) and threshold is None:
        raise ValueError("Threshold must be specified when using custom distance metrics")
    start = time.perf_counter()
    tuned = find_threshold(model_name, distance_metric)
    width = SIZES[model_name].width
    bundle, options = build_model(model_name), (detector_backend, enforce_detection, align, expand_percentage)

    def seen(image: Any) -> list[dict[str, Any]]:
        faces = extract_faces(image, *options, anti_spoofing=anti_spoofing)
        _check_real(faces)
        embeddings = embed(bundle, _prepared(bundle, faces, normalization))
        areas = [face["facial_area"] for face in faces]
        return [{"embedding": e, "facial_area": area} for e, area in zip(embeddings, areas, strict=True)]

    sides = [_side(image, i, width, seen) for i, image in enumerate((img1_path, img2_path), 1)]
    pairs = [
        (float(find_distance(a["embedding"], b["embedding"], distance_metric)), a["facial_area"], b["facial_area"])
        for a in sides[0]
        for b in sides[1]
    ]
    distance, area1, area2 = min(pairs, key=lambda pair: pair[0])
    limit = tuned if threshold is None else threshold
    return {
        "verified": distance <= limit,
        "distance": distance,
        "threshold": limit,
        "confidence": find_confidence(distance, model_name, distance_metric, distance <= limit),
        "model": model_name,
        "detector_backend": detector_backend,
        "similarity_metric": distance_metric,
        "facial_areas": {"img1": area1, "img2": area2},
        "time": round(time.perf_counter() - start, 2),
    }


def _side(image: Any, number: int, width: int, seen: Callable[[Any], list[Any]]) -> list[dict[str, Any]]:
    """The faces of one side of a comparison: of an image, or an embedding that was made before."""
    if not isinstance(image, list):
        try:
            return seen(image)
        except ValueError as error:
            raise type(error)(f"Exception while processing img{number}_path: {error}") from error
    if not all(isinstance(value, float | int) for value in image):
        raise DataTypeError(f"img{number}_path is a list, expected an embedding: numbers alone")
    if len(image) != width:
        raise DimensionMismatchError(f"img{number}_path is an embedding of {len(image)} numbers, expected {width}")
    nowhere = dict.fromkeys(("x", "y", "w", "h", "left_eye", "right_eye"))
    return [{"embedding": image, "facial_area": nowhere}]


def analyze(
    img_path: Image | Sequence[Any],
    actions: str | Sequence[str] = ("emotion", "age", "gender", "race"),
    enforce_detection: bool = True,
    detector_backend: str = "mtcnn",
    align: bool = True,
    expand_percentage: int = 0,
    silent: bool = False,
    anti_spoofing: bool = False,
) -> list[Any]:
    """Age, gender, emotion and race of the faces of an image (or a list of such lists), as their networks judge them.

    {"region", "face_confidence", "age": years, "gender": {label: per cent}, "dominant_gender": …} and so on.
    """
    if isinstance(img_path, list | tuple) or (isinstance(img_path, np.ndarray) and img_path.ndim == 4):
        options = (actions, enforce_detection, detector_backend, align, expand_percentage, silent, anti_spoofing)
        return [analyze(each, *options) for each in img_path]
    wanted = [actions] if isinstance(actions, str) else list(actions)
    if not wanted:
        raise ValueError(f"`actions` is empty, expected some of {', '.join(ATTRIBUTES)}")
    if unknown := [action for action in wanted if action not in ATTRIBUTES]:
        raise UnimplementedError(f"invalid action {unknown[0]!r}, expected some of {', '.join(ATTRIBUTES)}")
    faces = extract_faces(
        img_path, detector_backend, enforce_detection, align, expand_percentage, anti_spoofing=anti_spoofing
    )
    _check_real(faces)
    results = [{"region": face["facial_area"], "face_confidence": face["confidence"]} for face in faces]
    images = np.stack([resized(face["face"][:, :, ::-1], (224, 224)) for face in faces])
    for action in wanted:
        bundle = build_model(ATTRIBUTES[action], "facial_attribute")
        seen = np.stack([_grey(image) for image in images]) if action == "emotion" else images
        chances = jax.device_get(jax.nn.softmax(_apply(bundle, seen, "logits")))
        for result, chance in zip(results, chances, strict=True):
            result |= _judged(action, chance)
    return results


def _grey(image: np.ndarray) -> np.ndarray:
    cv2 = opencv()
    return cv2.resize(cv2.cvtColor(image, cv2.COLOR_BGR2GRAY), (48, 48))[..., None]


def _judged(action: str, chance: np.ndarray) -> dict[str, Any]:
    if action == "age":  # the expectation over 0 … 100 years
        return {"age": int((chance.astype(np.float64) * np.arange(len(chance))).sum())}
    labels = LABELS[action]
    percent = 100 * chance / (1 if action == "gender" else chance.sum())
    return {action: dict(zip(labels, map(float, percent), strict=True)), f"dominant_{action}": labels[chance.argmax()]}
