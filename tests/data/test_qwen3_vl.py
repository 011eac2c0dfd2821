"""The processor of Qwen3-VL: times of frames in the text, sizes of clips, sampled frames, templates, packing."""

import dataclasses
import json
from types import SimpleNamespace

import numpy as np
import pytest
from omnax.configs.qwen3_vl import tiny
from omnax.data.conversations.packing import Packer, RowShape
from omnax.data.conversations.qwen_vl import PixelSettings, Visual, Windows, make_processor, mid_times
from omnax.data.conversations.vision_tokens import FrameSampling, resize_clip
from omnax.data.drawn.visual_questions import VisualQuestions, documents
from omnax.hub.families.qwen_vl import preprocessing
from omnax.models.qwen_vl.qwen3 import config
from PIL import Image
from references.chat import tiny_tokenizer, tokenizer_json

TOKENIZER = tiny_tokenizer()
IDS = {name: TOKENIZER.token_to_id(f"<|{name}|>") for name in ("image_pad", "video_pad")}
VISION = {"depth": 1, "width": 16, "num_heads": 2, "mlp_dim": 8, "out_width": 16, "deepstack_blocks": (0,)}
TEXT = {"depth": 1, "width": 16, "vocab_size": 270}
FILES = {
    "tokenizer.json": tokenizer_json(),
    "preprocessor_config.json": {"size": {"shortest_edge": 32 * 32, "longest_edge": 128 * 128}},
    "video_preprocessor_config.json": {"size": {"shortest_edge": 32 * 32, "longest_edge": 8 * 96 * 96}},
}
PATCHES = {"patch_size": 16, "temporal_patch_size": 2, "merge_size": 2}


def processor(**options):
    model = dataclasses.replace(
        config("2B", text=TEXT, vision=VISION), image_token=IDS["image_pad"], video_token=IDS["video_pad"]
    )
    return make_processor(FILES, model, **options)


def ask(*parts):
    kinds = [{"type": part} if part in ("image", "video") else {"type": "text", "text": part} for part in parts]
    return [{"role": "user", "content": kinds}]


def frames(count, size=(64, 48)):
    rng = np.random.default_rng(count)
    return [Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)) for _ in range(count)]


VIDEOS = [
    (Visual(frames(5), fps=2.0, seconds=(0.0, 0.4, 1.1, 1.5, 2.25)), 20.0, [0, 8, 22, 30, 45]),
    (Visual(frames(2, (40, 90)), fps=0.5, seconds=(0.0, 123.5)), 2.0, [0, 247]),
]


