"""Zero-shot classification and retrieval with two towers (arXiv 2103.00020, section 3.1; open_clip's metrics)."""

import functools
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from ...kernels.normalization import l2_normalize
from ..recipe import Evaluator
from ..rules import Tree
from ..state import TrainState
from . import evaluators
from .host import Batches, check_finite, concatenated, replicated

Encode = Callable[[Tree, Array], Array]  # (params, images or tokens) -> normalised embeddings [B, E]
RECALLS = (1, 5, 10)


def prompt_tokens(
    tokenizer: Callable[..., np.ndarray], names: Sequence[str], templates: Sequence[str], context_length: int
) -> Int[np.ndarray, "V K T"]:
    """Every class name in every template, tokenised; ValueError without classes or templates."""
    if not names or not templates:
        raise ValueError(f"zero-shot needs class names and templates, got {len(names)} and {len(templates)}")
    if empty := [i for i, name in enumerate(names) if not name.strip()]:
        raise ValueError(f"class names {empty} are empty")
    texts = [template.format(name) for name in names for template in templates]
    return tokenizer(texts, context_length=context_length).reshape(len(names), len(templates), context_length)


def class_weights(encode: Encode, params: Tree, prompts: Int[Array, "V K T"]) -> Float[Array, "E V"]:
    """One normalised column per class: the mean of its prompts' normalised embeddings, normalised again."""
    weights = jax.lax.map(lambda tokens: l2_normalize(encode(params, tokens).mean(0)), prompts)
    return weights.T


def zero_shot(
    name: str, encode_image: Encode, encode_text: Encode, prompts: Callable[[], np.ndarray], batches: Batches
) -> Evaluator:
    """Accuracy (top 1, and top 5 of more classes) of images whose "label" is one of the classes that `prompts()`
    [V, K, T] describe; see `evaluators.accuracy`."""

    def logits(params: Tree, variables: Tree, image: Array) -> Array:
        cosines = encode_image(params["model"], image) @ params["classes"]
        return jnp.exp(params["model"]["logit_scale"]) * cosines

    @functools.cache
    def measure() -> Evaluator:
        num_classes = len(prompts())
        return evaluators.accuracy(name, logits, batches, num_classes, top=(5,) if num_classes > 5 else ())

    weigh = replicated(lambda params, tokens: class_weights(encode_text, params, tokens))

    def run(state: TrainState) -> dict[str, float | np.ndarray]:
        params = state.averaged_params
        return measure().run(state.replace(params={"model": params, "classes": weigh(params, prompts())}, ema={}))

    return Evaluator(name, run)


def retrieval(name: str, encode_image: Encode, encode_text: Encode, batches: Batches) -> Evaluator:
    """Recalls and ranks of `retrieval_metrics` over the pairs of a split, in which equal captions are one text.

    The "tokens" of a batch are [B, K, T]: all captions of an image, and rows of -1 where it has fewer than others.
    """

    @replicated
    def embed(params: Tree, variables: Tree, batch: Mapping[str, Array]) -> tuple[Array, Array, Array, Array]:
        tokens = jnp.moveaxis(batch["tokens"], 1, 0)
        text = jax.lax.map(lambda tokens: encode_text(params, jnp.maximum(tokens, 0)), tokens)
        return encode_image(params, batch["image"]), jnp.moveaxis(text, 0, 1), batch["tokens"], batch["mask"]

    def run(state: TrainState) -> dict[str, float | np.ndarray]:
        image, text, tokens = concatenated(embed, state, batches)
        owner, place = np.nonzero(tokens[..., 0] >= 0)
        _, first, same = np.unique(tokens[owner, place], axis=0, return_index=True, return_inverse=True)
        own = np.zeros((len(image), len(first)), bool)
        own[owner, same.reshape(-1)] = True
        return dict(retrieval_metrics(image, text[owner, place][first], own))

    return Evaluator(name, run)


def retrieval_metrics(
    image: Float[np.ndarray, "B E"], text: Float[np.ndarray, "K E"], own: Bool[np.ndarray, "B K"]
) -> dict[str, float]:
    """Recall at 1, 5, 10, mean and median rank (from 1) in both directions; `own` says which texts are an image's.

    A query is found when any of its own is: an image has several captions, and a text may belong to several images
    (arXiv 1707.05612, section 4.1). Strangers that score as high as the best of its own stand before it.
    FloatingPointError for embeddings that are not finite.
    """
    check_finite("embeddings of images", image)
    check_finite("embeddings of texts", text)
    return rank_metrics(image @ text.T, own)


def rank_metrics(similarity: Float[np.ndarray, "B K"], own: Bool[np.ndarray, "B K"]) -> dict[str, float]:
    """`retrieval_metrics` of similarities, however they were found."""
    metrics: dict[str, float] = {}
    for direction, scores, right in (("image_to_text", similarity, own), ("text_to_image", similarity.T, own.T)):
        best = np.where(right, scores, -np.inf).max(1, keepdims=True)
        ranks = 1 + (~right & (scores >= best)).sum(1)[right.any(1)]
        metrics |= {f"{direction}_recall_{k}": float((ranks <= k).mean()) for k in RECALLS}
        metrics |= {f"{direction}_mean_rank": float(ranks.mean()), f"{direction}_median_rank": float(np.median(ranks))}
    return metrics
