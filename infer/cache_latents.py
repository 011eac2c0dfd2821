"""Latents and text states of a folder of captioned images, computed once: what Stable Diffusion then trains on.

A job that is stopped and started again goes on with the next shard. Images that cannot be read are named and left out.
Training on the folder: --config.data.name=latents --config.data.path=FOLDER; then it needs no autoencoder and no text
encoder.
"""

import argparse
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ..data.captions import caption_source
from ..data.files import printable
from ..data.images.decode import CorruptExample
from ..data.images.edges import canny_edges
from ..data.latents import write_shards
from ..data.preprocess import alike, build
from ..models.stable_diffusion.vae import VAE
from ..storage.paths import as_path, is_local
from .diffusion import Diffusion, load_diffusion
from .images import skipped_line

CONDITIONS = ("", "file", "canny")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--weights", required=True, help="Stable Diffusion: a directory of components as of diffusers")
    parser.add_argument("--data", required=True, help="folder with captions.jsonl, or a TFDS data set with captions")
    parser.add_argument("--split", default="train")
    parser.add_argument("--out", required=True, type=as_path, help="folder for the latents")
    parser.add_argument("--size", type=int, default=0, help="rows and columns of the images; default: as trained")
    parser.add_argument("--condition", choices=CONDITIONS, default="", help="condition images, or edges of the images")
    parser.add_argument("--canny", type=float, nargs=2, default=(100.0, 200.0), metavar=("LOW", "HIGH"))
    parser.add_argument("--rows", type=int, default=512, help="examples in a shard")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--float16", action="store_true", help="keep half precision")
    parser.add_argument("--bfloat16", action="store_true", help="compute in bfloat16")


def run(arguments: argparse.Namespace) -> None:
    if not is_local(arguments.out):
        raise ValueError(f"--out is {arguments.out}: the job goes on where it stopped, expected a local folder")
    diffusion = load_diffusion(arguments.weights, dtype=jnp.bfloat16 if arguments.bfloat16 else None)
    if diffusion.pipeline.vae is None:
        raise ValueError(f"{arguments.weights} has no autoencoder: its UNet works on pixels, there is nothing to cache")
    size = diffusion.size((arguments.size,) * 2 if arguments.size else None)
    folder = as_path(arguments.data).is_dir()
    pictures = ("condition",) if arguments.condition == "file" else ()
    named = {"name": "captions", "path": arguments.data} if folder else {"name": arguments.data}
    source = caption_source({**named, "pictures": pictures}, arguments.split)
    count = -(-len(source) // arguments.rows)
    settings: dict[str, Any] = {
        "weights": str(arguments.weights),
        "data": arguments.data,
        "split": arguments.split,
        "size": list(size),
        "condition": arguments.condition,
        "canny": list(arguments.canny) if arguments.condition == "canny" else None,
        "dtype": "float16" if arguments.float16 else "float32",
        "rows": arguments.rows,
        "examples": len(source),
        "shards": count,
    }
    encode = Encoder(diffusion, size, arguments.batch_size, np.dtype(settings["dtype"]))
    read = Reader(source, size[0], arguments.condition, arguments.canny)
    empty = encode.texts([""])
    columns = TextColumn("shards"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns) as progress:
        task = progress.add_task("shards", total=count)

        def make(number: int) -> dict[str, np.ndarray] | None:
            first = number * arguments.rows
            examples, skipped = read(range(first, min(first + arguments.rows, len(source))))
            for line in skipped:
                progress.console.print(line, soft_wrap=True, markup=False, highlight=False)
            return encode(examples) if examples else None

        made = 0
        for number in write_shards(arguments.out, settings, {k: v[0] for k, v in empty.items()}, make):
            made += 1
            progress.update(task, completed=number + 1)
    print(f"{made} of {count} shards made, all are in {printable(arguments.out)}")


class Reader:
    """Examples of a source as arrays: "image" uint8, "condition" where asked for, "caption" and "index"."""

    def __init__(self, source: Any, side: int, condition: str, thresholds: Sequence[float]):
        geometry = [
            "decode",
            ("resize_shortest", {"size": side, "method": "pil_bilinear"}),
            ("center_crop", {"size": side}),
        ]
        steps = build(geometry)  # type: ignore[arg-type]
        self.source, self.condition, self.thresholds = source, condition, thresholds
        self.steps = alike(steps, ("condition",)) if condition == "file" else steps

    def __call__(self, indices: range) -> tuple[list[dict[str, Any]], list[str]]:
        """The examples that can be read, and a line for each of the others."""
        found, skipped = [], []
        for index in indices:
            try:
                example = self.source[index]
                out = self.steps(example, np.random.default_rng(index))
            except CorruptExample as error:
                skipped.append(skipped_line(error.name, error.reason))
                continue
            if self.condition == "canny":
                edges = canny_edges(out["image"], *self.thresholds)
                out["condition"] = np.repeat(edges[..., None], 3, -1)
            kept = {key: out[key] for key in ("image", "condition") if key in out}
            found.append({**kept, "caption": example["captions"][0], "index": np.int32(index)})
        return found, skipped


class Encoder:
    """Examples to moments and text states, in batches of one shape."""

    def __init__(self, diffusion: Diffusion, size: tuple[int, int], batch: int, dtype: np.dtype):
        self.diffusion, self.size, self.batch, self.dtype = diffusion, size, batch, dtype

    def __call__(self, examples: Sequence[dict[str, Any]]) -> dict[str, np.ndarray]:
        images = np.stack([example["image"] for example in examples])
        parts = [self._moments(images[i : i + self.batch]) for i in range(0, len(images), self.batch)]
        found = {"moments": np.concatenate(parts).astype(self.dtype)}
        found |= self.texts([example["caption"] for example in examples])
        rest = {
            key: np.stack([example[key] for example in examples])
            for key in ("condition", "index")
            if key in examples[0]
        }
        return found | rest

    def texts(self, captions: Sequence[str]) -> dict[str, np.ndarray]:
        """The text states of captions."""
        rows: dict[str, list[np.ndarray]] = {"context": [], "pooled": []}
        for first in range(0, len(captions), self.batch):
            some = list(captions[first : first + self.batch])
            filled = [*some, *[""] * (self.batch - len(some))]
            prompt = self.diffusion.prompt(filled, self.size)
            for name in rows:
                if (value := getattr(prompt, name)) is not None:
                    rows[name].append(np.asarray(value)[: len(some)].astype(self.dtype))
        return {name: np.concatenate(parts) for name, parts in rows.items() if parts}

    def _moments(self, images: np.ndarray) -> np.ndarray:
        filled = np.concatenate([images, np.zeros((self.batch - len(images), *images.shape[1:]), np.uint8)])
        vae, params = self.diffusion.pipeline.vae, self.diffusion.params["vae"]
        return np.asarray(_encode(vae, params, jnp.asarray(filled)))[: len(images)]


@functools.partial(jax.jit, static_argnums=0)
def _encode(vae: VAE, params: Any, images: jax.Array) -> jax.Array:
    posterior: Any = vae.apply({"params": params}, images / jnp.float32(127.5) - 1, method=VAE.encode)
    return jnp.concatenate([posterior.mean, posterior.logvar], -1)
