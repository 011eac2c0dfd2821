"""Contrastive training of two towers: CLIP, OpenCLIP, EVA-CLIP, SigLIP and LiT (configs/clip.py)."""

import dataclasses
import functools
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jax.sharding import PartitionSpec
from jaxtyping import Array

from .... import hub
from ....data import captions, pipeline, preprocess
from ....data.lookup import lookup
from ....data.prefetch import process_shard
from ....data.sources import Source
from ....data.text.bpe import TextTokenizer, load_tokenizer, train_tokenizer
from ....data.text.tokens import Overflow
from ....hub.families.clip.family import CLIPProcessor
from ....kernels.constraints import AXES
from ....models.clip import CLIP, CLIPConfig
from ....models.eva import EvaConfig
from ....models.layers import stack_layers, unstack_layers
from ....models.ranges import Count, NonNegative, PositiveFraction, Whole
from ....objectives import contrastive
from ...evaluation.pictures import draw_classification
from ...evaluation.processor import processor_of
from ...evaluation.zero_shot import prompt_tokens, retrieval, zero_shot
from ...inputs import DataConfig, normalization, warn_normalization
from ...optimizer import Multiplier, OptimizerConfig
from ...recipe import Batch, Evaluator, Loss, Player, Recipe
from ...rules import Rules, Tree
from ...settings import RunConfig, dtype_of
from ...sharding import batch_sharding
from ...state import TrainState

MAX_LEARNED = 10_000  # captions that a vocabulary is learned from


@dataclasses.dataclass(frozen=True, kw_only=True)
class CaptionConfig(DataConfig):
    """Captioned images (see data/captions.py) and their tokeniser."""

    caption_key: str = ""
    templates: tuple[str, ...] = ()  # of captions made from labels
    class_names: tuple[str, ...] = ()  # in place of the data set's own
    distinct: bool = False  # no caption twice in a batch whose size divides the number of captions
    tokenizer: str = ""  # a path; "": OpenAI's vocabulary; "learn": one learned from the training captions
    merges: Whole = 200  # at most, of a learned vocabulary
    overflow: Overflow = "truncate"  # captions that are too long; "error" stops the run

    def open(self, split: str) -> Source:
        """The examples of a split."""
        settings = {name: value for name, value in dataclasses.asdict(self).items() if value != ""}
        source = captions.caption_source(settings, split)
        return captions.DistinctCaptions(source) if self.distinct and split == self.train_split else source

    def make_tokenizer(self, context_length: int) -> TextTokenizer:
        """The tokeniser that the config names."""
        if self.tokenizer != "learn":
            return load_tokenizer(self.tokenizer or None, context_length=context_length)
        source = dataclasses.replace(self, distinct=False).open(self.train_split)
        texts = {text: None for _, found in captions.all_captions(source, MAX_LEARNED) for text in found}
        return train_tokenizer(texts, self.merges, context_length=context_length)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(RunConfig):
    """Settings of the recipe `clip`."""

    model: CLIPConfig
    dtype: str = "float32"  # of the matrix products
    data: CaptionConfig
    loss: str = "info_nce"  # or "sigmoid"
    form: contrastive.Form = "ring"  # how the loss is spread over devices: "full", "rows" or "ring"
    chunks: Count = 1  # the towers see so many parts of the batch in turn, the loss all of it (GradCache)
    optimizer: OptimizerConfig
    # Learning rates of the towers relative to the optimiser's, and their decay from layer to layer.
    image_rate: NonNegative = 1.0
    text_rate: NonNegative = 1.0
    image_layer_decay: PositiveFraction = 1.0
    text_layer_decay: PositiveFraction = 1.0
    prompts: tuple[str, ...] = ("{}",)  # templates of the zero-shot evaluation
    evaluators: tuple[str, ...] = ("zero_shot",)  # also "retrieval"

    def __post_init__(self) -> None:
        if self.loss not in contrastive.LOSSES or self.form not in contrastive.FORMS:
            raise ValueError(
                f"loss {self.loss!r}, form {self.form!r}: expected one of {contrastive.LOSSES} and one of "
                f"{contrastive.FORMS}"
            )
        if self.accumulation != 1:
            raise ValueError("a contrastive loss sees the whole batch: use chunks=, which keeps it exact")
        if self.batch_size % self.chunks:
            raise ValueError(f"batch_size {self.batch_size} is not divisible into {self.chunks} chunks")
        if (self.loss == "sigmoid") != (self.model.logit_bias_init is not None):
            raise ValueError("loss 'sigmoid' and model.logit_bias_init go together")
        if self.model.image.trunk.scan != self.model.text.scan:
            raise ValueError("model.image.trunk.scan and model.text.scan must be the same")


