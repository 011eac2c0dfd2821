"""What Stable Diffusion trains on: images with captions, condition images and image prompts; or what was made of them.

Texts and image prompts are dropped here and not in the loss, so that a batch is a function of seed and position alone.
"""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ....data import captions, pipeline, preprocess
from ....data.images.edges import canny
from ....data.images.transforms import Example, Transform
from ....data.latents import LatentFolder
from ....data.sources import Source
from ....data.text.bpe import TextTokenizer, load_tokenizer, train_tokenizer
from ....models.ranges import Fraction, NonNegative, Whole
from ...inputs import DataConfig, Steps

MAX_LEARNED = 10_000  # captions that a vocabulary is learned from
CONDITIONS = ("", "file", "canny")


@dataclasses.dataclass(frozen=True, kw_only=True)
class PictureConfig(DataConfig):
    """Captioned images (see data/captions.py). `preprocess` is geometry: it ends with uint8 pixels of one size."""

    caption_key: str = ""
    condition: str = ""  # "file": the field "condition" of every example; "canny": edges of the image
    canny_low: tuple[NonNegative, ...] = (100.0, 100.0)  # the ranges that thresholds are drawn from
    canny_high: tuple[NonNegative, ...] = (200.0, 200.0)
    prompt: str = ""  # image prompts: the field with the picture; "image": the image itself
    preprocess_prompt: Steps = ()  # of image prompts: ends with what the image encoder takes
    drop_text: Fraction = 0.0  # share of examples without text, without image prompt, and without both
    drop_image: Fraction = 0.0
    drop_both: Fraction = 0.0
    drop_words: tuple[str, ...] = ()  # left out of this share of the captions
    drop_words_share: Fraction = 0.0
    tokenizer: str = ""  # a path; "": OpenAI's vocabulary; "learn": one learned from the training captions
    tokenizer_2: str = ""  # SDXL's second
    merges: Whole = 200  # at most, of a learned vocabulary

    def __post_init__(self) -> None:
        if self.condition not in CONDITIONS:
            raise ValueError(f"data.condition is {self.condition!r}, expected one of {CONDITIONS}")
        if self.drop_text + self.drop_image + self.drop_both > 1:
            raise ValueError("data.drop_text, drop_image and drop_both add up to more than 1")
        if bool(self.prompt) != bool(self.preprocess_prompt):
            raise ValueError("data.prompt and data.preprocess_prompt go together")
        if self.cached and (self.prompt or self.drop_words):
            raise ValueError(
                "data.name 'latents' has neither pictures nor words: data.prompt and drop_words are of no use"
            )

    @property
    def cached(self) -> bool:
        """Whether latents and text states are read, in the place of images and captions (infer cache-latents)."""
        return self.name == "latents"

    @property
    def pictures(self) -> tuple[str, ...]:
        """The pictures of an example besides "image"."""
        condition = ("condition",) if self.condition == "file" else ()
        return (*condition, *((self.prompt,) if self.prompt not in ("", "image") else ()))

    def open(self, split: str, pictures: Sequence[str] | None = None) -> Source:
        """The examples of a split, with the pictures that training wants or with others."""
        if self.cached:
            return LatentFolder(Path(self.path))
        settings = {name: value for name, value in dataclasses.asdict(self).items() if value != ""}
        chosen = self.pictures if pictures is None else pictures
        return captions.caption_source(settings | {"pictures": chosen}, split)

    def make_tokenizers(self, lengths: Sequence[int]) -> tuple[TextTokenizer, ...]:
        """A tokeniser for each text encoder, of its context length."""
        if self.tokenizer != "learn":
            paths = (self.tokenizer, self.tokenizer_2)
            return tuple(
                load_tokenizer(path or None, context_length=length)
                for path, length in zip(paths, lengths, strict=False)
            )
        source = self.open(self.train_split, ())
        texts = {text: None for _, found in captions.all_captions(source, MAX_LEARNED) for text in found}
        return tuple(train_tokenizer(texts, self.merges, context_length=length) for length in lengths)


