"""What evaluators read is opened before the first step, for every recipe: no run ends after an hour for a folder."""

import numpy as np
import pytest
from omnax.data.images import encode_png
from omnax.train.main import make_recipe

CASES = {
    "vit": {"data.name": "folder", "data.path": "{folder}", "data.test_split": "test"},
    "dinov2": {"data.name": "folder", "data.path": "{folder}", "data.test_split": "test"},
    "clip": {"data.name": "folder", "data.path": "{folder}", "data.test_split": "test"},
    "wav2lip": {"data.name": "folder", "data.path": "{folder}"},
    "qwen_vl": {"data.tests": "({{'name': 'jsonl', 'path': '{folder}/test.jsonl'}},)"},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Ten classes to train on, and nothing to test on."""
    path = tmp_path_factory.mktemp("data")
    for name in map(str, range(10)):
        (path / "train" / name).mkdir(parents=True)
        (path / "train" / name / "a.png").write_bytes(encode_png(np.zeros((8, 8, 1), np.uint8)))
    return path


@pytest.mark.parametrize("name", CASES)
def test_a_missing_test_set_is_found_at_the_start(name, folder):
    overrides = {key: value.format(folder=folder) for key, value in CASES[name].items()}
    _, recipe = make_recipe(f"configs/{name}.py", overrides)
    with pytest.raises(ValueError, match="test"):
        recipe.inspect()


def test_other_classes_in_the_test_folder_are_found_at_the_start(folder, tmp_path):
    (tmp_path / "train").symlink_to(folder / "train")
    (tmp_path / "test" / "eleven").mkdir(parents=True)
    (tmp_path / "test" / "eleven" / "a.png").write_bytes(encode_png(np.zeros((8, 8, 1), np.uint8)))
    _, recipe = make_recipe("configs/vit.py", {"data.name": "folder", "data.path": str(tmp_path)})
    with pytest.raises(ValueError, match="eleven"):
        recipe.inspect()


@pytest.mark.parametrize("name", ["vit", "dinov2", "clip"])
def test_sound_data_are_opened_without_a_word(name):
    _, recipe = make_recipe(f"configs/{name}.py", {})
    recipe.inspect()
