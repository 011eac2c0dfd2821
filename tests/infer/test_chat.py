"""`infer chat` on a small model that answers at random: streaming, pictures, transcript, and bad input in one line."""

import argparse
import json
from fractions import Fraction
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from omnax import hub
from omnax.configs import qwen3_vl
from omnax.configs.qwen_vl import tiny
from omnax.data.conversations.qwen_vl import make_processor
from omnax.data.drawn.visual_questions import documents
from omnax.data.images.decode import encode_png
from omnax.data.media.video import write_video
from omnax.infer.__main__ import main
from omnax.infer.chat import Stream, add_arguments, sampling_of
from omnax.models.qwen_vl.model import QwenVL, forward, init_params
from PIL import Image
from references.chat import tiny_tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("chat")
    model = QwenVL(tiny("published"))
    # Twenty times the published deviation, so that the answers are not all one word
    params = jax.tree.map(lambda x: 20 * x if x.ndim > 1 else x, init_params(model, jax.random.key(1)))
    hub.save(hub.Bundle(model, params, model.config, documents(), "transformers"), path / "weights")
    rng = np.random.default_rng(0)
    (path / "a.png").write_bytes(encode_png(rng.integers(0, 256, (56, 84, 3), dtype=np.uint8)))
    write_video(path / "c.mp4", [rng.integers(0, 256, (56, 56, 3), dtype=np.uint8) for _ in range(8)], Fraction(4))
    return path


def chat(folder, *arguments):
    return main(["chat", "--weights", str(folder / "weights"), "--max-new-tokens", "5", *map(str, arguments)])


def test_answers_are_printed_and_written_down(folder, capsys):
    image = ["--image", folder / "a.png"]
    wanted = ["--transcript", folder / "chat.json", "--picture", folder / "chat.png"]
    assert chat(folder, *image, *image, "--video", folder / "c.mp4", *wanted, "where ?") == 0
    transcript = json.loads((folder / "chat.json").read_text())
    answer = transcript["messages"][-1]["content"]
    lines = [answer, f"transcript: {folder / 'chat.json'}", f"picture: {folder / 'chat.png'}", ""]
    assert answer and capsys.readouterr().out == "\n".join(lines)
    assert [part["type"] for part in transcript["messages"][0]["content"]] == ["image", "image", "video", "text"]
    assert transcript["images"] == [str(folder / "a.png")] * 2
    with Image.open(folder / "chat.png") as picture:
        assert picture.width > 600


@pytest.mark.parametrize("size", ["tiny", "tiny-moe"])
def test_qwen3_answers_with_the_same_command(folder, tmp_path, capsys, size):
    """Dense and with experts; a video's frames behind their times."""
    model = QwenVL(qwen3_vl.tiny(size))
    params = jax.tree.map(lambda x: 20 * x if x.ndim > 1 else x, init_params(model, jax.random.key(1)))
    hub.save(hub.Bundle(model, params, model.config, documents(), "transformers"), tmp_path / "weights")
    media = ["--image", folder / "a.png", "--video", folder / "c.mp4", "--transcript", tmp_path / "chat.json"]
    assert chat(tmp_path, "--greedy", *media, "which way ?") == 0
    answer = json.loads((tmp_path / "chat.json").read_text())["messages"][-1]["content"]
    assert answer and capsys.readouterr().out.startswith(answer)


def test_text_alone_is_answered_by_the_likeliest_words(folder, capsys):
    """As the model's own scores say, one word after the other and without a cache."""
    assert chat(folder, "--max-new-tokens", "3", "what color ?") == 0
    bundle = hub.load(folder / "weights")
    processor = make_processor(bundle.processor, bundle.config)
    tokens = processor([{"role": "user", "content": "what color ?"}], []).tokens[None]
    begin = tokens.shape[1]
    for _ in range(3):
        positions = np.broadcast_to(np.arange(tokens.shape[1])[None, :, None], (*tokens.shape, 3))
        logits = forward(bundle.model, bundle.params, tokens, positions).logits
        tokens = np.c_[tokens, logits[:, -1].argmax(-1)]
    assert capsys.readouterr().out == processor.tokenizer.decode(tokens[0, begin:].tolist()) + "\n"


def test_a_character_appears_when_all_its_tokens_are_there(capsys):
    """Letters of several bytes, in a tokenizer of bytes; nothing from a stop token on."""
    tokenizer = tiny_tokenizer()
    stop = tokenizer.token_to_id("<|im_end|>")
    stream = Stream(SimpleNamespace(tokenizer=tokenizer), (stop,))
    shown = []
    for token in [*tokenizer.encode("né €").ids, stop, *tokenizer.encode("x").ids]:
        stream.write(np.array([token]))
        shown.append(capsys.readouterr().out)
    assert shown == ["n", "", "é", " ", "", "", "€", "", ""]
    assert stream.close() == "né €" and capsys.readouterr().out == "\n"


def test_bad_input_is_one_line(folder, capsys):
    (folder / "thin.png").write_bytes(encode_png(np.zeros((10, 2100, 3), np.uint8)))
    (folder / "cut.mp4").write_bytes((folder / "c.mp4").read_bytes()[:-2000])
    for arguments, message in [
        (["--image", folder / "thin.png", "?"], r"thin.png: image of 10x2100 pixels: expected an aspect ratio"),
        (["--image", folder / "none.png", "?"], "there is no image"),
        (["--video", folder / "cut.mp4", "?"], "cut.mp4"),
        (["--temperature", "-1", "?"], "Sampling.temperature is -1.0"),
    ]:
        assert chat(folder, *arguments) == 1
        error = capsys.readouterr().err
        assert message in error and error.startswith("ValueError: ") and error.count("\n") == 1


def test_config_that_does_not_fit_the_weights_is_named(folder, tmp_path, capsys):
    bundle = hub.load(folder / "weights")
    hub.save(bundle, tmp_path / "w")
    file = tmp_path / "w" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"intermediate_size": 96}))
    assert main(["chat", "--weights", str(tmp_path / "w"), "?"]) == 1
    assert "mlp.gate_proj.weight" in capsys.readouterr().err


def settings(published, *flags):
    """What the command line draws with, beside such a generation_config.json."""
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    arguments = parser.parse_args(["--weights", "w", "?", *flags])
    documents = {"generation_config.json": published}
    return sampling_of(arguments, documents, SimpleNamespace(stop_tokens=(7,), pad_token=0))


def test_sampling_is_that_of_the_file_with_the_defaults_of_transformers():
    drawn = settings({"do_sample": True})
    assert (drawn.temperature, drawn.top_k, drawn.top_p) == (1.0, 50, 1.0)
    assert settings({"do_sample": True, "temperature": None, "top_k": None}) == drawn
    assert settings({}).temperature == 0 and settings({"temperature": 0.7}).temperature == 0
    assert settings({}, "--temperature", "0.7").top_k == 50
    qwen = {"do_sample": True, "repetition_penalty": 1.05, "temperature": 0.1, "top_k": 1, "top_p": 0.001}
    both = settings(qwen | {"max_new_tokens": 9}, "--top-k", "3")
    assert (both.repetition_penalty, both.temperature, both.top_k, both.max_new_tokens) == (1.05, 0.1, 3, 9)
    assert settings(qwen, "--greedy").temperature == 0 and settings({}).max_new_tokens == 256
    with pytest.raises(ValueError, match="'num_beams' is 4"):
        settings({"num_beams": 4})
