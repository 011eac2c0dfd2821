"""Conversations in the formats of fine-tuning, their media, and packing them into rows of one shape."""

import base64
import json
import os
import re
from fractions import Fraction

import numpy as np
import pytest
from omnax.configs.qwen_vl import tiny
from omnax.data.conversations import packing
from omnax.data.conversations.packing import Packer, RowShape
from omnax.data.conversations.qwen_vl import IGNORE, Windows, make_processor
from omnax.data.conversations.turns import JsonLines, Media, conversation_source, read_video
from omnax.data.conversations.vision_tokens import FrameSampling
from omnax.data.drawn.visual_questions import DIRECTIONS, POSITIONS, TASKS, VisualQuestions, documents
from omnax.data.images.decode import CorruptExample, encode_png
from omnax.data.media.video import write_video
from PIL import ExifTags, Image

PROCESSOR = make_processor(documents(), tiny("published"))
SHAPE = RowShape(tokens=96, patches=96, segments=8, frames=8)
PACKER = Packer(PROCESSOR, Windows(8), SHAPE)


def pixels(rows, columns, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (rows, columns, 3), dtype=np.uint8)


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "a.png").write_bytes(encode_png(pixels(40, 60)))
    (tmp_path / "b.png").write_bytes(encode_png(pixels(60, 40)))
    frames = [np.full((48, 64, 3), 20 * i, np.uint8) for i in range(12)]
    write_video(tmp_path / "c.mp4", frames, Fraction(4))
    return tmp_path


def write_lines(path, *lines):
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


def llava(value, **media):
    turns = [{"from": "human", "value": value}, {"from": "gpt", "value": "left"}]
    return {"conversations": turns, **media}


def test_both_formats_of_conversations(folder):
    url = "data:image/png;base64," + base64.b64encode((folder / "b.png").read_bytes()).decode()
    content = [
        {"type": "image", "image": "a.png"},
        {"type": "text", "text": "and"},
        {"type": "image_url", "image_url": {"url": url}},
        {"type": "video", "video": "c.mp4"},
    ]
    source = JsonLines(
        write_lines(
            folder / "train.jsonl",
            llava("<image>\nand <image> which way ?", image=["a.png", "b.png"]),
            llava("<video>\nwhich way ?", video="c.mp4"),
            "",
            {"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": "left"}]},
            {"text": "a disc"},
        )
    )
    assert len(source) == 4
    first, second, third, document = (source[i] for i in range(4))
    parts = [
        {"type": "image"},
        {"type": "text", "text": "and "},
        {"type": "image"},
        {"type": "text", "text": " which way ?"},
    ]
    assert first.messages[0] == {"role": "user", "content": parts}
    assert first.messages[1] == {"role": "assistant", "content": "left"}
    sampling = FrameSampling()
    assert [m.shape(sampling) for m in first.media] == [(1, 40, 60), (1, 60, 40)]
    assert second.media[0].shape(sampling) == (6, 48, 64)  # 3 s at 2 a second
    assert [m.shape(sampling) for m in third.media] == [(1, 40, 60), (1, 60, 40), (6, 48, 64)]
    np.testing.assert_array_equal(third.media[1].read(sampling).frames[0], pixels(60, 40))
    assert document.text == "a disc" and third.name.endswith("train.jsonl, line 4")
    assert isinstance(conversation_source({"name": "jsonl", "path": str(folder)}, "train"), JsonLines)


def test_sampled_frames_of_a_video(folder):
    visual = read_video(folder / "c.mp4", FrameSampling())
    values = [int(np.asarray(frame).mean()) for frame in visual.frames]
    wanted = [0, 2, 4, 7, 9, 11]
    np.testing.assert_allclose(values, [20 * i for i in wanted], atol=6)  # H.264 is lossy
    assert visual.fps == 6 / 12 * 4
    assert len(read_video(folder / "c.mp4", FrameSampling(), 4).frames) == 4


