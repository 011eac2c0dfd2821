"""BLIP-2: a Q-Former taught by three tasks at once, then its queries taught to speak to a frozen language model.

The stages are in configs/blip2.py; "words" is one of the smoke run alone, which makes a language model to be frozen.
"""

import dataclasses
import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array

from .... import hub
from ....data import captions, pipeline, preprocess
from ....data.drawn import tiles
from ....data.lookup import lookup
from ....data.prefetch import process_shard
from ....data.sources import Source
from ....data.text.tokenizer_file import TokenizerFile
from ....data.text.tokens import Overflow
from ....hub.families.blip2.family import Blip2Processor
from ....models.blip2.model import Blip2, Blip2Config, init_params
from ....models.opt import OPT
from ....models.published import count
from ....models.ranges import BelowOne, Count
from ....models.t5 import shift_right
from ....objectives import image_text
from ...evaluation.pictures import draw_language
from ...evaluation.processor import processor_of
from ...inputs import DataConfig
from ...optimizer import OptimizerConfig
from ...recipe import Batch, Player, Recipe
from ...rules import Rules, Tree, flatten, match_rules, unflatten
from ...settings import RunConfig, dtype_of
from ...sharding import batch_sharding
from ...state import TrainState
from . import evaluation, weights
from .texts import PrefixTexts, ReaderTexts, SplitTexts, WordTexts, open_tokenizer

STAGES = ("1", "words", "2")


@dataclasses.dataclass(frozen=True, kw_only=True)
class CaptionConfig(DataConfig):
    """Captioned images (see data/captions.py), and the tokenizers of the two text models."""

    caption_key: str = ""
    distinct: bool = False  # no caption twice in a batch whose size divides the number of captions
    reader: str = ""  # folder with the tokenizer.json of the Q-Former; "": that of the drawn tiles
    language: str = ""  # folder with that of the language model
    length: Count = 32  # tokens of a text
    prompt: str = ""  # of the language model, before every caption
    overflow: Overflow = "truncate"  # captions that are too long; "error" stops the run

    def open(self, split: str) -> Source:
        """The examples of a split."""
        settings = {name: value for name, value in dataclasses.asdict(self).items() if value != ""}
        source = captions.caption_source(settings, split)
        return captions.DistinctCaptions(source) if self.distinct and split == self.train_split else source

    @functools.cached_property
    def reader_tokenizer(self) -> TokenizerFile:
        return open_tokenizer(self.reader, tiles.reader_tokenizer())

    @functools.cached_property
    def language_tokenizer(self) -> TokenizerFile:
        return open_tokenizer(self.language, tiles.language_tokenizer())


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(RunConfig):
    """Settings of the recipe `blip2`."""

    stage: str
    model: Blip2Config
    dtype: str = "float32"  # of the matrix products
    frozen_dtype: str = "float32"  # of parameters that are not trained
    data: CaptionConfig
    optimizer: OptimizerConfig
    smoothing: BelowOne = 0.1  # of labels in stage 1's contrast and captions
    negatives: image_text.Negatives = "hard"
    gather_gradient: bool = False  # of the contrast, see objectives/image_text.py
    language_dropout: bool = True  # the frozen language model drops as if it were trained (LAVIS)
    patch_tower: bool = False  # an image encoder that hands on pixels and places, set by hand (the drawn tiles)
    export: Literal["lavis", "transformers"] = "lavis"
    evaluators: tuple[str, ...] = ()  # "retrieval", "match", "captions"; "answers"

    def __post_init__(self) -> None:
        lookup(dict.fromkeys(STAGES), self.stage, "stage")
        model = self.model
        if self.stage == "1" and not (model.embed_dim and model.temperature and model.qformer.lm_head):
            raise ValueError("stage 1 needs model.embed_dim, model.temperature and model.qformer.lm_head")
        if self.stage != "1" and model.opt is None and model.t5 is None:
            raise ValueError(f"stage {self.stage!r} needs a language model: model.opt or model.t5")
        if self.stage == "words" and model.opt is None:
            raise ValueError("stage 'words' trains model.opt")
        if self.stage == "1" and self.accumulation != 1:
            raise ValueError("stage 1 compares the whole batch: accumulation has to be 1")


