"""The networks of deepface 0.0.103 (serengil/deepface): recognisers, judges of attributes, anti-spoofing."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn

from ..published import Published, floats
from .arcface import ArcFace
from .config import FaceConfig
from .deepface import DeepFace
from .deepid import DeepID
from .dlib import DlibResNet
from .emotion import Emotion
from .facenet import Facenet
from .ghostfacenet import GhostFaceNet
from .minifasnet import MiniFASNet
from .openface import OpenFace
from .vgg_face import VGGFace

# Those that judge faces by a classifier on VGG-Face's trunk.
ATTRIBUTES = ("age", "gender", "race")
NETWORKS: Mapping[str, Callable[..., nn.Module]] = {
    "vgg_face": VGGFace,
    "facenet": Facenet,
    "openface": OpenFace,
    "deepface": DeepFace,
    "deepid": DeepID,
    "arcface": ArcFace,
    "ghostfacenet": GhostFaceNet,
    "dlib": DlibResNet,
    **{name: functools.partial(VGGFace, head="predictions", head_dropout=0.0) for name in ATTRIBUTES},
    "emotion": Emotion,
    "minifasnet_v2": MiniFASNet,
    "minifasnet_v1se": MiniFASNet,
}
# The names of deepface, what is published for them, and the files.
SIZES: Mapping[str, FaceConfig] = {
    "VGG-Face": FaceConfig("vgg_face", (224, 224), 4096, 2622),
    "Facenet": FaceConfig("facenet", (160, 160), 128),
    "Facenet512": FaceConfig("facenet", (160, 160), 512),
    "OpenFace": FaceConfig("openface", (96, 96), 128),
    "DeepFace": FaceConfig("deepface", (152, 152), 4096, 8631),
    "DeepID": FaceConfig("deepid", (55, 47), 160),
    "ArcFace": FaceConfig("arcface", (112, 112), 512),
    "GhostFaceNet": FaceConfig("ghostfacenet", (112, 112), 512),
    "Dlib": FaceConfig("dlib", (150, 150), 128),
    "Age": FaceConfig("age", (224, 224), 4096, 101),
    "Gender": FaceConfig("gender", (224, 224), 4096, 2),
    "Race": FaceConfig("race", (224, 224), 4096, 6),
    "Emotion": FaceConfig("emotion", (48, 48), 1024, 7),
    "MiniFASNetV2": FaceConfig("minifasnet_v2", (80, 80), 128, 3),
    "MiniFASNetV1SE": FaceConfig("minifasnet_v1se", (80, 80), 128, 3),
}
FILES: Mapping[str, str] = {
    "VGG-Face": "vgg_face_weights",
    "Facenet": "facenet_weights",
    "Facenet512": "facenet512_weights",
    "OpenFace": "openface_weights",
    "DeepFace": "VGGFace2_DeepFace_weights_val-0.9034",
    "DeepID": "deepid_weights",
    "ArcFace": "arcface_weights",
    "GhostFaceNet": "ghostfacenet_v1",
    "Dlib": "dlib_face_recognition_resnet_model_v1.dat",
    "Age": "age_model_weights",
    "Gender": "gender_model_weights",
    "Race": "race_model_single_batch",
    "Emotion": "facial_expression_model_weights",
    "MiniFASNetV2": "2.7_80x80_MiniFASNetV2.pth",
    "MiniFASNetV1SE": "4_0_0_80x80_MiniFASNetV1SE.pth",
}


def build(config: FaceConfig, **options: Any) -> nn.Module:
    """The network of a config; `dtype` is what it computes in. ValueError for a network that is not known."""
    if config.network not in NETWORKS:
        raise ValueError(f"unknown face network {config.network!r}, expected one of {', '.join(NETWORKS)}")
    return NETWORKS[config.network](config, **options)


def channels(config: FaceConfig) -> int:
    """Of the images: the emotion network takes grey ones."""
    return 1 if config.network == "emotion" else 3


def _published(name: str) -> Published:
    config = SIZES[name]
    image = floats(1, *config.image_size, channels(config))
    return Published(lambda scan: build(config), {"x": image}, f"deepface: {FILES[name]}")


PUBLISHED = {name: _published(name) for name in SIZES}
