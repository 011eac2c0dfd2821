"""deepface's Keras files (`*.h5`): which layer of a network comes where, since they are read by order.

Keras sorts layers by their distance from the output, the longest way counting, and ties by the order in which a walk
from the output meets them (keras/engine/functional.py: _map_graph_network). So branches are interleaved.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from flax import traverse_util

from ....models.faces import FaceConfig, arcface, facenet, ghostfacenet, openface, vgg_face
from ...files.keras_files import ORDER
from ...files.placement import Tree
from ...mapping import Row, Table

Layers = list[str | None]  # paths of modules; None stands for a layer without weights
_LEAVES = ("kernel", "scale", "slope", "bias", "mean", "var")  # in the order of Keras' weights
_NAMES = {"scale": "gamma", "slope": "alpha", "mean": "moving_mean", "var": "moving_variance"}
# Files of Keras 1 for Theano hold convolutions channels first; Keras turns them where the shapes say so.
_CHANNELS_FIRST = "D C X Y -> X Y C D"


def keras_table(config: FaceConfig, shapes: Tree) -> Table:
    """Rows from (number of the layer, number of its array) to parameters and batch statistics."""
    flat: dict[str, Any] = traverse_util.flatten_dict(shapes, sep="/")
    leaves = {path: tuple(leaf.shape) for path, leaf in flat.items()}
    rows = []
    for i, module in enumerate(keras_layers(config)):
        for j, leaf in enumerate(leaf for leaf in _LEAVES if f"{module}/{leaf}" in leaves):
            path = f"{module}/{leaf}"
            rows += _rows(f"{i}.{j}", path, leaves[path])
    return Table(rows, ORDER)


def _rows(source: str, path: str, shape: tuple[int, ...]) -> list[Row]:
    if path.endswith("/slope"):
        return [Row(source, path, "X Y C -> (X Y C)", sizes={"X": 1, "Y": 1})]
    if len(shape) < 4:
        return [Row(source, path)]
    if _depthwise(path):
        return [Row(source, path, "X Y D C -> X Y C D")]
    return [Row(source, path), Row(source, path, _CHANNELS_FIRST)]


def _depthwise(path: str) -> bool:
    return any(name in path for name in ("/cheap/", "/downsample/", "/shortcut_0/", "gdc_dw/"))


def keras_names(config: FaceConfig, shapes: Tree) -> dict[str, list[str]]:
    """Layers and their weights as Keras would call them, for a network that was not read from a file."""
    leaves = traverse_util.flatten_dict(shapes, sep="/")
    return {
        module.replace("/", "_"): [
            f"{module.replace('/', '_')}/{_NAMES.get(leaf, 'beta' if _normalises(module, leaves) else leaf)}:0"
            for leaf in _LEAVES
            if f"{module}/{leaf}" in leaves
        ]
        for module in keras_layers(config)
    }


def _normalises(module: str, leaves: Mapping[str, object]) -> bool:
    return f"{module}/mean" in leaves


def keras_layers(config: FaceConfig) -> list[str]:
    """The modules with weights in the order of Keras' layers; ValueError for networks that Keras does not have."""
    match config.network:
        case "vgg_face" | "age" | "gender" | "race":
            convolutions = [f"conv{i}_{j}" for i, (_, n) in enumerate(vgg_face.BLOCKS, 1) for j in range(1, n + 1)]
            head = "fc8" if config.network == "vgg_face" else "predictions"
            return [*convolutions, "fc6", "fc7", *([head] if config.classes else [])]
        case "facenet":
            return list(_facenet())
        case "openface":
            return list(_openface())
        case "deepface":
            return ["C1", "C3", "L4", "L5", "L6", "F7", *(["F8"] if config.classes else [])]
        case "deepid":
            return ["Conv1", "Conv2", "Conv3", "Conv4", "fc11", "fc12"]
        case "arcface":
            return list(_arcface())
        case "ghostfacenet":
            return list(_ghostfacenet())
        case "emotion":
            return [*(f"conv_{i}" for i in range(1, 6)), *(f"fc_{i}" for i in range(1, 4))]
    raise ValueError(f"there is no Keras form of the network {config.network!r}")


