"""What the commands of BLIP-2 share: the checkpoint, its images and prompts, how an answer is searched, a picture."""

import argparse
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from .. import hub
from ..data.images.decode import CorruptExample
from ..data.preprocess import build
from ..data.text.tokenizer_file import TokenizerFile
from ..models.blip2.decoding import Generator
from ..models.blip2.model import Blip2Config
from ..models.generation import Sampling
from ..storage.writing import staged
from .images import find_images, read_pixels, skipped_line

SEARCHES = ("beam", "greedy", "nucleus")


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--weights", required=True, help="BLIP-2 checkpoint: directory, or id of a hub repository")
    parser.add_argument("--tokenizer", type=Path, help="folder with tokenizer.json; default: beside the weights")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="default: bfloat16 but on CPUs")


def add_search_arguments(parser: argparse.ArgumentParser, **defaults: Any) -> None:
    """How answers are searched; the defaults are those of the paper's evaluations."""
    parser.add_argument("--search", choices=SEARCHES, default="beam")
    parser.add_argument("--beams", type=int, default=5)
    for name, kind in (("max_new_tokens", int), ("min_new_tokens", int), ("length_penalty", float)):
        parser.add_argument(f"--{name.replace('_', '-')}", type=kind, default=defaults[name])
    parser.add_argument("--top-p", type=float, default=0.9, help="of nucleus")
    parser.add_argument("--temperature", type=float, default=1.0, help="of nucleus")
    parser.add_argument("--repetition-penalty", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0, help="of nucleus")


def load(arguments: argparse.Namespace) -> tuple[hub.Bundle, TokenizerFile]:
    """The checkpoint and its tokenizer; ValueError where it is another model, or has no image encoder."""
    dtype = arguments.dtype or ("float32" if jax.default_backend() == "cpu" else "bfloat16")
    bundle = hub.load(arguments.weights, dtype=jnp.dtype(dtype))
    if not isinstance(bundle.config, Blip2Config) or bundle.config.vision is None:
        kind = "a BLIP-2 without its image encoder" if isinstance(bundle.config, Blip2Config) else "no BLIP-2"
        raise ValueError(f"{arguments.weights} is {kind} ({type(bundle.config).__name__})")
    files, where = bundle.processor.tokenizer, arguments.weights
    if arguments.tokenizer:
        files = {path.name: path.read_bytes() for path in arguments.tokenizer.glob("tokenizer.json")}
        where = str(arguments.tokenizer)
    return bundle, TokenizerFile.of(files, where)


def read(names: Sequence[str], bundle: hub.Bundle) -> tuple[list[Path], list[np.ndarray], Float[np.ndarray, "B X Y C"]]:
    """(paths, pixels, what the model takes) of the images that can be read; the others are named on the screen.

    ValueError where there is none.
    """
    prepare, rng = build(bundle.processor.image.steps), np.random.default_rng(0)
    paths, pictures, lines = [], [], []
    for path in find_images(names):
        try:
            pictures.append(read_pixels(path, 3, bundle.processor.image.alpha))
            paths.append(path)
        except CorruptExample as error:
            lines.append(skipped_line(error.name, error.reason))
            print(lines[-1])
    if not paths:
        raise ValueError(f"none of the {len(lines)} images could be read; {lines[0]}")
    return paths, pictures, np.stack([prepare({"image": pixels}, rng)["image"] for pixels in pictures])


def prompt_row(c: Blip2Config, tokenizer: TokenizerFile, text: str) -> Int[np.ndarray, " T"]:
    """The ids of a prompt with the places of the image: OPT's begins with </s>, T5's ends with it."""
    ids = tokenizer.encode(text) if text else []
    ids = [*ids, 1] if c.t5 else [tokenizer.id("</s>"), *ids]
    places = [] if c.image_token is None else [c.image_token] * c.num_queries
    return np.array([*places, *ids], np.int32)


def sampling(arguments: argparse.Namespace, bundle: hub.Bundle, tokenizer: TokenizerFile) -> Sampling:
    """What the flags say, with the tokens that end an answer: of OPT the one of the config, and a newline."""
    stops, pad = (1,), 0
    if bundle.config.opt is not None:
        said = bundle.metadata.get("text_config", {}).get("eos_token_id", 2)
        newline = tokenizer.encode("\n")
        stops = tuple(dict.fromkeys([*(said if isinstance(said, list) else [said]), *newline[: len(newline) == 1]]))
        pad = 1
    return Sampling(
        max_new_tokens=arguments.max_new_tokens,
        min_new_tokens=arguments.min_new_tokens,
        num_beams=arguments.beams if arguments.search == "beam" else 1,
        length_penalty=arguments.length_penalty,
        temperature=arguments.temperature if arguments.search == "nucleus" else 0.0,
        top_p=arguments.top_p if arguments.search == "nucleus" else 1.0,
        repetition_penalty=arguments.repetition_penalty,
        stop_tokens=stops,
        pad_token=pad,
    )


def answers(
    arguments: argparse.Namespace,
    bundle: hub.Bundle,
    tokenizer: TokenizerFile,
    images: Float[np.ndarray, "B X Y C"],
    prompt: str,
) -> list[str]:
    """What the language model says of every image behind the prompt; ValueError for a model without one."""
    c = bundle.config
    if c.opt is None and c.t5 is None:
        raise ValueError(f"{arguments.weights} has no language model, expected a BLIP-2 with OPT or T5")
    row = prompt_row(c, tokenizer, prompt)
    tokens = np.broadcast_to(row, (len(images), len(row)))
    how = sampling(arguments, bundle, tokenizer)
    rng = jax.random.key(arguments.seed)
    said = Generator(bundle.model, how)(bundle.params, images, tokens, np.ones(tokens.shape, bool), rng=rng)  # type: ignore[arg-type]
    return [_text(tokenizer, ids, how.stop_tokens) for ids in said]


def _text(tokenizer: TokenizerFile, ids: Int[np.ndarray, " T"], stops: tuple[int, ...]) -> str:
    end = np.isin(ids, stops).argmax() if np.isin(ids, stops).any() else len(ids)
    return tokenizer.decode(ids[:end])


def draw(pictures: Sequence[np.ndarray], titles: Sequence[str], path: Path) -> None:
    """Images under their texts."""
    from matplotlib.figure import Figure

    columns = min(len(pictures), 4)
    rows = math.ceil(len(pictures) / columns)
    figure = Figure(figsize=(3.2 * columns, 3.4 * rows), layout="constrained")
    axes = np.ravel(figure.subplots(rows, columns))
    for each in axes:
        each.axis("off")
    for each, picture, title in zip(axes, pictures, titles, strict=False):
        each.imshow(picture)
        each.set_title(title, fontsize=9, wrap=True)
    with staged(path) as file:
        figure.savefig(file, dpi=100)
    print(f"picture: {path}")
