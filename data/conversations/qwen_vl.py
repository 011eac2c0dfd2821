"""What a Qwen-VL model reads: conversations with images and videos -> token ids, packed patches, positions.

Everything comes from the checkpoint directory's own files (tokenizer.json, chat template, preprocessor settings).
"""

import dataclasses
import functools
import itertools
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import numpy as np
from jaxtyping import Bool, Float, Int
from PIL import Image
from tokenizers import Tokenizer

from ...hub.families.qwen_vl.preprocessing import read_pixels, read_sampling
from ...hub.generation import read_generation
from ...kernels.rope import packed_grid_positions
from ...kernels.window_attention import RaggedWindows, ragged_windows
from ...models.qwen_vl.deepstack import DeepStackConfig
from ...models.qwen_vl.model import QwenVLConfig
from ...models.qwen_vl.vision import VisionConfig
from ..images.decode import to_channels
from ..text.documents import open_tokenizer
from .templates import read_template, render, special_tokens
from .vision_tokens import (
    FrameSampling,
    Grid,
    Segment,
    mrope_positions,
    num_tokens,
    patchify_frames,
    resize_clip,
    smart_resize,
)

IGNORE = -100  # label of a token that is not learnt
VISION_START, VISION_END = "<|vision_start|>", "<|vision_end|>"
Timestamps = Literal["released", "transformers 5"]
Times = Iterator[Sequence[float]]  # of the videos of a conversation, in seconds

_MARK = "\U0010fffe"  # no character of any text (Unicode, section 23.7): holds places while a template runs
_THOUGHTS = ("reasoning_content", "thinking", "reasoning")  # what messages call it (templates.py)
_LONGEST_CONTROL = 64  # characters of a control token, and more

# The template of the Qwen2.5-VL releases, for directories that lack one: messages, and a system message before them.
MESSAGES_TEMPLATE = """
{%- for message in messages -%}
<|im_start|>{{ message.role }}
{% if message.content is string -%}
{{ message.content }}
{%- else -%}
{%- for part in message.content -%}
{%- if part.type == "image" -%}<|vision_start|><|image_pad|><|vision_end|>
{%- elif part.type == "video" -%}<|vision_start|><|video_pad|><|vision_end|>
{%- else -%}{{ part.text }}
{%- endif -%}
{%- endfor -%}
{%- endif -%}<|im_end|>
{% endfor -%}
{%- if add_generation_prompt -%}
<|im_start|>assistant
{% endif -%}
"""
DEFAULT_TEMPLATE = (
    """
{%- if messages[0].role != "system" -%}
<|im_start|>system
You are a helpful assistant.<|im_end|>
{% endif -%}"""
    + MESSAGES_TEMPLATE
)


# Qwen3-VL's: nobody speaks before the first message. Thinking opens the answer's thoughts, and keeps those behind the
# last question alone.
INSTRUCT_TEMPLATE = MESSAGES_TEMPLATE
THINKING_TEMPLATE = """
{%- set ns = namespace(last=-1) -%}
{%- for message in messages -%}
{%- if message.role == "user" -%}{%- set ns.last = loop.index0 -%}{%- endif -%}
{%- endfor -%}
{%- for message in messages -%}
<|im_start|>{{ message.role }}
{% if message.role == "assistant" -%}
{%- set said = message.content if message.content is string else message.content | map(attribute="text") | join -%}
{%- set thought = message.reasoning_content or "" -%}
{%- if not thought and "</think>" in said -%}
{%- set thought = said.split("</think>")[0].split("<think>")[-1].strip("\n") -%}
{%- set said = said.split("</think>")[-1].lstrip("\n") -%}
{%- endif -%}
{%- if loop.index0 > ns.last -%}
{{ "<think>\n" + thought.strip("\n") + "\n</think>\n\n" }}
{%- endif -%}
{{ said }}
{%- elif message.content is string -%}
{{ message.content }}
{%- else -%}
{%- for part in message.content -%}
{%- if part.type == "image" -%}<|vision_start|><|image_pad|><|vision_end|>
{%- elif part.type == "video" -%}<|vision_start|><|video_pad|><|vision_end|>
{%- else -%}{{ part.text }}
{%- endif -%}
{%- endfor -%}
{%- endif -%}<|im_end|>
{% endfor -%}
{%- if add_generation_prompt -%}
<|im_start|>assistant
<think>
{% endif -%}
"""


