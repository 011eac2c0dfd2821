"""Drawn questions that a small vision-language model learns in minutes, and a tokenizer of their few words.

Pictures and videos (four frames) are 56 pixels a side and hold one shape: a position or direction is the answer, or a
colour or shape; "describe" asks for a whole caption; "text" has no picture. Every conversation follows from task, split
and number alone.
"""

import json
from collections.abc import Callable
from typing import Any

import numpy as np
from tokenizers import AddedToken, Regex, Tokenizer, models, pre_tokenizers

from ..conversations.qwen_vl import MESSAGES_TEMPLATE
from ..conversations.turns import Conversation, Media
from ..lookup import lookup

SIDE, FRAMES, FPS = 56, 4, 2.0
COLORS = {
    "red": (220, 40, 40),
    "green": (40, 190, 60),
    "blue": (50, 80, 230),
    "yellow": (235, 215, 50),
    "purple": (150, 50, 200),
    "white": (240, 240, 240),
}
SHAPES = ("square", "disc", "cross")
POSITIONS = ("upper-left", "upper-right", "lower-left", "lower-right")
DIRECTIONS = {"right": (0, 1), "left": (0, -1), "down": (1, 0), "up": (-1, 0)}
SPECIAL = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
# Words of the questions and answers below, and of the chat template.
WORDS = (
    "\n",
    "user",
    "assistant",
    "system",
    "where",
    "which",
    "way",
    "what",
    "color",
    "shape",
    "describe",
    "repeat",
    "?",
)
TIMES = ("<0.2", "<1.2", "seconds>")  # of a video's pairs of frames, where they are written
FILLERS = ("a", "in", "the", *COLORS, *SHAPES, *POSITIONS, *DIRECTIONS)


def vocabulary() -> dict[str, int]:
    """Word or special token -> its id."""
    return {word: i for i, word in enumerate((*SPECIAL, *WORDS, *FILLERS, "<unknown>", *TIMES))}


def documents() -> dict[str, Any]:
    """The processor's files of a model of these questions, as hub.qwen_vl reads them beside released weights."""
    tokenizer = Tokenizer(models.WordLevel(vocabulary(), unk_token="<unknown>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(  # type: ignore[assignment]
        [pre_tokenizers.Split(Regex(r"\n|\?"), "isolated"), pre_tokenizers.Split(" ", "removed")]
    )
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in SPECIAL])
    pixels = {"size": {"shortest_edge": SIDE**2, "longest_edge": 4 * SIDE**2}}
    return {
        "tokenizer.json": json.loads(tokenizer.to_str()),
        "chat_template.jinja": MESSAGES_TEMPLATE.strip("\n").encode(),
        "preprocessor_config.json": pixels,
        "video_preprocessor_config.json": pixels,
    }


class VisualQuestions:
    """Conversations of one task; "test" draws others than "train"."""

    def __init__(self, task: str, split: str, size: int):
        self._make = lookup(TASKS, task, "task")
        self._seed = (sorted(TASKS).index(task), ("train", "test").index(split))
        self._name, self._size = f"{task}/{split}", size

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, index: int) -> Conversation:
        question, answer, media = self._make(np.random.default_rng((*self._seed, index)))
        parts = [{"type": "video" if media.is_video else "image"}] if media else []
        messages = (
            {"role": "user", "content": [*parts, {"type": "text", "text": question}]},
            {"role": "assistant", "content": answer},
        )
        return Conversation(f"{self._name}[{index}]", messages, (media,) if media else ())


Drawn = tuple[str, str, Media | None]  # question, answer, what it is about


def draw(rng: np.random.Generator, color: str, shape: str, centers: list[np.ndarray]) -> tuple[np.ndarray, ...]:
    """Frames uint8 [56, 56, 3] of a shape at (row, column) `centers`, on a noisy dark ground."""
    radius = rng.uniform(SIDE / 10, SIDE / 6)
    frames = []
    for center in centers:
        y, x = np.mgrid[:SIDE, :SIDE] - center[:, None, None]
        inside = {
            "square": np.maximum(abs(x), abs(y)) <= radius,
            "disc": x**2 + y**2 <= radius**2,
            "cross": (np.minimum(abs(x), abs(y)) <= radius / 3) & (np.maximum(abs(x), abs(y)) <= radius),
        }[shape]
        picture = np.where(inside[..., None], COLORS[color], 30) + rng.normal(0, 0.05 * 255, (SIDE, SIDE, 3))
        frames.append(picture.clip(0, 255).astype(np.uint8))
    return tuple(frames)


def _picture(rng: np.random.Generator) -> tuple[str, str, str, Media]:
    """Colour, shape and position of a picture, and it."""
    color, shape, corner = rng.choice(list(COLORS)), rng.choice(SHAPES), int(rng.integers(4))
    center = SIDE * np.array([0.25 + 0.5 * (corner // 2), 0.25 + 0.5 * (corner % 2)]) + rng.uniform(-5, 5, 2)
    return color, shape, POSITIONS[corner], Media(draw(rng, color, shape, [center]))


def _position(rng: np.random.Generator) -> Drawn:
    _, _, position, media = _picture(rng)
    return "where ?", position, media


def _color(rng: np.random.Generator) -> Drawn:
    color, _, _, media = _picture(rng)
    return "what color ?", color, media


def _shape(rng: np.random.Generator) -> Drawn:
    _, shape, _, media = _picture(rng)
    return "what shape ?", shape, media


def _describe(rng: np.random.Generator) -> Drawn:
    color, shape, position, media = _picture(rng)
    return "describe", f"a {color} {shape} in the {position}", media


def _direction(rng: np.random.Generator) -> Drawn:
    name = rng.choice(list(DIRECTIONS))
    middle = SIDE / 2 + rng.uniform(-4, 4, 2)
    steps = SIDE / 8 * (np.arange(FRAMES) - (FRAMES - 1) / 2)
    centers = [middle + step * np.array(DIRECTIONS[name]) for step in steps]
    frames = draw(rng, rng.choice(list(COLORS)), rng.choice(SHAPES), centers)
    return "which way ?", name, Media(frames, is_video=True, fps=FPS)


def _text(rng: np.random.Generator) -> Drawn:
    words = " ".join(rng.choice(FILLERS, int(rng.integers(1, 5))))
    return f"repeat {words}", words, None


TASKS: dict[str, Callable[[np.random.Generator], Drawn]] = {
    "position": _position,
    "direction": _direction,
    "color": _color,
    "shape": _shape,
    "describe": _describe,
    "text": _text,
}
