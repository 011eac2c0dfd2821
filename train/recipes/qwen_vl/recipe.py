"""Qwen-VL, 2.5 and 3: next-token prediction over packed conversations, in stages that train parts of the model.

The stages are in configs/qwen_vl.py and configs/qwen3_vl.py.
"""

import dataclasses
import functools
import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from .... import hub
from ....data.conversations import packing
from ....data.conversations.packing import Packer, RowShape
from ....data.conversations.qwen_vl import Windows, make_processor
from ....data.conversations.turns import Conversations, conversation_source
from ....data.drawn.visual_questions import VisualQuestions, documents
from ....data.prefetch import process_shard
from ....hub.families.qwen_vl.family import abstract, read_documents
from ....models.layers import stack_layers, unstack_layers
from ....models.lora import merge
from ....models.qwen_vl.decoding import vision_input
from ....models.qwen_vl.experts import RouterLoad
from ....models.qwen_vl.model import QwenVL, QwenVLConfig, forward, init_params
from ....models.qwen_vl.vision import VisionConfig
from ....models.ranges import Count, NonNegative, Positive, Whole
from ....objectives.language_modeling import IGNORE, Weighting, next_token_loss, token_losses, token_weights
from ....objectives.load_balance import Pool, load_balance
from ....storage.paths import as_path
from ...evaluation.host import put, replicated
from ...evaluation.pictures import draw_language
from ...optimizer import OptimizerConfig
from ...recipe import Batch, Evaluator, Loss, Player, Recipe
from ...rules import Rules, Tree, flatten, match_rules, unflatten
from ...settings import RunConfig, dtype_of
from ...sharding import batch_sharding, param_specs
from ...state import TrainState


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What is read. A stream is a dict: name, weight, and what `conversation_source` or `VisualQuestions` takes."""

    processor: str = ""  # checkpoint directory with tokenizer.json and so on; empty: that of the drawn questions
    streams: tuple[Mapping[str, Any], ...]
    tests: tuple[Mapping[str, Any], ...] = ()  # an evaluation each, called by their "label", "task" or "name"
    row: RowShape
    max_pixels: Whole = 0  # of an image; 0: as the checkpoint says
    max_frame_pixels: Whole = 0  # of a video's frame
    fps: Positive = 2.0  # sampled from videos
    max_frames: Count = 768
    threads: Count = 4


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(RunConfig):
    """Settings of the recipe `qwen_vl`."""

    model: QwenVLConfig
    dtype: str = "float32"  # of the matrix products
    data: DataConfig
    weighting: Weighting = "token"  # or "sqrt", "sample": what a long answer counts beside a short one
    balance_weight: NonNegative = 0.001  # of the loss that spreads tokens over experts
    balance: Pool = "batch"  # over which tokens; or "row"
    chunk: Count = 1024  # tokens of a row whose scores are in memory at once
    # Initial matrices of deviation 1/sqrt(inputs) instead of the published 0.02, with which narrow models learn slowly.
    init_by_inputs: bool = False
    optimizer: OptimizerConfig


def make_recipe(config: Config) -> Recipe:
    """The recipe of a config; reads no data yet."""
    model = QwenVL(config.model, dtype=dtype_of(config.dtype))
    _check_mesh(config)
    return Recipe(
        init=lambda rng: ((rescale if config.init_by_inputs else lambda p: p)(init_params(model, rng)), {}),
        players=(Player(make_loss(config, model), config.optimizer),),
        sharding=sharding_rules(config.model),
        batch=batch_shapes(config),
        data=functools.partial(_open_training, config),
        evaluators=tuple(make_evaluator(config, model, test) for test in config.data.tests),
        inspect=lambda: [open_stream(test, "test") for test in config.data.tests],
        prepare=functools.partial(prepare, config),
        load=lambda path: load(path, config),
        adapt=lambda params: adapt(params, config.model),
        bundle=lambda params: make_bundle(config, params),
        flops_per_step=flops_per_step(config),
        pictures=draw_language,
    )


def _check_mesh(config: Config) -> None:
    """ValueError where experts or tokens do not divide over their mesh axis, where that has a number."""
    of_axis = {
        "expert": (config.model.text.num_experts, "model.text.num_experts"),
        "context": (config.data.row.tokens, "data.row.tokens"),
    }
    for axis, (size, name) in of_axis.items():
        devices = getattr(config.mesh, axis)
        if devices > 1 and size % devices:
            raise ValueError(f"{name} is {size}, expected a multiple of mesh.{axis} {devices}")


def rescale(params: Tree) -> Tree:
    """Kernels drawn from N(0, 0.02) -> N(0, 1/inputs); a grid of positions -> N(0, 1/4), of the patches' size."""

    def scaled(path: str, x: Array) -> Array:
        if path.endswith("pos_embed"):
            return x * 25
        if not re.fullmatch(r".*/(kernel|mlp/(gate|up|down))", path):
            return x
        heads = "/attn/" in path
        inputs = x.shape[-3] * (x.shape[-2] if path.endswith("out/kernel") else 1) if heads else x.shape[-2]
        return x / (0.02 * inputs**0.5)

    return unflatten({path: scaled(path, leaf) for path, leaf in flatten(params).items()})