def make_recipe(config: Config) -> Recipe:
    """The recipe of a config; reads no data yet."""
    model = CLIP(config.model, dtype=dtype_of(config.dtype))
    trunk, text = config.model.image.trunk, config.model.text
    image = jax.ShapeDtypeStruct((config.batch_size, *trunk.image_size, trunk.num_channels), jnp.float32)
    tokens = jax.ShapeDtypeStruct((config.batch_size, text.context_length), jnp.int32)
    tokenizer = functools.cache(lambda: config.data.make_tokenizer(text.context_length))

    def init(rng: Array) -> tuple[Tree, Tree]:
        variables: Any = model.init(rng, jnp.zeros((1, *image.shape[1:])), jnp.zeros((1, 1), jnp.int32))
        return variables["params"], {}

    def clamp(state: TrainState) -> TrainState:
        return state.replace(
            params=state.params | {"logit_scale": contrastive.clamp_log_scale(state.params["logit_scale"])}
        )

    flops = sum(config.model.num_forward_flops())
    return Recipe(
        init=init,
        players=(Player(make_loss(config, model), dataclasses.replace(config.optimizer, lr_multiplier=rates(config))),),
        sharding=SHARDING,
        batch={"image": image, "tokens": tokens},
        data=lambda shard: train_batches(config, tokenizer(), shard),
        evaluators=make_evaluators(config, model, tokenizer),
        inspect=lambda: config.data.open(config.data.test_split),
        after_update=clamp if config.loss == "info_nce" else None,
        load=lambda path: load(path, config),
        adapt=lambda params: adapt(params, config.model),
        bundle=lambda params: make_bundle(config, model, tokenizer(), params),
        flops_per_step=3.0 * config.batch_size * flops,  # backward: two products for one
        pictures=draw_classification,
    )


def make_bundle(config: Config, model: CLIP, tokenizer: TextTokenizer, params: Tree) -> hub.Bundle:
    """A trained model with its preprocessing and vocabulary, in transformers' format where that has such towers."""
    trunk = config.model.image.trunk
    image = processor_of(config.data.preprocess_test, trunk.image_size, trunk.num_channels)
    return hub.Bundle(
        model=model,
        params=params,
        config=config.model,
        processor=CLIPProcessor(image, tokenizer.files(), config.model.text.context_length),
        format="open_clip" if isinstance(trunk, EvaConfig) else "transformers",
    )


def make_loss(config: Config, model: CLIP) -> Loss:
    """The contrastive loss of a batch; also how far the model is, and how many captions are there twice."""

    def encode(params: Tree, batch: Batch, rng: Array) -> tuple[Array, Array]:
        out: Any = model.apply({"params": params}, batch["image"], batch["tokens"], train=True, rngs={"dropout": rng})
        return out["image_embeds"], out["text_embeds"]

    def loss(params: Tree, state: TrainState, batch: Batch, rng: Array) -> tuple[Array, tuple[dict[str, Array], Tree]]:
        image, text = in_chunks(partial(encode, params), batch, rng, config.chunks)
        scale = jnp.exp(params["logit_scale"])
        total, terms = spread_loss(config.loss, config.form, image, text, scale, params.get("logit_bias"))
        duplicates = contrastive.count_duplicates(batch["tokens"]).astype(jnp.float32)
        return total, (terms | {"logit_scale": scale, "duplicate_captions": duplicates}, {})

    return loss


