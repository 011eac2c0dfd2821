"""Folders and files as people have them: what a walk passes over and names, where lines end, what is no text."""

import json
import os
import socket

import numpy as np
import pytest
from omnax.data import captions, files, sources
from omnax.data.images.decode import CorruptExample, encode_png
from omnax.data.lookup import unknown
from omnax.data.media.face_crops import find_videos
from omnax.infer.images import find_images
from omnax.train.inputs import DataConfig

PICTURE = encode_png(np.full((4, 4, 3), 200, np.uint8))
SUFFIXES = sources.IMAGE_SUFFIXES


@pytest.fixture
def odd(tmp_path):
    """Two images in two classes, beside everything a folder can hold that is none."""
    root = tmp_path / "train"
    for name in ("cat/1.png", "dog/2.PNG", ".thumbnails/3.png", "cat/._1.png", "cat/.git/4.png", "stray.png"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(PICTURE)
    os.mkfifo(root / "cat" / "pipe.png")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(os.path.relpath(root / "cat" / "socket.jpg"))
    (root / "cat" / "up").symlink_to(root)
    (root / "cat" / "a_dog").symlink_to(root / "dog")
    (root / "dog" / "self.png").symlink_to("self.png")
    (root / "dog" / "dead.gif").symlink_to("nowhere")
    (root / "dog" / "folder.jpg").mkdir()
    with open(os.fsencode(root / "dog") + b"/\xff.jpg", "wb") as file:
        file.write(PICTURE)
    return root


NAMED = {
    "cat/pipe.png": "is a pipe, no file",
    "cat/socket.jpg": "is a socket, no file",
    "cat/up": "is a link to a folder that is read already",
    "cat/a_dog": "is a link to a folder that is read already",
    "dog/self.png": "cannot be read (Too many levels of symbolic links)",
    "dog/dead.gif": "cannot be read (No such file or directory)",
}


def test_one_walk_names_what_it_passes_over(odd, caplog):
    found = [os.path.relpath(path, odd) for path in files.walk(odd, SUFFIXES)]
    assert found == ["cat/1.png", "dog/2.PNG", "dog/\udcff.jpg", "stray.png"]
    for name, reason in NAMED.items():
        assert f"skipped {odd / name}: {reason}" in caplog.messages
    assert len(caplog.messages) == len(NAMED)


def test_every_reader_of_folders_walks_so(odd, caplog):
    source = sources.source({"name": "folder", "path": odd.parent}, "train")
    assert source.class_names == ["cat", "dog"]  # hidden folders are no classes
    assert [source[i]["label"] for i in range(len(source))] == [0, 1, 1]
    assert source[2]["name"].endswith("\udcff.jpg") and source[2]["image"] == PICTURE
    assert len(find_images([str(odd)])) == 4
    (odd / "dog" / "a.mp4").write_bytes(b"")
    os.mkfifo(odd / "cat" / "b.mp4")
    assert find_videos(odd)["train"] == [odd / "dog" / "a.mp4"]
    assert f"skipped {odd}/cat/b.mp4: is a pipe, no file" in caplog.messages
    with pytest.raises(ValueError, match=r"no such image or folder: '.*pipe\.png'"):
        find_images([str(odd / "cat" / "pipe.png")])


def test_linked_class_folders_are_read(tmp_path):
    """As subsets of ImageNet are made; the name is that of the link."""
    (tmp_path / "all" / "n01").mkdir(parents=True)
    (tmp_path / "all" / "n01" / "1.png").write_bytes(PICTURE)
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "fish").symlink_to(tmp_path / "all" / "n01")
    source = sources.source({"name": "folder", "path": tmp_path}, "train")
    assert source.class_names == ["fish"] and source[0]["name"] == str(tmp_path / "train" / "fish" / "1.png")


def test_a_pipe_is_never_waited_for(tmp_path):
    os.mkfifo(tmp_path / "a.png")
    for path, message in (
        (tmp_path / "a.png", "it is a pipe, no file"),
        (tmp_path, "it is a folder"),
        (tmp_path / "a\0b", "no name of a file: embedded null"),
        (tmp_path / "\ud800.png", "no name of a file: .*surrogates"),
    ):
        with pytest.raises(OSError, match=message):
            files.read_file(path)


def test_lines_end_at_line_feeds_alone(tmp_path):
    text = "\ufeffone\u2028still one\r\n\n  \ntwo\x85\x0b\x0c\x1cstill two\n"
    path = tmp_path / "a.txt"
    path.write_bytes(text.encode() + b"not \xff text\nthree")
    assert files.text_lines(path) == [(1, "one\u2028still one"), (4, "two\x85\x0b\x0c\x1cstill two"), (6, "three")]
    path.write_text("one", encoding="utf-16")
    with pytest.raises(ValueError, match="is UTF-16 or UTF-32 by its byte order mark, expected UTF-8"):
        files.text_lines(path)


def caption_folder(path, *lines):
    (path / "a.png").write_bytes(PICTURE)
    (path / "captions.jsonl").write_bytes(b"\n".join(lines))
    return captions.caption_source({"name": "captions", "path": str(path)}, "train")


def entry(text):
    return json.dumps({"image": "a.png", "text": text}, ensure_ascii=False).encode("utf-8", "surrogatepass")


