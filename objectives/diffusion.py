"""Losses of diffusion models: what the model is to predict of a noised sample, and how much each time step counts."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from ..kernels.diffusion import velocity

Terms = dict[str, Float[Array, ""]]
PREDICTIONS = ("epsilon", "sample", "v_prediction")


def offset_noise(noise: Float[Array, "B ..."], rng: Array, amount: float) -> Float[Array, "B ..."]:
    """Noise plus `amount` N(0, 1) that is the same everywhere in an example's channel (the last axis).

    With it a model learns to make pictures brighter or darker as a whole. Source: SDXL, arXiv 2307.01952.
    """
    shape = (noise.shape[0], *(1,) * (noise.ndim - 2), noise.shape[-1])
    return noise + amount * jax.random.normal(rng, shape, noise.dtype)


def snr_weights(
    alphas: Float[Array, " T"] | Float[np.ndarray, " T"], step: Int[Array, " B"], prediction: str, gamma: float
) -> Float[Array, " B"]:
    """min-SNR-gamma (arXiv 2303.09556): min(snr, gamma) as the weight of an error of x_0, for what is predicted.

    An error of the noise is sqrt(snr) times that of x_0, one of v sqrt(snr + 1) times. snr = abar / (1 - abar).
    """
    kept = jnp.asarray(alphas, jnp.float32)[step]
    snr = kept / (1 - kept)
    bounded = jnp.minimum(snr, gamma)
    if prediction == "sample":
        return bounded
    return bounded / (snr if prediction == "epsilon" else snr + 1)


def prediction_loss(
    output: Float[Array, "B ..."],
    sample: Float[Array, "B ..."],
    noise: Float[Array, "B ..."],
    alphas: Float[Array, " T"] | Float[np.ndarray, " T"],
    step: Int[Array, " B"],
    *,
    prediction: str = "epsilon",
    min_snr: float | None = None,
    mask: Bool[Array, " B"] | None = None,
    axis_name: str | None = None,
) -> tuple[Float[Array, ""], Terms]:
    """Mean squared error of a model's output for the noised sample of time step `step`, in float32.

    Weighted per example, after its own mean, by `snr_weights` where `min_snr` is given; term "mse" is not weighted.
    The mean runs over the examples that `mask` keeps, over all devices where `axis_name` says so. ValueError for a
    prediction that is none of `PREDICTIONS`.
    """
    if prediction not in PREDICTIONS:
        raise ValueError(f"prediction is {prediction!r}, expected one of {PREDICTIONS}")
    targets = {"epsilon": noise, "sample": sample, "v_prediction": velocity(sample, noise, alphas, step)}
    difference = output.astype(jnp.float32) - targets[prediction].astype(jnp.float32)
    errors = jnp.square(difference).mean(tuple(range(1, difference.ndim)))
    weights = jnp.ones_like(errors) if min_snr is None else snr_weights(alphas, step, prediction, min_snr)
    kept = jnp.ones_like(errors) if mask is None else mask.astype(jnp.float32)
    sums = jnp.stack([(weights * errors * kept).sum(), (errors * kept).sum(), kept.sum()])
    if axis_name is not None:
        sums = lax.psum(sums, axis_name)
    total, mse = sums[:2] / jnp.maximum(sums[2], 1)
    return total, {"mse": mse}