def prepare(config: Config, state: TrainState | None, batch: Batch, rng: Array | None) -> Batch:
    """Adds what each position is to predict, and its weight in the mean over the whole batch of all devices.

    The mean over micro-batches that follows is so the mean over all tokens, however they fall into micro-batches.
    """
    segments = batch["segment_ids"]
    following = jnp.pad(batch["labels"][:, 1:], ((0, 0), (0, 1)), constant_values=IGNORE)
    same = jnp.pad(segments[:, 1:], ((0, 0), (0, 1))) == segments
    targets = jnp.where(same, following, IGNORE)
    weights = token_weights(targets, segments, config.weighting, config.data.row.segments + 1)
    return {**batch, "targets": targets, "weights": weights / jnp.maximum(weights.sum(), 1e-6) * config.accumulation}


def make_loss(config: Config, model: QwenVL) -> Loss:
    """Weighted cross-entropy of the next tokens, and how many of them are the likeliest."""

    def loss(params: Tree, state: TrainState, batch: Batch, rng: Array) -> tuple[Array, tuple[dict[str, Array], Tree]]:
        losses, hits, load = predict(config, model, params, batch, batch["targets"])
        total, _ = next_token_loss(losses, batch["weights"], denominator=jnp.float32(1))
        terms = {"accuracy": (hits * batch["weights"]).sum()}
        if load is not None:
            terms |= {"next_token": total}
            terms["load_balance"] = load_balance(load.chosen, load.probability, load.tokens, config.balance)
            total = total + config.balance_weight * terms["load_balance"]
        return total, (terms, {})

    return loss


def predict(
    config: Config, model: QwenVL, params: Tree, batch: Batch, targets: Array
) -> tuple[Array, Array, RouterLoad | None]:
    """Losses and hits [B, T] of the targets, and what the routers did."""
    out = forward(
        model,
        params,
        batch["tokens"],
        batch["positions"],
        vision=vision_input(batch),
        visual_index=batch["visual_index"],
        segment_ids=batch["segment_ids"],
        num_frames=config.data.row.frames,
        with_logits=False,
    )
    language = params["language"]
    tied = config.model.text.tie_embeddings
    head = language["embed_tokens"]["embedding"].T if tied else language["lm_head"]["kernel"]
    return *token_losses(out.hidden, head, targets, chunk=config.chunk), out.load


