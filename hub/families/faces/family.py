"""The face networks of deepface (see `omnax.models.faces`) under their published names, both ways.

Formats: "torch" (deepface 0.0.103's .pth), "keras" (its .h5, by the order of the layers), "dlib" (dlib's .dat), and
"safetensors" with the names of "torch". A file has no config beside it: which network it holds, and how wide it is,
shows in its tensors.
"""

import dataclasses
import functools
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from ....models.faces import ATTRIBUTES, SIZES, FaceConfig, build, channels
from ....models.published import floats
from ...bundle import Bundle
from ...family import Checkpoint, Family, Overrides, fields_of
from ...files.dlib_files import skeleton, write_dlib
from ...files.keras_files import ORDER, write_keras
from ...files.placement import Tree
from ...files.source import Source
from ...files.tensors import LazyTensor, TensorFile
from ...files.torch_writer import in_order, write_torch
from ...files.writers import MAX_SHARD_SIZE, write_file, write_safetensors
from ...mapping import Table, save_tensors
from ..wav2lip import join, split
from .dlib import DLIB_TABLE
from .keras import keras_layers, keras_names, keras_table
from .torch import GAINS, torch_name, torch_table

# PyTorch's tensors that only this network has, in the order in which they are looked for.
_MARKS = {
    "facenet": "mixed_6a.branch_0.conv.weight",
    "openface": "inception_3a.branch_1x1.conv.weight",
    "deepface": "L4.weight",
    "deepid": "fc12.weight",
    "arcface": "backbone.conv1_conv.weight",
    "ghostfacenet": "gdc_dw.weight",
    "dlib": "unit.0.con1.weight",
    "emotion": "fc_3.weight",
    "minifasnet_v1se": "conv_3.model.3.se_module.fc1.weight",
    "minifasnet_v2": "conv_6_sep.conv.weight",
    "attribute": "predictions.weight",
    "vgg_face": "fc8.weight",
}
# Keras' files by their number of layers and the shape of their first kernel; dlib's by their last layer.
_KERAS = {
    (245, (3, 3, 3, 32)): "facenet",
    (75, (7, 7, 3, 64)): "openface",
    (6, (11, 11, 3, 32)): "deepface",
    (7, (11, 11, 3, 32)): "deepface",
    (6, (4, 4, 3, 20)): "deepid",
    (110, (3, 3, 3, 64)): "arcface",
    (219, (3, 3, 3, 20)): "ghostfacenet",
    (8, (5, 5, 1, 64)): "emotion",
    (15, (3, 3, 3, 64)): "vgg_face",
    (16, (3, 3, 3, 64)): "vgg_face",
}
_DLIB_LAST = "con_28.filters"
# The layers that show the width of the embedding, and the number of classes.
_WIDTHS = {
    "facenet": "bottleneck",
    "openface": "dense_layer",
    "deepface": "F7",
    "deepid": "fc11",
    "arcface": "dense",
    "ghostfacenet": "gdc_conv",
    "dlib": "fc",
    "emotion": "fc_2",
    "minifasnet_v1se": "linear",
    "minifasnet_v2": "linear",
    **dict.fromkeys(("vgg_face", *ATTRIBUTES), "fc7"),
}
_CLASSES = {
    "vgg_face": "fc8",
    "deepface": "F8",
    "emotion": "fc_3",
    "minifasnet_v1se": "prob",
    "minifasnet_v2": "prob",
    **dict.fromkeys(ATTRIBUTES, "predictions"),
}
_PUBLISHED = {config.network: config for config in SIZES.values()}
_RENAMES = ((r"^module\.", ""), *ORDER)


def recognise(source: Source) -> str | None:
    """The format of a face network's file; None if it is none."""
    file = source.tensors.renamed(_RENAMES)
    if _keras(file):
        return "keras"
    if _DLIB_LAST in file:
        return "dlib"
    if _torch(file) is None:
        return None
    return "safetensors" if file.path.suffix == ".safetensors" else "torch"


def read(source: Source, format: str, overrides: Overrides) -> FaceConfig:
    """The published config of the network, with the width and the classes that the file has."""
    file = source.tensors.renamed(_RENAMES)
    network = {"keras": _keras, "dlib": lambda _: "dlib"}.get(format, _torch)(file)
    assert network is not None
    if network in ("vgg_face", "attribute"):
        network = _judge(
            file, _outputs(file, format, "age", "predictions") or _outputs(file, format, "vgg_face", "fc8")
        )
    config = dataclasses.replace(
        _PUBLISHED[network],
        width=_outputs(file, format, network, _WIDTHS[network]),
        classes=_outputs(file, format, network, _CLASSES[network]) if network in _CLASSES else 0,
    )
    known = {key: value for key, value in overrides.items() if key in fields_of(config)}
    return dataclasses.replace(config, **known)


def _torch(file: TensorFile) -> str | None:
    return next((name for name, mark in _MARKS.items() if mark in file), None)


def _keras(file: TensorFile) -> str | None:
    if "0.0" not in file or len(shape := file.shape("0.0")) != 4:
        return None
    layers = len({name.partition(".")[0] for name in file})
    turned = shape[2], shape[3], shape[1], shape[0]  # Keras 1 may have stored it channels first
    return _KERAS.get((layers, shape)) or _KERAS.get((layers, turned))


