"""`infer caption`, `vqa`, `match` and `capfilt` with small random models: what they print and draw, and bad input."""

import json

import jax
import numpy as np
import pytest
from omnax import hub
from omnax.configs.blip2 import get_config
from omnax.data.captions import CaptionFolder
from omnax.data.drawn import tiles
from omnax.data.images.decode import encode_png
from omnax.infer.__main__ import main
from omnax.models.blip2.decoding import Generator
from omnax.models.generation import Sampling
from omnax.train.config import build
from omnax.train.recipes.blip2 import recipe

CAPTION = tiles.CAPTIONS[50]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two images, one file that is none, and a checkpoint of each kind: one that speaks, one that matches."""
    path = tmp_path_factory.mktemp("blip2")
    for stage, name in (("1", "matches"), ("2", "speaks")):
        c = build(recipe.Config, get_config(f"stage={stage}").to_dict())
        params, _ = jax.jit(recipe.make_recipe(c).init)(jax.random.key(0))
        rng = np.random.default_rng(0)
        drawn = jax.tree.map(lambda leaf, rng=rng: rng.normal(0, 0.3, leaf.shape).astype(np.float32), params)
        hub.save(recipe.make_bundle(c, drawn | {"vision": params["vision"]}), path / name)
    (path / "images").mkdir()
    for i in (50, 120):
        (path / "images" / f"{i}.png").write_bytes(encode_png(tiles.draw(i, np.random.default_rng(i))))
    (path / "images" / "broken.png").write_bytes(b"\x89PNG nothing")
    return path


def test_caption_searches_and_draws(folder, capsys, tmp_path):
    arguments = ["caption", "--weights", str(folder / "speaks"), str(folder / "images"), "--max-new-tokens", "6"]
    assert main([*arguments, "--beams", "3", "--picture", str(tmp_path / "beams.png")]) == 0
    out = capsys.readouterr().out
    lines = [line.split("\t") for line in out.splitlines() if "\t" in line]
    assert [line[0][-6:] for line in lines] == ["20.png", "50.png"] and "skipped" in out
    bundle = hub.load(folder / "speaks")
    assert (tmp_path / "beams.png").stat().st_size > 1000
    # The same by hand: a newline ends an answer, as the exported config says
    newline = bundle.metadata["text_config"]["eos_token_id"]
    sampling = Sampling(max_new_tokens=6, min_new_tokens=1, num_beams=3, stop_tokens=(newline,), pad_token=1)
    prepared = [tiles.draw(i, np.random.default_rng(i)) for i in (120, 50)]
    mean, std = (np.array(getattr(bundle.processor.image, x), np.float32) for x in ("mean", "std"))
    images = np.stack([(image.astype(np.float32) / 255 - mean) / std for image in prepared])
    rows = np.full((2, 1), 2)
    said = Generator(bundle.model, sampling)(bundle.params, images, rows, np.ones((2, 1), bool))
    words = [[tiles.WORDS[i - 4] for i in row[: (row == newline).argmax() or 6] if 4 <= i < 22] for row in said]
    assert [line[1].split() for line in lines] == words
    greedy = [*arguments, "--search", "nucleus", "--seed", "1", "--picture", str(tmp_path / "drawn.png")]
    assert main(greedy) == 0 and (tmp_path / "drawn.png").is_file()


def test_vqa_asks_in_the_published_words(folder, capsys, tmp_path):
    image, picture = str(folder / "images" / "50.png"), str(tmp_path / "answers.png")
    arguments = ["vqa", "--weights", str(folder / "speaks"), image, "--picture", picture, "--search", "greedy"]
    assert main([*arguments, "--question", "the red ring", "--max-new-tokens", "3"]) == 0
    assert image in capsys.readouterr().out and (tmp_path / "answers.png").is_file()


def test_match_scores_every_pair(folder, capsys, tmp_path):
    arguments = ["match", "--weights", str(folder / "matches"), str(folder / "images"), "--text", CAPTION]
    arguments += ["--text", "a red bar", "--json", str(tmp_path / "s.json"), "--picture", str(tmp_path / "m.png")]
    assert main(arguments) == 0
    lines = [json.loads(line) for line in (tmp_path / "s.json").read_text().splitlines()]
    assert len(lines) == 2 and list(lines[0]["scores"]) == [CAPTION, "a red bar"]
    assert all(0 < pair["match"] < 1 and abs(pair["cosine"]) <= 1 for line in lines for pair in line["scores"].values())
    out = capsys.readouterr().out
    assert out.count("match ") == 4 and (tmp_path / "m.png").is_file()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["caption", "--weights", "speaks", "nowhere.png"], "no such image or folder: 'nowhere.png'"),
        (["caption", "--weights", "speaks", "images/broken.png"], "none of the 1 images could be read"),
        (["caption", "--weights", "matches", "images/50.png"], "has no language model"),
        (["caption", "--weights", "speaks", "images/50.png", "--prompt", "red " * 60], "expected at most 64"),
        (["caption", "--weights", "speaks", "images/50.png", "--beams", "0"], "num_beams is 0"),
        (["vqa", "--weights", "speaks", "--question", " ", "images/50.png"], "--question is empty"),
        (["vqa", "--weights", "speaks", "--question", "a", "--prompt", "b", "images/50.png"], "expected {} in it"),
        (["match", "--weights", "speaks", "--text", "a", "images/50.png"], "has no matching head"),
        (["match", "--weights", "matches", "--text", "...", "images/50.png"], "is empty, expected words"),
        (["match", "--weights", "matches", "--text", "red " * 20, "images/50.png"], "expected at most 16"),
    ],
)
def test_bad_input_is_one_line(folder, capsys, monkeypatch, arguments, message):
    monkeypatch.chdir(folder)
    assert main(arguments) == 1
    err = capsys.readouterr().err
    assert err.startswith("ValueError: ") and message in err and err.count("\n") == 1


def test_capfilt_writes_a_folder_that_data_read(folder, capsys, monkeypatch, tmp_path):
    """With a ranker that counts words in common with the right caption, in the place of CLIP."""
    from omnax.infer import capfilt

    (tmp_path / "web").mkdir()
    lines = []
    for i in (50, 120):
        data = (folder / "images" / f"{i}.png").read_bytes()
        (tmp_path / "web" / f"{i}.png").write_bytes(data)
        lines.append(json.dumps({"image": f"{i}.png", "text": tiles.CAPTIONS[i]}))
    (tmp_path / "web" / "captions.jsonl").write_text("\n".join(lines) + "\n")
    monkeypatch.setattr(capfilt, "load_clip", lambda weights: None)

    def overlap(judge, examples, texts):
        right = [{*example["captions"][0].split()} for example in examples]
        return [[len(words & {*text.split()}) for text in row] for words, row in zip(right, texts, strict=True)]

    monkeypatch.setattr(capfilt, "rank", overlap)
    arguments = ["capfilt", "--weights", str(folder / "speaks"), "--ranker", "", "--data", str(tmp_path / "web")]
    arguments += ["--out", str(tmp_path / "out"), "--candidates", "2", "--max-new-tokens", "5", "--min-new-tokens", "1"]
    assert main(arguments) == 0
    kept = CaptionFolder(tmp_path / "out")
    assert [row["captions"][0] for row in map(kept.__getitem__, range(2))] == [tiles.CAPTIONS[50], tiles.CAPTIONS[120]]
    assert "2 of 2 images" in capsys.readouterr().out
