"""Losses of Wav2Lip (arXiv 2008.10010, section 3): is the mouth in sync, is it the right picture, does it look real.

Each is (total, named terms). Means run over the examples that `mask` keeps, over all devices where `axis_name` says
so. LSE-D and LSE-C, by which the paper scores synchrony, are here too.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

Terms = dict[str, Float[Array, ""]]


@jax.custom_jvp
def binary_cross_entropy(probability: Float[Array, "*B"], label: Float[Array, "*B"]) -> Float[Array, "*B"]:
    """-(y log p + (1 - y) log(1 - p)), logarithms kept above -100: value and gradient are those of torch's BCELoss.

    p is clipped to [0, 1] first: the cosine of unit vectors may round to more than 1. Labels get no gradient.
    """
    p = jnp.clip(probability.astype(jnp.float32), 0.0, 1.0)
    return -(label * jnp.maximum(jnp.log(p), -100.0) + (1 - label) * jnp.maximum(jnp.log1p(-p), -100.0))


@binary_cross_entropy.defjvp
def _binary_cross_entropy_jvp(primals, tangents):
    p = jnp.clip(primals[0].astype(jnp.float32), 0.0, 1.0)
    slope = (p - primals[1]) / jnp.maximum(p * (1 - p), 1e-12)
    return binary_cross_entropy(*primals), slope * tangents[0].astype(jnp.float32)


def sync_loss(
    audio: Float[Array, "B D"],
    face: Float[Array, "B D"],
    label: Float[Array, " B"],
    *,
    mask: Bool[Array, " B"] | None = None,
    axis_name: str | None = None,
) -> tuple[Float[Array, ""], Terms]:
    """Cosine BCE of the expert: unit vectors of matching sound and mouth (label 1) point the same way, others not.

    Terms: "sync" (the total) and "accuracy", the share of pairs whose cosine is on its label's side of 1/2: at 1/2
    itself, and where it is NaN, it is on neither.
    """
    cosine = jnp.einsum("bd,bd->b", audio, face, precision="highest")
    total = _mean(binary_cross_entropy(cosine, label), mask, axis_name)
    right = jnp.where(label > 0.5, cosine > 0.5, cosine < 0.5)
    accuracy = _mean(right.astype(jnp.float32), mask, axis_name)
    return total, {"sync": total, "accuracy": accuracy}


def reconstruction_loss(
    generated: Float[Array, "B ..."],
    target: Float[Array, "B ..."],
    *,
    mask: Bool[Array, " B"] | None = None,
    axis_name: str | None = None,
) -> tuple[Float[Array, ""], Terms]:
    """Mean absolute difference over whole faces and all frames."""
    difference = jnp.abs(generated - target).reshape(len(generated), -1).mean(-1)
    total = _mean(difference, mask, axis_name)
    return total, {"l1": total}


def generator_loss(
    terms: Terms, *, sync_weight: Float[Array, ""] | float, adversarial_weight: float
) -> tuple[Float[Array, ""], Terms]:
    """s E_sync + g L_gen + (1 - s - g) L1, of terms "sync", "l1" and (for g > 0) "adversarial"."""
    total = sync_weight * terms["sync"] + (1 - sync_weight - adversarial_weight) * terms["l1"]
    if adversarial_weight:
        total += adversarial_weight * terms["adversarial"]
    return total, terms


def adversarial_loss(
    logits: Float[Array, " B"],
    *,
    real: bool,
    mask: Bool[Array, " B"] | None = None,
    axis_name: str | None = None,
) -> Float[Array, ""]:
    """Mean BCE of the discriminator's logits with the label "real" or "generated".

    The generator's loss is that of its own pictures with `real=True` (non-saturating); the discriminator's is the sum
    of both over real and generated ones. From logits, so that neither saturates: the published one takes the sigmoid
    first and cuts its logarithm at -100.
    """
    return _mean(jax.nn.softplus(-logits if real else logits), mask, axis_name)


def lse_distances(face: Float[Array, "T D"], audio: Float[Array, "T D"], max_shift: int = 15) -> Float[Array, " K"]:
    """Mean distance between the mouths and the sounds shifted by -max_shift … max_shift steps [2 max_shift + 1].

    Entry k compares mouth i with sound i + k - max_shift; beyond the ends the sound is a vector of zeros. Source:
    joonson/syncnet_python SyncNetInstance.py calc_pdist, with torch's pairwise_distance (eps 1e-6 in the difference).
    """
    padded = jnp.pad(audio, [(max_shift, max_shift), (0, 0)])
    shifted = jnp.stack([padded[k : k + len(face)] for k in range(2 * max_shift + 1)])  # K T D
    return jnp.sqrt(jnp.square(face - shifted + 1e-6).sum(-1)).mean(-1)


def lip_sync_error(distances: Float[Array, " K"]) -> Terms:
    """Term "lse_d" is the smallest mean distance (lower is better), "lse_c" the median minus it (higher is better)."""
    smallest = distances.min()
    return {"lse_d": smallest, "lse_c": jnp.median(distances) - smallest}


def _mean(values: Float[Array, " B"], mask: Bool[Array, " B"] | None, axis_name: str | None) -> Float[Array, ""]:
    weights = jnp.ones_like(values) if mask is None else mask.astype(values.dtype)
    total, count = (values * weights).sum(), weights.sum()
    if axis_name is not None:
        total, count = lax.psum((total, count), axis_name)
    return total / jnp.maximum(count, 1)
