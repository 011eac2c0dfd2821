"""Sources: the digits and how they are prepared, other TFDS data sets, folders of images."""

import os
import re
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
import tensorflow_datasets as tfds
from omnax.data import sources
from omnax.data.images.decode import CorruptExample, decode_image, encode_png
from sklearn.datasets import load_digits

# Opens the digits; told to "die", the process kills itself while TFDS writes.
PREPARE = """
import os, signal, sys
from omnax.data import sources
from omnax.data.drawn import digits
if sys.argv[1] == "die":
    def encode(image, encode=digits.encode_png, written=[]):
        written.append(image)
        if len(written) > 1000:
            os.kill(os.getpid(), signal.SIGKILL)
        return encode(image)
    digits.encode_png = encode
source = sources.source({"name": "digits"}, "train")
assert "tensorflow" not in sys.modules
print(len(source), source[0]["label"])
"""


RECORDS = "digits-train.array_record-00000-of-00001"


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    path = tmp_path_factory.mktemp("tfds")
    sources.source({"name": "digits", "data_dir": path}, "train")
    return path


def test_digits_are_those_of_scikit_learn(directory):
    config = {"name": "digits", "data_dir": str(directory)}
    splits = {split: sources.source(config, split) for split in ("train", "test")}
    assert [len(split) for split in splits.values()] == [1437, 360]
    digits = load_digits()
    expected = sorted(
        (int(label), np.rint(image * 255 / 16).astype(np.uint8).tobytes())
        for image, label in zip(digits.images, digits.target, strict=True)
    )
    found = [
        (example["label"], decode_image(example["image"], channels=1).tobytes())
        for split in splits.values()
        for example in map(split.__getitem__, range(len(split)))
    ]
    assert sorted(found) == expected
    for split, share in (("train", 0.8), ("test", 0.2)):
        counts = np.bincount([splits[split][i]["label"] for i in range(len(splits[split]))])
        assert np.abs(counts - share * np.bincount(digits.target)).max() < 2
    assert splits["test"].class_names == list("0123456789")
    assert splits["test"][7]["name"] == "digits/test[7]"


def test_splits(directory):
    config = {"name": "digits", "data_dir": directory}
    whole, part = (sources.source(config, split) for split in ("train", "train[100:110]"))
    assert [part[i]["image"] for i in range(len(part))] == [whole[i]["image"] for i in range(100, 110)]
    with pytest.raises(ValueError, match="tset"):
        sources.source(config, "tset")
    with pytest.raises(ValueError, match=r"digits/train\[:0\] holds no examples"):
        sources.source(config, "train[:0]")


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("dataset_info.json", lambda data: data[: len(data) // 2], r"damaged: dataset_info\.json: Failed to load JSON"),
        ("dataset_info.json", lambda data: b"\xff" + data, r"damaged: dataset_info\.json"),
        (
            "digits-train.array_record-00000-of-00001",
            lambda data: data[: len(data) // 2],
            r"digits-train\.array_record",
        ),
        (RECORDS, lambda data: bytes(len(data)), r"digits-train\.array_record"),
        (RECORDS, lambda data: b"", r"digits-train\.array_record"),
    ],
)
def test_a_damaged_cache_is_one_line_that_names_its_file(directory, tmp_path, name, damage, message):
    shutil.copytree(directory / "digits", tmp_path / "digits")
    file = tmp_path / "digits" / "1.0.0" / name
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(ValueError, match=message) as caught:
        source = sources.source({"name": "digits", "data_dir": tmp_path}, "train")
        [source[i] for i in range(len(source))]
    assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value) and len(str(caught.value)) < 1000


@pytest.mark.parametrize("split", ["train", "train[:9]"])
def test_a_cache_without_its_description_is_named(directory, tmp_path, split):
    shutil.copytree(directory / "digits", tmp_path / "digits")
    (tmp_path / "digits" / "1.0.0" / "dataset_info.json").unlink()
    with pytest.raises(ValueError, match=rf"{tmp_path}.* is damaged: no dataset_info\.json names its splits"):
        sources.source({"name": "digits", "data_dir": tmp_path}, split)