def in_chunks(
    encode: Callable[[Batch, Array], tuple[Array, Array]], batch: Batch, rng: Array, chunks: int
) -> tuple[Array, Array]:
    """`encode(batch, rng)` of the whole batch, part after part; the backward pass encodes each part again.

    Between the two passes only the embeddings are kept, so memory is that of one part, while the loss, and so the
    gradient, is that of the whole batch. Source: GradCache (arXiv 2101.06983), open_clip's --accum-freq.
    """
    if chunks == 1:
        return encode(batch, rng)
    # Part i takes every `chunks`-th row, starting at i: each device keeps the rows it has.
    parts = {k: rearrange(jnp.asarray(v), "(b a) ... -> a b ...", a=chunks) for k, v in batch.items()}
    step = jax.checkpoint(lambda part: encode(*part))
    embeds = jax.lax.map(step, (parts, jax.random.split(rng, chunks)))
    return jax.tree.map(lambda x: rearrange(x, "a b d -> (b a) d"), embeds)


def spread_loss(
    name: str, form: contrastive.Form, image: Array, text: Array, scale: Array, bias: Array | None
) -> tuple[Array, dict[str, Array]]:
    """The loss of global arrays, spread over the mesh's batch axes in the given form; as it is without a mesh."""

    def loss(image: Array, text: Array, scalars: tuple[Array, ...], **options: Any) -> tuple[Array, dict[str, Array]]:
        objective = contrastive.sigmoid_loss if name == "sigmoid" else contrastive.info_nce
        return objective(image, text, *scalars, form=form, **options)

    scalars = (scale,) if bias is None else (scale, bias)
    mesh = jax.sharding.get_abstract_mesh()
    axes = tuple(axis for axis in AXES["batch"] if axis in mesh.shape)
    if not axes:
        return loss(image, text, scalars)
    rows, everywhere = PartitionSpec(axes), PartitionSpec()
    return jax.shard_map(
        partial(loss, axis_name=axes),
        mesh=mesh,
        in_specs=(rows, rows, everywhere),
        out_specs=everywhere,
        axis_names=set(axes),
    )(image, text, scalars)


def make_evaluators(config: Config, model: CLIP, tokenizer: Callable[[], TextTokenizer]) -> tuple[Evaluator, ...]:
    """The evaluators that the config names."""
    data, length = config.data, config.model.text.context_length

    def encode_image(params: Tree, image: Array) -> Array:
        out: Any = model.apply({"params": params}, image, method=CLIP.encode_image)
        return out["embeds"]

    def encode_text(params: Tree, tokens: Array) -> Array:
        out: Any = model.apply({"params": params}, tokens, method=CLIP.encode_text)
        return out["embeds"]

    @functools.cache
    def names() -> tuple[str, ...]:
        return tuple(data.open(data.test_split).class_names)

    @functools.cache
    def prompts() -> np.ndarray:
        return prompt_tokens(tokenizer(), names(), config.prompts, length)

    @functools.cache
    def most_captions() -> int:
        return captions.most_captions(data.open(data.test_split))

    def batches(all_captions: bool = False) -> pipeline.Batches:
        count = most_captions() if all_captions else 0
        stream = pipeline.Stream(data.open(data.test_split), _preprocess(config, tokenizer(), train=False, count=count))
        shard = process_shard(batch_sharding(jax.sharding.get_mesh()), config.batch_size)
        reading = pipeline.Reading(shard, data.threads, data.workers)
        return pipeline.evaluate(stream, batch_size=config.batch_size, reading=reading)

    makers = {
        "zero_shot": lambda: zero_shot("zero_shot", encode_image, encode_text, prompts, batches),
        "retrieval": lambda: retrieval("retrieval", encode_image, encode_text, lambda: batches(all_captions=True)),
    }
    return tuple(lookup(makers, name, "evaluator")() for name in config.evaluators)


