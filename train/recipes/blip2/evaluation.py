"""What BLIP-2's stages are measured by: recalls, pairs told from their hardest rivals, captions word for word."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from ....data.lookup import lookup
from ....models.blip2.decoding import answer, caption
from ....models.blip2.model import Blip2, apply, cosines
from ....models.generation import Sampling
from ...evaluation.host import Batches, concatenated, replicated
from ...evaluation.zero_shot import rank_metrics
from ...recipe import Batch, Evaluator
from ...rules import Tree
from ...state import TrainState

_PARTS = 30  # pairs that are matched at once


def make(name: str, config: Any, model: Blip2, batches: Batches) -> Evaluator:
    """The evaluator of that name."""
    makers: dict[str, Callable[[], Callable[[TrainState], dict[str, float | np.ndarray]]]] = {
        "retrieval": lambda: _retrieval(model, batches),
        "match": lambda: _match(model, batches),
        "captions": lambda: _captions(config, model, batches),
        "answers": lambda: _answers(config, model, batches),
    }
    return Evaluator(name, lookup(makers, name, "evaluator")())


def _features(model: Blip2) -> Any:
    """(images' tokens, images' and texts' embeddings, tokens, mask) of a batch."""

    def run(params: Tree, variables: Tree, batch: Batch) -> tuple[Array, ...]:
        tokens = batch["tokens"]
        image = apply(model, params, batch["image"], method="encode_image")
        queries, _ = apply(model, params, image, method="query")
        hidden = apply(model, params, tokens, tokens != 0, method="encode_text")
        embeds = (apply(model, params, x, method=f"embed_{n}") for n, x in (("image", queries), ("text", hidden)))
        return image, *embeds, tokens, batch["mask"]

    return replicated(run)


def _similarity(image: np.ndarray, text: np.ndarray, tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Cosines of images with distinct texts, and which texts are an image's own."""
    _, first, same = np.unique(tokens, axis=0, return_index=True, return_inverse=True)
    own = np.eye(len(first), dtype=bool)[same.reshape(-1)]
    return np.asarray(cosines(jnp.asarray(image), jnp.asarray(text[first]))), own


def _retrieval(model: Blip2, batches: Batches) -> Any:
    features = _features(model)

    def run(state: TrainState) -> dict[str, float | np.ndarray]:
        _, image, text, tokens = concatenated(features, state, batches)
        return dict(rank_metrics(*_similarity(image, text, tokens)))

    return run


def _match(model: Blip2, batches: Batches) -> Any:
    """Share of images whose own text is a likelier pair than the text of the highest cosine among all others."""
    features = _features(model)

    @replicated
    def score(params: Tree, image: Array, tokens: Array) -> Array:
        return apply(model, params, image, tokens, tokens != 0, method="match")[:, 1]

    def run(state: TrainState) -> dict[str, float | np.ndarray]:
        image, queries, text, tokens = concatenated(features, state, batches)
        similarity, own = _similarity(queries, text, tokens)
        distinct = np.unique(tokens, axis=0)
        rivals = distinct[np.where(own, -np.inf, similarity).argmax(1)]
        parts = np.arange(0, len(image), _PARTS)
        scores = [
            np.concatenate(
                [np.asarray(score(state.averaged_params, image[i : i + _PARTS], rows[i : i + _PARTS])) for i in parts]
            )
            for rows in (tokens, rivals)
        ]
        return {"true_over_hardest": float((scores[0] > scores[1]).mean())}

    return run


def _captions(config: Any, model: Blip2, batches: Batches) -> Any:
    """Share of images whose caption by the Q-Former's head is the right one, word for word."""
    tokenizer, length = config.data.reader_tokenizer, config.data.length
    end = tokenizer.id("[SEP]")
    sampling = Sampling(max_new_tokens=length, stop_tokens=(end,))

    @replicated
    def run_batch(params: Tree, variables: Tree, batch: Batch) -> tuple[Array, Array, Array]:
        said = caption(model, params, batch["image"], tokenizer.id("[DEC]"), sampling, jax.random.key(0))
        return said, batch["tokens"], batch["mask"]

    def run(state: TrainState) -> dict[str, float | np.ndarray]:
        said, tokens = concatenated(run_batch, state, batches)
        right = (said[:, : length - 1] == tokens[:, 1:]).all(1)
        return {"exact": float(right.mean())}

    return run


def _answers(config: Any, model: Blip2, batches: Batches) -> Any:
    """Share of captions by the language model that are right, word for word; "shuffled" is that of other images.

    What is above it, the model has seen.
    """
    tokenizer, data = config.data.language_tokenizer, config.data
    language = config.model.opt
    end = tokenizer.encode("\n")[0] if language else 1
    pad = tokenizer.id("<pad>") if language else 0
    sampling = Sampling(max_new_tokens=data.length, stop_tokens=(end,), pad_token=pad)
    prompt = [tokenizer.id("</s>")] if language else []
    prompt += tokenizer.encode(data.prompt.strip()) if data.prompt else []
    prompt += [] if language else [1]

    @replicated
    def run_batch(params: Tree, variables: Tree, batch: Batch) -> tuple[Array, ...]:
        image = batch["image"]
        rows = jnp.broadcast_to(jnp.array(prompt, jnp.int32), (len(image), len(prompt)))
        kept = jnp.ones(rows.shape, bool)
        shown, rng = (image, jnp.roll(image, 7, 0)), jax.random.key(0)
        said = [answer(model, params, x, rows, kept, sampling, rng) for x in shown]
        expected = batch["tokens"][:, len(prompt) :] if language else batch["labels"]
        return *said, expected, batch["mask"]

    def run(state: TrainState) -> dict[str, float | np.ndarray]:
        own, other, expected = concatenated(run_batch, state, batches)
        length = expected.shape[1]
        return {
            name: float((said[:, :length] == expected).all(1).mean())
            for name, said in (("exact", own), ("shuffled", other))
        }

    return run
