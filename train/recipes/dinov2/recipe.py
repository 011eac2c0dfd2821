"""Self-supervised ViTs: DINO, iBOT, DINOv2 as published, and distillation from a frozen teacher (configs/dinov2.py)."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from .... import hub
from ....data import pipeline, preprocess
from ....data.images import multicrop
from ....data.images.masking import MaskConfig, mask_crops, masked_bound
from ....data.images.multicrop import CropsConfig
from ....data.images.transforms import Example, keep
from ....data.lookup import lookup
from ....kernels.interpolation import resize_positions
from ....kernels.pca import pca_colors
from ....models.dinov2 import Dinov2, Dinov2Config, Head, HeadConfig, probe_features
from ....models.layers import stack_layers, unstack_layers
from ....models.ranges import NonNegative, PositiveFraction, Whole
from ...evaluation import evaluators
from ...evaluation.host import put, replicated
from ...evaluation.pictures import draw_self_distillation
from ...evaluation.processor import processor_of
from ...inputs import DataConfig, evaluation_batches, open_checked, warn_normalization
from ...optimizer import Multiplier, OptimizerConfig
from ...recipe import Evaluator, Player, Recipe
from ...rules import Rules, Tree
from ...settings import RunConfig, dtype_of
from ...state import TrainState
from .self_distillation import LossConfig, Networks, Step, TeacherConfig, count_masked


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(RunConfig):
    """Settings of the recipe `dinov2`; the teacher's momentum is `ema.decay` -> `ema.decay_end`."""

    model: Dinov2Config
    dtype: str = "float32"  # of the matrix products
    dino_head: HeadConfig = dataclasses.field(default_factory=HeadConfig)
    ibot_head: HeadConfig | None = None  # None: patches share the dino_head
    teacher_model: Dinov2Config | None = None  # of a frozen teacher; its heads have the student's prototypes
    teacher: TeacherConfig = dataclasses.field(default_factory=TeacherConfig)
    losses: LossConfig = dataclasses.field(default_factory=LossConfig)
    crops: CropsConfig = dataclasses.field(default_factory=CropsConfig)
    mask: MaskConfig = dataclasses.field(default_factory=MaskConfig)
    data: DataConfig
    optimizer: OptimizerConfig  # its rules come from the four fields below
    layer_decay: PositiveFraction = 1.0  # the learning rate of layer i is multiplied by layer_decay^(depth + 1 - i)
    patch_embed_rate: NonNegative = 1.0  # multiplies the learning rate of the patch embedding
    freeze_last_layer: Whole = 0  # steps before the prototypes move
    freeze_gain: bool = False  # prototypes keep norm 1 (DINO, iBOT: norm_last_layer)
    clip_each: bool = False  # gradients are clipped parameter by parameter (DINO, iBOT), not network by network
    evaluators: tuple[str, ...] = ("knn",)  # also "linear_probe", "linear_heads" (as published), "pca"

    def __post_init__(self) -> None:
        if self.teacher.frozen != (self.teacher_model is not None):
            raise ValueError("teacher.frozen and teacher_model go together: distillation needs both")
        if self.ema is None:
            raise ValueError(
                "ema must be set: the average of the student is its teacher (and the result of distillation)"
            )
        if self.losses.block and self.teacher.centering != "sinkhorn_knopp":
            raise ValueError(
                f"losses.block balances targets by Sinkhorn-Knopp, but teacher.centering is {self.teacher.centering!r}"
            )
        if self.batch_size % (self.mask.group * self.accumulation):
            raise ValueError(
                f"batch_size {self.batch_size} is not divisible into {self.accumulation} micro-batches of groups of "
                f"mask.group {self.mask.group} images"
            )
        for name in ("global_size", "local_size"):
            if getattr(self.crops, name) % self.model.patch_size:
                size = getattr(self.crops, name)
                raise ValueError(f"crops.{name} {size} is not divisible by model.patch_size {self.model.patch_size}")
        if self.losses.ibot and not self.teacher.frozen and not self.model.mask_token:
            raise ValueError("losses.ibot needs model.mask_token=True")

    @property
    def masks(self) -> bool:
        """Whether students see masked images: not without an iBOT term, and not in distillation."""
        return bool(self.losses.ibot) and not self.teacher.frozen

    @property
    def grid(self) -> tuple[int, int]:
        """Patches of a global crop."""
        side = self.crops.global_size // self.model.patch_size
        return side, side

    @property
    def bound(self) -> int:
        """The most patches of a group of images that are compared with the teacher's."""
        if not self.masks:
            return 2 * self.mask.group * math.prod(self.grid)
        # Micro-batches take rows from everywhere, so the ratios of a group are no longer spread evenly.
        spread = self.accumulation == 1
        return masked_bound(self.mask if spread else dataclasses.replace(self.mask, stratified=False), self.grid)


