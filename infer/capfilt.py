"""Write captions for a folder of images with a BLIP-2, and keep the best by a CLIP; a killed job goes on.

    python -m omnax.infer capfilt --weights Salesforce/blip2-opt-2.7b --ranker openai/clip-vit-large-patch14 \\
        --data web --out web-capfilt

The folder that is written is read by data as {"name": "captions", "path": "web-capfilt"}; one of an image's captions is
drawn each time it is seen. Candidates are drawn as BLIP's are (salesforce/BLIP models/blip.py).
"""

import argparse
from collections.abc import Sequence

import numpy as np

from ..data.capfilt import bootstrap
from ..data.captions import CaptionFolder
from ..data.images.decode import decode_image
from ..data.images.transforms import Example
from ..data.preprocess import build
from ..hub import Bundle
from ..models.clip import CLIP
from ..storage.paths import as_path, is_local
from .blip2 import add_model_arguments, add_search_arguments, answers, load
from .embed import encoder, load_clip, text_rows


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser)
    parser.add_argument("--ranker", required=True, help="CLIP checkpoint; the paper's: openai/clip-vit-large-patch14")
    parser.add_argument("--data", type=as_path, required=True, help="folder with captions.jsonl and images")
    parser.add_argument("--out", type=as_path, required=True, help="folder to write")
    parser.add_argument("--prompt", default="", help="how every caption begins")
    parser.add_argument("--candidates", type=int, default=10, help="captions written for each image")
    parser.add_argument("--keep", type=int, default=2)
    parser.add_argument("--batch-size", type=int, default=8)
    add_search_arguments(parser, max_new_tokens=30, min_new_tokens=10, length_penalty=1.0)
    parser.set_defaults(search="nucleus", repetition_penalty=1.1)


def run(arguments: argparse.Namespace) -> None:
    if not is_local(arguments.out):
        raise ValueError(f"--out is {arguments.out}: the job goes on where it stopped, expected a local folder")
    bundle, tokenizer = load(arguments)
    judge = load_clip(arguments.ranker)
    source = CaptionFolder(arguments.data)

    def captioner(examples: Sequence[Example]) -> list[list[str]]:
        images = np.stack([_pixels(example, bundle) for example in examples])
        images = np.concatenate([images, images[-1:].repeat(arguments.batch_size - len(images), 0)])
        written: list[list[str]] = [[] for _ in examples]
        for number in range(arguments.candidates):
            arguments.seed = number
            said = answers(arguments, bundle, tokenizer, images, arguments.prompt)
            for texts, text in zip(written, said, strict=False):
                texts.append(f"{arguments.prompt} {text}".strip())
        return written

    done = bootstrap(
        source,
        captioner,
        lambda examples, texts: rank(judge, examples, texts),
        arguments.out,
        keep=arguments.keep,
        batch_size=arguments.batch_size,
        on_batch=lambda count: print(f"{count} of {len(source)} images", flush=True),
    )
    print(f"captions: {arguments.out} ({len(done)} images)")


def rank(judge: Bundle, examples: Sequence[Example], texts: Sequence[Sequence[str]]) -> list[list[float]]:
    """The cosines of every image with its texts."""
    rows = text_rows(judge)
    see, read = encoder(judge, CLIP.encode_image), encoder(judge, CLIP.encode_text)
    scores = []
    for example, candidates in zip(examples, texts, strict=True):
        image = np.asarray(see(_pixels(example, judge)[None]))
        scores.append([float((image * np.asarray(read(rows(text)[None]))).sum()) for text in candidates])
    return scores


def _pixels(example: Example, bundle: Bundle) -> np.ndarray:
    """What a model takes of an encoded image."""
    image = bundle.processor.image
    pixels = decode_image(example["image"], 3, example["name"], alpha=image.alpha)
    return build(image.steps)({"image": pixels}, np.random.default_rng(0))["image"]