def _outputs(file: TensorFile, format: str, network: str, module: str) -> int:
    """How many numbers a layer puts out; 0 where the file has no such layer."""
    if format == "dlib":
        return file.shape("fc_0.weights")[1]
    if format != "keras":
        name = torch_name(network, f"{module}/kernel")
        return file.shape(name)[0] if name in file else 0
    layer = keras_layers(_PUBLISHED[network]).index(module)
    bias, kernel = f"{layer}.1", f"{layer}.0"  # kernels of convolutions may be turned
    return file.shape(bias)[0] if bias in file else file.shape(kernel)[-1] if kernel in file else 0


def _judge(file: TensorFile, classes: int) -> str:
    """VGG-Face and the judges of attributes on its trunk differ in their number of classes alone."""
    known = {_PUBLISHED[name].classes: name for name in ("vgg_face", *ATTRIBUTES)} | {0: "vgg_face"}
    if classes not in known:
        expected = ", ".join(f"{count} ({name})" for count, name in known.items() if count)
        raise ValueError(f"{file.path}: its classifier on VGG-Face has {classes} classes, expected one of {expected}")
    return known[classes]


def shapes(config: FaceConfig) -> Tree:
    """Abstract parameters and batch statistics in one tree."""
    image = floats(1, *config.image_size, channels(config))
    variables = jax.eval_shape(build(config).init, jax.random.key(0), image)
    return join(variables["params"], variables.get("batch_stats", {}))


def bundle(checkpoint: Checkpoint, params: Tree) -> Bundle:
    """The network with its batch statistics; what its file says besides is kept for saving."""
    source, config = checkpoint.source, checkpoint.config
    file = source.tensors.renamed(_RENAMES)
    if config.network == "facenet" and checkpoint.format in ("torch", "safetensors"):
        _check_gains(file)
    params, statistics = split(params)
    metadata: dict[str, Any] = {"names": tuple(source.tensors if checkpoint.format == "keras" else file)}
    if checkpoint.format == "dlib":
        metadata["skeleton"] = skeleton(file.path)
    return Bundle(
        model=build(config, dtype=checkpoint.options.compute_dtype),
        params=params,
        config=config,
        format=checkpoint.format,
        metadata=metadata,
        variables={"batch_stats": statistics} if statistics else {},
    )


def _check_gains(file: TensorFile) -> None:
    """Facenet's normalisations have no gain; PyTorch's files hold ones in their place."""
    for name in file:
        if re.fullmatch(GAINS, name) and not (file.read(name) == 1).all():
            raise ValueError(f"{file.path}: {name} is not 1 throughout, but Facenet's normalisations have no gain")


def save(bundle: Bundle, path: Path, format: str, max_shard_size: int = MAX_SHARD_SIZE) -> None:
    """Writes one file. See `omnax.hub.save`."""
    config, names = bundle.config, bundle.metadata.get("names", ())
    tree = join(bundle.params, bundle.variables.get("batch_stats", {}))
    tensors = save_tensors(tree, _table(format, config))
    match format:
        case "keras":
            layers = _keras_layers(names) or keras_names(config, shapes(config))
            write_file(path, tensors, functools.partial(write_keras, layers=layers))
        case "dlib":
            if "skeleton" not in bundle.metadata:
                raise ValueError(f"{path}: a dlib file describes its whole network; only one that was read is written")
            named = in_order(tensors, names)
            write_file(path, named, functools.partial(write_dlib, bones=bundle.metadata["skeleton"]))
        case _:
            tensors |= {name: _constant(array) for name, array in _unsaid(config, tensors).items()}
            named = in_order(tensors, names)
            write_file(path, named, write_safetensors) if format == "safetensors" else write_torch(path, named)


def _keras_layers(names: Sequence[str]) -> dict[str, list[str]]:
    """Layer -> names of its weights, from the names "12.0 conv2d_5/kernel:0 of conv2d_5" of a file that was read."""
    layers: dict[str, list[str]] = {}
    for name in names:
        if match := re.fullmatch(r"\d+\.\d+ (.*) of (.*)", name):
            layers.setdefault(match[2], []).append(match[1])
    return layers


def _unsaid(config: FaceConfig, tensors: Mapping[str, LazyTensor]) -> dict[str, np.ndarray]:
    """What PyTorch's modules hold besides: counters of batches, and Facenet's gains."""
    found: dict[str, np.ndarray] = {}
    for name, tensor in tensors.items():
        if name.endswith(".running_mean"):
            module = name.removesuffix(".running_mean")
            found[f"{module}.num_batches_tracked"] = np.array(0, np.int64)
            if config.network == "facenet":
                found[f"{module}.weight"] = np.ones(tensor.shape, np.float32)
    return found


def _constant(array: np.ndarray) -> LazyTensor:
    return LazyTensor(array.shape, array.dtype, lambda: array)


def _table(format: str, config: FaceConfig) -> Table:
    if format == "keras":
        return keras_table(config, shapes(config))
    if format != "dlib":
        return torch_table(config, shapes(config))
    if config.network != "dlib":
        raise ValueError(f"format 'dlib' is dlib's own, there is none of the network {config.network!r}")
    return DLIB_TABLE


FAMILY = Family(
    name="face network",
    config=FaceConfig,
    formats=("torch", "keras", "dlib", "safetensors"),
    recognise=recognise,
    read=read,
    table=lambda source, format, config: _table(format, config),
    shapes=lambda source, config: shapes(config),
    bundle=bundle,
    save=save,
    unsaid=lambda config, format: {"image_size": config.image_size},  # files hold no size, networks are made for one
)