def make_recipe(config: Config) -> Recipe:
    """The recipe of a config; reads no data yet."""
    step = make_step(config)
    side = config.crops.global_size

    def init(rng: Array) -> tuple[Tree, Tree]:
        keys = jax.random.split(rng)
        image = jnp.zeros((1, side, side, config.model.num_channels))
        params = step.networks.init(keys[0], image)
        if config.teacher.frozen:
            params["teacher"] = step.teacher_networks.init(keys[1], image)
        return params, {"center": step.initial_centers()}

    return Recipe(
        init=init,
        players=(Player(step.loss, make_optimizer_config(config)),),
        sharding=sharding_rules(config),
        batch=batch_shapes(config),
        data=train_batches(config),
        evaluators=make_evaluators(config, step.networks),
        inspect=lambda: open_checked(config.data, config.data.test_split),
        prepare=(lambda state, batch, rng: count_masked(batch, config.accumulation)) if config.masks else None,
        load=lambda path: load(path, config),
        adapt=lambda params: adapt(params, config),
        bundle=lambda params: make_bundle(config, params),
        flops_per_step=float(num_flops(config)),
        pictures=draw_self_distillation,
    )


def make_step(config: Config) -> Step:
    """Networks and losses of the config."""
    dtype = dtype_of(config.dtype)
    heads = (Head(config.dino_head, dtype), Head(config.ibot_head, dtype) if config.ibot_head else None)
    teacher_model = config.teacher_model or config.model
    return Step(
        networks=Networks(Dinov2(config.model, dtype), *heads),
        teacher_networks=Networks(Dinov2(teacher_model, dtype), *heads),
        teacher=config.teacher,
        losses=config.losses,
        groups=config.batch_size // config.accumulation // config.mask.group,
        bound=config.bound,
    )


def batch_shapes(config: Config) -> dict[str, jax.ShapeDtypeStruct]:
    """One global batch: "global" [B, 2, S, S, C], "local" [B, L, s, s, C] and "masked" [B, 2, X, Y] bool."""
    c = config.crops
    shapes: dict[str, tuple[tuple[int, ...], type]] = {
        "global": ((2, c.global_size, c.global_size, 3), jnp.float32),
        "local": ((c.local_count, c.local_size, c.local_size, 3), jnp.float32),
        "masked": ((2, *config.grid), jnp.bool_),
    }
    return {
        name: jax.ShapeDtypeStruct((config.batch_size, *shapes[name][0]), shapes[name][1]) for name in fields(config)
    }


def fields(config: Config) -> list[str]:
    """The arrays of a batch."""
    present = {"global": True, "local": config.crops.local_count > 0, "masked": config.masks}
    return [name for name, used in present.items() if used]


def train_batches(config: Config) -> Callable[[tuple[int, int]], pipeline.Batches]:
    """Endless shuffled batches of crops and masks."""

    def open_shard(shard: tuple[int, int]) -> pipeline.Batches:
        data = config.data
        steps = [preprocess.build(data.preprocess), multicrop.multicrop(config.crops)]
        if config.masks:
            steps.append(mask_crops(config.mask, config.grid, config.seed))
        steps.append(keep(fields(config)))

        def transform(example: Example, rng: np.random.Generator) -> Example:
            for step in steps:
                example = step(example, rng)
            return example

        stream = pipeline.Stream(data.open(data.train_split), transform)
        reading = pipeline.Reading(shard, data.threads, data.workers)
        return pipeline.train([stream], batch_size=config.batch_size, seed=config.seed, reading=reading)

    return open_shard


