"""The byte-pair tokeniser against published ids, OpenAI's class and transformers' (spec vit_clip.md B4)."""

import json
import random
import sys
import types
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest
from omnax.data.text import bpe

# Text -> ids without START and END: OpenAI's, and Hugging Face's where they differ.
GOLDEN = {
    "a photo of a cat": ([320, 1125, 539, 320, 2368], None),
    "hello world!!!": ([3306, 1002, 995], None),
    "it's 2023, don't": ([585, 568, 273, 271, 273, 274, 267, 847, 713], None),
    "café naïve": ([15304, 1097, 35689, 563], None),
    "日本語 テスト": ([39121, 44353, 34002, 508, 2429, 228, 32421, 486], None),
    "emoji 😀🎉": ([16327, 12832, 3986], None),
    "100,000.50$": ([272, 271, 271, 267, 271, 271, 271, 269, 276, 271, 259], None),
    "a_b-c/d": ([320, 318, 321, 268, 322, 270, 323], None),
    "&lt;b&gt; &amp;amp; x": (
        [283, 321, 285, 261, 343],
        [261, 3333, 282, 321, 261, 4725, 282, 261, 6259, 282, 6259, 282, 343],
    ),
    "don’t “quote”": ([847, 713, 257, 4020, 257], [847, 728, 503, 339, 728, 506, 4020, 728, 507]),
}
# Ranges of code points: Latin, Greek, Cyrillic, Hebrew, Arabic, Devanagari, Thai, Kana, CJK, Hangul, emoji, signs.
SCRIPTS = [
    *[(0x20, 0x7F)] * 4,
    *((0xA0, 0x24F), (0x370, 0x3FF), (0x400, 0x4FF), (0x5D0, 0x5EA), (0x620, 0x64A), (0x905, 0x939)),
    *((0xE01, 0xE30), (0x3041, 0x30FF), (0x4E00, 0x4FFF), (0xAC00, 0xACFF), (0x1F600, 0x1F64F), (0x2000, 0x206F)),
]
PIECES = [
    "&amp;",
    "&lt;",
    "'s",
    "don't",
    "I'LL",
    "\t",
    "\n",
    "  ",
    "Ã©",
    "…",
    "ΟΔΟΣ",
    "İ",
    "e\u0301",
    "42nd",
    "<|endoftext|>",
]


def random_texts(count):
    generator = random.Random(0)
    for _ in range(count):
        words = []
        for _ in range(generator.randint(0, 8)):
            low, high = generator.choice(SCRIPTS)
            word = "".join(chr(generator.randint(low, high)) for _ in range(generator.randint(1, 7)))
            words.append(generator.choice([word, word, word, generator.choice(PIECES)]))
        yield generator.choice([" ", ""]).join(words)


@pytest.fixture(scope="module")
def tokenizer():
    return bpe.load_tokenizer()


@pytest.fixture(scope="module")
def hf_tokenizer():
    return bpe.load_tokenizer(hf=True, pad=bpe.END)


def test_golden_ids(tokenizer, hf_tokenizer):
    assert (tokenizer.vocab_size, tokenizer.start_id, tokenizer.end_id) == (49408, 49406, 49407)
    for text, (ids, hf_ids) in GOLDEN.items():
        assert tokenizer.encode(text) == ids
        assert hf_tokenizer.encode(text) == (hf_ids or ids)


def test_2000_random_texts_equal_openai(tokenizer, monkeypatch):
    # clip/__init__.py asks for setuptools' pkg_resources, which is gone; the tokeniser needs nothing of it.
    monkeypatch.setitem(sys.modules, "clip", types.ModuleType("clip"))
    sys.modules["clip"].__path__ = [str(_package_folder("clip-anytorch"))]
    from clip.simple_tokenizer import SimpleTokenizer

    reference = SimpleTokenizer()
    for text in random_texts(2000):
        ids = reference.encode(text)
        assert tokenizer.encode(text) == ids, text
        assert tokenizer.decode(ids) == reference.decode(ids)


