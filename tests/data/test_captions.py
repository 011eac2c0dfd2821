"""Caption sources: folder, tar shards, labelled sets; drawn shapes; prompts and class names of zero-shot evaluation."""

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
