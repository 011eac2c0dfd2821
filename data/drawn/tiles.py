"""Drawn tiles with captions as a TFDS data set: 24x24 pictures of "a red ring at the middle left" and the like.

One glyph stands in one cell of a 3x3 grid: 5 colours, 4 shapes, 3 rows and 3 columns make 180 captions of seven words.
Both splits hold all of them, drawn anew. Every attribute is a word of its own, so a caption that is written word by
word shows which of them were seen.
"""

import io
import itertools
from collections.abc import Iterator

import numpy as np
import tensorflow_datasets as tfds
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

from ..images.decode import encode_png

COLORS = {
    "red": (220, 40, 40),
    "green": (40, 200, 60),
    "blue": (50, 80, 230),
    "yellow": (230, 220, 50),
    "white": (235, 235, 235),
}
SHAPES = ("square", "cross", "bar", "ring")
ROWS, COLUMNS = ("top", "middle", "bottom"), ("left", "center", "right")
TILES = tuple(itertools.product(COLORS, SHAPES, ROWS, COLUMNS))
CAPTIONS = tuple(f"a {color} {shape} at the {row} {column}" for color, shape, row, column in TILES)
WORDS = ("a", "at", "the", *COLORS, *SHAPES, *ROWS, *COLUMNS)
SIDE, CELL = 24, 8
PER_CAPTION = {"train": 20, "test": 1}


def draw(caption: int, rng: np.random.Generator) -> np.ndarray:
    """A uint8 picture [24, 24, 3] of the tile."""
    color, shape, row, column = TILES[caption]
    image = 30 + rng.normal(0, 10, (SIDE, SIDE, 3))
    y, x = (np.mgrid[:CELL, :CELL] - (CELL - 1) / 2).astype(np.float64)
    radius = np.hypot(y, x)
    inside = {
        "square": (abs(y) < 3) & (abs(x) < 3),
        "cross": (np.minimum(abs(y), abs(x)) < 1.2) & (np.maximum(abs(y), abs(x)) < 3.6),
        "bar": (abs(y) < 1.6) & (abs(x) < 3.6),
        "ring": (radius > 2.0) & (radius < 3.8),
    }[shape]
    ink = np.array(COLORS[color]) * rng.uniform(0.8, 1) + rng.normal(0, 10, (CELL, CELL, 3))
    top, left = CELL * ROWS.index(row), CELL * COLUMNS.index(column)
    cell = image[top : top + CELL, left : left + CELL]
    cell[inside] = ink[inside]
    return image.clip(0, 255).astype(np.uint8)


def reader_tokenizer() -> bytes:
    """The tokenizer.json of a Q-Former that reads these captions: BERT's special tokens, the words, [DEC]."""
    return _tokenizer(("[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS, "[DEC]"), "[UNK]", ())


def language_tokenizer() -> bytes:
    """The tokenizer.json of a small OPT: its special tokens, the words, a newline and <image>."""
    return _tokenizer(("<s>", "<pad>", "</s>", "<unk>", *WORDS, "\n", "<image>"), "<unk>", ("\n", "<image>"))


def _tokenizer(vocabulary: tuple[str, ...], unknown: str, cut: tuple[str, ...]) -> bytes:
    """One token a word; those that are `cut` out before stand for themselves wherever they are."""
    ids = {word: number for number, word in enumerate(vocabulary)}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token=unknown))
    tokenizer.normalizer = normalizers.Lowercase()  # type: ignore[assignment]
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # type: ignore[assignment]
    tokenizer.add_tokens(list(cut))
    special = [word for word in vocabulary if word[0] in "[<"]
    tokenizer.add_special_tokens(special)
    return tokenizer.to_str().encode()


class Tiles(tfds.core.GeneratorBasedBuilder):
    """TFDS builder; `sources.source` prepares and opens it under the name "tiles". The label numbers the caption."""

    VERSION = tfds.core.Version("1.0.0")
    code_path = None  # there are no checksum files beside the code; finding it fails for editable namespace packages

    def _info(self) -> tfds.core.DatasetInfo:
        features = tfds.features.FeaturesDict(
            {
                "image": tfds.features.Image(shape=(SIDE, SIDE, 3), encoding_format="png"),
                "caption": tfds.features.Text(),
                "label": tfds.features.ClassLabel(names=list(CAPTIONS)),
            }
        )
        description = "Drawn tiles: colour, shape, row and column of a glyph, with a caption that names them."
        return tfds.core.DatasetInfo(builder=self, features=features, description=description, disable_shuffling=True)

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Iterator]:
        return {split: self._generate_examples(seed, count) for seed, (split, count) in enumerate(PER_CAPTION.items())}

    def _generate_examples(self, seed: int, count: int) -> Iterator:
        for number, caption in itertools.product(range(count), range(len(CAPTIONS))):
            image = draw(caption, np.random.default_rng((seed, caption, number)))
            # without TensorFlow, TFDS takes encoded images only, and only from a file object
            encoded = io.BytesIO(encode_png(image))
            yield number * len(CAPTIONS) + caption, {"image": encoded, "caption": CAPTIONS[caption], "label": caption}
