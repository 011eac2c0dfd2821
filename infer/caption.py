"""Describe images with a BLIP-2: beams as in the paper, the likeliest words, or nucleus sampling; with a picture.

python -m omnax.infer caption --weights Salesforce/blip2-opt-2.7b a.jpg b.jpg --prompt "a photo of"
"""

import argparse
from pathlib import Path

from ..storage.paths import as_path
from .blip2 import add_model_arguments, add_search_arguments, answers, draw, load, read


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser)
    parser.add_argument("images", nargs="+", help="image files, or folders of them")
    parser.add_argument("--prompt", default="", help="how every caption begins; the models for COCO: 'a photo of'")
    add_search_arguments(parser, max_new_tokens=30, min_new_tokens=1, length_penalty=1.0)
    parser.add_argument("--picture", type=as_path, default=Path("captions.png"), help="where the picture goes")


def run(arguments: argparse.Namespace) -> None:
    bundle, tokenizer = load(arguments)
    paths, pictures, images = read(arguments.images, bundle)
    said = answers(arguments, bundle, tokenizer, images, arguments.prompt)
    texts = [f"{arguments.prompt} {text}".strip() for text in said]
    for path, text in zip(paths, texts, strict=True):
        print(f"{path}\t{text}")
    draw(pictures[:16], texts[:16], arguments.picture)
