"""Tokenizers that come as a tokenizer.json, and how BLIP-2 cleans the texts before."""

import re
from collections.abc import Iterable, Mapping

from tokenizers import Tokenizer


class TokenizerFile:
    """A tokenizer.json; special tokens are added by who asks for rows, never by the file."""

    def __init__(self, document: bytes, where: str = "tokenizer.json"):
        try:
            self._tokenizer = Tokenizer.from_str(document.decode())
        except Exception as error:  # the library raises plain Exceptions
            raise ValueError(f"{where} is no tokenizer ({str(error)[:200]})") from error
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self.where = where

    @classmethod
    def of(cls, files: Mapping[str, bytes], where: str) -> "TokenizerFile":
        """That of a checkpoint's files; ValueError without one."""
        if "tokenizer.json" not in files:
            raise ValueError(f"{where} has no tokenizer.json, got {sorted(files)}: put that of its texts beside it")
        return cls(files["tokenizer.json"], f"{where}: tokenizer.json")

    @property
    def vocab_size(self) -> int:
        return self._tokenizer.get_vocab_size()

    def encode(self, text: str) -> list[int]:
        """The ids of the text alone."""
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Iterable[int]) -> str:
        """The text of the ids, without special tokens and white space around it."""
        return self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=True).strip()

    def id(self, token: str) -> int:
        """The id of a token; ValueError where the vocabulary lacks it."""
        number = self._tokenizer.token_to_id(token)
        if number is None:
            raise ValueError(f"{self.where} has no token {token!r}")
        return number


_MARKS = re.compile(r"[.!\"()*#:;~]")


def clean_caption(text: str, words: int = 50) -> str:
    """Lower case, marks as spaces, one space between words, so many words (LAVIS BlipCaptionProcessor)."""
    text = re.sub(r"\s{2,}", " ", _MARKS.sub(" ", text.lower())).rstrip("\n").strip(" ")
    return " ".join(text.split(" ")[:words])


def clean_question(text: str, words: int = 50) -> str:
    """Lower case, without marks, so many words (LAVIS BlipQuestionProcessor)."""
    return " ".join(_MARKS.sub("", text.lower()).rstrip(" ").split(" ")[:words])