def make_evaluators(config: Config, networks: Networks) -> tuple[Evaluator, ...]:
    """The evaluators that the config names, on the averaged student (the teacher)."""
    data = config.data
    train, test = (evaluation_batches(data, s, config.batch_size) for s in (data.train_split, data.test_split))
    blocks = min(4, config.model.depth)

    def features(params: Tree, variables: Tree, image: Array) -> Array:
        return networks.tokens(params, image[:, None])[0][:, 0]

    def all_features(params: Tree, variables: Tree, image: Array) -> Array:
        return probe_features(networks.backbone, params["backbone"], image, blocks)

    def on(
        features: evaluators.Apply, make: Callable[..., Evaluator], **options: int
    ) -> Callable[[TrainState], dict[str, float | np.ndarray]]:
        def run(state: TrainState) -> dict[str, float | np.ndarray]:
            classes = len(data.open(data.test_split).class_names)  # known once the data are opened
            return make("", features, train, test, classes, **options).run(state)

        return run

    @replicated
    def maps(params: Tree, image: Array) -> dict[str, Array]:
        image = image[: 2 * PICTURES : 2]
        out: Any = networks.backbone.apply({"params": params["backbone"]}, image)
        return {"images": image, "colors": pca_colors(out["patches"])[0]}

    def pca(state: TrainState) -> dict[str, float | np.ndarray]:
        return jax.device_get(maps(state.averaged_params, put(next(iter(test())))["image"]))

    runs = {
        "knn": on(features, evaluators.knn),
        "linear_probe": on(features, evaluators.linear_probe),
        "linear_heads": on(all_features, evaluators.linear_heads, blocks=blocks),
        "pca": pca,
    }
    return tuple(Evaluator(name, lookup(runs, name, "evaluator")) for name in config.evaluators)


PICTURES = 10  # images in the PCA picture


def make_optimizer_config(config: Config) -> OptimizerConfig:
    """The optimiser with the rules of dinov2:dinov2/utils/param_groups.py: layer-wise rates, no decay on 1-D parts."""
    model = config.model
    first = config.layer_decay ** (model.depth + 1)
    rates = tuple(config.layer_decay ** (model.depth - i) for i in range(model.depth))
    blocks: list[tuple[str, Multiplier]] = [(rf"backbone/encoder/blocks_{i}/.*", rate) for i, rate in enumerate(rates)]
    if model.scan:
        blocks = [(r"backbone/encoder/blocks/.*", rates)]
    trained: list[tuple[str, bool]] = [(r"teacher/.*", False)] if config.teacher.frozen else []
    if config.freeze_gain:
        trained.append((r".*_head/last_layer/gain", False))
    networks = [
        "backbone",
        "dino_head",
        *(["ibot_head"] if config.ibot_head else []),
        *(["teacher"] if trained else []),
    ]
    groups = [(r".*", "each")] if config.clip_each else [(rf"{name}/.*", name) for name in networks]
    return dataclasses.replace(
        config.optimizer,
        trainable=(*trained, (r".*", True)),
        lr_multiplier=(
            (r"backbone/patch_embed/.*", first * config.patch_embed_rate),
            (r"backbone/embed/.*", first),
            *blocks,
            (r".*", 1.0),
        ),
        decay_multiplier=((r".*/(bias|scale|gamma)", 0.0), (r".*", 1.0)),
        clip_groups=tuple(groups),
        delay=((r".*_head/last_layer/.*", config.freeze_last_layer), (r".*", 0)),
    )


