"""Supervised image classification with a ViT: pre-training and fine-tuning as published (configs/vit.py)."""

import dataclasses
import functools
import logging
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array

from .... import hub
from ....data.lookup import lookup
from ....data.mixing import mixup
from ....kernels.interpolation import resize_positions
from ....models.layers import stack_layers, unstack_layers
from ....models.ranges import BelowOne, NonNegative, PositiveFraction
from ....models.vit import ViT, ViTConfig
from ....objectives.classification import LOSSES, rank
from ...evaluation import evaluators
from ...evaluation.pictures import draw_classification
from ...evaluation.processor import processor_of
from ...inputs import DataConfig, evaluation_batches, normalization, open_checked, train_batches, warn_normalization
from ...optimizer import Multiplier, OptimizerConfig
from ...recipe import Batch, Evaluator, Loss, Player, Recipe
from ...rules import Rules, Tree
from ...settings import RunConfig, dtype_of
from ...state import TrainState

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(RunConfig):
    """Settings of the recipe `vit`."""

    model: ViTConfig
    dtype: str = "float32"  # of the matrix products
    data: DataConfig
    loss: str = "softmax"  # or "sigmoid"
    label_smoothing: BelowOne = 0.0
    mixup: NonNegative = 0.0  # Beta parameter; 0: none
    optimizer: OptimizerConfig
    layer_decay: PositiveFraction = 1.0  # the learning rate of layer i is multiplied by layer_decay^(depth + 1 - i)
    evaluators: tuple[str, ...] = ("accuracy",)  # also "knn", "linear_probe"


def make_recipe(config: Config) -> Recipe:
    """The recipe of a config; reads no data yet."""
    model = ViT(config.model, dtype=dtype_of(config.dtype))
    image = jax.ShapeDtypeStruct((config.batch_size, *config.model.image_size, config.model.num_channels), jnp.float32)
    optimizer = config.optimizer
    if config.layer_decay != 1:
        rates = layer_decay_rules(config.model, config.layer_decay)
        optimizer = dataclasses.replace(optimizer, lr_multiplier=rates)

    def init(rng: Array) -> tuple[Tree, Tree]:
        variables: Any = model.init(rng, jnp.zeros((1, *image.shape[1:])))
        return variables["params"], {}

    def prepare(state: TrainState, batch: Batch, rng: Array) -> Batch:
        labels = jax.nn.one_hot(batch["label"], config.model.num_classes)
        images, labels = mixup(rng, batch["image"], labels, config.mixup)
        return {"image": images, "label": labels}

    @functools.cache
    def class_names() -> tuple[str, ...]:
        return tuple(config.data.open(config.data.test_split).class_names)

    return Recipe(
        init=init,
        players=(Player(make_loss(config, model), optimizer),),
        sharding=sharding_rules(config.model),
        batch={"image": image, "label": jax.ShapeDtypeStruct((config.batch_size,), jnp.int32)},
        data=train_batches(config.data, config.batch_size, config.seed, config.model.num_classes),
        evaluators=make_evaluators(config, model),
        inspect=lambda: open_checked(config.data, config.data.test_split, config.model.num_classes),
        prepare=prepare if config.mixup else None,
        load=lambda path: load(path, config),
        adapt=lambda params: adapt(params, config.model),
        bundle=lambda params: make_bundle(config, model, params, class_names()),
        class_names=class_names,
        flops_per_step=3.0 * config.batch_size * config.model.num_forward_flops(),  # backward: two products for one
        pictures=draw_classification,
    )


def make_loss(config: Config, model: nn.Module) -> Loss:
    """Cross-entropy of the logits on the (mixed) labels; also the accuracy on the training batch."""
    objective = lookup(LOSSES, config.loss, "loss")

    def loss(params: Tree, state: TrainState, batch: Batch, rng: Array) -> tuple[Array, tuple[dict[str, Array], Tree]]:
        out: Any = model.apply({"params": params}, batch["image"], train=True, rngs={"dropout": rng})
        logits = out["logits"]
        labels = batch["label"]
        total, _ = objective(logits, labels, label_smoothing=config.label_smoothing)
        label = labels.argmax(-1) if labels.ndim > 1 else labels
        return total, ({"accuracy": (rank(logits, label) == 0).mean()}, {})

    return loss