READ = {
    "line separator": (entry("a\u2028b"), ("a\u2028b",)),
    "list with null": (entry(["one", None, "two"]), ("one", "two")),
    "byte order mark": (b"\xef\xbb\xbf" + entry("one"), ("one",)),
    "carriage return": (entry("one") + b"\r", ("one",)),
    "object": (b'{"image": "a.png", "captions": [{"text": "one"}, {"text": null}]}', ("one",)),
}
SKIPPED = {
    "null": (entry(None), "it has no caption"),
    "list of null": (entry([None]), "it has no caption"),
    "number": (entry(3.5), "its caption is 3.5, expected a text"),
    "number in a list": (entry(["one", 3]), "its caption is 3, expected a text"),
    "true": (entry(True), "its caption is True, expected a text"),
    "deep list": (b'{"image": "a.png", "text": ' + b"[" * 90 + b"]" * 90 + b"}", "nested too deeply"),
    "deeper than the parser": (b'{"image": "a.png", "text": ' + b"[" * 99_999, "no JSON object|nested too deeply"),
    "lone surrogate": (b'{"image": "a.png", "text": "a \\ud800"}', "half of a surrogate pair"),
    "no UTF-8": (b'{"image": "a.png", "text": "\xff"}', "no JSON object with an image"),
    "array": (b"[1]", "no JSON object with an image"),
    "number for an image": (b'{"image": 3, "text": "a"}', "no JSON object with an image"),
    "NUL in the name": (b'{"image": "a\\u0000.png", "text": "a"}', "cannot be read .no name of a file"),
    "surrogate in the name": (b'{"image": "\\ud800.png", "text": "a"}', "cannot be read .no name of a file"),
    "pipe": (b'{"image": "pipe", "text": "a"}', "it is a pipe, no file"),
    "long": (b'{"image": "%s", "text": "a"}' % (b"x" * 100_000), "cannot be read"),
}


@pytest.mark.parametrize("name", READ)
def test_captions_that_are_read_right(tmp_path, name):
    line, expected = READ[name]
    source = caption_folder(tmp_path, line, entry("last"))
    assert len(source) == 2 and source[0]["captions"] == expected and source[1]["captions"] == ("last",)


@pytest.mark.parametrize("name", SKIPPED)
def test_captions_that_are_skipped_and_named(tmp_path, name, caplog):
    line, message = SKIPPED[name]
    os.mkfifo(tmp_path / "pipe")
    source = caption_folder(tmp_path, entry("first"), b"", line)
    with pytest.raises(CorruptExample, match=message):
        source[1]
    assert [*captions.all_captions(source)] == [(0, ("first",))]
    assert len(caplog.messages) == 1 and len(caplog.messages[0]) < 2000 and caplog.messages[0].isprintable()


def test_a_folder_without_splits_says_so(tmp_path, caplog):
    caption_folder(tmp_path, entry("one"))
    assert not caplog.messages
    config = {"name": "captions", "path": str(tmp_path)}
    captions.caption_source(config, "test")
    assert caplog.messages == [f"{tmp_path} has no folder 'test': this test is one on its training data"]
    (tmp_path / "test").mkdir()
    caption_folder(tmp_path / "test", entry("one"))
    captions.caption_source(config, "test")
    assert len(caplog.messages) == 1


def folders(root, **classes):
    for split, names in classes.items():
        for name in names:
            (root / split / name).mkdir(parents=True)
            (root / split / name / "1.png").write_bytes(PICTURE)
    return DataConfig(name="folder", path=str(root), preprocess=(), preprocess_test=("decode",))


@pytest.mark.parametrize(
    ("train", "test", "head", "message"),
    [
        (["a", "b"], ["a", "c"], 2, r"has other classes than the training data \(2 and 2\): 'c' are new, 'b' are miss"),
        (["a", "b", "c"], ["a", "b"], 3, r"\(2 and 3\): none are new, 'c' are missing"),
        (["a", "b", "c"], ["a", "b", "c"], 2, r"has 3 classes \('a', 'b', 'c'\), the model's head 2"),
        (["a", "b"], ["a", "b"], 3, r"has 2 classes \('a', 'b'\), the model's head 3"),
    ],
)
def test_classes_are_checked_when_the_data_open(tmp_path, train, test, head, message):
    from omnax.train.inputs import evaluation_batches, train_batches

    config = folders(tmp_path, train=train, test=test)
    with pytest.raises(ValueError, match=message):
        evaluation_batches(config, "test", 1, head)()
    if len(train) != head:
        with pytest.raises(ValueError, match=f"split 'train' has {len(train)} classes .*, the model's head {head}"):
            train_batches(config, 1, 0, head)((0, 1))


def test_messages_are_bounded():
    names = [f"{i:0200d}" for i in range(5000)]
    with pytest.raises(ValueError, match="has 5000 classes") as caught:
        sources.check_classes("data", names, 3)
    assert len(str(caught.value)) < 2000
    assert len(unknown("thing", "x" * 9999, map(str, range(9999)))) < 2000
    assert files.printable("a\ud800\udcff") == "a\\ud800\\udcff" and len(files.printable("x" * 99_999)) < 400