def batch_shapes(config: Config) -> dict[str, jax.ShapeDtypeStruct]:
    """One global batch, as data/conversations/packing.py makes it."""
    row, windows = config.data.row, Windows.of(config.model.vision)
    sizes: dict[str, tuple[int, ...]] = dict.fromkeys(
        ("tokens", "labels", "visual_index", "segment_ids"), (row.tokens,)
    )
    sizes |= {"positions": (row.tokens, 3), "coordinates": (row.patches, 2), "frame_ids": (row.patches,)}
    for name in windows.shifts():
        sizes[f"{name}_token"] = (int(row.limits(windows)[3]), windows.side**2)
        sizes[f"{name}_slot"] = (row.patches,)
    if windows.sizes:
        sizes["grid_sizes"] = (row.patches, 2)
    shapes = {name: jax.ShapeDtypeStruct((config.batch_size, *size), jnp.int32) for name, size in sizes.items()}
    patches = (config.batch_size, row.patches, config.model.vision.patch_dim)
    return shapes | {"patches": jax.ShapeDtypeStruct(patches, jnp.float32)}


def make_packer(config: Config) -> Packer:
    """Reads the processor's files."""
    data = config.data
    files = _documents(config)
    processor = make_processor(files, config.model)
    bounds = {"image": data.max_pixels, "video": data.max_frame_pixels}
    limited = {k: dataclasses.replace(getattr(processor, k), max_pixels=n) for k, n in bounds.items() if n}
    sampling = dataclasses.replace(processor.sampling, fps=data.fps, max_frames=data.max_frames)
    processor = dataclasses.replace(processor, sampling=sampling, **limited)
    return Packer(processor, Windows.of(config.model.vision), data.row)


def _documents(config: Config) -> dict[str, Any]:
    if not config.data.processor:
        return documents()
    directory = as_path(config.data.processor)
    if not directory.is_dir():
        raise ValueError(f"data.processor {config.data.processor!r} is not a folder, expected that of a checkpoint")
    return read_documents(directory)


def open_stream(stream: Mapping[str, Any], split: str) -> Conversations:
    """The conversations that an entry of `streams` or `tests` names."""
    if stream.get("name") == "drawn":
        return VisualQuestions(stream["task"], split, stream["size"])
    return conversation_source(stream, stream.get("split", split))


def _open_training(config: Config, shard: tuple[int, int]) -> packing.PackedBatches:
    streams = [(open_stream(stream, "train"), stream.get("weight", 1.0)) for stream in config.data.streams]
    options: dict[str, Any] = {"batch_size": config.batch_size, "seed": config.seed, "threads": config.data.threads}
    return packing.train(streams, make_packer(config), shard=shard, **options)


def make_evaluator(config: Config, model: QwenVL, test: Mapping[str, Any]) -> Evaluator:
    """Share of held-out conversations whose whole answer is the likeliest, token by token: what greedy decoding says.

    "blind" is the same with all pixels at zero: what is above it, the model has seen.
    """
    segments = config.data.row.segments + 1

    @replicated
    def count(params: Tree, batch: Batch, blind: Array) -> Array:
        batch = {**batch, "patches": jnp.where(blind, 0, batch["patches"])}
        prepared = prepare(config, None, batch, None)
        targets = prepared["targets"]
        losses, hits, _ = predict(config, model, params, batch, targets)
        learnt = targets != IGNORE
        by_segment = jax.vmap(lambda x, ids: jax.ops.segment_sum(x.astype(jnp.int32), ids, segments))
        total, right = (by_segment(x, batch["segment_ids"]) for x in (learnt, hits))
        return jnp.stack([(total > 0).sum(), ((total > 0) & (right == total)).sum(), (~jnp.isfinite(losses)).sum()])

    def run(state: TrainState) -> dict[str, float | np.ndarray]:
        shard = process_shard(batch_sharding(jax.sharding.get_mesh()), config.batch_size)
        source, packer = open_stream(test, "test"), make_packer(config)
        totals = {"exact": np.zeros(3), "blind": np.zeros(3)}
        for batch in packing.evaluate(
            source, packer, batch_size=config.batch_size, shard=shard, threads=config.data.threads
        ):
            batch = put(batch)
            for name in totals:
                totals[name] += jax.device_get(count(state.averaged_params, batch, name == "blind"))
        if bad := sum(not_finite for _, _, not_finite in totals.values()):
            raise FloatingPointError(f"the losses of {bad:.0f} tokens are not finite")
        return {name: float(right / max(number, 1)) for name, (number, right, _) in totals.items()}

    return Evaluator(test.get("label") or test.get("task") or test["name"], run)


