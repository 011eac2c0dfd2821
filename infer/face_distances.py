"""How far embeddings of faces are apart, which distance still is one person, and how sure that is.

As in deepface 0.0.103 (modules/verification.py, config/threshold.py, config/confidence.py). All in float64.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from numpy.typing import ArrayLike

METRICS = ("cosine", "euclidean", "euclidean_l2", "angular")
Metric = str | Callable[[np.ndarray, np.ndarray], float]

# Model -> thresholds in the order of METRICS, tuned by deepface with normalization "base".
THRESHOLDS = {
    "VGG-Face": (0.68, 1.17, 1.17, 0.39),
    "Facenet": (0.40, 10, 0.80, 0.33),
    "Facenet512": (0.30, 23.56, 1.04, 0.35),
    "ArcFace": (0.68, 4.15, 1.13, 0.39),
    "Dlib": (0.07, 0.6, 0.4, 0.12),
    "SFace": (0.593, 10.734, 1.055, 0.36),
    "OpenFace": (0.10, 0.55, 0.55, 0.11),
    "DeepFace": (0.23, 64, 0.64, 0.12),
    "DeepID": (0.015, 45, 0.17, 0.04),
    "GhostFaceNet": (0.65, 35.71, 1.10, 0.38),
    "Buffalo_L": (0.55, 0.6, 1.1, 0.45),
}


class Confidence(NamedTuple):
    """A logistic regression on the distance, and the ranges of its percentages on either side of the threshold."""

    slope: float
    shift: float
    normalizer: float
    max_true: float
    min_true: float
    max_false: float
    min_false: float


# Model -> regressions in the order of METRICS.
CONFIDENCES = {
    "VGG-Face": (
        Confidence(-6.61254, 3.145549, 0.979183, 88.28484, 20.78798, 20.55668, 3.457833),
        Confidence(-6.505124, 3.891213, 1.399416, 76.47012, 17.7949, 16.44374, 6.824842),
        Confidence(-6.505124, 3.891213, 1.399416, 76.47012, 17.7949, 16.44374, 6.824842),
        Confidence(-5.035754, 0.2961597, 0.493373, 34.23072, 16.62451, 15.49608, 10.0802),
    ),
    "Facenet": (
        Confidence(-6.502269, 1.679049, 1.206694, 77.17253, 41.79, 20.61835, 0.7976712),
        Confidence(-6.716177, 2.790978, 18.73529, 74.76413, 40.44238, 25.84086, 1.935615),
        Confidence(-6.70871, 2.909419, 1.553508, 75.45757, 40.45094, 30.55593, 2.189645),
        Confidence(-6.371147, 0.6766461, 0.56627, 45.80236, 24.32731, 16.95268, 5.063533),
    ),
    "Facenet512": (
        Confidence(-5.868252, 0.8674085, 1.384316, 62.19495, 40.70092, 39.96947, 0.6687247),
        Confidence(-6.742961, 2.619494, 40.77175, 75.20185, 23.39157, 20.31741, 1.593039),
        Confidence(-6.760402, 3.005765, 1.663921, 78.73795, 23.4928, 21.7548, 2.28735),
        Confidence(-6.48784, 0.9536497, 0.625563, 52.1216, 21.72373, 20.73464, 4.290546),
    ),
    "ArcFace": (
        Confidence(-6.58615, 2.261713, 1.22267, 82.32545, 28.68775, 17.21036, 1.306796),
        Confidence(-5.370594, 0.6896764, 10.40133, 43.04233, 19.04816, 18.68289, 0.9185347),
        Confidence(-6.541949, 3.262896, 1.563758, 74.93505, 21.80017, 15.09108, 3.629685),
        Confidence(-5.633449, 0.5682159, 0.571477, 40.81365, 18.40962, 15.13985, 6.59169),
    ),
    "GhostFaceNet": (
        Confidence(-6.595824, 2.418096, 1.155661, 84.65758, 22.70053, 15.08427, 1.510176),
        Confidence(-6.506709, 2.935231, 52.15013, 73.09359, 24.63719, 16.51325, 2.734546),
        Confidence(-6.572852, 3.306883, 1.520303, 75.95534, 20.08887, 17.84279, 3.675728),
        Confidence(-5.588607, 0.4884569, 0.549751, 39.92979, 16.49082, 16.14323, 7.018277),
    ),
    "Dlib": (
        Confidence(-3.761809, -0.6908814, 0.200732, 32.28908, 27.84269, 27.80333, 19.06184),
        Confidence(-7.494008, 3.969615, 0.909856, 89.60222, 37.63548, 36.79189, 5.474065),
        Confidence(-7.10464, 2.328863, 0.633612, 76.39948, 37.84998, 36.56104, 10.22269),
        Confidence(-3.211694, -0.597035, 0.205221, 31.79314, 27.25273, 27.18853, 22.16387),
    ),
    "SFace": (
        Confidence(-6.531674, 2.221725, 1.147363, 81.04136, 26.26225, 23.62218, 1.325615),
        Confidence(-5.922413, 2.230655, 18.82645, 53.59441, 24.24534, 24.00001, 2.432186),
        Confidence(-6.561645, 3.2156, 1.514835, 72.39437, 22.25501, 19.53139, 3.402493),
        Confidence(-5.575609, 0.4217735, 0.547079, 37.48564, 17.07467, 16.40045, 6.732499),
    ),
    "OpenFace": (
        Confidence(-2.932563, -2.05823, 0.884469, 10.54666, 8.832402, 8.5359, 0.9452381),
        Confidence(-5.829345, 1.439068, 1.330015, 60.2855, 27.50618, 27.05838, 1.224548),
        Confidence(-5.829345, 1.439068, 1.330015, 60.2855, 27.50618, 27.05838, 1.224548),
        Confidence(-0.5288928, -4.450628, 0.463143, 1.109656, 1.091443, 1.088723, 0.9052859),
    ),
    "DeepID": (
        Confidence(-1.110939, -1.644356, 0.142463, 16.11437, 15.96622, 15.96057, 14.1532),
        Confidence(-4.2679, -0.1177763, 124.1947, 27.23424, 16.08201, 15.90739, 1.230125),
        Confidence(-3.668141, -0.9230555, 0.533784, 21.68183, 17.57161, 17.54824, 5.309829),
        Confidence(-0.2707576, -3.870047, 0.171993, 2.026199, 2.022078, 2.021498, 1.951975),
    ),
    "DeepFace": (
        Confidence(-5.415667, 1.414278, 0.379428, 74.38936, 54.25112, 54.16884, 34.51159),
        Confidence(-7.001069, 5.229677, 85.99748, 90.45532, 50.79115, 50.42181, 14.53694),
        Confidence(-6.520867, 3.750707, 0.871123, 80.42595, 39.64198, 39.57803, 12.6776),
        Confidence(-0.201785, -4.960268, 0.2869, 0.6803997, 0.6801855, 0.675951, 0.6573199),
    ),
}


def distances(
    first: Float[np.ndarray, "N D"], second: Float[np.ndarray, "M D"], metric: str
) -> Float[np.ndarray, "N M"]:
    """All distances between two sets of embeddings; ValueError for an unknown metric or shapes that do not fit."""
    first, second = np.asarray(first, np.float64), np.asarray(second, np.float64)
    if first.ndim != 2 or second.ndim != 2 or first.shape[1] != second.shape[1]:
        raise ValueError(f"embeddings of shapes {first.shape} and {second.shape}, expected [N, D] and [M, D]")
    match metric:
        case "euclidean":
            return np.linalg.norm(first[:, None] - second[None], axis=2)
        case "euclidean_l2":
            return distances(_unit(first), _unit(second), "euclidean")
        case "cosine" | "angular":
            lengths = np.linalg.norm(first, axis=1)[:, None] * np.linalg.norm(second, axis=1)[None]
            similarity = first @ second.T / lengths
            return 1 - similarity if metric == "cosine" else np.arccos(similarity.clip(-1, 1)) / math.pi
    raise ValueError(f"unknown distance metric {metric!r}, expected one of {', '.join(METRICS)}")


def _unit(embeddings: np.ndarray) -> np.ndarray:
    return embeddings / (np.linalg.norm(embeddings, axis=1, keepdims=True) + 1e-10)


def find_distance(first: ArrayLike, second: ArrayLike, metric: Metric = "cosine") -> float:
    """The distance between two embeddings, rounded to six decimals; a metric may be a function of the two."""
    if not isinstance(metric, str):
        return metric(np.asarray(first), np.asarray(second))
    return round(float(distances(np.asarray(first)[None], np.asarray(second)[None], metric)[0, 0]), 6)


def find_threshold(model_name: str, metric: Metric) -> float:
    """The largest distance of one person that deepface tuned; 0 for a metric of one's own."""
    if not isinstance(metric, str):
        return 0.0
    if model_name not in THRESHOLDS or metric not in METRICS:
        models = ", ".join(THRESHOLDS)
        raise ValueError(f"no threshold for {metric!r} of {model_name!r}, expected one of {METRICS} of {models}")
    return THRESHOLDS[model_name][METRICS.index(metric)]


def find_confidence(distance: float, model_name: str, metric: Metric, verified: bool) -> float:
    """Per cent: 51 to 100 for one person, 0 to 49 for two; 51 or 49 where nothing is tuned."""
    if distance <= 0:
        return 100.0 if verified else 0.0
    if not isinstance(metric, str) or metric not in METRICS or model_name not in CONFIDENCES:
        return 51 if verified else 49
    row = CONFIDENCES[model_name][METRICS.index(metric)]
    distance = distance / row.normalizer if row.normalizer > 1 else distance
    percent = 100 / (1 + math.exp(-(row.slope * distance + row.shift)))
    if verified:
        low, high, least, most = row.min_true, row.max_true, max(51, row.min_true), 100
    else:
        low, high, least, most = row.min_false, row.max_false, 0, min(49, int(row.max_false))
    spread = (percent - low) / (high - low) * (most - least) + least
    spread = max(spread, 51) if verified else min(spread, 49)
    return round(min(max(spread, 0), 100), 2)
