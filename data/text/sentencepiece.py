"""SigLIP's tokenisers (arXiv 2303.15343, 2502.14786): sentencepiece vocabularies, read without that package.

The vocabulary comes from `tokenizer.json`, or from sentencepiece's own `spiece.model` where it is a unigram model
(arXiv 1804.10959). The towers were trained on text that was cleaned first; the published libraries do so in four ways:

| checkpoint | cleaning |
|---|---|
| transformers, SiglipTokenizer | lower case, no punctuation |
| transformers, any other class (SigLIP 2) | lower case |
| open_clip, clean = canonicalize | mojibake and HTML entities repaired, "_" a space, no punctuation, lower case |
| open_clip, clean = lower or whitespace | repaired, and lower case or not |
"""

import html
import json
import string
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import ftfy
import numpy as np
import tokenizers
from tokenizers import Regex, models, normalizers, pre_tokenizers

from .documents import entry, open_tokenizer, read_document, settings
from .tokens import Overflow, token_rows

_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)
_UNIGRAM = 1  # sentencepiece_model.proto, TrainerSpec.ModelType


def canonicalize(text: str) -> str:
    """big_vision's cleaning, as in transformers: lower case, no ASCII punctuation, white space collapsed."""
    return " ".join(text.lower().translate(_NO_PUNCTUATION).split())


def repair(text: str) -> str:
    """open_clip's cleaning before all others: mojibake and (twice) HTML entities, white space collapsed."""
    return " ".join(html.unescape(html.unescape(ftfy.fix_text(text))).split())


CLEANINGS: dict[str, Callable[[str], str]] = {
    "canonicalize": lambda text: canonicalize(repair(text).replace("_", " ")),
    "lower": lambda text: repair(text).lower(),
    "whitespace": repair,
}


class SentencePieceTokenizer:
    """Encodes text as ids and an end; rows are filled up with `pad`.

    `clean` goes before the vocabulary's own normalisation. `files` are what it was made of.
    """

    def __init__(
        self,
        encoder: tokenizers.Tokenizer,
        *,
        clean: Callable[[str], str] = canonicalize,
        end: str = "</s>",
        pad: str = "</s>",
        context_length: int = 64,
        files: Mapping[str, bytes] | None = None,
    ):
        vocab = encoder.get_vocab()
        if missing := sorted({end, pad} - set(vocab)):
            raise ValueError(f"the tokens {missing} are not in the vocabulary")
        self.end_id, self.pad_id, self.context_length = vocab[end], vocab[pad], context_length
        self._encoder, self._clean, self._files = encoder, clean, dict(files or {})

    @property
    def vocab_size(self) -> int:
        """Ids that texts can become; T5's extra ids behind the vocabulary are none of them."""
        return max(self._encoder.get_vocab_size(with_added_tokens=False), self.end_id + 1, self.pad_id + 1)

    def encode(self, text: str) -> list[int]:
        """The ids of the cleaned text alone."""
        return self._encoder.encode(self._clean(text), add_special_tokens=False).ids

    def __call__(
        self, texts: str | Sequence[str], *, context_length: int | None = None, overflow: Overflow = "truncate"
    ) -> np.ndarray:
        """Padded ids [B, T] int32 (see `token_rows`)."""
        length = self.context_length if context_length is None else context_length
        return token_rows(
            texts, self.encode, start=(), end=self.end_id, pad=self.pad_id, length=length, overflow=overflow
        )

    def files(self) -> dict[str, bytes]:
        """The files of a checkpoint that describe it."""
        return dict(self._files)


def is_sentencepiece(files: Mapping[str, bytes]) -> bool:
    """Whether a checkpoint's tokeniser files are of this kind; CLIP's own byte pairs end words by a suffix."""
    if "spiece.model" in files:
        return True
    model = entry(read_document(files, "tokenizer.json"), "tokenizer.json", "model", dict, default={})
    return bool(model) and not model.get("end_of_word_suffix")