def make_recipe(config: Config) -> Recipe:
    """The recipe of a config; reads no data yet."""
    model = Blip2(config.model, dtype=dtype_of(config.dtype))
    losses = {"1": stage_1, "words": stage_words, "2": stage_2}
    return Recipe(
        init=functools.partial(init, config, model),
        players=(Player(functools.partial(losses[config.stage], config, model), config.optimizer),),
        sharding=SHARDING,
        batch=batch_shapes(config),
        data=lambda shard: train_batches(config, shard),
        evaluators=tuple(
            evaluation.make(name, config, model, functools.partial(test_batches, config)) for name in config.evaluators
        ),
        inspect=lambda: config.data.open(config.data.test_split),
        load=functools.partial(weights.load, config=config.model),
        adapt=lambda params: weights.adapt(params, config.model),
        bundle=functools.partial(make_bundle, config),
        flops_per_step=flops_per_step(config),
        pictures=draw_language,
    )


def init(config: Config, model: Blip2, rng: Array) -> tuple[Tree, Tree]:
    """Initial values; what is not trained lies in `frozen_dtype`."""
    params = init_params(model, rng)
    if config.patch_tower:
        params = params | {"vision": weights.patch_tower(params["vision"])}
    leaves = flatten(params)
    trained = match_rules(config.optimizer.trainable, leaves, "optimizer.trainable")
    frozen = dtype_of(config.frozen_dtype)
    return unflatten({path: x if trained[path] else x.astype(frozen) for path, x in leaves.items()}), {}


class Calls:
    """Methods of a model with these parameters, each with a key of its own for dropout."""

    def __init__(self, model: Blip2, params: Tree, rng: Array):
        self._model, self._params, self._rng, self._count = model, params, rng, 0

    def __call__(self, method: str, *args: Any, **options: Any) -> Any:
        self._count += 1
        rngs = {"dropout": jax.random.fold_in(self._rng, self._count)}
        return self._model.apply({"params": self._params}, *args, method=method, rngs=rngs, **options)


Result = tuple[Array, tuple[dict[str, Array], Tree]]


def stage_1(config: Config, model: Blip2, params: Tree, state: TrainState, batch: Batch, rng: Array) -> Result:
    """Contrast, matching and captions, added up."""
    key, *keys = jax.random.split(rng, 3)
    call, tokens = Calls(model, params, key), batch["tokens"]
    mask = tokens != 0
    image = call("encode_image", batch["image"])
    queries, kept = call("query", image, train=True)
    text = call("embed_text", call("encode_text", tokens, mask, train=True))
    scores = image_text.similarities(
        call("embed_image", queries), text, params["temperature"], gather_gradient=config.gather_gradient
    )
    contrast, terms = image_text.contrast_loss(*scores, smoothing=config.smoothing)
    # For every text another image, and for every image another text
    images, texts = (
        image_text.draw_negatives(each, key, kind=config.negatives)
        for each, key in zip(scores[::-1], keys, strict=True)
    )
    scores = call(
        "match",
        jnp.concatenate([image, image[images], image]),
        jnp.concatenate([tokens, tokens, tokens[texts]]),
        jnp.concatenate([mask, mask, mask[texts]]),
        train=True,
    )
    match, matched = image_text.match_loss(scores[: len(image)], scores[len(image) :])
    begin = tokens.at[:, 0].set(config.data.reader_tokenizer.id("[DEC]"))
    cache = call("start_caption", kept, tokens.shape[1])
    logits, _ = call("extend_caption", begin, cache, mask, train=True)
    caption, captioned = image_text.caption_loss(logits[:, :-1], tokens[:, 1:], mask[:, 1:], smoothing=config.smoothing)
    terms |= {"contrast": contrast, "match": match, "caption": caption, "temperature": params["temperature"]}
    return contrast + match + caption, (terms | matched | captioned, {})


