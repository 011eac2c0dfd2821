"""Caption sources: folder, tar shards, labelled sets; drawn shapes; prompts and class names of zero-shot evaluation."""

import dataclasses
import hashlib
import io
import json
import tarfile

import numpy as np
import pytest
from omnax.data import captions, pipeline, preprocess
from omnax.data.drawn import shapes
from omnax.data.images.decode import CorruptExample, encode_png
from omnax.data.text.bpe import BytePairTokenizer
from omnax.data.text.imagenet_classes import CLASS_NAMES
from omnax.data.text.prompts import IMAGENET_7, IMAGENET_80
from omnax.train.recipes.clip.recipe import CaptionConfig

PICTURE = encode_png(np.full((4, 4, 3), 200, np.uint8))


def write_tar(path, members):
    with tarfile.open(path, "w") as archive:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))


@pytest.fixture
def shards(tmp_path):
    """Six examples in two shards, of which one has a damaged image, one no image and one an empty caption."""
    first = [("a/000.png", PICTURE), ("a/000.txt", b"a cat"), ("a/001.png", PICTURE[:40]), ("a/001.txt", b"a dog")]
    first += [("a/002.txt", b"no image")]
    second = [("003.json", json.dumps({"caption": "from json"}).encode()), ("003.png", PICTURE)]
    second += [("004.png", PICTURE), ("004.txt", b" \n"), ("005.png", PICTURE), ("005.txt", "größer".encode())]
    write_tar(tmp_path / "train-0.tar", first)
    write_tar(tmp_path / "train-1.tar", second)
    return tmp_path


def stream(source):
    steps = preprocess.build(["decode", "value_range", ("keep", {"keys": ("image", "tokens")})])
    tokenize = captions.Tokenize(BytePairTokenizer([]), context_length=12)
    return pipeline.Stream(source, captions.chain(tokenize, steps))


def test_tar_shards_read_by_position_and_skip_count_and_name_what_is_damaged(shards):
    source = captions.caption_source({"name": "tar", "path": str(shards)}, "train")
    assert len(source) == 6
    assert source[0]["captions"] == ("a cat",) and source[3]["captions"] == ("from json",)
    assert source[5]["captions"] == ("größer",) and source[5]["image"] == PICTURE
    batches = pipeline.evaluate(stream(source), batch_size=6)
    batch = next(batches)
    assert batch["mask"].tolist() == [True, False, False, True, False, True]
    reasons = {name.rpartition("/")[2]: reason for name, reason in batches.skipped.items()}
    assert set(reasons) == {"001", "002", "004"}
    assert "no image" in reasons["002"] and reasons["004"] == "its caption is empty"
    again = captions.caption_source({"name": "tar", "path": str(shards / "*-1.tar")}, "anything")
    assert len(again) == 3
    training = pipeline.train([stream(source)], batch_size=4, seed=0)
    assert next(training)["tokens"].shape == (4, 12)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: data[:1024] + b"x" + data[1025:], r"train-0\.tar .* at offset 1024: there is neither a header"),
        (lambda data: data[:1024] + b"\0" * 512 + data[1536:], r"at offset 1024: there is neither a header"),
        (lambda data: data[:1148] + b"77777777777" + data[1159:], r"at offset 1024: there is neither a header"),
        (lambda data: data[:2600], r"at offset \d+: (it has 2600 bytes|unexpected end of data|truncated header)"),
        (lambda data: data[:2048], r"at offset 2048: there is neither a header nor the end"),
        (lambda data: data + data, r"neither a header nor the end"),
    ],
)
def test_damage_in_a_tar_header_is_an_error_with_its_place(shards, damage, message):
    """Each once lost the examples behind it without a word."""
    path = shards / "train-0.tar"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=message):
        captions.caption_source({"name": "tar", "path": str(shards)}, "train")


def test_members_that_macos_adds_are_passed_over_and_named(tmp_path, caplog):
    members = [("a/._000.png", b"Mac"), ("a/000.png", PICTURE), ("a/._000.txt", b"Mac"), ("a/000.txt", b"a cat")]
    write_tar(tmp_path / "train.tar", members)
    source = captions.caption_source({"name": "tar", "path": str(tmp_path)}, "train")
    assert len(source) == 1 and source[0]["captions"] == ("a cat",) and source[0]["image"] == PICTURE
    assert caplog.messages == [f"{tmp_path / 'train.tar'}: passed over 2 members as a/._000.png"]


@pytest.mark.parametrize(
    ("suffix", "content", "message"),
    [
        ("txt", b"caf\xe9", "its caption is no UTF-8"),
        ("json", b'{"caption": null}', "it has no caption"),
        ("json", b"[" * 99_999, "its json is damaged"),
        ("json", b'["a"]', "expected an object with a caption, got list"),
    ],
)
def test_odd_texts_in_a_tar_are_skipped_and_named(tmp_path, suffix, content, message):
    write_tar(tmp_path / "train.tar", [("0.png", PICTURE), (f"0.{suffix}", content)])
    with pytest.raises(CorruptExample, match=message):
        captions.caption_source({"name": "tar", "path": str(tmp_path)}, "train")[0]
    write_tar(tmp_path / "train.tar", [("0.png", PICTURE), ("0.txt", b"\xef\xbb\xbfa cat")])
    assert captions.caption_source({"name": "tar", "path": str(tmp_path)}, "train")[0]["captions"] == ("a cat",)


