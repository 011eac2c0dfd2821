"""Folders of images, tar shards, captions, conversations and media in a bucket read as on a disk."""

import io
import json
import pickle
import shutil
import tarfile
from fractions import Fraction

import numpy as np
import pytest
from omnax.data.captions import caption_source
from omnax.data.conversations.qwen_vl import FrameSampling
from omnax.data.conversations.turns import conversation_source
from omnax.data.files import read_file, text_lines, walk
from omnax.data.images.decode import encode_png
from omnax.data.media.audio import load_audio, write_wav
from omnax.data.media.video import open_video, write_video
from omnax.data.sources import source
from omnax.storage.paths import as_path
from omnax.storage.writing import staged

TURNS = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "This."}]


@pytest.fixture(scope="module")
def places(bucket, tmp_path_factory):
    """The same small data on a disk and in the bucket: (folder, URL)."""
    folder = tmp_path_factory.mktemp("data") / "sets"
    image = [encode_png(np.full((8, 8, 3), 40 * i, np.uint8)) for i in range(4)]
    for i, name in enumerate(("a/0.png", "a/deep/1.png", "b/2.png", "b/.hidden.png")):
        path = folder / "images" / "train" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(image[i])
    (folder / "captions").mkdir()
    (folder / "captions" / "0.png").write_bytes(image[0])
    (folder / "captions" / "captions.jsonl").write_text('{"image": "0.png", "text": "dark"}\n')
    with tarfile.open(folder / "train-0.tar", "w") as archive:
        for name, data in (("0.png", image[1]), ("0.txt", b"grey"), ("1.png", image[2]), ("1.txt", b"light")):
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    lines = [{"image": "captions/0.png", "conversations": TURNS}, {"text": "plain"}, {"text": "another"}]
    (folder / "train.jsonl").write_text("\n".join(map(json.dumps, lines)))
    rng = np.random.default_rng(0)
    write_wav(folder / "sound.wav", rng.uniform(-0.5, 0.5, 16_000))
    frames = rng.integers(0, 255, (10, 32, 32, 3), dtype=np.uint8)
    write_video(folder / "video.mp4", frames, Fraction(10), audio=folder / "sound.wav")
    with staged(as_path("gs://bucket/sets")) as stage:
        shutil.copytree(folder, stage)
    return folder, "gs://bucket/sets"


@pytest.mark.parametrize(
    "config",
    [{"name": "folder", "path": "/images"}, {"name": "captions", "path": "/captions"}, {"name": "tar", "path": ""}],
    ids=lambda config: config["name"],
)
def test_examples_are_those_of_a_disk(config, places):
    make = source if config["name"] == "folder" else caption_source
    opened = [make(config | {"path": f"{place}{config['path']}"}, "train") for place in places]
    local, remote = opened[0], pickle.loads(pickle.dumps(opened[1]))  # as it goes to a worker
    assert len(local) == len(remote) > 0 and local.class_names == remote.class_names
    for i in range(len(local)):
        expected, got = dict(local[i]), dict(remote[i])
        assert got.pop("name").replace(places[1], str(places[0])) == expected.pop("name")
        assert got == expected


def test_conversations_and_their_images(places):
    local, remote = (conversation_source({"name": "jsonl", "path": str(place)}, "train") for place in places)
    assert len(remote) == 3
    sampling = FrameSampling()
    for i in range(3):
        assert (remote[i].messages, remote[i].text) == (local[i].messages, local[i].text)
    assert remote[0].media[0].shape(sampling) == local[0].media[0].shape(sampling) == (1, 8, 8)
    assert remote[0].media[0].read(sampling).frames[0].tobytes() == local[0].media[0].read(sampling).frames[0].tobytes()


def test_media(places, tmp_path):
    sounds = [load_audio(f"{place}/video.mp4") for place in places]
    np.testing.assert_array_equal(*sounds)
    videos = [open_video(f"{place}/video.mp4") for place in places]
    assert videos[1].fps == videos[0].fps and videos[1].num_frames == 10
    np.testing.assert_array_equal(*(list(video.frames()) for video in videos))
    write_video(f"{places[1]}/again.mp4", videos[1].frames(), Fraction(10), audio=f"{places[1]}/sound.wav")
    assert len(list(open_video(f"{places[1]}/again.mp4").frames())) == 10
    write_wav(f"{places[1]}/again.wav", sounds[0])
    np.testing.assert_allclose(load_audio(f"{places[1]}/again.wav"), sounds[0].clip(-1, 1), atol=1e-4)


def test_files_and_what_is_missing(places):
    root = as_path(places[1])
    assert [path.removeprefix(f"{root}/") for path in walk(root, {".wav", ".mp4"})][-1] == "video.mp4"
    assert text_lines(root / "train.jsonl")[1] == (2, '{"text": "plain"}')
    with pytest.raises(FileNotFoundError, match="No such file"):
        read_file(f"{root}/none.png")
    with pytest.raises(ValueError, match="nowhere/train is not a folder"):
        source({"name": "folder", "path": f"{root}/nowhere"}, "train")
    with pytest.raises(ValueError, match="data_dir is gs://bucket/sets, expected a local folder"):
        source({"name": "digits", "data_dir": str(root)}, "train")