@pytest.mark.parametrize("timestamps", ["released", "transformers 5"])
def test_prompts_with_videos_are_those_of_transformers(timestamps):
    """Its own text for a video, in the place of the placeholder: with the marks around it as released, or inside."""
    from oracles import transformers

    theirs = transformers.models.qwen3_vl.processing_qwen3_vl.Qwen3VLProcessor
    made = processor(timestamps=timestamps)
    question = ask("Look:", "video", "then", "video", "image", "what?")
    example = made(question, [*(video for video, _, _ in VIDEOS), Visual(frames(1))])
    settings = SimpleNamespace(
        video_processor=SimpleNamespace(merge_size=2, temporal_patch_size=2),
        vision_start_token="<|vision_start|>",
        vision_end_token="<|vision_end|>",
        video_token="<|video_pad|>",
        _calculate_timestamps=lambda *arguments: theirs._calculate_timestamps(None, *arguments),
    )
    metadata = [SimpleNamespace(fps=rate, frames_indices=list(numbers)) for _, rate, numbers in VIDEOS]
    grids = np.array(example.grids[:2])
    inputs = {"video_grid_thw": grids, "video_metadata": metadata}
    texts = [theirs.replace_video_token(settings, inputs, i) for i in range(2)]
    text = made.render(question, add_generation_prompt=True)
    placeholder = "<|video_pad|>"
    if timestamps == "released":
        placeholder = f"<|vision_start|>{placeholder}<|vision_end|>"
    for filled in texts:
        text = text.replace(placeholder, filled.replace("<|video_pad|>", "\0"), 1)
    pads = "<|image_pad|>" * (np.prod(example.grids[2]) // 4)
    text = text.replace("<|image_pad|>", pads).replace("\0", "<|video_pad|>")
    assert example.tokens.tolist() == TOKENIZER.encode(text).ids
    assert "<0.2 seconds>" in text and "<61.8 seconds>" in text
    visual = example.visual_index >= 0
    np.testing.assert_array_equal(example.visual_index[visual], np.arange(visual.sum()))
    np.testing.assert_array_equal(visual, np.isin(example.tokens, list(IDS.values())))


def test_times_are_those_of_the_kept_frames():
    assert mid_times([0, 1, 3], 2) == (0.5, 3) and mid_times([0.5], 2) == (0.5,)
    assert Visual(frames(4), fps=2.0).times(2) == (0.25, 1.25)


def test_wrong_numbers_of_videos_are_named():
    made, video = processor(), VIDEOS[0][0]
    with pytest.raises(ValueError, match="more video placeholders than videos"):
        made(ask("video", "video"), [video])
    with pytest.raises(ValueError, match="placeholders, got 2 visuals"):
        made(ask("video"), [video, video])
    with pytest.raises(ValueError, match="placeholders, got 2 visuals"):
        made(ask("video"), [video, Visual(frames(1))])


def test_what_a_person_types_is_no_video():
    example = processor()(ask("<|vision_start|><|video_pad|><|vision_end|>"), [])
    assert not np.isin(example.tokens, list(IDS.values())).any()


def test_clips_are_resized_as_transformers_does():
    """300 random clips under random bounds, sides below a patch among them."""
    from oracles import transformers

    resize = transformers.models.qwen3_vl.video_processing_qwen3_vl.smart_resize
    rng = np.random.default_rng(0)
    for _ in range(300):
        count = int(rng.integers(2, 40))
        height, width = np.exp(rng.uniform(np.log(10), np.log(900), 2)).astype(int).tolist()
        least = int(rng.integers(1, 200)) * 1024
        most = least * int(rng.integers(1, 30))
        expected = resize(count, height, width, 2, 32, least, most)
        assert resize_clip((count, height, width), (2, 32), least, most) == expected
    with pytest.raises(ValueError, match="aspect ratio of at most 200"):
        resize_clip((2, 32, 9000), (2, 32), 1, 10**9)


def test_frames_are_sampled_as_transformers_does():
    from oracles import transformers

    theirs = transformers.models.qwen3_vl.video_processing_qwen3_vl.Qwen3VLVideoProcessor
    sampling = FrameSampling(even=False)
    for total, rate in ((1, 30.0), (3, 24.0), (31, 29.97), (500, 25.0), (100_000, 30.0), (77, 1.0)):
        settings = SimpleNamespace(fps=2, min_frames=4, max_frames=768)
        metadata = SimpleNamespace(total_num_frames=total, fps=rate)
        np.testing.assert_array_equal(sampling.indices(total, rate), theirs.sample_frames(settings, metadata))
        if total >= 3:
            chosen = theirs.sample_frames(settings, metadata, num_frames=3)
            np.testing.assert_array_equal(sampling.indices(total, rate, 3), chosen)


def test_settings_of_clips_are_those_of_the_class():
    """Every key of it has its fate; what the file leaves out is the class's; sizes follow both kinds of bounds."""
    from oracles import transformers

    made = transformers.models.qwen3_vl.video_processing_qwen3_vl
    keys = set(transformers.processing_utils.VideosKwargs.__annotations__)
    assert keys | set(made.Qwen3VLVideoProcessorInitKwargs.__annotations__) <= set(preprocessing.CLIPS.keys)
    absent = PixelSettings(**preprocessing.read_pixels({}, "video", PATCHES, clips=True))
    theirs = made.Qwen3VLVideoProcessor
    assert (absent.min_pixels, absent.max_pixels) == (theirs.size["shortest_edge"], theirs.size["longest_edge"])
    assert absent.mean == absent.std == (0.5,) * 3 == tuple(theirs.image_mean)
    wanted = {name: getattr(theirs, name) for name in ("fps", "min_frames", "max_frames")}
    assert preprocessing.read_sampling({}) == wanted | {"even": False}
    size = {"shortest_edge": 4096, "longest_edge": 25165824}
    file = {"size": size, "cap_pixels_per_frame": True, "max_video_tokens": 9}
    read = lambda file: PixelSettings(  # noqa: E731
        **preprocessing.read_pixels({"video_preprocessor_config.json": file}, "video", PATCHES, clips=True)
    )
    assert read(file).grid(4, 480, 640) == (2, 4, 6)  # nine tokens of 1024 pixels
    assert read({"size": size}).grid(5, 480, 640) == (3, 30, 40)
    for key, value in (("min_pixels", 9), ("do_sample_frames", False), ("num_frames", 8), ("patch_size", 14)):
        with pytest.raises(ValueError, match=f"'{key}' is {value}"):
            read({key: value})


def test_templates_of_instruct_and_thinking():
    """Nobody speaks first; thoughts before the last question are dropped, those behind it kept (spec 4.5)."""
    thought = {"role": "assistant", "content": "four", "reasoning_content": "2 and 2"}
    talk = [*ask("2 + 2?"), thought, *ask("sure?")]
    begin = "<|im_start|>user\n2 + 2?<|im_end|>\n<|im_start|>assistant\n"
    end = "four<|im_end|>\n<|im_start|>user\nsure?<|im_end|>\n<|im_start|>assistant\n"
    assert processor().render(talk, add_generation_prompt=True) == begin + end
    thinking = processor(thinking=True)
    assert thinking.render(talk, add_generation_prompt=True) == begin + end + "<think>\n"
    behind = thinking.render(talk[:2], add_generation_prompt=False)
    assert behind == f"{begin}<think>\n2 and 2\n</think>\n\nfour<|im_end|>\n"
    inline = [talk[0], {"role": "assistant", "content": "<think>\n2 and 2\n</think>\n\nfour"}]
    assert thinking.render(inline, add_generation_prompt=False) == behind
    ids, learnt = thinking.encode_turns(talk[:2])
    assert TOKENIZER.decode(ids[learnt].tolist(), skip_special_tokens=False) == "2 and 2\n</think>\n\nfour<|im_end|>\n"


def test_rows_count_the_tokens_of_timestamps():
    """Planned from what a video declares, without its pixels, a row is as long as it then is."""
    body = tiny("tiny")
    packer = Packer(make_processor(documents(), body), Windows.of(body.vision), RowShape(tokens=96, patches=128))
    for task in ("direction", "position", "text"):
        prepared = packer.prepare(VisualQuestions(task, "train", 5)[1])
        example = packer.read(prepared)
        cost = dict(zip(("tokens", "patches"), prepared.cost, strict=False))
        assert cost == {"tokens": len(example.tokens), "patches": len(example.patches)}
    words = json.loads(packer.processor.tokenizer.to_str())["model"]["vocab"]
    moving = packer.read(packer.prepare(VisualQuestions("direction", "train", 5)[1]))
    assert {"<0.2", "<1.2", "seconds>"} <= {word for word, i in words.items() if i in moving.tokens}
    assert words["<unknown>"] not in moving.tokens
    batch = packer.batch([[moving], []])
    assert batch["grid_sizes"].shape == (2, 128, 2) and (batch["grid_sizes"][0, :32] == 4).all()
    assert "window_token" not in batch
