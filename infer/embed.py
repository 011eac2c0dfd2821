"""Embeddings of images or texts to an .npz or parquet file; started again, it goes on where it stopped."""

import argparse
import hashlib
import io
import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Float
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ..data.files import text_lines
from ..data.images.decode import CorruptExample
from ..data.preprocess import build
from ..data.text.bpe import TextTokenizer, tokenizer_of
from ..data.text.tokens import OVERFLOWS, Overflow
from ..hub import Bundle, load
from ..models.clip import CLIP, CLIPConfig
from ..storage.paths import as_path, glob, read_whole
from ..storage.writing import remove_tree, staged
from .images import check_finite, find_images, read_pixels, skipped_line

THREADS = 2  # that read and decode the next images while the model runs
Prepare = Callable[[str], np.ndarray]  # an image file or a text -> one row of the model's input


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--weights", required=True, help="CLIP checkpoint: directory, file, or id of a hub repository")
    parser.add_argument("images", nargs="*", help="image files, or folders of them")
    parser.add_argument("--texts", type=as_path, help="a file with one text per line, in place of images")
    parser.add_argument(
        "--overflow", choices=OVERFLOWS, default="truncate", help="what becomes of texts that are too long"
    )
    parser.add_argument("--out", type=as_path, default=Path("embeddings.npz"), help=".npz (embeds, names) or .parquet")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--save-every", type=int, default=64, help="batches that a restart may have to repeat")


def run(arguments: argparse.Namespace) -> None:
    if bool(arguments.images) == (arguments.texts is not None):
        raise ValueError("give image files or folders, or --texts FILE")
    if arguments.out.suffix not in (".npz", ".parquet"):
        raise ValueError(f"--out is {str(arguments.out)!r}, expected a name that ends in .npz or .parquet")
    names = _texts(arguments.texts) if arguments.texts else [str(path) for path in find_images(arguments.images)]
    bundle = load_clip(arguments.weights)
    prepare, method = (
        (text_rows(bundle, arguments.overflow), CLIP.encode_text)
        if arguments.texts
        else (image_rows(bundle), CLIP.encode_image)
    )
    encode = encoder(bundle, method)
    parts = _open_parts(arguments.out, names, arguments)
    size = arguments.batch_size * arguments.save_every
    columns = TextColumn("embeddings"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, transient=True) as progress:
        task = progress.add_task("embeddings", total=len(names))
        for number, first in enumerate(range(0, len(names), size)):
            chunk, path = names[first : first + size], parts / f"{number:06d}.npz"
            if not path.is_file():
                _write(path, embed(encode, prepare, chunk, arguments.batch_size, lambda n: progress.advance(task, n)))
            else:
                progress.advance(task, len(chunk))
    _finish(parts, arguments.out)


def load_clip(weights: str) -> Bundle:
    """A checkpoint of both towers; ValueError for any other model."""
    bundle = load(weights)
    if not isinstance(bundle.config, CLIPConfig):
        raise ValueError(f"{weights} holds a {type(bundle.config).__name__}, expected both towers of a CLIP model")
    return bundle


def image_rows(bundle: Bundle) -> Prepare:
    """Reads and preprocesses one image file as published; CorruptExample, naming the file, for what is no image."""
    image, channels = bundle.processor.image, bundle.config.image.trunk.num_channels
    transform = build(image.steps)

    def prepare(name: str) -> np.ndarray:
        return transform({"image": read_pixels(name, channels, image.alpha)}, np.random.default_rng(0))["image"]

    return prepare


def checkpoint_tokenizer(bundle: Bundle) -> TextTokenizer:
    """The tokeniser that a checkpoint ships, or OpenAI's; ValueError if its ids are not those of the text tower."""
    files, ids = bundle.processor.tokenizer, bundle.config.text.vocab_size
    tokenizer = tokenizer_of(files)
    published = not set(files) - {"open_clip_config.json"}
    if tokenizer.vocab_size > ids or (published and tokenizer.vocab_size != ids):
        whose = "ships no vocabulary, and OpenAI's" if published else "ships a vocabulary that"
        raise ValueError(f"the checkpoint {whose} has {tokenizer.vocab_size} ids, its text tower {ids}")
    return tokenizer


def text_rows(bundle: Bundle, overflow: Overflow = "truncate") -> Prepare:
    """Tokenises one text; what is too long loses its tail, or is a ValueError."""
    tokenizer = checkpoint_tokenizer(bundle)
    return lambda text: tokenizer(text, context_length=bundle.processor.context_length, overflow=overflow)[0]


def encoder(bundle: Bundle, method: Any) -> Callable[[np.ndarray], Float[Array, "B E"]]:
    """Rows -> normalised embeddings by one tower, compiled."""

    @jax.jit
    def encode(params: Any, rows: Array) -> Float[Array, "B E"]:
        return bundle.model.apply({"params": params}, rows, method=method)["embeds"]  # type: ignore[index]

    return lambda rows: encode(bundle.params, rows)