def _merged(*branches: Layers) -> Iterator[str]:
    """Branches that meet at their ends, in the order of their inputs there."""
    for distance in range(max(map(len, branches)), 0, -1):
        for branch in branches:
            if distance <= len(branch) and (layer := branch[-distance]):
                yield layer


def _unit(path: str, activation: bool = True) -> Layers:
    return [f"{path}/conv", f"{path}/bn", *([None] if activation else [])]


def _facenet() -> Iterator[str]:
    def block(prefix: str, branches: Sequence[facenet.Branch]) -> Iterator[str]:
        chains = []
        for i, branch in enumerate(branches):
            names = [f"{prefix}/branch_{i}" + (f"_{k}" if len(branch) > 1 else "") for k in range(len(branch))]
            chains.append([layer for name in names for layer in _unit(name)])
        yield from _merged(*chains)

    def residuals(name: str, count: int, branches: Sequence[facenet.Branch]) -> Iterator[str]:
        for i in range(count):
            yield from block(f"{name}_{i}/mixed", branches)
            yield f"{name}_{i}/up"

    for name, _ in facenet.STEM:
        yield from (layer for layer in _unit(name) if name and layer)
    yield from residuals("block35", 5, facenet.BLOCK_35)
    yield from block("mixed_6a", facenet.MIXED_6A)
    yield from residuals("block17", 10, facenet.BLOCK_17)
    yield from block("mixed_7a", facenet.MIXED_7A)
    yield from residuals("block8", 6, facenet.BLOCK_8)
    yield from ("bottleneck", "bottleneck_bn")


def _openface() -> Iterator[str]:
    for i in range(1, 4):
        yield from (f"conv{i}/conv", f"conv{i}/bn")
    for block in openface.BLOCKS:
        branches: list[Layers] = []
        for name, used in (("branch_3x3", block.three), ("branch_5x5", block.five)):
            if used:  # a padding stands between the two
                branches.append([*_unit(f"{block.name}/{name}_0"), None, *_unit(f"{block.name}/{name}_1")])
        if block.pool_channels:
            branches.append([*_unit(f"{block.name}/branch_pool"), None])
        if block.one:
            branches.append(_unit(f"{block.name}/branch_1x1"))
        yield from _merged(*branches)
    yield "dense_layer"


def _arcface() -> Iterator[str]:
    yield from ("conv1_conv", "conv1_bn", "conv1_prelu")
    for stage, (_, units) in enumerate(arcface.STAGES, 2):
        for i in range(units):
            unit = f"conv{stage}_{i}"
            body: Layers = [f"{unit}/{name}" for name in ("bn_1", "conv_1", "bn_2", "prelu_1", "conv_2", "bn_3")]
            yield from _merged([f"{unit}/conv_0", f"{unit}/bn_0"] if i == 0 else [], body)
    yield from ("bn", "dense", "embedding")


def _ghostfacenet() -> Iterator[str]:
    def prelu(path: str) -> Layers:
        return [f"{path}/conv", f"{path}/bn", f"{path}/prelu"]

    yield from ("stem/conv", "stem/bn", "stem/prelu")
    channels = ghostfacenet.STEM
    for i, (_, _, out, stride, squeeze) in enumerate(ghostfacenet.BOTTLENECKS):
        unit = f"bottlenecks_{i}"
        shortcut: Layers = []
        if stride > 1 or out != channels:
            shortcut = [*_unit(f"{unit}/shortcut_0", False), *_unit(f"{unit}/shortcut_1", False)]
        body: Layers = [*prelu(f"{unit}/ghost_1/primary"), *prelu(f"{unit}/ghost_1/cheap"), None]
        body += _unit(f"{unit}/downsample", False) if stride > 1 else []
        body += [f"{unit}/se/{name}" for name in ("reduce", "prelu", "expand")] + [None, None] if squeeze else []
        body += [*_unit(f"{unit}/ghost_2/primary", False), *_unit(f"{unit}/ghost_2/cheap", False), None]
        yield from _merged(shortcut, body)
        channels = out
    yield from ("tail/conv", "tail/bn", "tail/prelu", "gdc_dw", "gdc_bn", "gdc_conv", "pre_embedding")
