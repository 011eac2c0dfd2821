"""Answer a question about images with a BLIP-2, in the prompt of the paper; with a picture.

python -m omnax.infer vqa --weights Salesforce/blip2-flan-t5-xl --question "how many dogs are there?" a.jpg
"""

import argparse
from pathlib import Path

from ..storage.paths import as_path
from .blip2 import add_model_arguments, add_search_arguments, answers, draw, load, read

# Zero-shot prompts (paper, section 4.1); fine-tuned models have OPT's.
PROMPTS = {"opt": "Question: {} Answer:", "t5": "Question: {} Short answer:"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser)
    parser.add_argument("images", nargs="+", help="image files, or folders of them")
    parser.add_argument("--question", required=True)
    parser.add_argument("--prompt", help=f"with {{}} for the question; default: {' or '.join(PROMPTS.values())}")
    add_search_arguments(parser, max_new_tokens=10, min_new_tokens=1, length_penalty=-1.0)
    parser.add_argument("--picture", type=as_path, default=Path("answers.png"), help="where the picture goes")


def run(arguments: argparse.Namespace) -> None:
    question = arguments.question.strip()
    if not question:
        raise ValueError("--question is empty, expected a question about the images")
    if arguments.prompt is not None and "{}" not in arguments.prompt:
        raise ValueError(f"--prompt is {arguments.prompt[:60]!r}, expected {{}} in it for the question")
    bundle, tokenizer = load(arguments)
    paths, pictures, images = read(arguments.images, bundle)
    prompt = arguments.prompt or PROMPTS["t5" if bundle.config.t5 else "opt"]
    texts = answers(arguments, bundle, tokenizer, images, prompt.format(question))
    for path, text in zip(paths, texts, strict=True):
        print(f"{path}\t{text}")
    draw(pictures[:16], [f"{question}\n{text}" for text in texts[:16]], arguments.picture)
