"""Conversations about images and videos to train on: JSONL files, captioned images of any source, plain texts.

A source has `len` and `source[i]`, a `Conversation`; what cannot be read is a `CorruptExample` that names file and
line, which training skips, counts and names.
"""

import base64
import contextlib
import dataclasses
import io
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any, Protocol

import numpy as np
from PIL import Image

from ...storage.paths import as_path, read_range
from .. import checksums
from ..captions import caption_source
from ..files import check_encoding, check_file, printable, read_file, read_json
from ..images.decode import CorruptExample, decode_image, stored_size, to_pil
from ..media.video import declared_frames, open_video
from ..sources import Source
from .qwen_vl import Visual
from .vision_tokens import FrameSampling

Message = Mapping[str, Any]  # {"role", "content": text, or parts {"type": "text" | "image" | "video", "text"?}}
ROLES = {"human": "user", "gpt": "assistant"}  # LLaVA's names
DESCRIBE = "Describe the image."


@dataclasses.dataclass(frozen=True)
class Media:
    """One image or video: a file, an encoded image, or frames in memory with their rate."""

    source: Path | bytes | tuple[np.ndarray, ...]
    is_video: bool = False
    fps: float = 0.0  # of frames in memory
    name: str = "image"  # for messages

    def shape(self, sampling: FrameSampling) -> tuple[int, int, int]:
        """(sampled frames, height, width) without decoding the pixels. CorruptExample for what cannot be read."""
        if isinstance(self.source, tuple):
            return len(self.source), *self.source[0].shape[:2]
        if self.is_video:
            with _named(self.name):
                video = open_video(check_file(self._path()))
                return len(sampling.indices(declared_frames(self._path()), float(video.fps))), *video.size
        with _named(self.name):
            data = self.source if isinstance(self.source, bytes) else None
            with io.BytesIO(data) if data is not None else check_file(self._path()).open("rb") as file:
                return 1, *stored_size(Image.open(file))

    def seconds(self, sampling: FrameSampling) -> tuple[float, ...]:
        """When each sampled frame of a video is shown, as `read` will say."""
        if isinstance(self.source, tuple):
            return tuple(i / self.fps for i in range(len(self.source)))
        with _named(self.name):
            rate = float(open_video(check_file(self._path())).fps)
            return tuple((sampling.indices(declared_frames(self._path()), rate) / rate).tolist())

    def read(self, sampling: FrameSampling) -> Visual:
        """The pixels. CorruptExample for what is damaged."""
        if isinstance(self.source, tuple):
            return Visual([to_pil(frame) for frame in self.source], self.fps if self.is_video else None)
        if self.is_video:
            with _named(self.name):
                return read_video(check_file(self._path()), sampling)
        with _named(self.name):
            data = self.source if isinstance(self.source, bytes) else read_file(self._path())
        return Visual([to_pil(decode_image(data, 3, self.name))])

    def _path(self) -> Path:
        if not isinstance(self.source, PurePath):
            raise ValueError("a video is a file or frames in memory, not encoded bytes")
        return self.source


@contextlib.contextmanager
def _named(name: str) -> Iterator[None]:
    """Turns what a reader raises into CorruptExample(name, reason)."""
    try:
        yield
    except CorruptExample:
        raise
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        raise CorruptExample(name, f"cannot be read ({error})") from error


def read_video(path: Path, sampling: FrameSampling, num_frames: int | None = None) -> Visual:
    """Evenly sampled frames of a video file, taken as they are decoded. ValueError naming what is wrong with it."""
    video = open_video(path)
    total = declared_frames(path)
    try:
        wanted = sampling.indices(total, float(video.fps), num_frames)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    frames, last = {}, None
    for number, frame in enumerate(video.frames()):
        last = frame
        if number in wanted:
            frames[number] = Image.fromarray(np.ascontiguousarray(frame))
    assert last is not None  # open_video decoded one
    end = Image.fromarray(np.ascontiguousarray(last))  # where the file declares a frame too many
    rate, seconds = float(video.fps), tuple((wanted / float(video.fps)).tolist())
    return Visual([frames.get(number, end) for number in wanted], len(wanted) / total * rate, seconds)


@dataclasses.dataclass(frozen=True)
class Conversation:
    """Messages with a part for each of `media`, in order; or a plain text to learn as it is."""

    name: str
    messages: Sequence[Message] = ()
    media: tuple[Media, ...] = ()
    text: str = ""