def sharding_rules(config: QwenVLConfig) -> Rules[str]:
    """Heads, MLP columns and vocabulary over `tensor`, widths over `fsdp`, where they divide."""
    rules = [
        (r".*/attn/(query|key|value)/kernel", "fsdp tensor -|fsdp - -"),
        (r".*/attn/out/kernel", "tensor - fsdp|- - fsdp"),
        (r".*/mlp/(gate|fc1)/kernel", "fsdp tensor|fsdp -"),
        (r".*/mlp/fc2/kernel", "tensor fsdp|- fsdp"),
        (r"visual/(.*merger.*/|merger_)fc1/kernel", "fsdp tensor|fsdp -"),
        (r"visual/(.*merger.*/|merger_)fc2/kernel", "tensor fsdp|- fsdp"),
        (r"language/embed_tokens/embedding", "tensor fsdp|- fsdp"),
        (r".*", "auto"),
    ]
    if config.text.num_experts:
        experts = (("(gate|up)", "expert fsdp tensor|expert fsdp -"), ("down", "expert tensor fsdp|expert - fsdp"))
        rules = [(rf"language/.*/mlp/{name}", layout) for name, layout in experts] + rules
    return tuple(rules if config.text.tie_embeddings else [(r"language/lm_head/kernel", "fsdp tensor|fsdp -"), *rules])


def adapt(params: Tree, config: QwenVLConfig) -> Tree:
    """Brings parameters into the layer layouts of `config`."""
    scans = {"visual": config.vision.scan, "language": config.text.scan}
    return {name: (stack_layers if scans[name] else unstack_layers)(part) for name, part in params.items()}


def load(path: str, config: Config) -> Tree:
    """Published weights, straight into their shards; ValueError where they are of another architecture."""
    mesh = jax.sharding.get_mesh()
    layout = functools.partial(param_specs, sharding_rules(config.model))
    bundle = hub.load(path, mesh=None if mesh.empty else mesh, rules=layout, scan=config.model.text.scan)
    return adapt(bundle.params, config.model)


def make_bundle(config: Config, params: Tree) -> hub.Bundle:
    """What `hub.save` writes: low-rank terms merged, with the processor's files."""
    text = config.model.text
    if text.lora_rank:
        params = merge(params, text.lora_alpha / text.lora_rank)
    model = dataclasses.replace(config.model, text=dataclasses.replace(text, lora_rank=0))
    return hub.Bundle(
        model=QwenVL(model), params=params, config=model, processor=_documents(config), format="transformers"
    )


def flops_per_step(config: Config) -> float:
    """Matrix products of forward and backward pass on full rows; frozen parts need no gradients of their parameters."""
    c, row = config.model, config.data.row
    shapes = flatten(abstract(c))
    trained = match_rules(config.optimizer.trainable, shapes, "optimizer.trainable")
    total = 0.0
    chosen = c.text.experts_per_token / max(c.text.num_experts, 1)
    for path, leaf in shapes.items():
        if leaf.ndim < 2 or path.endswith(("embed_tokens/embedding", "global_query", "pos_embed")):
            continue
        visual = path.startswith("visual/")
        rows = row.patches / (c.vision.merge_size**2 if "merger" in path else 1) if visual else row.tokens
        backward = trained[path] + (not visual or any(trained[p] for p in shapes if p.startswith("visual/")))
        share = chosen if re.fullmatch(r"language/.*/mlp/(gate|up|down)", path) else 1
        total += 2 * leaf.size * share * rows * (1 + backward)
    if c.text.tie_embeddings:
        total += 6 * row.tokens * c.text.vocab_size * c.text.width
    total += 3 * 2 * row.tokens**2 * c.text.num_heads * c.text.head_dim * c.text.depth  # causal: half of all pairs
    if isinstance(c.vision, VisionConfig):  # pairs within whole frames depend on the images
        windows = c.vision.depth - len(c.vision.full_blocks)
        total += 3 * 4 * row.patches * c.vision.width * windows * c.vision.window**2
    return config.batch_size * total
