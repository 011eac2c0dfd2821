"""Answer a question about images and videos with a vision-language model; the answer streams as it is written.

    python -m omnax.infer chat --weights DIR --image a.jpg --image b.png --video c.mp4 "What differs?"

Images and videos stand before the question, in the order image, video. Sampling follows the checkpoint's
generation_config.json where no flag says otherwise.
"""

import argparse
import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .. import hub
from ..data.conversations.qwen_vl import Processor, Visual, Windows, collate, make_processor, pack
from ..data.conversations.turns import read_video
from ..data.images.decode import decode_image, to_pil
from ..hub.generation import read_generation
from ..models.generation import Sampling
from ..models.qwen_vl.decoding import Generator
from ..models.qwen_vl.model import QwenVLConfig
from ..storage.paths import as_path
from ..storage.writing import staged

# Flags that are entries of generation_config.json
SAMPLING = {"temperature": float, "top_k": int, "top_p": float, "repetition_penalty": float}
MAX_NEW_TOKENS = 256


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--weights", required=True, help="checkpoint: directory, or id of a hub repository")
    parser.add_argument("question")
    parser.add_argument("--image", type=as_path, action="append", default=[], help="image file; may be given again")
    parser.add_argument("--video", type=as_path, action="append", default=[], help="video file; may be given again")
    parser.add_argument("--system", default="", help="system message instead of the chat template's own")
    parser.add_argument("--max-new-tokens", type=int, help=f"default: the checkpoint's, else {MAX_NEW_TOKENS}")
    parser.add_argument("--greedy", action="store_true", help="the likeliest token, whatever the checkpoint's settings")
    for name, kind in SAMPLING.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=kind)
    parser.add_argument("--presence-penalty", type=float, default=0.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--fps", type=float, default=2.0, help="frames a second taken from videos")
    parser.add_argument("--num-frames", type=int, help="frames taken from each video, instead of --fps")
    parser.add_argument("--max-pixels", type=int, help="of an image; larger ones are shrunk")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="default: bfloat16 but on CPUs")
    parser.add_argument("--picture", type=as_path, help="where a picture of images, question and answer goes")
    parser.add_argument("--transcript", type=as_path, help="where the conversation goes, as JSON")


def run(arguments: argparse.Namespace) -> None:
    dtype = arguments.dtype or ("float32" if jax.default_backend() == "cpu" else "bfloat16")
    visuals = [read_image(path) for path in arguments.image]
    bundle = hub.load(arguments.weights, dtype=jnp.dtype(dtype))
    if not isinstance(bundle.config, QwenVLConfig):
        raise ValueError(
            f"{arguments.weights} is no vision-language model that chats, but {type(bundle.config).__name__}"
        )
    processor = make_processor(bundle.processor, bundle.config)
    sampler = dataclasses.replace(processor.sampling, fps=arguments.fps)
    visuals += [read_video(path, sampler, arguments.num_frames) for path in arguments.video]
    if arguments.max_pixels:
        image = dataclasses.replace(processor.image, max_pixels=arguments.max_pixels)
        processor = dataclasses.replace(processor, image=image)
    check_sizes(processor, visuals, [*arguments.image, *arguments.video])
    messages = make_messages(arguments)
    answer = reply(
        bundle, processor, messages, visuals, sampling_of(arguments, bundle.processor, processor), arguments.seed
    )
    if arguments.transcript:
        media = {"images": list(map(str, arguments.image)), "videos": list(map(str, arguments.video))}
        conversation = [*messages, {"role": "assistant", "content": answer}]
        arguments.transcript.write_text(json.dumps({"messages": conversation, **media}, indent=1, ensure_ascii=False))
        print(f"transcript: {arguments.transcript}")
    if arguments.picture:
        _draw(visuals, arguments.question, answer, arguments.picture)
        print(f"picture: {arguments.picture}")


def read_image(path: Path) -> Visual:
    """An image file; ValueError naming it where it is missing or damaged."""
    if not path.is_file():
        raise ValueError(f"there is no image {str(path)!r}")
    return Visual([to_pil(decode_image(path.read_bytes(), 3, str(path)))])


def check_sizes(processor: Processor, visuals: list[Visual], paths: list[Path]) -> None:
    """ValueError naming the file whose pictures cannot be resized."""
    for visual, path in zip(visuals, paths, strict=True):
        setting = processor.image if visual.fps is None else processor.video
        width, height = visual.frames[0].size
        try:
            setting.grid(len(visual.frames), height, width)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error