@dataclasses.dataclass(frozen=True)
class PixelSettings:
    """Sizes and normalisation of images, or of video frames (hub/families/qwen_vl/preprocessing.py reads them)."""

    min_pixels: int = 56 * 56
    max_pixels: int = 16384 * 28 * 28
    clip_pixels: int = 0  # of all temporal patches of a video together (qwen-vl-utils); 0: no bound
    whole_clip: bool = False  # whether the bounds are of all frames of a video together (Qwen3-VL)
    frame_tokens: int = 0  # with whole_clip, visual tokens of a frame at most; 0: no bound
    mean: tuple[float, ...] = (0.48145466, 0.4578275, 0.40821073)
    std: tuple[float, ...] = (0.26862954, 0.26130258, 0.27577711)
    patch_size: int = 14
    temporal_patch_size: int = 2
    merge_size: int = 2
    resample: int = Image.Resampling.BICUBIC

    def grid(self, num_frames: int, height: int, width: int) -> Grid:
        """The patches of so many frames of a size in pixels."""
        times = -(-num_frames // self.temporal_patch_size)
        if self.whole_clip:
            rows, columns = self._clip_size(num_frames, height, width)
            return times, rows // self.patch_size, columns // self.patch_size
        most = self.max_pixels
        if self.clip_pixels:
            most = min(most, self.clip_pixels * self.temporal_patch_size // num_frames)
            most = max(most, int(1.05 * self.min_pixels))
        rows, columns = smart_resize(height, width, self.patch_size * self.merge_size, self.min_pixels, most)
        return times, rows // self.patch_size, columns // self.patch_size

    def _clip_size(self, num_frames: int, height: int, width: int) -> tuple[int, int]:
        factor, most = self.patch_size * self.merge_size, self.max_pixels
        if self.frame_tokens:
            share = min(self.frame_tokens * factor**2, most // num_frames)
            most = max(share, int(1.05 * self.min_pixels)) * num_frames
        return resize_clip((num_frames, height, width), (self.temporal_patch_size, factor), self.min_pixels, most)

    def patches(self, frames: Sequence[Image.Image]) -> tuple[Float[np.ndarray, "P F"], Grid]:
        """Frames of one size -> their patches: RGB, antialiased smart resize, normalisation in float32."""
        width, height = frames[0].size
        rows, columns = (side * self.patch_size for side in self.grid(len(frames), height, width)[1:])
        resized = [to_channels(frame).resize((columns, rows), Image.Resampling(self.resample)) for frame in frames]
        # Rescaling and normalisation fused: (x - 255 mean) / (255 std)
        mean, std = (np.asarray(value, np.float32) * np.float32(255) for value in (self.mean, self.std))
        pixels = (np.stack([np.asarray(frame, np.float32) for frame in resized]) - mean) / std
        return patchify_frames(pixels, self.patch_size, self.temporal_patch_size, self.merge_size)


@dataclasses.dataclass(frozen=True)
class Visual:
    """One image, or one video's sampled frames and their rate in frames a second."""

    frames: Sequence[Image.Image]
    fps: float | None = None
    seconds: tuple[float, ...] = ()  # of each frame in the video; (): evenly at `fps` from 0 on

    def times(self, group: int) -> tuple[float, ...]:
        """The middle of each run of `group` frames in seconds, the last frame repeated to fill the last run."""
        assert self.fps is not None
        return mid_times(self.seconds or [i / self.fps for i in range(len(self.frames))], group)


def mid_times(seconds: Sequence[float], group: int) -> tuple[float, ...]:
    """The mean of the first and the last time of each run of `group`; the last is repeated to fill the last run."""
    filled = [*seconds, *[seconds[-1]] * (-len(seconds) % group)]
    return tuple((filled[i] + filled[i + group - 1]) / 2 for i in range(0, len(filled), group))


@dataclasses.dataclass(frozen=True)
class Example:
    """One sequence, unpadded. Patches of all its images and videos stand one after the other."""

    tokens: Int[np.ndarray, " T"]
    labels: Int[np.ndarray, " T"]  # the token itself where it is learnt, else IGNORE
    positions: Int[np.ndarray, "T 3"]
    rope_delta: int
    visual_index: Int[np.ndarray, " T"]  # row of the merged visual features that stands here, -1 for text
    patches: Float[np.ndarray, "P F"]
    coordinates: Int[np.ndarray, "P 2"]  # row, column in the item's patch grid
    frame_ids: Int[np.ndarray, " P"]  # 1, 2, ...: patches see each other within a frame
    grids: tuple[Grid, ...]


@dataclasses.dataclass(frozen=True)
class Processor:
    """Turns messages [{"role", "content": text or [{"type": "text" | "image" | "video", ...}]}] into `Example`s."""

    tokenizer: Tokenizer
    template: str
    image: PixelSettings
    video: PixelSettings
    sampling: FrameSampling
    image_token: int
    video_token: int
    stop_tokens: tuple[int, ...]
    pad_token: int
    tokens_per_second: float
    vocab_size: int  # rows of the model's embedding
    special_tokens: Mapping[str, str] = dataclasses.field(default_factory=dict)  # as chat templates see them
    advance_by_space: bool = False  # positions after a video as in transformers 5.0-5.23, see mrope_positions
    timestamps: Timestamps | None = None  # how the times of a video's frames are written before them; None: not

    def render(self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool) -> str:
        """The conversation as the model's text, by the chat template."""
        return render(self.template, messages, self.special_tokens, add_generation_prompt=add_generation_prompt)

    def __call__(
        self, messages: Sequence[Mapping[str, Any]], visuals: Sequence[Visual], *, add_generation_prompt: bool = True
    ) -> Example:
        """Builds the sequence of a conversation whose image and video parts are `visuals`, in order.

        With the prompt for an answer at its end it is encoded whole, as published, and nothing of it is learnt.
        ValueError where the number of visuals differs from the number of placeholders in the rendered text.
        """
        if not add_generation_prompt:
            ids, learnt = self.encode_turns(messages, self._times(visuals))
            return self.assemble(ids, visuals, learnt)
        guarded, typed = self._guarded(messages)
        times = self._times(visuals)
        return self.assemble(self._encode_guarded(self.render(guarded, True), typed, times), visuals)

    def encode(self, text: str) -> Int[np.ndarray, " T"]:
        """Token ids of a rendered conversation, one placeholder token for each image or video."""
        return np.asarray(self.tokenizer.encode(text, add_special_tokens=False).ids, np.int64)

    def encode_text(self, text: str) -> Int[np.ndarray, " T"]:
        """Token ids of a text that a person wrote: what looks like a control token in it becomes none."""
        typed: list[str] = []
        return self._encode_guarded(self._guard(text, typed), typed)

    def _times(self, visuals: Sequence[Visual]) -> Times:
        group = self.video.temporal_patch_size
        return iter([visual.times(group) for visual in visuals if self.timestamps and visual.fps is not None])

    def encode_turns(
        self, messages: Sequence[Mapping[str, Any]], times: Times | None = None
    ) -> tuple[Int[np.ndarray, " T"], Bool[np.ndarray, " T"]]:
        """Token ids of a whole conversation, and which are learnt: what the assistant says, to the end of its turn.

        Every answer is encoded by itself, behind its header, as it will be generated: the tokeniser joins nothing of
        the two (an answer that begins with a line break, and the one that ends the header). ValueError where the
        template does not write turn after turn. `times` are those of the videos, where they are written.
        """
        guarded, typed = self._guarded(messages)
        whole, pieces, done = self.render(guarded, False), list[tuple[str, bool]](), 0
        for i, message in enumerate(guarded):
            if message["role"] != "assistant":
                continue
            before, after = self.render(guarded[:i], True), self.render(guarded[: i + 1], False)
            if not (whole.startswith(after) and after.startswith(before)):
                raise ValueError(f"the chat template does not write turn after turn, at answer {i + 1} of the messages")
            pieces += [(whole[done : len(before)], False), (whole[len(before) : len(after)], True)]
            done = len(after)
        encoded = [
            (self._encode_guarded(text, typed, times), learnt) for text, learnt in [*pieces, (whole[done:], False)]
        ]
        return (
            np.concatenate([ids for ids, _ in encoded]),
            np.concatenate([np.full(len(ids), learnt) for ids, learnt in encoded]),
        )

    @functools.cached_property
    def _controls(self) -> re.Pattern[str]:
        """What no text may become: the control tokens, and the mark that keeps their places while a template runs."""
        added = self.tokenizer.get_added_tokens_decoder().values()
        tokens = [token.content for token in added if token.special or re.fullmatch(r"<\|.*\|>", token.content)]
        return re.compile("|".join(map(re.escape, [*sorted(tokens, key=len, reverse=True), _MARK])))

    def _guard(self, text: str, typed: list[str]) -> str:
        """The text with a numbered mark for each control token in it, which is added to `typed`."""

        def mark(found: re.Match[str]) -> str:
            typed.append(found[0])
            return f"{_MARK}{len(typed) - 1}{_MARK}"

        return self._controls.sub(mark, text)

    def _guarded(self, messages: Sequence[Mapping[str, Any]]) -> tuple[list[dict[str, Any]], list[str]]:
        """The messages with marks for the control tokens in their texts, and these. ValueError for odd roles."""
        typed: list[str] = []
        guarded = []
        for message in messages:
            if not re.fullmatch(r"[A-Za-z_]+", message["role"]):
                raise ValueError(f"the role of a message is {message['role'][:80]!r}, expected a name as 'user'")
            content = message["content"]
            if isinstance(content, str):
                content = self._guard(content, typed)
            else:
                content = [
                    dict(part) | ({"text": self._guard(part["text"], typed)} if part["type"] == "text" else {})
                    for part in content
                ]
                for part, following in itertools.pairwise(content):
                    if part["type"] == following["type"] == "text" and "<" in part["text"][-_LONGEST_CONTROL:]:
                        typed.append("")  # two texts shall not make one either
                        part["text"] += f"{_MARK}{len(typed) - 1}{_MARK}"
            thoughts = {key: self._guard(message[key], typed) for key in _THOUGHTS if isinstance(message.get(key), str)}
            guarded.append({**message, "content": content, **thoughts})
        return guarded, typed

    def _encode_guarded(self, text: str, typed: Sequence[str], times: Times | None = None) -> Int[np.ndarray, " T"]:
        """Ids of a text with marks; a typed control token is cut behind its first letter and so remains letters."""
        if self.timestamps:
            text = self._with_timestamps(text, times)
        parts = re.split(f"{_MARK}([0-9]+){_MARK}", text)
        texts = [
            piece
            for i, part in enumerate(parts)
            for piece in ((typed[int(part)][:1], typed[int(part)][1:]) if i % 2 else (part,))
        ]
        return np.concatenate([np.zeros(0, np.int64), *(self.encode(piece) for piece in texts if piece)])

    def _with_timestamps(self, text: str, times: Times | None) -> str:
        """The frames of every video one by one, each behind its time, in the place of one placeholder.

        As released that includes the marks around the placeholder (transformers 4.57); 5.0 to 5.23 leaves them there.
        """
        pad = self.tokenizer.id_to_token(self.video_token) or ""
        pattern = re.escape(pad)
        if self.timestamps == "released":
            pattern = f"{re.escape(VISION_START + pad + VISION_END)}|{pattern}"

        def frames(found: re.Match[str]) -> str:
            seconds = next(times, None) if times else None
            if seconds is None:
                raise ValueError("conversation has more video placeholders than videos")
            return "".join(f"<{time:.1f} seconds>{VISION_START}{pad}{VISION_END}" for time in seconds)

        return re.sub(pattern, frames, text)

    def grids(self, ids: Int[np.ndarray, " T"], shapes: Sequence[tuple[int, int, int]]) -> tuple[Grid, ...]:
        """The patches of the images and videos that stand at the placeholders, from their (frames, height, width).

        ValueError where their number differs from that of the placeholders.
        """
        settings, _ = self._places(ids, [frames for frames, _, _ in shapes])
        return tuple(setting.grid(*shape) for setting, shape in zip(settings, shapes, strict=True))

    def num_places(self, ids: Int[np.ndarray, " T"]) -> int:
        """How many tokens stand for images, videos, or frames with a time."""
        return int(np.isin(ids, (self.image_token, self.video_token)).sum())

    def _places(
        self, ids: Int[np.ndarray, " T"], num_frames: Sequence[int]
    ) -> tuple[list[PixelSettings], list[list[int]]]:
        """The settings of each image or video, and its placeholders: one each, or one for each frame with a time."""
        places = np.flatnonzero(np.isin(ids, (self.image_token, self.video_token))).tolist()
        settings, owned, end = [], [], 0
        for frames in num_frames:
            is_video = end < len(places) and ids[places[end]] == self.video_token
            settings.append(self.video if is_video else self.image)
            count = -(-frames // self.video.temporal_patch_size) if is_video and self.timestamps else 1
            owned.append(places[end : end + count])
            end += count
        if end != len(places):
            raise ValueError(
                f"conversation has {len(places)} image or video placeholders, got {len(num_frames)} visuals"
            )
        return settings, owned

    def assemble(
        self, ids: Int[np.ndarray, " T"], visuals: Sequence[Visual], learnt: Bool[np.ndarray, " T"] | None = None
    ) -> Example:
        """Expands each placeholder token to its visual's tokens and lays out patches, positions and labels.

        Labels are the tokens that are `learnt` (see `encode_turns`), and of no image or video.
        """
        if ids.max(initial=0) >= self.vocab_size:
            name = self.tokenizer.id_to_token(int(ids.max()))
            raise ValueError(f"token {name!r} has id {ids.max()}, outside the model's vocabulary of {self.vocab_size}")
        learnt = np.zeros(len(ids), bool) if learnt is None else learnt
        settings, owned = self._places(ids, [len(visual.frames) for visual in visuals])
        packed = [setting.patches(visual.frames) for setting, visual in zip(settings, visuals, strict=True)]
        grids = tuple(grid for _, grid in packed)
        merge = self.image.merge_size
        places = [place for group in owned for place in group]
        repeats = np.ones(len(ids), np.int64)
        for group, grid in zip(owned, grids, strict=True):
            repeats[group] = num_tokens(grid, merge) // len(group)
        tokens = np.repeat(ids, repeats).astype(np.int32)
        is_visual = np.repeat(np.isin(np.arange(len(ids)), places), repeats)
        segments = self._segments(len(ids), owned, visuals, grids)
        coordinates, frame_ids = packed_grid_positions(grids, merge=merge)
        positions, delta = mrope_positions(segments, self.tokens_per_second, merge, self.advance_by_space)
        return Example(
            tokens=tokens,
            labels=np.where(np.repeat(learnt, repeats) & ~is_visual, tokens, IGNORE).astype(np.int32),
            positions=positions.astype(np.int32),
            rope_delta=delta,
            visual_index=np.where(is_visual, np.cumsum(is_visual) - 1, -1).astype(np.int32),
            patches=_concatenate([patches for patches, _ in packed], (0, self._patch_width()), np.float32),
            coordinates=coordinates[:, 1:],
            frame_ids=frame_ids,
            grids=grids,
        )

    def _segments(
        self, length: int, owned: Sequence[Sequence[int]], visuals: Sequence[Visual], grids: Sequence[Grid]
    ) -> list[Segment]:
        segments, end = [], 0
        for places, visual, grid in zip(owned, visuals, grids, strict=True):
            seconds = None
            if self.timestamps:  # frames are placed as images
                grid = (grid[0] // len(places), *grid[1:])
            elif visual.fps is not None:
                seconds = self.video.temporal_patch_size / visual.fps
            for place in places:
                segments += [Segment(place - end), Segment(num_tokens(grid, self.image.merge_size), grid, seconds)]
                end = place + 1
        return [segment for segment in [*segments, Segment(length - end)] if segment.length]

    def _patch_width(self) -> int:
        return len(self.image.mean) * self.image.temporal_patch_size * self.image.patch_size**2


def pack(examples: Sequence[Example]) -> tuple[Example, Int[np.ndarray, " T"]]:
    """Several examples as one, each with positions from 0, and the segment of every token (1, 2, ...).

    Patches and features are renumbered, so that tokens keep their own.
    """
    if len(examples) == 1:
        return examples[0], np.ones(len(examples[0].tokens), np.int32)
    features = np.cumsum([0, *((example.visual_index >= 0).sum() for example in examples)])
    frames = np.cumsum([0, *(example.frame_ids.max(initial=0) for example in examples)])
    indices = [np.where(e.visual_index < 0, -1, e.visual_index + n) for e, n in zip(examples, features, strict=False)]

    def joined(name: str) -> np.ndarray:
        return np.concatenate([getattr(example, name) for example in examples])

    packed = Example(
        **{name: joined(name) for name in ("tokens", "labels", "positions", "patches", "coordinates")},
        rope_delta=examples[-1].rope_delta,
        visual_index=np.concatenate(indices).astype(np.int32),
        frame_ids=np.concatenate([e.frame_ids + n for e, n in zip(examples, frames, strict=False)]).astype(np.int32),
        grids=tuple(grid for example in examples for grid in example.grids),
    )
    segments = np.repeat(np.arange(1, len(examples) + 1), [len(example.tokens) for example in examples])
    return packed, segments.astype(np.int32)


@dataclasses.dataclass(frozen=True)
class Buckets:
    """The declared sizes of padded batches. Each size that occurs compiles once; None: powers of two from 64."""

    tokens: tuple[int, ...] | None = None
    patches: tuple[int, ...] | None = None
    windows: int | None = None  # of a row; None follows from the patches, and doubles where images are thin

    def fit(self, what: str, size: int) -> int:
        """The smallest bucket of `what` that holds `size`; ValueError if none does."""
        sizes = getattr(self, what)
        if sizes is None:
            return max(64, 1 << (size - 1).bit_length())
        if size > max(sizes):
            raise ValueError(f"{size} {what} do not fit the largest bucket, {max(sizes)}")
        return min(bucket for bucket in sizes if bucket >= size)


@dataclasses.dataclass(frozen=True)
class Windows:
    """What of the encoder's config decides how patches are laid out."""

    side: int = 0  # patches; 0: no windows
    shifted: bool = False
    merge_size: int = 2
    sizes: bool = False  # whether every patch says the size of its image's grid

    @classmethod
    def of(cls, vision: VisionConfig | DeepStackConfig) -> "Windows":
        """What an encoder needs."""
        if isinstance(vision, DeepStackConfig):
            return cls(merge_size=vision.merge_size, sizes=True)
        return cls(vision.window, vision.shifted, vision.merge_size)

    def shifts(self) -> dict[str, tuple[int, int]]:
        """Batch field -> displacement of its windows."""
        if not self.side:
            return {}
        half = self.side // 2
        return {"window": (0, 0)} | ({"shifted_window": (half, half)} if self.shifted else {})

    def count(self, grid: Grid) -> int:
        """Windows of one image or video, in the partition that has more."""

        def along(size: int, shift: int) -> int:
            return (size - 1 + self.side - shift) // self.side - (self.side - shift) // self.side + 1

        return grid[0] * max((along(grid[1], s) * along(grid[2], s) for s, _ in self.shifts().values()), default=0)


def collate(
    rows: Sequence[tuple[Example, Int[np.ndarray, " T"]]],
    windows: Windows,
    buckets: Buckets = Buckets(),
    pad_token: int = 0,
    with_visuals: bool | None = None,
) -> dict[str, np.ndarray]:
    """Rows of `pack` as one padded batch (on the right): what the model, its losses and its decoding read.

    Fields: tokens, labels, visual_index, segment_ids [B, T]; positions [B, T, 3]; lengths, rope_delta [B]; and where
    any row has an image or video (or as `with_visuals` says) patches, coordinates, frame_ids, and the windows or sizes
    of grids as models/qwen_vl/decoding.py vision_input reads them. Padding is segment 0.
    """
    length = buckets.fit("tokens", max(len(row.tokens) for row, _ in rows))

    def padded(arrays: Sequence[np.ndarray], size: int, fill: int = 0) -> np.ndarray:
        return np.stack(
            [np.pad(a, [(0, size - len(a)), *[(0, 0)] * (a.ndim - 1)], constant_values=fill) for a in arrays]
        )

    examples = [row for row, _ in rows]
    batch: dict[str, Any] = {
        "tokens": padded([e.tokens for e in examples], length, pad_token),
        "labels": padded([e.labels for e in examples], length, IGNORE),
        "visual_index": padded([e.visual_index for e in examples], length, -1),
        "segment_ids": padded([segments for _, segments in rows], length),
        "positions": padded([e.positions for e in examples], length),
        "lengths": np.array([len(e.tokens) for e in examples], np.int32),
        "rope_delta": np.array([e.rope_delta for e in examples], np.int32),
    }
    if not (any(e.grids for e in examples) if with_visuals is None else with_visuals):
        return batch
    patches = buckets.fit("patches", max(len(e.patches) for e in examples))
    for name in ("patches", "coordinates", "frame_ids"):
        batch[name] = padded([getattr(e, name) for e in examples], patches)
    grids = [e.grids for e in examples]
    if windows.sizes:
        batch["grid_sizes"] = padded([_grid_sizes(row) for row in grids], patches)
    for prefix, shift in windows.shifts().items():
        plan = _window_rows(grids, windows, shift, patches, buckets.windows)
        batch |= {f"{prefix}_token": plan.token, f"{prefix}_slot": plan.slot}
    return batch


def _grid_sizes(grids: Sequence[Grid]) -> Int[np.ndarray, "P 2"]:
    """Rows and columns of the grid that each patch is in."""
    sizes = np.array([grid[1:] for grid in grids], np.int32).reshape(-1, 2)
    return np.repeat(sizes, [math.prod(grid) for grid in grids], axis=0)


def _window_rows(
    grids: Sequence[Sequence[Grid]], windows: Windows, shift: tuple[int, int], patches: int, count: int | None
) -> RaggedWindows:
    """The windows of every row, in buckets that follow from the bucket of patches.

    Room for four times the windows of a square image (ragged edges are smaller windows); thin images double it.
    """
    side = (windows.side, windows.side)
    plan = functools.partial(ragged_windows, window=side, shift=shift, merge=windows.merge_size, length=patches)
    if count is None:
        needed = max(plan(row).token.shape[1] for row in grids)
        count = max(4 * patches // windows.side**2, 4)
        while count < needed:
            count *= 2
    rows = [plan(row, count=count) for row in grids]
    return RaggedWindows(*(np.concatenate(parts) for parts in zip(*rows, strict=True)))


def _concatenate(parts: Sequence[np.ndarray], empty: tuple[int, ...], dtype: Any) -> np.ndarray:
    return np.concatenate(parts).astype(dtype) if parts else np.zeros(empty, dtype)


def make_processor(
    documents: Mapping[str, Any],
    config: QwenVLConfig,
    *,
    advance_by_space: bool = False,
    timestamps: Timestamps = "released",
    thinking: bool = False,
) -> Processor:
    """The processor of a loaded checkpoint: `make_processor(bundle.processor, bundle.config)`.

    `documents` are the files beside the weights (DOCUMENTS of hub/families/qwen_vl/family.py). `timestamps` says how a
    Qwen3-VL's prompts give the times of frames; without a template beside the weights it gets that of Instruct or
    `thinking`. ValueError without a tokenizer.json.
    """
    if "tokenizer.json" not in documents:
        raise ValueError("the checkpoint has no tokenizer.json; expected it beside the weights")
    tokenizer = open_tokenizer(json.dumps(documents["tokenizer.json"]))
    patches = {
        "patch_size": config.vision.patch_size,
        "temporal_patch_size": config.vision.temporal_patch_size,
        "merge_size": config.vision.merge_size,
    }
    template = (THINKING_TEMPLATE if thinking else INSTRUCT_TEMPLATE) if config.timestamps else DEFAULT_TEMPLATE
    clips = config.timestamps
    stops = read_generation(documents.get("generation_config.json"))["eos_token_id"] or [
        token for name in ("<|im_end|>", "<|endoftext|>") if (token := tokenizer.token_to_id(name)) is not None
    ]
    pad = tokenizer.token_to_id("<|endoftext|>")
    return Processor(
        tokenizer=tokenizer,
        template=read_template(documents, template.strip("\n")),
        special_tokens=special_tokens(documents),
        image=PixelSettings(**read_pixels(documents, "image", patches)),
        video=PixelSettings(**read_pixels(documents, "video", patches, clips=clips)),
        sampling=FrameSampling(**read_sampling(documents)) if clips else FrameSampling(),
        image_token=config.image_token,
        video_token=config.video_token,
        stop_tokens=tuple(stops),
        pad_token=0 if pad is None else pad,
        tokens_per_second=config.tokens_per_second,
        vocab_size=config.text.vocab_size,
        advance_by_space=advance_by_space,
        timestamps=timestamps if config.timestamps else None,
    )