def stage_2(config: Config, model: Blip2, params: Tree, state: TrainState, batch: Batch, rng: Array) -> Result:
    """The caption behind the image's queries, by the frozen language model."""
    options = {"train": True, "language_train": config.language_dropout}
    call = Calls(model, params, rng)
    if config.model.t5 is not None:
        labels = batch["labels"]
        mask, decoder = batch["tokens"] != 0, shift_right(labels)
        logits = call("__call__", batch["image"], batch["tokens"], mask, decoder, **options)["logits"]
        return _learn(logits, labels, labels != 0)
    tokens, pad = batch["tokens"], config.data.language_tokenizer.id("<pad>")
    logits = call("__call__", batch["image"], tokens, tokens != pad, **options)["logits"]
    return _learn(logits[:, config.model.num_queries - 1 : -1], tokens, batch["learnt"])


def stage_words(config: Config, model: Blip2, params: Tree, state: TrainState, batch: Batch, rng: Array) -> Result:
    """The language model alone retells words that stand before the caption."""
    tokens = jnp.concatenate([batch["words"], batch["tokens"]], 1)
    mask = tokens != config.data.language_tokenizer.id("<pad>")
    assert config.model.opt is not None
    options = {"train": True, "rngs": {"dropout": rng}}
    out: Any = OPT(config.model.opt, model.dtype).apply({"params": params["language"]}, tokens, mask, **options)
    return _learn(out["logits"][:, batch["words"].shape[1] - 1 : -1], batch["tokens"], batch["learnt"])


def _learn(logits: Array, labels: Array, learnt: Array) -> Result:
    loss, terms = image_text.caption_loss(logits, labels, learnt)
    return loss, (terms, {})


def batch_shapes(config: Config) -> dict[str, jax.ShapeDtypeStruct]:
    """One global batch."""
    size, length, vision = config.batch_size, config.data.length, config.model.vision
    shapes = {"tokens": jax.ShapeDtypeStruct((size, length), jnp.int32)}
    if config.stage == "words":
        words = 2 * len(tiles.TILES[0])
        shapes |= {"words": jax.ShapeDtypeStruct((size, words), jnp.int32)}
    else:
        assert vision is not None, "images come as pixels"
        image = (size, *vision.image_size, vision.num_channels)
        shapes |= {"image": jax.ShapeDtypeStruct(image, jnp.float32)}
    if config.stage != "1" and config.model.t5 is None:
        shapes |= {"learnt": jax.ShapeDtypeStruct((size, length), jnp.bool_)}
    elif config.stage != "1":
        shapes |= {"labels": jax.ShapeDtypeStruct((size, length), jnp.int32)}
    return shapes


def texts(config: Config, first: bool) -> Any:
    """The transform that makes rows of tokens of a caption."""
    data = config.data
    options: dict[str, Any] = {"length": data.length, "first": first, "overflow": data.overflow}
    if config.stage == "1":
        return ReaderTexts(data.reader_tokenizer, **options)
    if config.model.t5 is not None:
        return SplitTexts(data.language_tokenizer, prompt=data.prompt, **options)
    prefix = PrefixTexts(data.language_tokenizer, prompt=data.prompt, **options)
    return WordTexts(prefix) if config.stage == "words" else prefix


def train_batches(config: Config, shard: tuple[int, int]) -> pipeline.Batches:
    """Endless shuffled batches; ValueError for a vocabulary that is not the model's."""
    check_vocabulary(config)
    source = config.data.open(config.data.train_split)
    draw = [source.draw] if isinstance(source, captions.DistinctCaptions) else []
    steps = captions.chain(*draw, texts(config, first=False), preprocess.build(config.data.preprocess))
    reading = pipeline.Reading(shard, config.data.threads, config.data.workers)
    stream = pipeline.Stream(source, steps)
    return pipeline.train([stream], batch_size=config.batch_size, seed=config.seed, reading=reading)