def run(argument, path):
    environment = {**os.environ, "OMNAX_DATA_DIR": str(path)}
    command = [sys.executable, "-W", "error", "-c", PREPARE, argument]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_a_kill_leaves_nothing_and_two_processes_prepare_once(tmp_path):
    killed = run("die", tmp_path)
    killed.communicate()
    assert killed.returncode == -signal.SIGKILL
    assert [entry.name.split(".")[0] for entry in (tmp_path / "digits").iterdir()] == ["incomplete"]
    both = [run("live", tmp_path), run("live", tmp_path)]
    results = [process.communicate() for process in both]
    assert [process.returncode for process in both] == [0, 0], results
    assert [output.splitlines()[-1] for output, _ in results] == ["1437 1", "1437 1"]
    assert sum("Downloading and preparing" in output for output, _ in results) == 1
    assert [entry.name for entry in (tmp_path / "digits").iterdir()] == ["1.0.0"]


class TinyCaptions(tfds.core.GeneratorBasedBuilder):
    """A data set as a user might add: pictures with texts."""

    VERSION = tfds.core.Version("2.1.0")
    code_path = None

    def _info(self):
        features = {"image": tfds.features.Image(shape=(None, None, 3)), "caption": tfds.features.Text()}
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples(5)}

    def _generate_examples(self, number):
        import io

        for i in range(number):
            image = np.full((2, 3, 3), i, np.uint8)
            yield i, {"image": io.BytesIO(encode_png(image)), "caption": f"grey {i}"}


def test_other_tfds_data_sets(tmp_path):
    config = {"name": "tiny_captions", "data_dir": tmp_path}
    with pytest.raises(ValueError, match=r"'tiny_captions' is not prepared in .*download=True"):
        sources.source(config, "train")
    source = sources.source({**config, "download": True}, "train[20%:]")
    assert len(source) == 4
    for example in map(source.__getitem__, range(4)):
        assert example["caption"].decode() == f"grey {decode_image(example['image'])[0, 0, 0]}"
    assert len(sources.source({**config, "name": "tiny_captions:2.1.0"}, "train")) == 5
    with pytest.raises(ValueError, match="tiny_caption"):
        sources.source({**config, "name": "tiny_caption"}, "train")


def test_image_folder(tmp_path, caplog):
    for name in ("dogs/2.PNG", "cats/b/1.png", "cats/a.png"):
        (tmp_path / "val" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "val" / name).write_bytes(encode_png(np.full((2, 2, 3), len(name), np.uint8)))
    (tmp_path / "val" / "cats" / "notes.txt").write_text("no image")
    (tmp_path / "val" / "dogs" / "gone.jpg").symlink_to(tmp_path / "nowhere")
    source = sources.source({"name": "folder", "path": str(tmp_path)}, "val")
    assert source.class_names == ["cats", "dogs"]
    names = [str(tmp_path / "val" / name) for name in ("cats/a.png", "cats/b/1.png", "dogs/2.PNG")]
    assert [(source[i]["name"], source[i]["label"]) for i in range(3)] == [*zip(names, [0, 0, 1], strict=True)]
    assert decode_image(source[1]["image"])[0, 0, 0] == len("cats/b/1.png")
    assert len(source) == 3 and re.search(r"skipped .*gone.jpg: cannot be read \(No such file", caplog.text)
    (tmp_path / "val" / "dogs" / "2.PNG").unlink()
    with pytest.raises(CorruptExample, match=r"2.PNG: cannot be read \(No such file"):
        source[2]
    (tmp_path / "val" / "dogs" / "3.png").write_bytes(b"")
    with pytest.raises(ValueError, match="train is not a folder"):
        sources.source({"name": "folder", "path": str(tmp_path)}, "train")
    (tmp_path / "train" / "cats").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"no images in .*train, expected one folder per class"):
        sources.source({"name": "folder", "path": str(tmp_path)}, "train")
