"""`python -m omnax.benchmarks.clip_embed`: `infer embed` of CLIP ViT-B/32 beside transformers, on the same images.

Random weights of the published size, written by transformers and read by both. Both read, resize, crop and normalise
with Pillow and give normalised embeddings, which are compared. Rounds alternate; the ratio is of the medians.
"""

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..infer.embed import embed, encoder, image_rows, load_clip
from ..models.clip import CLIP
from .vs_torch import oracles, take_turns


def ours(checkpoint: Path, files: list[str], batch: int) -> Callable[[], np.ndarray]:
    """The loop of `infer embed`."""
    bundle = load_clip(str(checkpoint))
    encode, prepare = encoder(bundle, CLIP.encode_image), image_rows(bundle)
    return lambda: embed(encode, prepare, files, batch)["embeds"]


def theirs(torch: Any, transformers: Any, checkpoint: Path, files: list[str], batch: int) -> Callable[[], np.ndarray]:
    """transformers as its documentation has it."""
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    model = transformers.CLIPModel.from_pretrained(checkpoint).eval()
    processor = CLIPImageProcessorPil.from_pretrained(checkpoint)

    def run() -> np.ndarray:
        parts = []
        for first in range(0, len(files), batch):
            images = [Image.open(file).convert("RGB") for file in files[first : first + batch]]
            pixels = processor(images, return_tensors="pt")["pixel_values"]
            with torch.inference_mode():
                features: Any = model.get_image_features(pixel_values=pixels)
            parts.append(torch.nn.functional.normalize(features.pooler_output).numpy())
        return np.concatenate(parts)

    return run


def write(transformers: Any, folder: Path, number: int) -> list[str]:
    """A checkpoint of transformers' default size, B/32, with random weights, and so many JPEG files of noise."""
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    transformers.CLIPModel(transformers.CLIPConfig()).save_pretrained(folder)
    CLIPImageProcessorPil().save_pretrained(folder)
    files = [str(folder / f"{i}.jpg") for i in range(number)]
    for i, file in enumerate(files):
        Image.fromarray(np.random.default_rng(i).integers(0, 256, (360, 480, 3)).astype(np.uint8)).save(file)
    return files


def main() -> None:
    """Prints images per second of both and their ratio."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    torch, transformers = oracles()
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = Path(folder)
        files = write(transformers, checkpoint, arguments.images)
        runs = {
            "omnax": ours(checkpoint, files, arguments.batch),
            "transformers": theirs(torch, transformers, checkpoint, files, arguments.batch),
        }
        embeds = {name: run() for name, run in runs.items()}  # the first run compiles and does not count
        seconds = take_turns(runs, arguments.rounds)
    for name, times in seconds.items():
        rates = sorted(arguments.images / times)
        print(f"{name:12s} {np.median(rates):.1f} images/s (min {rates[0]:.1f}, max {rates[-1]:.1f})")
    ratios = sorted(seconds["transformers"] / seconds["omnax"])
    print(f"omnax / transformers: {np.median(ratios):.2f} times the speed (min {ratios[0]:.2f}, max {ratios[-1]:.2f})")
    difference = np.abs(embeds["omnax"] - embeds["transformers"]).max()
    print(f"largest difference of an embedding's entry: {difference:.1e}")


if __name__ == "__main__":
    main()