def make_messages(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """The conversation up to the answer."""
    kinds = ["image"] * len(arguments.image) + ["video"] * len(arguments.video)
    content = [*({"type": kind} for kind in kinds), {"type": "text", "text": arguments.question}]
    system = [{"role": "system", "content": arguments.system}] if arguments.system else []
    return [*system, {"role": "user", "content": content}]


def sampling_of(arguments: argparse.Namespace, documents: dict[str, Any], processor: Processor) -> Sampling:
    """Flags, else the checkpoint's generation_config.json, else the defaults of transformers' `generate`: greedy.

    A `--temperature` alone draws, as `do_sample` does. ValueError for entries that ask for what is not done here.
    """
    published = read_generation(documents.get("generation_config.json"))
    given = {name: getattr(arguments, name) for name in SAMPLING if getattr(arguments, name) is not None}
    settings = {name: published[name] for name in SAMPLING} | given
    if arguments.greedy or ("temperature" not in given and not published["do_sample"]):
        settings["temperature"] = 0.0
    return Sampling(
        max_new_tokens=arguments.max_new_tokens or published["max_new_tokens"] or MAX_NEW_TOKENS,
        presence_penalty=arguments.presence_penalty,
        stop_tokens=processor.stop_tokens,
        pad_token=processor.pad_token,
        **settings,
    )


def reply(
    bundle: hub.Bundle,
    processor: Processor,
    messages: list[dict[str, Any]],
    visuals: list[Visual],
    sampling: Sampling,
    seed: int,
) -> str:
    """The answer, which is printed while it is written."""
    row = pack([processor(messages, visuals)])
    batch = collate([row], Windows.of(bundle.config.vision), pad_token=processor.pad_token)
    frames = int(row[0].frame_ids.max(initial=0))
    # A power of two, so that another number of frames seldom compiles again
    num_frames = 1 << (frames - 1).bit_length() if frames else 0
    generator = Generator(bundle.model, sampling, num_frames, bundle.model.dtype)  # type: ignore[arg-type]
    stream = Stream(processor, sampling.stop_tokens)
    generator(bundle.params, batch, jax.random.key(seed), lambda tokens: stream.write(tokens[0]))
    return stream.close()


class Stream:
    """Prints an answer token by token; a character of several tokens appears when it is whole."""

    def __init__(self, processor: Processor, stop_tokens: tuple[int, ...]):
        self._processor, self._stop_tokens = processor, stop_tokens
        self._tokens: list[int] = []
        self._shown, self._stopped = "", False

    def write(self, tokens: np.ndarray) -> None:
        """Takes the next tokens; those from a stop token on are not part of the answer."""
        for token in tokens.tolist():
            self._stopped |= token in self._stop_tokens
            if not self._stopped:
                self._tokens.append(token)
        text = self._text()
        if not text.endswith("\ufffd"):
            self._show(text)

    def close(self) -> str:
        """Ends the line; returns the whole answer."""
        self._show(self._text())
        print(flush=True)
        return self._shown

    def _text(self) -> str:
        return self._processor.tokenizer.decode(self._tokens, skip_special_tokens=True)

    def _show(self, text: str) -> None:
        sys.stdout.write(text[len(self._shown) :])
        sys.stdout.flush()
        self._shown = text


def _draw(visuals: list[Visual], question: str, answer: str, path: Path) -> None:
    """Images and up to four frames of each video, above question and answer."""
    from matplotlib.figure import Figure

    frames = [visual.frames[i] for visual in visuals for i in _spread(len(visual.frames), 4)]
    figure = Figure(figsize=(max(2.5 * len(frames), 6), 4 if frames else 2), layout="constrained")
    figure.suptitle(f"{question}\n\n{answer}", fontsize=10, wrap=True)
    for axes, frame in zip(np.ravel(figure.subplots(1, max(len(frames), 1))), frames or [None], strict=True):
        axes.axis("off")
        if frame is not None:
            axes.imshow(frame)
    with staged(path) as file:
        figure.savefig(file, dpi=100)


def _spread(total: int, most: int) -> list[int]:
    return np.unique(np.linspace(0, total - 1, min(total, most)).round().astype(int)).tolist()