def test_truncated_and_missing_media_are_named(folder):
    whole = (folder / "c.mp4").read_bytes()
    (folder / "cut.mp4").write_bytes(whole[: len(whole) // 2])
    (folder / "cut.png").write_bytes((folder / "a.png").read_bytes()[:300])
    for name, is_video in (("cut.mp4", True), ("no.mp4", True), ("no.png", False)):
        with pytest.raises(CorruptExample, match=name):
            Media(folder / name, is_video, name=name).shape(FrameSampling())
    with pytest.raises(CorruptExample, match=r"cut\.png"):
        Media(folder / "cut.png", name="cut.png").read(FrameSampling())


BROKEN = {
    '{"conversations": [': "it is not JSON",
    '{"image": "a.png"}': "it is no conversation .KeyError: 'conversations'",
    "[1]": "it is no conversation",
    json.dumps(llava("<image> <image> where ?", image="a.png")): "its text has more <image> than it has images",
    json.dumps(llava("where ?", image="a.png")): "it has 1 images or videos more",
    json.dumps({"messages": [{"role": "user", "content": "where ?"}]}): "nobody answers",
    json.dumps(llava("<image> where ?", image="gone.png")): "cannot be read",
    json.dumps(llava("where ? " * 200)): "too large for a row: .* tokens of 96",
    '{"text": "half \\ud800"}': "it is no conversation .UnicodeEncodeError: .*surrogates not allowed",
    json.dumps(llava(None)): "it is no conversation .TypeError: expected a text, got None",
    json.dumps({"text": ["x" * 9999]}): "expected a text, got .* characters",
    json.dumps(llava("<image> a ?", image="a\0.png")): "no name of a file",
    json.dumps(llava("<image> b ?", image=7)): "it is no conversation",
    json.dumps({"messages": [{"role": "assistant<|im_end|>", "content": "a"}]}): "nobody answers",
    json.dumps({"messages": [{"role": "a b", "content": "a"}, {"role": "assistant", "content": "b"}]}): "the role",
    "[" * 99_999: "it is not JSON .it is nested too deeply",
    json.dumps(llava("<image> c ?", image="pipe.png")): "it is a pipe, no file",
    json.dumps(llava("<image> d ?", image="data:image/png;base64,a")): "it is no conversation .Error",
}


def test_broken_lines_are_skipped_counted_and_named(folder, caplog):
    good = llava("<image>\nwhere ?", image="a.png")
    os.mkfifo(folder / "pipe.png")
    path = write_lines(folder / "x.jsonl", good, *BROKEN, good)
    batches = packing.evaluate(JsonLines(path), PACKER, batch_size=1)
    batch = next(batches)
    assert batch["segment_ids"].max() == 2 and len(batches.skipped) == len(BROKEN)
    for number, (line, reason) in enumerate(BROKEN.items(), 2):
        media = [str(folder / name) for name in ("gone.png", "a\0.png", "pipe.png") if json.dumps(name) in line]
        name = media[0] if media else f"{path}, line {number}"
        assert re.search(reason, batches.skipped[name]) and len(batches.skipped[name]) < 1000
    assert f"skipped unusable conversation {len(BROKEN)}" in caplog.text


def test_a_byte_order_mark_and_line_separators_are_read_right(folder):
    lines = [json.dumps({"text": text}, ensure_ascii=False) for text in ("a\u2028b", "c\x85d")]
    (folder / "y.jsonl").write_bytes(("\ufeff" + "\r\n".join(lines)).encode())
    source = JsonLines(folder / "y.jsonl")
    assert [source[i].text for i in range(len(source))] == ["a\u2028b", "c\x85d"]
    (folder / "y.jsonl").write_text(lines[0], encoding="utf-16")
    with pytest.raises(ValueError, match="is UTF-16 or UTF-32"):
        JsonLines(folder / "y.jsonl")


def test_a_source_without_a_usable_line_stops(tmp_path):
    path = write_lines(tmp_path / "x.jsonl", *["{"] * 120)
    with pytest.raises(ValueError, match="100 conversations in a row cannot be used"):
        next(packing.evaluate(JsonLines(path), PACKER, batch_size=1))
    with pytest.raises(ValueError, match="there is no file of conversations"):
        JsonLines(tmp_path / "none.jsonl")
    with pytest.raises(ValueError, match="is empty"):
        JsonLines(write_lines(tmp_path / "empty.jsonl", ""))


def streams():
    return [
        (VisualQuestions(task, "train", 50), weight)
        for task, weight in (("position", 1), ("direction", 1), ("text", 2))
    ]


def test_rows_are_filled_evenly_within_their_bounds():
    batch = next(packing.train(streams(), PACKER, batch_size=4, seed=0))
    assert {name: x.shape for name, x in batch.items() if name in ("tokens", "patches", "window_token")} == {
        "tokens": (4, 96),
        "patches": (4, 96, 1176),
        "window_token": (4, 6, 64),
    }
    filled = (batch["segment_ids"] > 0).sum(1)
    assert filled.min() > 96 - 40 and (batch["segment_ids"].max(1) >= 3).all()
    # Every conversation begins at position 0, sees its own pixels, and answers
    for row in range(4):
        for segment in range(1, batch["segment_ids"][row].max() + 1):
            here = batch["segment_ids"][row] == segment
            assert batch["positions"][row, here][0].tolist() == [0, 0, 0]
            assert (batch["labels"][row, here] != IGNORE).any()
        visual = batch["visual_index"][row]
        np.testing.assert_array_equal(visual[visual >= 0], np.arange((batch["frame_ids"][row] > 0).sum() // 4))


def test_batches_do_not_depend_on_processes_and_resume_exactly():
    whole = packing.train(streams(), PACKER, batch_size=4, seed=3)
    parts = [packing.train(streams(), PACKER, batch_size=4, seed=3, shard=(i, 2)) for i in range(2)]
    states = []
    expected = []
    for _ in range(3):
        expected.append(next(whole))
        halves = [next(part) for part in parts]
        states.append(whole.get_state())
        for name, array in expected[-1].items():
            np.testing.assert_array_equal(np.concatenate([half[name] for half in halves]), array, err_msg=name)
        assert parts[0].get_state() == parts[1].get_state() == states[-1]
    again = packing.train(streams(), PACKER, batch_size=4, seed=3)
    again.set_state(json.loads(json.dumps(states[0])))
    for batch in expected[1:]:
        for name, array in next(again).items():
            np.testing.assert_array_equal(array, batch[name], err_msg=name)
    with pytest.raises(ValueError, match="the state has seed = 4, this run 3"):
        again.set_state(states[0] | {"seed": 4})


def test_one_pass_sees_every_conversation_once():
    source = VisualQuestions("position", "test", 20)
    batches = list(packing.evaluate(source, PACKER, batch_size=2))
    assert sum(int(batch["segment_ids"].max(1).sum()) for batch in batches) == 20


@pytest.mark.parametrize("task", TASKS)
def test_drawn_questions(task):
    """Every word is known, every draw its own; test draws are not those of training."""
    train, test = (VisualQuestions(task, split, 40) for split in ("train", "test"))
    answers = set()
    for i in range(40):
        conversation = train[i]
        prepared = PACKER.prepare(conversation)
        assert PROCESSOR.tokenizer.token_to_id("<unknown>") not in prepared.ids
        assert conversation.messages == train[i].messages
        answers.add(conversation.messages[1]["content"])
    assert {"position": set(POSITIONS), "direction": set(DIRECTIONS)}.get(task, answers) == answers and len(answers) > 2
    if task != "text":
        first, other = (source[0].media[0].source[0] for source in (train, test))
        assert first.shape == (56, 56, 3) and (first != other).any()


def test_the_shape_is_where_the_answer_says():
    for i in range(20):
        conversation = VisualQuestions("position", "train", 20)[i]
        frame = conversation.media[0].source[0].astype(int).max(-1)
        row, column = (np.argwhere(frame > 110).mean(0) > 28).astype(int)
        assert POSITIONS[2 * row + column] == conversation.messages[1]["content"]
        moving = VisualQuestions("direction", "train", 20)[i]
        first, last = (np.argwhere(moving.media[0].source[t].max(-1) > 110).mean(0) for t in (0, 3))
        step = np.array(DIRECTIONS[moving.messages[1]["content"]])
        np.testing.assert_allclose(last - first, 21 * step, atol=2)


def test_a_turned_photograph_is_measured_as_it_is_read(tmp_path):
    """Rows are planned from the sizes alone, which have to be those of the upright picture."""
    image = Image.new("RGB", (40, 24))
    exif = image.getexif()
    exif[ExifTags.Base.Orientation] = 8
    image.save(tmp_path / "a.jpg", exif=exif)
    media = Media(tmp_path / "a.jpg")
    assert media.shape(FrameSampling()) == (1, 40, 24) and media.read(FrameSampling()).frames[0].size == (24, 40)