def sentencepiece_tokenizer(files: Mapping[str, bytes], **given: Any) -> SentencePieceTokenizer:
    """The tokeniser that a checkpoint's files (name -> content) describe; what is `given` overrides theirs."""
    if "tokenizer.json" in files:
        encoder = open_tokenizer(json.dumps(read_document(files, "tokenizer.json")))
    else:
        encoder = read_unigram(files["spiece.model"])
    raw = settings(files)
    end = raw["eos_token"] or "</s>"
    published: dict[str, Any] = {"clean": _cleaning(files, raw), "end": end, "pad": raw["pad_token"] or end}
    if raw["model_max_length"]:
        published["context_length"] = raw["model_max_length"]
    return SentencePieceTokenizer(encoder, files=files, **(published | given))


def _cleaning(files: Mapping[str, bytes], config: Mapping[str, Any]) -> Callable[[str], str]:
    if "open_clip_config.json" in files:
        part, where = read_document(files, "open_clip_config.json"), "open_clip_config.json"
        for key in ("model_cfg", "text_cfg", "tokenizer_kwargs"):
            part, where = entry(part, where, key, dict, default={}), f"{where}, {key}"
        name = entry(part, where, "clean", str, default="whitespace")
        if name not in CLEANINGS:
            raise ValueError(f"open_clip_config.json: clean is {name!r}, expected one of {[*CLEANINGS]}")
        return CLEANINGS[name]
    return canonicalize if "Siglip" in (config["tokenizer_class"] or "SiglipTokenizer") else str.lower


def read_unigram(model: bytes) -> tokenizers.Tokenizer:
    """A unigram model of sentencepiece (`spiece.model`); ValueError for one of another kind.

    Field numbers: google/sentencepiece src/sentencepiece_model.proto. Its normalisation is kept as the table compiled
    into it; words begin with "▁".
    """
    try:
        return _unigram(model)
    except (IndexError, KeyError, TypeError, struct.error, UnicodeDecodeError, AttributeError) as error:
        raise ValueError(f"spiece.model is damaged, or no model of sentencepiece ({error!r})") from error


def _unigram(model: bytes) -> tokenizers.Tokenizer:
    parts = [*_fields(model)]
    trainer, normalizer = (dict(_fields(next((v for n, v in parts if n == number), b""))) for number in (2, 3))
    kind = trainer.get(3, _UNIGRAM)
    if kind != _UNIGRAM:
        raise ValueError(f"spiece.model is of kind {kind}, expected a unigram model ({_UNIGRAM}) or a tokenizer.json")
    pieces = [dict(_fields(value)) for number, value in parts if number == 1]
    if not pieces:
        raise ValueError("spiece.model has no pieces, expected a model of sentencepiece")
    vocab = [(piece[1].decode(), struct.unpack("<f", piece.get(2, bytes(4)))[0]) for piece in pieces]
    encoder = tokenizers.Tokenizer(models.Unigram(vocab, trainer.get(40, 0), bool(trainer.get(35, 0))))
    steps: list[Any] = [normalizers.Precompiled(normalizer[2])] if normalizer.get(2) else []
    steps += [normalizers.Strip(), normalizers.Replace(Regex(" {2,}"), " ")]
    encoder.normalizer = normalizers.Sequence(steps)  # type: ignore[assignment]
    encoder.pre_tokenizer = pre_tokenizers.Metaspace()  # type: ignore[assignment]
    return encoder


def _fields(message: bytes) -> Iterator[tuple[int, Any]]:
    """(number, value) of a protocol buffer's fields: integers, or the bytes of all other types."""
    position = 0

    def varint() -> int:
        nonlocal position
        value = shift = 0
        while True:
            byte = message[position]
            position, value, shift = position + 1, value | (byte & 127) << shift, shift + 7
            if byte < 128:
                return value

    while position < len(message):
        number, wire = divmod(varint(), 8)
        if wire == 0:
            yield number, varint()
            continue
        size = {1: 8, 2: None, 5: 4}[wire]
        size = varint() if size is None else size
        yield number, message[position : position + size]
        position += size