def make_evaluators(config: Config, model: nn.Module) -> tuple[Evaluator, ...]:
    """The evaluators that the config names."""
    data, classes = config.data, config.model.num_classes
    splits = (data.train_split, data.test_split)
    train, test = (evaluation_batches(data, split, config.batch_size, classes) for split in splits)

    def outputs(params: Tree, image: Array) -> Any:
        return model.apply({"params": params}, image)

    def logits(params: Tree, variables: Tree, image: Array) -> Array:
        return outputs(params, image)["logits"]

    def features(params: Tree, variables: Tree, image: Array) -> Array:
        return outputs(params, image)["pre_logits"]

    makers = {
        "accuracy": lambda: evaluators.accuracy("test", logits, test, classes),
        "knn": lambda: evaluators.knn("knn", features, train, test, classes),
        "linear_probe": lambda: evaluators.linear_probe("linear_probe", features, train, test, classes),
    }
    return tuple(lookup(makers, name, "evaluator")() for name in config.evaluators)


def make_bundle(config: Config, model: ViT, params: Tree, labels: tuple[str, ...]) -> hub.Bundle:
    """A trained model with its preprocessing and class names, in the format that can express its pooling."""
    c = config.model
    processor = processor_of(config.data.preprocess_test, c.image_size, c.num_channels)
    return hub.Bundle(
        model=model,
        params=params,
        config=config.model,
        processor=processor,
        format="transformers" if config.model.pool == "token" else "timm",
        labels=labels if len(labels) == config.model.num_classes else None,
    )


def sharding_rules(config: ViTConfig) -> Rules[str]:
    """Heads and MLP columns over `tensor`, widths over `fsdp`; the right-hand dimensions are those of one layer."""
    rules = [
        (r".*attn/(query|key|value)/kernel", "fsdp tensor -"),
        (r".*attn/out/kernel", "tensor - fsdp"),
        (r".*mlp/fc1/kernel", "fsdp tensor"),
        (r".*mlp/fc1/bias", "tensor"),
        (r".*mlp/fc2/kernel", "tensor fsdp"),
        (r".*", "auto"),
    ]
    if config.qkv_bias:
        rules.insert(0, (r".*attn/(query|key|value)/bias", "tensor -"))
    if config.num_classes:  # the number of classes is seldom divisible
        rules.insert(0, (r"head/kernel", "fsdp tensor|fsdp -"))
    return tuple(rules)


def layer_decay_rules(config: ViTConfig, decay: float) -> Rules[Multiplier]:
    """Multipliers decay^(depth + 1 - i) for block i = 1..depth; 1 behind the blocks, decay^(depth + 1) before them."""
    rates = tuple(decay ** (config.depth - i) for i in range(config.depth))
    if config.scan:
        blocks: list[tuple[str, Multiplier]] = [(r"encoder/blocks/.*", rates)]
    else:
        blocks = [(rf"encoder/blocks_{i}/.*", rate) for i, rate in enumerate(rates)]
    return ((r"(patch_embed|embed|pre_norm)/.*", decay ** (config.depth + 1)), *blocks, (r".*", 1.0))


def load(path: str, settings: Config) -> Tree:
    """Published weights, fitted to the model; warns where the published one is another function or saw others."""
    bundle, config = hub.load(path), settings.model
    warn_normalization(path, bundle.processor, *normalization(settings.data.preprocess, config.num_channels))
    for field in ("activation", "eps", "pool", "pos_embed", "pre_logits_dim"):
        published, own = getattr(bundle.config, field), getattr(config, field)
        if published != own:
            logger.warning("%s was published with %s=%r, the config has %r", path, field, published, own)
    return adapt(bundle.params, config, bundle.config.grid)


def adapt(params: Tree, config: ViTConfig, grid: tuple[int, int] | None = None) -> Tree:
    """Brings parameters into the layer layout of `config`, and learned positions from `grid` to its grid.

    Another run's parameters come without their grid: it is that of `config` if the number of patches is, else square.
    """
    params = (stack_layers if config.scan else unstack_layers)(params)
    table = params.get("embed", {}).get("pos_embed")
    if table is None:
        return params
    if grid is None:
        prefix = int(config.class_token and config.class_position)
        grid = _guess_grid(table.shape[1] - prefix, config.grid)
    table = resize_positions(table, grid, config.grid, config.pos_interpolation)
    return params | {"embed": params["embed"] | {"pos_embed": table}}


def _guess_grid(patches: int, own: tuple[int, int]) -> tuple[int, int]:
    side = math.isqrt(patches)
    if patches == math.prod(own):
        return own
    if side**2 != patches:
        raise ValueError(f"pos_embed has {patches} patch positions, expected a square or those of the grid {own}")
    return side, side
