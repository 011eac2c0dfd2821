"""SigLIP's tokenisers: ids of transformers' SiglipTokenizer and of open_clip's, cleaning, padding, bad files."""

import json
import random
import warnings
from pathlib import Path

import numpy as np
import pytest
from omnax.data.text import sentencepiece
from omnax.data.text.bpe import load_tokenizer, tokenizer_of
from oracles import transformers

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from open_clip.tokenizer import HFTokenizer

# A unigram model of 97 pieces, with eight rules of normalisation (full-width letters, the ligature ﬁ, …), trained by
# sentencepiece 0.2.3, and the ids of transformers' SiglipTokenizer, which needs that package.
MODEL = (Path(__file__).parent / "siglip_spiece.model").read_bytes()
GOLDEN = {
    "a photo of a cat": [36, 4, 19, 36, 21, 1, 1, 1, 1, 1, 1, 1],
    "A photo of a DOG!": [36, 4, 19, 36, 27, 1, 1, 1, 1, 1, 1, 1],
    "the quick-brown fox, jumps.": [20, 8, 76, 89, 90, 78, 93, 25, 44, 1, 1, 1],
    "origami  sketches\nof_circles": [3, 33, 88, 91, 19, 86, 94, 89, 86, 85, 88, 1],
    "cafés and café": [34, 36, 93, 81, 42, 1, 1, 1, 1, 1, 1, 1],
    "ﬁ　ＡＢ…": [95, 80, 94, 95, 2, 1, 1, 1, 1, 1, 1, 1],
    "日本 dog 42": [95, 2, 27, 95, 2, 1, 1, 1, 1, 1, 1, 1],
    "": [1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1],
    "!?": [1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1],
    "it's 100,000.50$": [95, 94, 83, 91, 95, 2, 1, 1, 1, 1, 1, 1],
}
CONFIG = {"tokenizer_class": "SiglipTokenizer", "eos_token": "</s>", "pad_token": {"content": "</s>"}}
FILES = {"spiece.model": MODEL, "tokenizer_config.json": json.dumps(CONFIG | {"model_max_length": 12}).encode()}
WORDS = ["a", "photo", "of", "the", "cats", "DOG", "(quick)", "café", "&amp;", "x_y", "don't", "日本", "…", "\t", "Ａ"]


def random_texts(count):
    generator = random.Random(0)
    for _ in range(count):
        yield generator.choice([" ", ""]).join(generator.choices(WORDS, k=generator.randint(0, 8)))


def test_spiece_model_equals_siglip_tokenizer(tmp_path):
    tokenizer = tokenizer_of(FILES)
    assert (tokenizer.vocab_size, tokenizer.end_id, tokenizer.pad_id, tokenizer.context_length) == (97, 1, 1, 12)
    for text, ids in GOLDEN.items():
        assert tokenizer(text)[0].tolist() == ids, text
    for name, content in tokenizer.files().items():
        (tmp_path / name).write_bytes(content)
    np.testing.assert_array_equal(load_tokenizer(tmp_path)([*GOLDEN]), [*GOLDEN.values()])


@pytest.mark.parametrize("clean", ["canonicalize", "lower", "whitespace"])
def test_tokenizer_json_equals_open_clip(tmp_path, clean):
    pieces = [(token, 0.0) for token in ("<pad>", "</s>", "<unk>")]
    pieces += [
        (token, -float(i)) for i, token in enumerate(["▁", "▁a", "▁photo", "▁of", "▁the", "▁cat", "▁cats", "ed"])
    ]
    pieces += [(letter, -10.0) for letter in "abcdefghijklmnopqrstuvwxyzé&()_DOG'"]
    published = transformers.T5TokenizerFast(vocab=pieces, extra_ids=0, pad_token="</s>")
    published.save_pretrained(tmp_path)
    text_config = {"tokenizer_kwargs": {"clean": clean}}
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": {"text_cfg": text_config}}))
    reference = HFTokenizer(str(tmp_path), context_length=16, clean=clean)
    ours = load_tokenizer(tmp_path)
    texts = [*random_texts(300), "", " a photo "]
    np.testing.assert_array_equal(ours(texts, context_length=16), reference(texts).numpy())
    (tmp_path / "open_clip_config.json").unlink()
    lowered = load_tokenizer(tmp_path)  # SigLIP 2 in transformers: of another class than SiglipTokenizer
    assert lowered.encode("A Photo (of)") == published("a photo (of)", add_special_tokens=False)["input_ids"]


def test_too_long_texts_and_bad_files_are_named(tmp_path):
    tokenizer = tokenizer_of(FILES)
    with pytest.raises(ValueError, match=r"text of \d+ tokens, expected at most 4"):
        tokenizer("a photo of a cat", context_length=4, overflow="error")
    assert tokenizer("a photo of a cat", context_length=4)[0, -1] == tokenizer.end_id
    with pytest.raises(ValueError, match=r"the tokens \['<eos>'\] are not in the vocabulary"):
        tokenizer_of(
            {"spiece.model": MODEL, "special_tokens_map.json": b'{"eos_token": "<eos>", "pad_token": "<pad>"}'}
        )
    with pytest.raises(ValueError, match="clean is 'upper', expected one of"):
        config = {"model_cfg": {"text_cfg": {"tokenizer_kwargs": {"clean": "upper"}}}}
        tokenizer_of({"spiece.model": MODEL, "open_clip_config.json": json.dumps(config).encode()})
    byte_pairs = bytes([0x12, 2, 3 << 3, 2])  # trainer_spec { model_type: BPE }
    with pytest.raises(ValueError, match=r"spiece\.model is of kind 2, expected a unigram model"):
        sentencepiece.read_unigram(byte_pairs)