def train_batches(config: Config, tokenizer: TextTokenizer, shard: tuple[int, int]) -> pipeline.Batches:
    """Endless shuffled batches of image and tokens; ValueError for a vocabulary larger than the model's."""
    if tokenizer.vocab_size > config.model.text.vocab_size:
        raise ValueError(
            f"the tokeniser has {tokenizer.vocab_size} ids, model.text.vocab_size is {config.model.text.vocab_size}"
        )
    source = config.data.open(config.data.train_split)
    stream = pipeline.Stream(source, _preprocess(config, tokenizer, train=True, source=source))
    reading = pipeline.Reading(shard, config.data.threads, config.data.workers)
    return pipeline.train([stream], batch_size=config.batch_size, seed=config.seed, reading=reading)


def _preprocess(
    config: Config, tokenizer: TextTokenizer, train: bool, source: Source | None = None, count: int = 0
) -> Any:
    """One caption of each image is tokenised; with a `count` all, that many at most."""
    data, length = config.data, config.model.text.context_length
    one = captions.Tokenize(tokenizer, length, not train, data.overflow)
    tokenize = captions.TokenizeAll(tokenizer, length, count) if count else one
    steps = preprocess.build(data.preprocess if train else data.preprocess_test)
    draw = [source.draw] if isinstance(source, captions.DistinctCaptions) else []
    return captions.chain(*draw, tokenize, steps)


# Heads and MLP columns over `tensor`, widths over `fsdp`; the right-hand dimensions are those of one layer.
SHARDING: Rules[str] = (
    (r".*attn/(query|key|value)/kernel", "fsdp tensor -"),
    (r".*attn/(query|key|value)/bias", "tensor -"),
    (r".*attn/out/kernel", "tensor - fsdp"),
    (r".*mlp/(fc1|gate)/kernel", "fsdp tensor"),
    (r".*mlp/(fc1|gate)/bias", "tensor"),
    (r".*mlp/fc2/kernel", "tensor fsdp"),
    (r".*", "auto"),
)


def rates(config: Config) -> Rules[Multiplier]:
    """The towers' learning-rate multipliers: rate · decay^(layers behind); embeddings come before the first layer."""
    rules: list[tuple[str, Multiplier]] = []
    towers = (
        ("image/trunk", config.model.image.trunk, config.image_rate, config.image_layer_decay),
        ("text", config.model.text, config.text_rate, config.text_layer_decay),
    )
    for path, tower, rate, decay in towers:
        layers = tuple(rate * decay ** (tower.depth - i) for i in range(tower.depth))
        if decay != 1 and tower.scan:
            rules.append((rf"{path}/encoder/blocks/.*", layers))
        elif decay != 1:
            rules += [(rf"{path}/encoder/blocks_{i}/.*", value) for i, value in enumerate(layers)]
        if decay != 1:
            rules.append((rf"{path}/(\w*embed|pre_norm)(/.*)?", rate * decay ** (tower.depth + 1)))
        rules.append((rf"{path.split('/')[0]}/.*", rate))
    return (*rules, (".*", 1.0))


def load(path: str, config: Config) -> Tree:
    """Published weights in the layout of `config`; warns where they saw pixels of another mean or deviation."""
    bundle = hub.load(path)
    normal = normalization(config.data.preprocess, config.model.image.trunk.num_channels)
    warn_normalization(path, bundle.processor, *normal)
    return adapt(bundle.params, config.model)


def adapt(params: Tree, config: CLIPConfig) -> Tree:
    """Brings parameters into the layer layout of `config`."""
    return (stack_layers if config.text.scan else unstack_layers)(params)
