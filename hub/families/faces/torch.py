"""The names of deepface's PyTorch files (0.0.103, `*.pth`): they follow the paths of our parameters, layer by layer.

Flattened maps are channels first there and channels last here, so dense layers behind them are rearranged.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any

from flax import traverse_util

from ....models.faces.config import FaceConfig
from ...files.placement import Tree
from ...mapping import Row, Table

_LEAVES = {"kernel": "weight", "scale": "weight", "slope": "weight", "mean": "running_mean", "var": "running_var"}
_CONV, _DENSE = "D C X Y -> X Y C D", "F D -> D F"


def torch_table(config: FaceConfig, shapes: Tree) -> Table:
    """One row for every parameter and batch statistic of a network."""
    flat: dict[str, Any] = traverse_util.flatten_dict(shapes, sep="/")
    leaves = {path: tuple(leaf.shape) for path, leaf in flat.items()}
    renames = [(r"^module\.", "")]  # what torch's DataParallel puts before every name
    ignore = [r".*\.num_batches_tracked"]
    if config.network == "facenet":  # its normalisations have no gain: files hold ones, which `check_gains` proves
        ignore.append(GAINS)
    return Table(tuple(_rows(config, leaves)), renames, ignore)


GAINS = r"(.*\.)?(bn|bottleneck_bn)\.weight"


def _rows(config: FaceConfig, leaves: Mapping[str, tuple[int, ...]]) -> Iterator[Row]:
    for path, shape in leaves.items():
        pattern, sizes = _arranged(config, path, len(shape))
        yield Row(torch_name(config.network, path), path, pattern, sizes=sizes)


def torch_name(network: str, path: str) -> str:
    """The published name of a parameter."""
    module, _, leaf = path.rpartition("/")
    return f"{_module(network, module)}.{_LEAVES.get(leaf, leaf)}"


def _module(network: str, path: str) -> str:
    match network:
        case "facenet":
            path = re.sub(r"^(block\d+)_(\d+)", r"\1/\2", path).replace("/mixed/", "/")
            path = re.sub(r"(branch_\d)_(\d)", r"\1/\2", path)
        case "arcface":
            path = re.sub(r"^(conv[2-5])_(\d+)", r"backbone/\1/\2", path)
            path = re.sub(r"^(conv1_)", r"backbone/\1", path)
        case "openface":
            path = re.sub(r"(branch_[35]x[35])_(\d)", r"\1/\2", path)
        case "ghostfacenet":
            path = re.sub(r"(bottlenecks|shortcut)_(\d+)", r"\1/\2", path)
        case "minifasnet_v2" | "minifasnet_v1se":
            path = re.sub(r"_model_(\d+)", r"/model/\1", path)
        case "age" | "gender" | "race":
            path = re.sub(r"^(conv|fc)", r"backbone/\1", path)
        case "dlib":
            path = re.sub(r"unit_(\d+)", r"unit/\1", path)
    return path.replace("/", ".")


def _arranged(config: FaceConfig, path: str, rank: int) -> tuple[str, dict[str, int]]:
    """Pattern of a row, with the sizes that it leaves open."""
    module, _, leaf = path.rpartition("/")
    if module in ("L4", "L5", "L6"):
        side = {"L4": 9, "L5": 7, "L6": 5}[module]
        kernel = "P D (C X Y) -> P (X Y C) D", {"X": side, "Y": side}
        return kernel if leaf == "kernel" else ("D X Y -> X Y D", {})
    if leaf != "kernel":
        return "", {}
    if (sides := _flattened(config, module)) is not None:
        return "F (D X Y) -> (X Y D) F", {"X": sides[0], "Y": sides[1]}
    return (_CONV if rank == 4 else _DENSE), {}


def _flattened(config: FaceConfig, module: str) -> tuple[int, int] | None:
    """Rows and columns of the map that a dense layer flattens; None where there is none."""
    rows, columns = config.image_size
    match config.network, module:
        case "arcface", "dense":
            return -(-rows // 16), -(-columns // 16)
        case "deepid", "fc11" | "fc12":
            third = [((((side - 3) // 2 - 2) // 2) - 2) // 2 for side in (rows, columns)]
            return (third[0], third[1]) if module == "fc11" else (third[0] - 1, third[1] - 1)
        case "deepface", "F7":
            last = [((-(-(side - 10) // 2) - 8 - 8 - 7) // 2 + 1) - 4 for side in (rows, columns)]
            return last[0], last[1]
    return None