@dataclasses.dataclass(frozen=True)
class Drop:
    """Leaves out words, texts and image prompts by the config's shares; "keep_prompt" says whether the latter stays.

    One number decides for an example: image, text, both (tencent-ailab/IP-Adapter tutorial_train.py).
    """

    config: PictureConfig

    def __call__(self, example: Example, rng: np.random.Generator) -> Example:
        c, found = self.config, dict(example)
        if c.drop_words and rng.random() < c.drop_words_share:
            found["captions"] = tuple(without(text, c.drop_words) for text in found["captions"])
        r = rng.random()
        image, text = r < c.drop_image, c.drop_image <= r < c.drop_image + c.drop_text
        both = c.drop_image + c.drop_text <= r < c.drop_image + c.drop_text + c.drop_both
        if text or both:
            found["captions"] = ("",)
        return found | ({"keep_prompt": np.float32(not (image or both))} if c.prompt else {})


def without(text: str, words: Sequence[str]) -> str:
    """A caption without some of its words."""
    return " ".join(word for word in text.split() if word not in words)


def make_preprocess(config: PictureConfig, tokenizers: Sequence[TextTokenizer]) -> Transform:
    """Example -> "image" in [-1, 1], "tokens" [E, T], "condition" in [0, 1], "prompt", "keep_prompt", as there are."""
    geometry = preprocess.build(config.preprocess)
    alike = preprocess.alike(geometry, ("condition",)) if config.condition == "file" else geometry
    edges = canny(config.canny_low, config.canny_high) if config.condition == "canny" else None
    prompt = preprocess.build(config.preprocess_prompt)
    tokenize = [captions.Tokenize(tokenizer, tokenizer.context_length) for tokenizer in tokenizers]

    def apply(example: Example, rng: np.random.Generator) -> Example:
        seed = int(rng.integers(2**63))  # one caption for all encoders
        rows = [each(example, np.random.default_rng(seed))["tokens"] for each in tokenize]
        found: Example = {"tokens": np.stack(rows)}
        if config.prompt:
            shown = prompt({"image": example[config.prompt], "name": example["name"]}, rng)["image"]
            found |= {"prompt": shown, "keep_prompt": example["keep_prompt"]}
        pictures = {key: example[key] for key in ("image", "condition", "name") if key in example}
        pictures = alike(pictures, rng)
        pictures = edges(pictures, rng) if edges else pictures
        found["image"] = pictures["image"].astype(np.float32) / 127.5 - 1
        if config.condition:
            found["condition"] = pictures["condition"].astype(np.float32) / 255
        return found

    return captions.chain(Drop(config), apply)


def make_cached(config: PictureConfig) -> Transform:
    """A row of a `LatentFolder` -> "moments", "context", "pooled" and "condition" in [0, 1], as there are."""

    def apply(example: Example, rng: np.random.Generator) -> Example:
        empty = rng.random() < config.drop_text
        texts = {name: example[f"empty_{name}" if empty else name] for name in ("context", "pooled") if name in example}
        found = {"moments": example["moments"]} | texts
        found = {name: value.astype(np.float32) for name, value in found.items()}
        if config.condition:
            found["condition"] = example["condition"].astype(np.float32) / 255
        return found

    return apply


def train_batches(
    config: PictureConfig, batch_size: int, seed: int, tokenizers: Callable[[], Sequence[TextTokenizer]]
) -> Callable[[Any], pipeline.Batches]:
    """`open(shard)` for a recipe's `data`: endless shuffled batches of the training split."""

    def open_shard(shard: tuple[int, int]) -> pipeline.Batches:
        transform = make_cached(config) if config.cached else make_preprocess(config, tokenizers())
        stream = pipeline.Stream(config.open(config.train_split), transform)
        reading = pipeline.Reading(shard, config.threads, config.workers)
        return pipeline.train([stream], batch_size=batch_size, seed=seed, reading=reading)

    return open_shard