def sharding_rules(config: Config) -> Rules[str]:
    """Backbone: heads and MLP columns over `tensor`, widths over `fsdp`. Prototypes over both: they must divide."""
    rules = [
        (r".*_head/last_layer/direction", "- fsdp+tensor"),
        (r".*_head/last_layer/gain", "fsdp+tensor"),
        (r".*attn/(query|key|value)/kernel", "fsdp tensor -"),
        (r".*attn/out/kernel", "tensor - fsdp"),
        (r".*mlp/(fc1|gate)/kernel", "fsdp tensor"),
        (r".*mlp/(fc1|gate)/bias", "tensor"),
        (r".*mlp/fc2/kernel", "tensor fsdp"),
        (r".*", "auto"),
    ]
    if config.model.qkv_bias:
        rules.insert(0, (r".*attn/(query|key|value)/bias", "tensor -"))
    return tuple(rules)


def num_flops(config: Config) -> int:
    """Of a step: the teacher's forward pass on the global crops, three times the student's on all; heads included."""
    student, teacher = config.model, config.teacher_model or config.model
    c = config.crops
    seen = 2 * student.num_forward_flops(c.global_size) + c.local_count * student.num_forward_flops(c.local_size)
    patches = config.bound / config.mask.group if config.losses.ibot else 0
    dino, ibot = (head_flops(head, student.width) for head in (config.dino_head, config.ibot_head or config.dino_head))
    student_heads, teacher_heads = (crops * dino + patches * ibot for crops in (2 + c.local_count, 2))
    forward = 2 * teacher.num_forward_flops(c.global_size) + teacher_heads
    return int(config.batch_size * (3 * (seen + student_heads) + forward))


def head_flops(head: HeadConfig, width: int) -> int:
    """Of one token through a head."""
    inner = width * head.hidden + (head.layers - 2) * head.hidden**2 + head.hidden * head.bottleneck
    return 2 * (inner + head.bottleneck * head.prototypes)


def make_bundle(config: Config, params: Tree) -> hub.Bundle:
    """The backbone as it is published, with the preprocessing that it was evaluated with.

    The format "run" holds its heads too.
    """
    data, side = config.data, config.crops.global_size
    processor = processor_of(data.preprocess_test, _evaluated_size(data, side), config.model.num_channels)
    heads = {name: params[name] for name in ("dino_head", "ibot_head") if name in params}
    # Only the official files mean the interpolation of positions that training used.
    return hub.Bundle(
        Dinov2(config.model), params["backbone"], config.model, processor, "official", variables={"heads": heads}
    )


def _evaluated_size(data: DataConfig, side: int) -> tuple[int, int]:
    """The size that the last resize or crop of the evaluation leaves; that of the global crops without one."""
    sizes = [step[1]["size"] for step in data.preprocess_test if not isinstance(step, str) and "size" in step[1]]
    size = sizes[-1] if sizes else side
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def load(path: str, config: Config) -> Tree:
    """A published backbone under "backbone/", and heads where the file has them (published ones do not: skip those)."""
    bundle = hub.load(path, num_heads=(config.teacher_model or config.model).num_heads)
    warn_normalization(path, bundle.processor, multicrop.IMAGENET_MEAN, multicrop.IMAGENET_STD)
    return adapt({"backbone": bundle.params} | bundle.variables.get("heads", {}), config)


def adapt(params: Tree, config: Config) -> Tree:
    """Fits the parameters of another run or file to the config; in distillation they are the frozen teacher's."""
    if config.teacher_model is None:
        return fit(params, config.model)
    return {"teacher": fit({name: params[name] for name in params if name != "teacher"}, config.teacher_model)}


def fit(params: Tree, model: Dinov2Config) -> Tree:
    """Brings parameters into the model's layer layout, and positions to its `image_size`."""
    params = (stack_layers if model.scan else unstack_layers)(params)
    embed = params["backbone"]["embed"]
    table, prefix = embed["pos_embed"], int(model.class_position)
    side, wanted = math.isqrt(table.shape[1] - prefix), model.image_size // model.patch_size
    table = resize_positions(table, (side, side), (wanted, wanted), model.pos_interpolation)
    return params | {"backbone": params["backbone"] | {"embed": embed | {"pos_embed": table}}}
