"""S3FD against a torch restatement through s3fd.pth, its boxes against loops; MTCNN's real weights on a photograph."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from omnax import hub
from omnax.hub.families.mtcnn import load_mtcnn
from omnax.infer import face_detection
from omnax.models import s3fd
from oracles import torch
from references import s3fd as reference
from skimage.data import astronaut


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    torch.manual_seed(0)
    network = reference.S3FD()
    path = tmp_path_factory.mktemp("s3fd") / "s3fd.pth"
    torch.save(network.state_dict(), path)
    return network, path


def test_s3fd(published, tmp_path):
    network, path = published
    bundle = hub.load(path)
    assert isinstance(bundle.model, s3fd.S3FD)
    assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(bundle.params)) == 22_459_110
    image = np.random.default_rng(0).uniform(-120, 130, (2, 96, 128, 3)).astype(np.float32)
    got = jax.jit(lambda p: bundle.model.apply({"params": p}, image))(bundle.params)
    expected = network(torch.tensor(image.transpose(0, 3, 1, 2).copy()))
    for (probability, offsets), (score, location) in zip(got, expected, strict=True):
        np.testing.assert_allclose(probability, score, atol=1e-5)
        np.testing.assert_allclose(offsets, location.permute(0, 2, 3, 1), atol=1e-5)
    hub.save(bundle, tmp_path / "again.pth")
    saved = torch.load(tmp_path / "again.pth", weights_only=True)
    assert list(saved) == list(network.state_dict()) and len(saved) == 65
    assert all(torch.equal(saved[key], value) for key, value in network.state_dict().items())


def test_s3fd_boxes_are_those_of_the_loops():
    """Random maps with a few strong cells: decoding, suppression, the sure ones first."""
    rng = np.random.default_rng(0)
    shapes = [(48 // 2**i + 1, 40 // 2**i + 1) for i in range(6)]
    levels = [(rng.random(shape) ** 12, rng.normal(size=(*shape, 4))) for shape in shapes]
    detector = face_detection.S3FDDetector.__new__(face_detection.S3FDDetector)
    boxes, scores = detector._choose(levels)
    expected = np.array(reference.detect([(p, o.transpose(2, 0, 1)) for p, o in levels]))
    assert len(expected) > 10
    np.testing.assert_allclose(np.concatenate([boxes, scores[:, None]], 1), expected, atol=1e-9)


def test_s3fd_sees_frames_minus_the_published_means(published):
    """Batches of frames go in as RGB minus (104, 117, 123), and each gets the box of its surest face."""
    detector = face_detection.S3FDDetector(hub.load(published[1]))
    seen = []
    face = np.zeros((24, 32))
    face[10, 20] = 1.0  # stride 4: a box of 16 pixels around (82, 42)
    coarse = [(np.zeros((2, 1, 1)), np.zeros((2, 1, 1, 4)))] * 5

    def network(params, image):
        seen.append(image)
        return [(np.stack([face, 0 * face]), np.zeros((2, 24, 32, 4))), *coarse]

    detector._apply = network
    frames = np.full((2, 96, 128, 3), 200, np.uint8)
    assert detector.first(frames) == [(34, 50, 74, 90), None]
    np.testing.assert_array_equal(seen[0][0, 0, 0], [96, 83, 77])


def test_mtcnn_finds_the_astronaut():
    """Values of facenet-pytorch 2.6.0 on the same photograph; ours differ from them by 3e-5 pixels."""
    boxes, scores, points = face_detection.Mtcnn(load_mtcnn()).detect(astronaut())
    np.testing.assert_allclose(boxes, [[181.051407, 62.156132, 267.747315, 172.050171]], atol=1e-3)
    np.testing.assert_allclose(scores, [0.99999774], atol=1e-6)
    assert points.shape == (1, 5, 2) and points[0, 0, 0] < points[0, 1, 0] and points[0, 3, 1] > points[0, 2, 1]
    assert face_detection.Mtcnn(load_mtcnn()).largest(np.zeros((1, 64, 64, 3), np.uint8)) == [None]


def test_suppression_by_hand():
    boxes = np.array([[0, 0, 10, 10], [0, 0, 10, 8], [20, 20, 24, 24], [0, 0, 4, 4]], float)
    scores = np.array([0.8, 0.9, 0.7, 0.6])
    assert face_detection.suppress(boxes, scores, 0.5).tolist() == [1, 2, 3]
    assert face_detection.suppress(boxes, scores, 0.5, of_smaller=True).tolist() == [1, 2]
    assert face_detection.suppress(np.empty((0, 4)), np.empty(0), 0.5).tolist() == []
    assert face_detection.squares(np.array([[0.0, 0, 4, 10]])).tolist() == [[-3, 0, 7, 10]]
    assert jnp.allclose(face_detection._area_matrix(3, 2), jnp.array([[0.5, 0.5, 0], [0, 0.5, 0.5]]))