class Conversations(Protocol):
    """What training reads."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Conversation: ...


def conversation_source(config: Mapping[str, Any], split: str) -> Conversations:
    """Opens what a config names.

    "jsonl" (`path`: a file, or a folder with <split>.jsonl; `media`: the folder of its images, default that of the
    file), or any captioned images of data/captions.py (TFDS sets among them), as answers to `prompt`.
    """
    if config["name"] == "jsonl":
        path = as_path(config["path"])
        return JsonLines(path / f"{split}.jsonl" if path.is_dir() else path, config.get("media", ""))
    return Captions(caption_source(config, split), config.get("prompt") or DESCRIBE)


class Captions:
    """Captioned images as conversations: the prompt asked, the first caption answered."""

    def __init__(self, source: Source, prompt: str):
        self.source, self.prompt = source, prompt

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Conversation:
        example = self.source[index]
        question = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": self.prompt}]}
        answer = {"role": "assistant", "content": example["captions"][0]}
        name = example["name"]
        return Conversation(name, (question, answer), (Media(example["image"], name=name),))


class JsonLines:
    """A file of conversations, one JSON object a line, in the formats people fine-tune with.

    LLaVA's: {"image" | "video": path or list of paths, "conversations": [{"from": "human" | "gpt" | "system", "value":
    text with <image> and <video>}]}. OpenAI's: {"messages": [{"role", "content": text or [{"type": "text", "text"},
    {"type": "image", "image": path}, {"type": "image_url", "image_url": {"url": path or data URL}}, {"type": "video",
    "video": path}]}]}. Plain text: {"text": text}. Only the positions of the lines are held in memory.
    """

    def __init__(self, path: Path, media: str = ""):
        if not path.is_file():
            raise ValueError(f"there is no file of conversations {str(path)!r}")
        try:
            checksums.check_file(path)
        except OSError as error:
            raise ValueError(f"{path} is damaged: {error.strerror}") from error
        self._path, self._media = path, as_path(media) if media else path.parent
        with path.open("rb") as file:
            check_encoding(file.read(4), path)
            file.seek(0)
            sizes = [(len(line), bool(line.strip())) for line in file]  # bytes: lines end at LF alone
        ends = np.cumsum([size for size, _ in sizes])
        starts = ends - [size for size, _ in sizes]
        self._lines = [(i, int(starts[i]), size) for i, (size, filled) in enumerate(sizes) if filled]
        if not self._lines:
            raise ValueError(f"{path} is empty")

    def __len__(self) -> int:
        return len(self._lines)

    def __getitem__(self, index: int) -> Conversation:
        number, offset, size = self._lines[index]
        name = f"{self._path}, line {number + 1}"
        try:
            entry = read_json(read_range(self._path, offset, size))
        except ValueError as error:
            raise CorruptExample(name, f"it is not JSON ({printable(error)})") from error
        try:
            return self._parse(entry, name)
        except CorruptExample:
            raise
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            what = f"{type(error).__name__}: {printable(error)}"
            raise CorruptExample(name, f"it is no conversation ({what})") from error

    def _parse(self, entry: Mapping[str, Any], name: str) -> Conversation:
        if "text" in entry:
            return Conversation(name, text=_text(entry["text"]))
        if "messages" in entry:
            media: list[Media] = []
            messages = [self._openai(message, media) for message in entry["messages"]]
        else:
            waiting: dict[str, list[str]] = {}
            for kind in ("image", "video"):
                places = entry.get(kind) or []
                waiting[kind] = [places] if isinstance(places, str) else list(places)
            media = []
            messages = [self._llava(turn, waiting, media, name) for turn in entry["conversations"]]
            if left := sum(map(len, waiting.values())):
                raise CorruptExample(name, f"it has {left} images or videos more than <image> and <video> in its text")
        if not any(message["role"] == "assistant" for message in messages):
            raise CorruptExample(name, "nobody answers: no turn of the assistant")
        return Conversation(name, messages, tuple(media))

    def _openai(self, message: Message, media: list[Media]) -> Message:
        content, role = message["content"], _text(message["role"])
        if isinstance(content, str):
            return {"role": role, "content": _text(content)}
        parts = []
        for part in content:
            kind = part["type"]
            if kind == "text":
                parts.append({"type": "text", "text": _text(part["text"])})
                continue
            place = part["image_url"]["url"] if kind == "image_url" else part[kind]
            media.append(self._open(_text(place), is_video=kind == "video"))
            parts.append({"type": "video" if kind == "video" else "image"})
        return {"role": role, "content": parts}

    def _llava(self, turn: Mapping[str, str], waiting: dict[str, list[str]], media: list[Media], name: str) -> Message:
        role = ROLES.get(turn["from"], _text(turn["from"]))
        parts, rest = [], _text(turn["value"])
        while found := [(rest.index(mark), mark) for mark in ("<image>", "<video>") if mark in rest]:
            place, mark = min(found)
            kind = mark.strip("<>")
            if not waiting[kind]:
                raise CorruptExample(name, f"its text has more {mark} than it has {kind}s")
            media.append(self._open(waiting[kind].pop(0), is_video=kind == "video"))
            # LLaVA writes a line break beside the mark; the templates of Qwen have none there
            parts += [{"type": "text", "text": rest[:place].removesuffix("\n")}, {"type": kind}]
            rest = rest[place + len(mark) :].removeprefix("\n")
        parts = [part for part in [*parts, {"type": "text", "text": rest}] if part.get("text") != ""]
        return {"role": role, "content": parts if any(part["type"] != "text" for part in parts) else rest}

    def _open(self, place: str, *, is_video: bool) -> Media:
        if place.startswith("data:"):
            return Media(base64.b64decode(place.partition(",")[2]), is_video, name=f"{self._path}: data URL")
        path = self._media / place.removeprefix("file://")
        return Media(path, is_video, name=str(path))


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"expected a text, got {printable(repr(value))}")
    value.encode()  # half of a surrogate pair, which JSON can write, is no text
    return value