def test_2000_random_texts_equal_transformers(hf_tokenizer, tmp_path):
    hf_tokenizer.save(tmp_path)
    from oracles import transformers

    reference = transformers.CLIPTokenizer.from_pretrained(tmp_path)
    texts = list(random_texts(2000))
    expected = reference(texts, padding="max_length", truncation=True, max_length=24)["input_ids"]
    ours = bpe.load_tokenizer(tmp_path)
    assert ours.pad_id == 49407 and ours.context_length == 77
    reference.save_pretrained(tmp_path / "v5")
    assert not (tmp_path / "v5" / "merges.txt").exists()  # transformers 5 writes tokenizer.json alone
    assert bpe.load_tokenizer(tmp_path / "v5").merges == ours.merges
    np.testing.assert_array_equal(bpe.load_tokenizer(tmp_path / "v5")(texts[:50]), ours(texts[:50]))
    for text, row, ids in zip(texts, ours(texts, context_length=24), expected, strict=True):
        assert row.tolist() == ids, text


def test_rows_are_padded_and_truncation_keeps_the_end(tokenizer):
    rows = tokenizer(["a cat", "", "a photo of a cat"], context_length=5)
    np.testing.assert_array_equal(
        rows, [[49406, 320, 2368, 49407, 0], [49406, 49407, 0, 0, 0], [49406, 320, 1125, 539, 49407]]
    )
    assert rows.dtype == np.int32 and tokenizer("a cat").shape == (1, 77)
    with pytest.raises(ValueError, match="text of 7 tokens, expected at most 5: 'a photo of a cat'"):
        tokenizer("a photo of a cat", context_length=5, overflow="error")
    with pytest.raises(ValueError, match="overflow is 'cut', expected one of"):
        tokenizer("a cat", overflow="cut")


def test_a_vocabulary_learned_from_few_texts_reads_all_texts(tmp_path):
    captions = [f"a {colour} {shape}" for colour in ("red", "green") for shape in ("circle", "square")]
    tokenizer = bpe.train_tokenizer(captions, 20, context_length=8)
    assert tokenizer.vocab_size == 512 + len(tokenizer.merges) + 2 <= 512 + 20 + 2
    assert max(map(len, map(tokenizer.encode, captions))) < max(map(len, captions)) / 2
    again = bpe.train_tokenizer(captions, 20)
    assert again.merges == tokenizer.merges
    for text in ("a red circle", "日本 42!", "unseen words"):
        assert tokenizer.decode(tokenizer.encode(text)).replace(" ", "") == text.replace(" ", "")
    tokenizer.save(tmp_path)
    restored = bpe.load_tokenizer(tmp_path, hf=False)
    np.testing.assert_array_equal(restored(captions), tokenizer(captions))


def test_a_merges_file_by_path(tokenizer):
    path = _package_folder("open_clip_torch") / "bpe_simple_vocab_16e6.txt.gz"
    assert bpe.load_tokenizer(path).merges == tokenizer.merges


