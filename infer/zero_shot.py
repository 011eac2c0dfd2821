"""Which of the given labels an image shows, by a CLIP model that was never trained on them; with a bar picture."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from ..data.files import text_lines
from ..data.text.imagenet_classes import CLASS_NAMES
from ..data.text.prompts import TEMPLATES
from ..hub import Bundle
from ..models.clip import CLIP
from ..storage.paths import as_path
from ..train.evaluation.zero_shot import class_weights, prompt_tokens
from .classify import draw
from .embed import checkpoint_tokenizer, embed, encoder, image_rows, load_clip
from .images import check_finite, find_images, read_pixels, skipped_line


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--weights", required=True, help="CLIP checkpoint: directory, file, or id of a hub repository")
    parser.add_argument("--labels", required=True, help="comma-separated labels, a file of one per line, or 'imagenet'")
    parser.add_argument("images", nargs="+", help="image files, or folders of them")
    parser.add_argument("--templates", default="1", help=f"one of {[*TEMPLATES]}, or a text with {{}} in it")
    parser.add_argument("--top", type=int, default=5, help="labels shown per image")
    parser.add_argument("--picture", type=as_path, default=Path("zero_shot.png"), help="where the picture goes")
    parser.add_argument("--json", type=as_path, help="also write the scores to this file, one JSON line per image")
    parser.add_argument("--batch-size", type=int, default=8)


def run(arguments: argparse.Namespace) -> None:
    labels = parse_labels(arguments.labels)
    templates = TEMPLATES.get(arguments.templates, (arguments.templates,))
    if not all("{}" in template for template in templates):
        raise ValueError(f"--templates is {arguments.templates!r}, expected one of {[*TEMPLATES]} or a text with {{}}")
    paths = find_images(arguments.images)
    bundle = load_clip(arguments.weights)
    names = [str(path) for path in paths]
    images = embed(encoder(bundle, CLIP.encode_image), image_rows(bundle), names, min(arguments.batch_size, len(paths)))
    for name, reason in zip(images["skipped"], images["reasons"], strict=True):
        print(skipped_line(name, reason))
    if not len(images["names"]):
        first = skipped_line(images["skipped"][0], images["reasons"][0])
        raise ValueError(f"none of the {len(names)} images could be read; {first}")
    paths = [as_path(name) for name in images["names"]]
    weights = label_weights(bundle, labels, templates)
    for label, column in zip(labels, np.asarray(weights).T, strict=True):
        check_finite(f"label {label!r}", column)
    scores = np.asarray(probabilities(bundle, images["embeds"], weights))
    for path, row in zip(paths, scores, strict=True):
        check_finite(str(path), row)
    results, channels = [], bundle.config.image.trunk.num_channels
    for path, row in zip(paths, scores, strict=True):
        best = np.argsort(-row, kind="stable")[: arguments.top]
        results.append((path, [(labels[i], float(row[i])) for i in best]))
        print(path)
        for label, score in results[-1][1]:
            print(f"  {score:7.4f}  {label}")
    if arguments.json:
        lines = (json.dumps({"image": str(path), "top": dict(best)}) for path, best in results)
        arguments.json.write_text("".join(f"{line}\n" for line in lines))
    shown = [(path, read_pixels(path, channels, bundle.processor.image.alpha), best) for path, best in results[:16]]
    draw(shown, arguments.picture)
    print(f"picture: {arguments.picture}")


def parse_labels(text: str) -> list[str]:
    """Labels from a comma-separated list, a file of one per line, or "imagenet"; ValueError if there are none."""
    if text == "imagenet":
        return list(CLASS_NAMES)
    parts = [line for _, line in text_lines(as_path(text))] if as_path(text).is_file() else text.split(",")
    labels = [part.strip() for part in parts if part.strip()]
    if not labels:
        raise ValueError(f"--labels {text!r} holds no label, expected a,b,c or a file with one per line")
    return labels


def label_weights(bundle: Bundle, labels: Sequence[str], templates: Sequence[str]) -> Float[Array, "E V"]:
    """One normalised column per label (see `train.zero_shot.class_weights`)."""
    prompts = prompt_tokens(checkpoint_tokenizer(bundle), labels, templates, bundle.processor.context_length)

    @jax.jit
    def weigh(params: dict, prompts: Array) -> Float[Array, "E V"]:
        def encode(params: dict, tokens: Array) -> Array:
            return bundle.model.apply({"params": params}, tokens, method=CLIP.encode_text)["embeds"]  # type: ignore[index]

        return class_weights(encode, params, prompts)

    return weigh(bundle.params, jnp.asarray(prompts))


def probabilities(
    bundle: Bundle, embeds: Float[np.ndarray, "B E"], weights: Float[Array, "E V"]
) -> Float[Array, "B V"]:
    """Softmax over the labels of the scaled cosines; for SigLIP a sigmoid for each label by itself."""
    logits = jnp.exp(bundle.params["logit_scale"].astype(jnp.float32)) * (embeds @ weights)
    if "logit_bias" in bundle.params:
        return jax.nn.sigmoid(logits + bundle.params["logit_bias"])
    return jax.nn.softmax(logits)