def embed(
    encode: Callable[[np.ndarray], Array],
    prepare: Prepare,
    names: Sequence[str],
    batch_size: int,
    advance: Callable[[int], Any] = lambda count: None,
) -> dict[str, np.ndarray]:
    """ "embeds" [B, E] and "names" of what could be read, "skipped" and "reasons" of what could not.

    The last batch is filled up with zeros, so that the model compiles once; the next rows are read while it runs.
    """
    kept: list[str] = []
    skipped: dict[str, str] = {}
    outputs: list[tuple[Array, int]] = []
    rows: list[np.ndarray] = []

    def flush() -> None:
        if rows:
            filled = [*rows, *[np.zeros_like(rows[0])] * (batch_size - len(rows))]
            outputs.append((encode(np.stack(filled)), len(rows)))
            rows.clear()

    for name, row in _read_ahead(prepare, names, 2 * batch_size):
        if isinstance(row, str):
            skipped[name] = row
        else:
            rows.append(row)
            kept.append(name)
        if len(rows) == batch_size:
            flush()
        advance(1)
    flush()
    embeds = [np.asarray(out)[:count] for out, count in outputs]
    for name, row in zip(kept, itertools.chain(*embeds), strict=True):
        check_finite(name, row)
    return {
        "embeds": np.concatenate(embeds) if embeds else np.zeros((0, 0), np.float32),
        "names": np.array(kept, str),
        "skipped": np.array([*skipped], str),
        "reasons": np.array([*skipped.values()], str),
    }


def _read_ahead(prepare: Prepare, names: Sequence[str], ahead: int) -> Iterator[tuple[str, np.ndarray | str]]:
    """(name, row, or the reason why there is none), in order, at most `ahead` rows before they are asked for."""

    def attempt(name: str) -> np.ndarray | str:
        try:
            return prepare(name)
        except CorruptExample as error:
            return error.reason

    with ThreadPoolExecutor(THREADS) as pool:
        pending = [pool.submit(attempt, name) for name in names[:ahead]]
        for i, name in enumerate(names):
            row = pending.pop(0).result()
            if i + ahead < len(names):
                pending.append(pool.submit(attempt, names[i + ahead]))
            yield name, row


def _texts(path: Path) -> list[str]:
    if not path.is_file():
        raise ValueError(f"no such file: {str(path)!r}")
    texts = [line for _, line in text_lines(path)]
    if not texts:
        raise ValueError(f"{path} holds no text")
    return texts


def _open_parts(out: Path, names: Sequence[str], arguments: argparse.Namespace) -> Path:
    """The folder beside `out` that keeps finished parts; ValueError if it is that of another job."""
    folder = out.with_name(f"{out.name}.parts")
    digest = hashlib.sha256("\n".join(names).encode()).hexdigest()
    sizes = {"batch_size": arguments.batch_size, "save_every": arguments.save_every}
    job = {"weights": arguments.weights, "inputs": len(names), "sha256": digest, **sizes}
    manifest = folder / "job.json"
    if manifest.is_file() and json.loads(manifest.read_text()) != job:
        raise ValueError(f"{folder} holds parts of another job ({manifest}): finish that one, or remove the folder")
    folder.mkdir(parents=True, exist_ok=True)
    manifest.write_text(json.dumps(job))
    return folder


def _write(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """All or nothing."""
    with staged(path) as stage, stage.open("wb") as file:
        np.savez(file, **arrays)  # type: ignore[arg-type]


def _finish(parts: Path, out: Path) -> None:
    """Joins the parts into `out`, removes them and says what was skipped."""
    files = [dict(np.load(io.BytesIO(read_whole(path)))) for path in glob(parts / "*.npz")]
    joined = {
        key: np.concatenate([file[key] for file in files if len(file[key])] or [files[0][key]]) for key in files[0]
    }
    embeds, names = joined["embeds"], joined["names"]
    for name, reason in zip(joined["skipped"], joined["reasons"], strict=True):
        print(skipped_line(name, reason))
    if not len(names):
        raise ValueError(f"none of the {len(joined['skipped'])} inputs could be read")
    if out.suffix == ".npz":
        _write(out, {"embeds": embeds, "names": names})
    else:
        _write_parquet(out, embeds, names)
    remove_tree(parts)
    print(f"{len(names)} x {embeds.shape[1]} embeddings, {len(joined['skipped'])} inputs skipped: {out}")


def _write_parquet(path: Path, embeds: np.ndarray, names: np.ndarray) -> None:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise ValueError(f"{path}: parquet files need the package pyarrow; .npz does without") from error
    column = pyarrow.FixedSizeListArray.from_arrays(embeds.reshape(-1), embeds.shape[1])
    table = pyarrow.table({"name": names.tolist(), "embedding": column})
    with staged(path) as stage:
        parquet.write_table(table, stage)
