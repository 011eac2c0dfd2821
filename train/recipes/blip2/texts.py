"""What BLIP-2's stages read of a caption: rows of token ids, by the conventions of each text model."""

import dataclasses
from pathlib import Path

import numpy as np

from ....data.drawn import tiles
from ....data.images.transforms import Example
from ....data.text.tokenizer_file import TokenizerFile, clean_caption
from ....data.text.tokens import Overflow, token_rows

NEWLINE = "\n"  # ends a caption of OPT's


def open_tokenizer(folder: str, drawn: bytes) -> TokenizerFile:
    """The tokenizer.json of a folder; without one that of the drawn tiles."""
    if not folder:
        return TokenizerFile(drawn)
    files = {path.name: path.read_bytes() for path in Path(folder).glob("tokenizer.json")}
    return TokenizerFile.of(files, folder)


def draw_caption(example: Example, rng: np.random.Generator, first: bool) -> str:
    """One of an example's captions, the `first` or any, cleaned."""
    captions = example["captions"]
    return clean_caption(captions[0 if first or len(captions) == 1 else int(rng.integers(len(captions)))])


@dataclasses.dataclass(frozen=True)
class ReaderTexts:
    """ "tokens" [T] of the Q-Former: [CLS], words, [SEP], padding 0."""

    tokenizer: TokenizerFile
    length: int
    first: bool = False
    overflow: Overflow = "truncate"

    def __call__(self, example: Example, rng: np.random.Generator) -> Example:
        ends = {"start": (self.tokenizer.id("[CLS]"),), "end": self.tokenizer.id("[SEP]"), "pad": 0}
        text = draw_caption(example, rng, self.first)
        rows = token_rows(text, self.tokenizer.encode, length=self.length, overflow=self.overflow, **ends)
        return {**example, "tokens": rows[0]}


@dataclasses.dataclass(frozen=True)
class PrefixTexts:
    """ "tokens" [T] of OPT: </s>, prompt and caption, newline, padding 1; "learnt" [T] is False on prompt and padding.

    The first token is learnt where there is no prompt (LAVIS blip2_opt.py).
    """

    tokenizer: TokenizerFile
    length: int
    prompt: str = ""
    first: bool = False
    overflow: Overflow = "truncate"

    def __call__(self, example: Example, rng: np.random.Generator) -> Example:
        begin, pad = self.tokenizer.id("</s>"), self.tokenizer.id("<pad>")
        (end,) = self.tokenizer.encode(NEWLINE)
        prompt = f"{self.prompt.strip()} " if self.prompt else ""
        text = prompt + draw_caption(example, rng, self.first)
        ends = {"start": (begin,), "end": end, "pad": pad, "length": self.length, "overflow": self.overflow}
        row = token_rows(text, self.tokenizer.encode, **ends)[0]
        known = 1 + len(self.tokenizer.encode(self.prompt.strip())) if self.prompt else 0
        return {**example, "tokens": row, "learnt": (row != pad) & (np.arange(self.length) >= known)}


@dataclasses.dataclass(frozen=True)
class SplitTexts:
    """ "tokens" [T] of T5's encoder and "labels" [T] of its decoder, both with end 1 and padding 0.

    A caption is split in two at a place drawn from the first half of its tokens (prefix language modelling; the place
    is as LAVIS's authors say it, their code is unpublished); with a prompt that is the encoder's, and all of the
    caption the decoder's.
    """

    tokenizer: TokenizerFile
    length: int
    prompt: str = ""
    first: bool = False
    overflow: Overflow = "truncate"

    def __call__(self, example: Example, rng: np.random.Generator) -> Example:
        ids = self.tokenizer.encode(draw_caption(example, rng, self.first))
        cut = int(rng.integers(1, max(1, len(ids) // 2) + 1)) if not self.first and not self.prompt else 0
        parts = self.tokenizer.encode(self.prompt) if self.prompt else ids[:cut], ids[cut:]
        options = {"start": (), "end": 1, "pad": 0, "length": self.length, "overflow": self.overflow}
        rows = [token_rows("", lambda _, part=part: part, **options)[0] for part in parts]
        return {**example, "tokens": rows[0], "labels": rows[1]}


@dataclasses.dataclass(frozen=True)
class WordTexts:
    """`PrefixTexts` with "words" [W]: what a small language model learns to retell, before it ever sees an image.

    They are the attributes of a drawn tile, twice, in any order.
    """

    texts: PrefixTexts

    def __call__(self, example: Example, rng: np.random.Generator) -> Example:
        words = [word for word in draw_caption(example, rng, True).split() if word not in tiles.WORDS[:3]]
        order = np.concatenate([rng.permutation(len(words)), rng.permutation(len(words))])
        ids = self.texts.tokenizer.encode(" ".join(words[i] for i in order))
        return {**self.texts(example, rng), "words": np.array(ids, np.int32)}
