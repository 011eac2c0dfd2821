"""`SHA256SUMS` beside data: what it lists is checked as it is read, by every reader of files."""

import hashlib
import io
import json
import logging
import os
import shutil
import subprocess
import tarfile
import warnings
from pathlib import Path

import numpy as np
import pytest
from omnax.data import captions, checksums, sources
from omnax.data.conversations.turns import JsonLines
from omnax.data.files import read_file
from omnax.data.images.decode import CorruptExample, decode_image, encode_png
from omnax.data.media.audio import load_audio, write_wav

PICTURE = encode_png(np.full((4, 4, 3), 200, np.uint8))


def listed(folder: Path) -> Path:
    """As the command in checksums.py writes it."""
    command = "find . -type f ! -name SHA256SUMS -print0 | xargs -0 sha256sum > SHA256SUMS"
    subprocess.run(command, shell=True, cwd=folder, check=True)
    return folder


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def classes(folder: Path) -> Path:
    for name in ("cat/a.png", "cat/b\nc.png", "dog/ü.png"):
        (folder / "train" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "train" / name).write_bytes(PICTURE)
    with open(os.fsencode(folder) + b"/train/dog/\xff.png", "wb") as file:
        file.write(PICTURE)
    return folder


def test_a_changed_or_missing_image_is_named(tmp_path, caplog):
    root = listed(classes(tmp_path))
    source = sources.source({"name": "folder", "path": root}, "train")
    assert len(source) == 4 and all(source[i]["image"] == PICTURE for i in range(4)) and not caplog.messages
    names = [source[i]["name"] for i in range(4)]
    for name in ("cat/b\nc.png", "dog/ü.png"):
        changed = root / "train" / name
        flip(changed)
        with pytest.raises(CorruptExample, match="its SHA-256 is not the one in SHA256SUMS"):
            source[names.index(str(changed))]
        changed.write_bytes(PICTURE)
    (root / "train" / "cat" / "a.png").unlink()
    with caplog.at_level(logging.WARNING):
        assert len(sources.source({"name": "folder", "path": root}, "train")) == 3
    assert caplog.messages == [f"skipped {root}/train/cat/a.png: is listed in SHA256SUMS and missing"]


def test_texts_shards_conversations_and_sounds(tmp_path):
    (tmp_path / "a.png").write_bytes(PICTURE)
    (tmp_path / "captions.jsonl").write_text(json.dumps({"image": "a.png", "text": "a cat"}))
    (tmp_path / "turns.jsonl").write_text(json.dumps({"text": "words"}))
    write_wav(tmp_path / "a.wav", np.zeros(2000))
    for i in range(2):
        with tarfile.open(tmp_path / f"train-{i}.tar", "w") as archive:
            for name, data in (("0.png", PICTURE), ("0.txt", b"a cat")):
                info = tarfile.TarInfo(name)
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
    readers = {
        "captions.jsonl": lambda folder: captions.caption_source({"name": "captions", "path": str(folder)}, "train"),
        "turns.jsonl": lambda folder: JsonLines(folder / "turns.jsonl"),
        "train-1.tar": lambda folder: captions.caption_source({"name": "tar", "path": str(folder)}, "train"),
        "a.wav": lambda folder: load_audio(folder / "a.wav"),
    }
    listed(tmp_path)
    for name, read in readers.items():
        read(tmp_path)
        copy = tmp_path.with_name(f"copy of {name}")
        shutil.copytree(tmp_path, copy)
        flip(copy / name)
        with pytest.raises(ValueError, match=f"{name}.*its SHA-256 is not the one in SHA256SUMS"):
            read(copy)
    copy = tmp_path.with_name("one shard")
    shutil.copytree(tmp_path, copy)
    (copy / "train-0.tar").unlink()
    with pytest.raises(ValueError, match=r"train-0\.tar is listed in SHA256SUMS and missing"):
        readers["train-1.tar"](copy)


@pytest.mark.parametrize("content", [b"\xff\x00", b"123  a.png\n", b"deadbeef\n"])
def test_a_damaged_list_is_named(tmp_path, content):
    (tmp_path / "a.png").write_bytes(PICTURE)
    (tmp_path / checksums.LIST).write_bytes(content)
    with pytest.raises(ValueError, match=r"SHA256SUMS, line 1 is damaged, expected a SHA-256 and a name"):
        read_file(tmp_path / "a.png")


def test_other_forms_of_a_list_and_files_that_it_does_not_have(tmp_path):
    (tmp_path / "a.png").write_bytes(PICTURE)
    (tmp_path / "b.png").write_bytes(PICTURE)
    (tmp_path / checksums.LIST).write_text(f"{hashlib.sha256(b'').hexdigest().upper()} *a.png\n")
    assert read_file(tmp_path / "b.png") == PICTURE
    with pytest.raises(OSError, match="its SHA-256 is not the one"):
        read_file(tmp_path / "a.png")


def test_a_bit_of_a_png_is_found_without_a_list():
    """Its chunks have CRCs, of which Pillow looks at those without pixels only."""
    small = np.random.default_rng(0).integers(0, 256, (5, 5, 3)).astype(np.uint8)
    pixels = np.kron(small, np.ones((8, 8, 1), np.uint8))
    whole = encode_png(pixels)
    for at in range(len(whole)):
        for bit in (0, 5):
            try:
                with warnings.catch_warnings(action="ignore"):
                    found = decode_image(whole[:at] + bytes([whole[at] ^ 1 << bit]) + whole[at + 1 :])
            except CorruptExample:
                continue
            np.testing.assert_array_equal(found, pixels, err_msg=str(at))
