"""The objectives of BLIP-2's first stage (arXiv 2301.12597, section 3.2): contrast, matching, captions.

Arrays hold the whole batch; under a mesh they are spread over its devices, and so is what is computed of them: every
image is compared with the texts of all devices. Reference: LAVIS models/blip2_models/blip2_qformer.py.
"""

from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

Terms = dict[str, Array]
Negatives = Literal["hard", "random"]


def smoothed_cross_entropy(
    logits: Float[Array, "*B V"], targets: Float[Array, "*B V"], smoothing: float
) -> Float[Array, "*B"]:
    """-Σ_v q_v log p_v with q = (1 - smoothing) · targets + smoothing / V."""
    log_probs = jax.nn.log_softmax(logits)
    return -(1 - smoothing) * (targets * log_probs).sum(-1) - smoothing * log_probs.mean(-1)


def similarities(
    image: Float[Array, "B Q E"],
    text: Float[Array, "B E"],
    temperature: Float[Array, ""],
    *,
    gather_gradient: bool = False,
) -> tuple[Float[Array, "B B"], Float[Array, "B B"]]:
    """Of images with texts, and of texts with images: the cosine of the nearest query, over the temperature.

    As in LAVIS each trains the side of its rows only: what is gathered from other devices has no gradient, nor has what
    it is compared with on its own. With `gather_gradient` both sides learn from both.
    """
    constant = (lambda x: x) if gather_gradient else jax.lax.stop_gradient
    to_text = jnp.einsum("iqe,je->ijq", image, constant(text), precision="highest").max(-1)
    to_image = jnp.einsum("ie,jqe->ijq", text, constant(image), precision="highest").max(-1)
    return to_text / temperature, to_image / temperature


def contrast_loss(
    to_text: Float[Array, "B B"],
    to_image: Float[Array, "B B"],
    same: Bool[Array, "B B"] | None = None,
    *,
    smoothing: float = 0.1,
) -> tuple[Float[Array, ""], Terms]:
    """Image-text contrast of `similarities`; `same` says which pairs of a row share an image (None: its own alone)."""
    same = jnp.eye(len(to_text), dtype=bool) if same is None else same
    targets = same / same.sum(1, keepdims=True)
    losses = [smoothed_cross_entropy(scores, targets, smoothing).mean() for scores in (to_text, to_image)]
    return (losses[0] + losses[1]) / 2, {"image_to_text": losses[0], "text_to_image": losses[1]}


def draw_negatives(
    scores: Float[Array, "B B"], rng: Array, same: Bool[Array, "B B"] | None = None, *, kind: Negatives = "hard"
) -> Int[Array, " B"]:
    """For every row the index of a column that does not belong to it: by softmax of the scores, or any of them alike.

    ValueError for a batch of one, which has no negatives.
    """
    if len(scores) < 2:
        raise ValueError("a batch of 1 has no negatives, expected at least 2 pairs")
    same = jnp.eye(len(scores), dtype=bool) if same is None else same
    scores = jnp.zeros_like(scores) if kind == "random" else jax.lax.stop_gradient(scores)
    return jax.random.categorical(rng, jnp.where(same, -jnp.inf, scores))


def match_loss(pairs: Float[Array, "B 2"], others: Float[Array, "C 2"]) -> tuple[Float[Array, ""], Terms]:
    """Image-text matching: cross-entropy of scores (no pair, pair) of true pairs and of others, each counting once."""
    losses = -jnp.concatenate([jax.nn.log_softmax(pairs)[:, 1], jax.nn.log_softmax(others)[:, 0]])
    right = jnp.concatenate([pairs[:, 1] > pairs[:, 0], others[:, 0] > others[:, 1]])
    return losses.mean(), {"match_accuracy": right.mean()}


def caption_loss(
    logits: Float[Array, "B T V"], labels: Int[Array, "B T"], learnt: Bool[Array, "B T"], *, smoothing: float = 0.0
) -> tuple[Float[Array, ""], Terms]:
    """Cross-entropy of the labels that are learnt, the mean over all of them in the batch."""
    count = jnp.maximum(learnt.sum(), 1)
    losses = smoothed_cross_entropy(logits, jax.nn.one_hot(labels, logits.shape[-1]), smoothing)
    right = (logits.argmax(-1) == labels) & learnt
    return (losses * learnt).sum() / count, {"caption_accuracy": right.sum() / count}
