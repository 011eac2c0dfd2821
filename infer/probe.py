"""Measures a self-supervised backbone on labelled images: nearest neighbours and the published linear heads.

The two frozen evaluations of DINOv2 (arXiv 2304.07193, section 7.1): the vote of 20 nearest neighbours by class token,
and 52 linear classifiers trained in one program (train/evaluation/evaluators.py). Published: facebook/dinov2-small
on ImageNet-1k 79.0 % and 81.1 %.
"""

import argparse
import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ..hub import load
from ..models.dinov2 import Dinov2, probe_features
from ..train.evaluation import evaluators
from ..train.inputs import DataConfig, evaluation_batches
from ..train.rules import Tree
from ..train.settings import MeshConfig
from ..train.sharding import make_mesh
from ..train.state import TrainState

BLOCKS = 4  # whose class tokens the linear heads may see


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--weights", required=True, help="checkpoint: directory, file, or id of a hub repository")
    parser.add_argument("--data", required=True, help="data set: textures, folder, or the name of a TFDS data set")
    parser.add_argument("--path", default="", help="of a folder, which holds one folder per split")
    parser.add_argument("--data-dir", default="", help="where TFDS data sets lie")
    parser.add_argument("--train-split", default="train")
    parser.add_argument("--test-split", default="test")
    parser.add_argument("--steps", type=int, default=12_500, help="of the linear heads")
    parser.add_argument("--batch-size", type=int, default=128, help="of the linear heads")


def run(arguments: argparse.Namespace) -> None:
    bundle = load(arguments.weights)
    if not isinstance(bundle.model, Dinov2):
        raise ValueError(f"{arguments.weights} holds no DINO, iBOT or DINOv2 backbone")
    for name in ("steps", "batch_size"):
        if getattr(arguments, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(arguments, name)}")
    model, blocks = bundle.model, min(BLOCKS, bundle.config.depth)
    decode = ("decode", {"alpha": bundle.processor.alpha})
    data = DataConfig(
        name=arguments.data,
        path=arguments.path,
        data_dir=arguments.data_dir,
        preprocess=(),
        preprocess_test=(decode, *bundle.processor.steps, ("keep", {"keys": ("image", "label")})),
    )

    def class_tokens(params: Tree, variables: Tree, image: Float[Array, "B X Y C"]) -> Array:
        return model.apply({"params": params}, image)["cls"]  # type: ignore[index]

    def all_features(params: Tree, variables: Tree, image: Float[Array, "B X Y C"]) -> Array:
        return probe_features(model, params, image, blocks)

    state = TrainState(jnp.int32(0), bundle.params, {}, {}, {}, jax.random.PRNGKey(0))
    heads = functools.partial(
        evaluators.linear_heads, blocks=blocks, steps=arguments.steps, batch_size=arguments.batch_size
    )
    with jax.set_mesh(make_mesh(MeshConfig())):
        train, test = (evaluation_batches(data, s, 64) for s in (arguments.train_split, arguments.test_split))
        classes = len(data.open(arguments.test_split).class_names)
        found = evaluators.knn("knn", class_tokens, train, test, classes)(state)
        print(f"20 nearest neighbours: {found['accuracy']:.4f}")
        found = heads("linear_heads", all_features, train, test, classes)(state)
    pool = "with" if found["mean_patch"] else "without"
    print(f"best of the linear heads on the test split, as published: {found['best_accuracy']:.4f}")
    print(
        f"of the one chosen on a held-out tenth of the training split: {found['accuracy']:.4f} "
        f"({found['blocks']:.0f} blocks, {pool} mean patch, rate {found['learning_rate']:g})"
    )