def test_batches(config: Config) -> pipeline.Batches:
    """One pass over the test split, in this process's share of every batch."""
    steps = captions.chain(texts(config, first=True), preprocess.build(config.data.preprocess_test))
    shard = process_shard(batch_sharding(jax.sharding.get_mesh()), config.batch_size)
    reading = pipeline.Reading(shard, config.data.threads, config.data.workers)
    stream = pipeline.Stream(config.data.open(config.data.test_split), steps)
    return pipeline.evaluate(stream, batch_size=config.batch_size, reading=reading)


def check_vocabulary(config: Config) -> None:
    """ValueError for a tokenizer with more ids than its model has."""
    model, language = config.model, config.model.opt or config.model.t5
    readers = [("model.qformer", model.qformer.vocab_size, config.data.reader_tokenizer)]
    if config.stage != "1":
        assert language is not None
        name = "model.opt" if model.opt else "model.t5"
        readers = [(name, language.vocab_size, config.data.language_tokenizer)]
    for name, size, tokenizer in readers:
        if tokenizer.vocab_size > size:
            raise ValueError(f"{tokenizer.where} has {tokenizer.vocab_size} ids, {name}.vocab_size is {size}")


# Heads, MLP columns and vocabularies over `tensor`, widths over `fsdp`, where they divide.
SHARDING: Rules[str] = (
    (r".*(attn|cross)/(query|key|value)/kernel", "fsdp tensor -|fsdp - -|- - -"),
    (r".*(attn|cross)/out/kernel", "tensor - fsdp|- - fsdp|- - -"),
    (r".*mlp/(fc1|gate)/kernel", "fsdp tensor|fsdp -|- -"),
    (r".*mlp/fc2/kernel", "tensor fsdp|- fsdp|- -"),
    (r".*(token_embed|embed_tokens)/embedding", "tensor fsdp|- fsdp|- -"),
    (r".*", "auto"),
)


def make_bundle(config: Config, params: Tree) -> hub.Bundle:
    """What `hub.save` writes: of stage 1 the Q-Former with its heads, of stage 2 the whole that speaks.

    LAVIS's files hold neither a frozen image encoder nor the language model; transformers' hold both, and of stage 1
    neither the temperature nor the head of captions.
    """
    model, tree = weights.exported(config.model, params, config.export, first_stage=config.stage == "1")
    vision, processor = model.vision, None
    if vision is not None:
        image = processor_of(config.data.preprocess_test, vision.image_size, vision.num_channels)
        folder = config.data.reader if config.stage == "1" else config.data.language
        drawn = tiles.reader_tokenizer() if config.stage == "1" else tiles.language_tokenizer()
        processor = Blip2Processor(image, {"tokenizer.json": weights.tokenizer_document(folder, drawn)})
    metadata: dict[str, Any] = {"projection": "t5_proj" if config.model.t5 else "opt_proj"}
    if config.export == "transformers":
        metadata = {}
        if model.opt is not None:  # a newline ends what it says
            tokenizer = config.data.language_tokenizer
            ids = {"bos": tokenizer.id("</s>"), "eos": tokenizer.encode("\n")[0], "pad": tokenizer.id("<pad>")}
            metadata = {"text_config": {f"{name}_token_id": number for name, number in ids.items()}}
    return hub.Bundle(
        model=Blip2(model), params=tree, config=model, processor=processor, format=config.export, metadata=metadata
    )


def flops_per_step(config: Config) -> float:
    """Matrix products with parameters, forward and backward; what lies before all that is trained needs no gradient."""
    shapes = jax.eval_shape(lambda: init_params(Blip2(config.model), jax.random.key(0)))
    vision, length = config.model.vision, config.data.length
    total = float(vision.num_forward_flops()) if vision and config.stage != "words" else 0.0
    queries = config.model.num_queries
    rows = {"1": 2 * queries + 5 * length, "2": queries, "words": 0}[config.stage]
    total += 6.0 * rows * count(shapes["qformer"])
    if "language" in shapes and config.stage != "1":
        total += (4.0 if config.stage == "2" else 6.0) * (queries + length) * count(shapes["language"])
    return config.batch_size * total