def test_bad_directories_and_settings_are_named(tmp_path, monkeypatch):
    (tmp_path / "tokenizer_config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"has no vocabulary of CLIP's kind, only \['tokenizer_config\.json'\]"):
        bpe.load_tokenizer(tmp_path)
    with pytest.raises(ValueError, match="no such vocabulary: 'nowhere'"):
        bpe.load_tokenizer("nowhere")
    (tmp_path / "vocab.json").write_text("{}")
    (tmp_path / "merges.txt").write_text("#version: 0.2\na b\nab\n")
    with pytest.raises(ValueError, match="merge 'ab' has 1 symbols, expected 2"):
        bpe.load_tokenizer(tmp_path)
    (tmp_path / "merges.txt").write_text("#version: 0.2\na b\n")
    with pytest.raises(ValueError, match="the vocabulary lacks 515 symbols"):
        bpe.load_tokenizer(tmp_path)
    with pytest.raises(ValueError, match=r"padding token '\[PAD\]' is not in the vocabulary"):
        bpe.BytePairTokenizer([], pad="[PAD]")
    monkeypatch.setattr(bpe.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="instant-clip-tokenizer"):
        bpe.published_merges.__wrapped__()


def _package_folder(distribution):
    """Where a package keeps its vocabulary file; the package itself is not imported."""
    files = metadata.files(distribution) or ()
    return next(Path(str(f.locate())).parent for f in files if f.name == "bpe_simple_vocab_16e6.txt.gz")


SETTINGS = {"vocab.json": b"{}", "merges.txt": b""}
MODEL = {"type": "BPE", "end_of_word_suffix": "</w>", "vocab": {}, "merges": []}
DAMAGED = {
    "empty": ({"tokenizer.json": b""}, "tokenizer.json is not JSON"),
    "a list": ({"tokenizer.json": b"[]"}, "tokenizer.json holds list, expected an object"),
    "no model": ({"tokenizer.json": b"{}"}, "no vocabulary of CLIP's kind"),
    "model": ({"tokenizer.json": {"model": [1]}}, r"tokenizer.json: 'model' is \[1\], expected an object"),
    "merges": ({"tokenizer.json": {"model": MODEL | {"merges": {}}}}, "model: 'merges' is {}, expected a list"),
    "a merge": ({"tokenizer.json": {"model": MODEL | {"merges": [["a", 2]]}}}, "a merge is .*expected two symbols"),
    "vocab": ({"tokenizer.json": {"model": MODEL | {"vocab": [1]}}}, "model: 'vocab' is .*expected an object"),
    "an id": (
        {"tokenizer.json": {"model": MODEL | {"vocab": {"a": "1"}}}},
        "the id of 'a' is '1', expected",
    ),
    "added": ({"tokenizer.json": {"model": MODEL, "added_tokens": 3}}, "'added_tokens' is 3, expected a list"),
    "an added one": ({"tokenizer.json": {"model": MODEL, "added_tokens": [{"id": 1}]}}, "entry 0 is .*a content"),
    "unigram": (
        {"tokenizer.json": {"model": {"type": "Unigram", "vocab": 1}}},
        "json describes no tokeniser",
    ),
    "vocabulary": ({"vocab.json": b"[]", "merges.txt": b""}, "vocab.json holds list"),
    "merges in another code": ({"vocab.json": b"{}", "merges.txt": b"\xff"}, "merges.txt is no text in UTF-8"),
    "settings": (SETTINGS | {"tokenizer_config.json": b"1"}, "tokenizer_config.json holds int"),
    "length": (
        SETTINGS | {"tokenizer_config.json": {"model_max_length": "77"}},
        "'model_max_length' is '77'",
    ),
    "pad": (
        SETTINGS | {"tokenizer_config.json": {"pad_token": 1}},
        "json: 'pad_token' is 1, expected",
    ),
    "eos": (SETTINGS | {"special_tokens_map.json": {"eos_token": {"content": []}}}, "eos_token: 'content' is"),
    "class": ({"spiece.model": b"", "tokenizer_config.json": {"tokenizer_class": 1}}, "spiece.model has no pieces"),
    "pieces": ({"spiece.model": b"\x0a\x05ab"}, "spiece.model is damaged"),
    "clean": ({"tokenizer.json": {"model": {"type": "BPE"}}, "open_clip_config.json": b"[]"}, "is|holds|describes"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_files_of_wrong_types_are_named_with_the_entry(name):
    files, message = DAMAGED[name]
    contents = {file: x if isinstance(x, bytes) else json.dumps(x).encode() for file, x in files.items()}
    with pytest.raises(ValueError, match=message):
        bpe.tokenizer_of(contents)
