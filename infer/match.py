"""How well texts fit images, by a BLIP-2's matching head and by cosine; with a picture of the matrix.

python -m omnax.infer match --weights Salesforce/blip2-itm-vit-g --text "a dog" --text "two cats" a.jpg b.jpg
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Float

from ..data.text.tokenizer_file import clean_caption
from ..data.text.tokens import token_rows
from ..hub import Bundle
from ..models.blip2.model import apply, cosines
from ..storage.paths import as_path
from ..storage.writing import staged, write_whole
from .blip2 import add_model_arguments, load, read

LENGTH = 35  # tokens of a text in the paper's retrieval


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser)
    parser.add_argument("images", nargs="+", help="image files, or folders of them")
    parser.add_argument("--text", action="append", required=True, help="a text; may be given again")
    parser.add_argument("--picture", type=as_path, default=Path("match.png"), help="where the picture goes")
    parser.add_argument("--json", type=as_path, help="also write the scores to this file, one JSON line per image")


def run(arguments: argparse.Namespace) -> None:
    texts = [clean_caption(text) for text in arguments.text]
    if not all(texts):
        raise ValueError(f"--text {arguments.text[texts.index('')]!r} is empty, expected words")
    bundle, tokenizer = load(arguments)
    if not bundle.config.embed_dim:
        raise ValueError(f"{arguments.weights} has no matching head, expected a BLIP-2 for retrieval")
    paths, _, images = read(arguments.images, bundle)
    ends = {"start": (tokenizer.id("[CLS]"),), "end": tokenizer.id("[SEP]"), "pad": 0}
    length = min(LENGTH, bundle.config.qformer.max_positions)
    rows = token_rows(texts, tokenizer.encode, length=length, overflow="error", **ends)
    matched, similar = scores(bundle, images, rows)
    lines = []
    for path, probabilities, cosine in zip(paths, matched, similar, strict=True):
        print(path)
        for i in np.argsort(-probabilities, kind="stable"):
            print(f"  match {probabilities[i]:6.4f}  cosine {cosine[i]:7.4f}  {arguments.text[i]}")
        pairs = zip(arguments.text, probabilities.tolist(), cosine.tolist(), strict=True)
        lines.append({"image": str(path), "scores": {text: {"match": p, "cosine": c} for text, p, c in pairs}})
    if arguments.json:
        write_whole(arguments.json, "".join(json.dumps(line) + "\n" for line in lines).encode())
    draw([path.name for path in paths], arguments.text, matched, arguments.picture)


def scores(
    bundle: Bundle, images: Float[np.ndarray, "B X Y C"], rows: np.ndarray
) -> tuple[Float[np.ndarray, "B K"], Float[np.ndarray, "B K"]]:
    """The probability that each image and text are a pair, and their cosine."""
    model: Any = bundle.model

    @jax.jit
    def run(params: Any, image: Array, rows: Array) -> tuple[Array, Array]:
        mask = rows != 0
        tokens = apply(model, params, image[None], method="encode_image")
        queries, _ = apply(model, params, tokens, method="query")
        hidden = apply(model, params, rows, mask, method="encode_text")
        embeds = [apply(model, params, x, method=f"embed_{n}") for n, x in (("image", queries), ("text", hidden))]
        pairs = apply(model, params, tokens.repeat(len(rows), 0), rows, mask, method="match")
        return jax.nn.softmax(pairs)[:, 1], cosines(*embeds)[0]

    found = [jax.device_get(run(bundle.params, image, rows)) for image in images]
    matched, similar = (np.stack(column) for column in zip(*found, strict=True))
    return matched, similar


def draw(images: Sequence[str], texts: Sequence[str], matched: Float[np.ndarray, "B K"], path: Path) -> None:
    """The matrix of probabilities."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(2 + 1.2 * len(texts), 1.5 + 0.5 * len(images)), layout="constrained")
    axes = figure.subplots()
    axes.imshow(matched, vmin=0, vmax=1, cmap="viridis", aspect="auto")
    axes.set_xticks(range(len(texts)), texts, rotation=30, ha="right", fontsize=8)
    axes.set_yticks(range(len(images)), images, fontsize=8)
    for (row, column), value in np.ndenumerate(matched):
        axes.text(column, row, f"{value:.2f}", ha="center", va="center", color="w" if value < 0.6 else "k", fontsize=8)
    with staged(path) as file:
        figure.savefig(file, dpi=100)
    print(f"picture: {path}")