def test_a_learned_vocabulary_passes_over_bad_captions(tmp_path, caplog):
    lines = [{"image": "a.png", "text": "aa aa ab"}, {"image": "a.png", "text": None}, {"image": "b.png", "text": "x"}]
    (tmp_path / "a.png").write_bytes(PICTURE)
    (tmp_path / "captions.jsonl").write_text("\n".join(map(json.dumps, lines)))
    config = CaptionConfig(name="captions", path=str(tmp_path), tokenizer="learn", preprocess=(), preprocess_test=())
    assert ("a", "a</w>") in config.make_tokenizer(8).merges
    assert [message.partition(": ")[2][:30] for message in caplog.messages] == [
        "it has no caption",
        "cannot be read (No such file o",
    ]
    assert len(dataclasses.replace(config, distinct=True).open("train")) == 1


def test_folder_with_captions(tmp_path):
    (tmp_path / "a.png").write_bytes(PICTURE)
    lines = [{"image": "a.png", "text": ["one", "two", ""]}, {"image": "b.png", "text": "gone"}, {"text": "x"}]
    (tmp_path / "captions.jsonl").write_text("\n".join([*map(json.dumps, lines), "{", '{"image": "a.png"}']))
    source = captions.caption_source({"name": "captions", "path": str(tmp_path)}, "train")
    assert len(source) == 5 and source[0]["captions"] == ("one", "two")
    for index, message in ((1, "cannot be read"), (2, "line 3"), (3, "line 4"), (4, "it has no caption")):
        with pytest.raises(CorruptExample, match=message):
            source[index]
    drawn = {
        captions.Tokenize(BytePairTokenizer([]), 6)(source[0], np.random.default_rng(i))["tokens"][1] for i in range(9)
    }
    assert len(drawn) == 2  # the first byte of "one" and of "two"
    strict = captions.Tokenize(BytePairTokenizer([]), 4, first=True, overflow="error")
    with pytest.raises(ValueError, match=r"caption of .*a\.png: text of 5 tokens, expected at most 4: 'one'"):
        strict(source[0], np.random.default_rng(0))


class Labelled:
    class_names = ["cat", "dog"]  # noqa: RUF012

    def __len__(self):
        return 4

    def __getitem__(self, index):
        return {
            "image": PICTURE,
            "label": index % 2,
            "name": f"labelled[{index}]",
            "captions": {"text": [b"seen", b""]},
        }


def test_captions_from_labels_and_from_nested_fields(monkeypatch):
    monkeypatch.setattr(captions.sources, "source", lambda config, split: Labelled())
    config = {"name": "pets", "templates": ("a {}", "the {}"), "class_names": ("kitten", "puppy")}
    source = captions.caption_source(config, "train")
    assert source[1]["captions"] == ("a puppy", "the puppy") and source.class_names == ["kitten", "puppy"]
    assert captions.caption_source({"name": "pets"}, "train")[0]["captions"] == ("seen",)
    with pytest.raises(CorruptExample, match=r"labelled\[0\]"):
        captions.caption_source({"name": "pets", "caption_key": "title"}, "train")[0]
    with pytest.raises(ValueError, match="got 1 class_names, data set 'pets' has 2 classes"):
        captions.caption_source(config | {"class_names": ("kitten",)}, "train")


def test_distinct_captions_show_each_caption_once_an_epoch(monkeypatch):
    monkeypatch.setattr(captions.sources, "source", lambda config, split: Labelled())
    source = captions.caption_source({"name": "pets", "templates": ("a {}",)}, "train")
    distinct = captions.DistinctCaptions(source)
    assert len(distinct) == 2
    drawn = [distinct.draw(distinct[1], np.random.default_rng(i)) for i in range(20)]
    assert {example["captions"] for example in drawn} == {("a dog",)}
    assert {example["name"] for example in drawn} == {"labelled[1]", "labelled[3]"}


def test_bad_sources_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"no tar shards match '.*train\*\.tar'"):
        captions.caption_source({"name": "tar", "path": str(tmp_path)}, "train")
    (tmp_path / "train.tar").write_bytes(b"no tar" * 200)
    with pytest.raises(ValueError, match=r"train\.tar is not an uncompressed tar shard"):
        captions.caption_source({"name": "tar", "path": str(tmp_path)}, "train")
    with pytest.raises(ValueError, match=r"has no captions\.jsonl"):
        captions.caption_source({"name": "captions", "path": str(tmp_path)}, "train")


def test_shapes_are_what_their_captions_say():
    test = shapes.held_out()
    assert len(test) == 16 and len(shapes.CAPTIONS) == 128 and len(set(shapes.CAPTIONS)) == 128
    for part in range(3):  # every colour, shape and quadrant is trained on
        values = {combination[part] for combination in shapes.COMBINATIONS}
        assert values == {c[part] for i, c in enumerate(shapes.COMBINATIONS) if i not in test}
    for index in (0, 37, 127):
        color, _, quadrant = shapes.COMBINATIONS[index]
        picture = shapes.draw(index, np.random.default_rng(index))
        inside = (picture == shapes.COLORS[color]).all(-1)
        rows, columns = np.nonzero(inside)
        vertical, horizontal = quadrant.split()
        assert (rows.mean() < 16) == (vertical == "upper") and (columns.mean() < 16) == (horizontal == "left")
        assert 20 < inside.sum() < 200


def test_published_prompts_and_class_names():
    def digest(lines):
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()

    assert len(IMAGENET_80) == 80 and set(IMAGENET_7) <= set(IMAGENET_80)
    assert digest(sorted(IMAGENET_80)) == "a8a4822f2921936e2ef07cf2e7a5df69be9532aab2f3f4880156bb03563e2467"
    assert len(CLASS_NAMES) == 1000 and len(set(CLASS_NAMES)) == 998
    assert digest(CLASS_NAMES) == "571ae1c583b4be7da87519494c52bf405a46af05d5815627c7a0dee997068b60"
