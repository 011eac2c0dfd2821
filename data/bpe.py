"""The public name of data/text/bpe.py: the tokenisers of CLIP checkpoints."""

from .text.bpe import TextTokenizer, load_tokenizer, tokenizer_of, train_tokenizer

__all__ = ["TextTokenizer", "load_tokenizer", "tokenizer_of", "train_tokenizer"]
