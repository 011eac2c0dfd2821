"""MTCNN's published weights out of the files of the `mtcnn` package (MIT), which is data here: it is never imported."""

import importlib.util
from pathlib import Path
from typing import Any

import jax
import numpy as np

from ...models.mtcnn import ONET, RNET, PNet

Tree = dict[str, Any]

# Arrays of each file in order: (module, (leaf, ...)) with R-Net's and O-Net's heads behind their dense layer.
_DENSE = [("dense", ("kernel", "bias")), ("prelu", ("slope",))]
_HEADS = {
    "pnet": [("box", ("kernel", "bias")), ("face", ("kernel", "bias"))],
    "rnet": [*_DENSE, ("box", ("kernel", "bias")), ("face", ("kernel", "bias"))],
    "onet": [*_DENSE, ("box", ("kernel", "bias")), ("points", ("kernel", "bias")), ("face", ("kernel", "bias"))],
}
_NETWORKS = {"pnet": (PNet(), 3, 12), "rnet": (RNET, 3, 24), "onet": (ONET, 4, 48)}


def load_mtcnn(folder: Path | None = None) -> dict[str, Tree]:
    """Parameters of "pnet", "rnet" and "onet" from `folder` (default: the installed package's weights).

    ValueError where the package is missing or a file holds other arrays than expected.
    """
    import joblib  # comes with the package

    folder = folder or _package_folder()
    return {name: _read(joblib.load(folder / f"{name}.lz4"), folder / f"{name}.lz4", name) for name in _NETWORKS}


def _package_folder() -> Path:
    spec = importlib.util.find_spec("mtcnn")
    if spec is None or not spec.submodule_search_locations:
        raise ValueError("the face detector's weights come with the package mtcnn: pip install 'omnax[media]'")
    return Path(spec.submodule_search_locations[0]) / "assets" / "weights"


def _read(arrays: list[np.ndarray], path: Path, name: str) -> Tree:
    network, convolutions, side = _NETWORKS[name]
    tree: Tree = {"features": {}}
    remaining = iter(arrays)
    for i in range(1, convolutions + 1):
        tree["features"][f"conv{i}"] = {"kernel": next(remaining), "bias": next(remaining)}
        tree["features"][f"prelu{i}"] = {"slope": np.ravel(next(remaining))}
    for module, leaves in _HEADS[name]:
        tree[module] = {leaf: next(remaining) for leaf in leaves}
    image = jax.ShapeDtypeStruct((1, side, side, 3), np.float32)
    expected = jax.tree.map(lambda leaf: leaf.shape, jax.eval_shape(network.init, jax.random.key(0), image)["params"])
    got = jax.tree.map(lambda leaf: tuple(leaf.shape), tree)
    if got != expected or next(remaining, None) is not None:
        raise ValueError(f"{path} holds arrays of shapes {got}, expected {expected}")
    return tree
