"""Noise of diffusion models: how much of it each time step holds, adding it, and guidance of what predicts it.

x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) n (DDPM, arXiv 2006.11239). The tables are NumPy and float32, rounded as
diffusers' schedulers round them: its samplers divide by 1 - abar_0, which has four digits left.
"""

import itertools
import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

BETA_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2")


def make_betas(schedule: str, start: float, end: float, steps: int) -> Float[np.ndarray, " T"]:
    """The variance added by each of `steps` time steps: "linear", "scaled_linear" (Stable Diffusion) or cosine."""
    if schedule == "linear":
        return _linspace(start, end, steps)
    if schedule == "scaled_linear":
        return _linspace(start**0.5, end**0.5, steps) ** 2
    kept = [math.cos((i / steps + 0.008) / 1.008 * math.pi / 2) ** 2 for i in range(steps + 1)]
    return np.array([min(1 - b / a, 0.999) for a, b in itertools.pairwise(kept)], np.float32)


def _linspace(start: float, end: float, steps: int) -> Float[np.ndarray, " T"]:
    """torch's, which counts the second half from the end."""
    first, last, i = np.float32(start), np.float32(end), np.arange(steps)
    step = (last - first) / np.float32(max(steps - 1, 1))
    return np.where(i < steps // 2, first + step * i.astype(np.float32), last - step * (steps - 1 - i)).astype("f4")


def cumulative_alphas(betas: Float[np.ndarray, " T"]) -> Float[np.ndarray, " T"]:
    """abar_t, the share of the variance that is still the picture's: the product of 1 - beta up to t."""
    return np.cumprod(1 - betas, dtype=np.float64).astype(np.float32)


def zero_terminal_snr(betas: Float[np.ndarray, " T"]) -> Float[np.ndarray, " T"]:
    """Betas whose last step keeps nothing of the picture (arXiv 2305.08891, algorithm 1)."""
    root = np.sqrt(cumulative_alphas(betas))
    root = (root - root[-1]) * (root[0] / (root[0] - root[-1]))
    kept = root**2
    return 1 - np.concatenate([kept[:1], kept[1:] / kept[:-1]])


def add_noise(
    sample: Float[Array, "B ..."],
    noise: Float[Array, "B ..."],
    alphas: Float[Array, " T"] | Float[np.ndarray, " T"],
    step: Int[Array, " B"],
) -> Float[Array, "B ..."]:
    """x_t of each example at its own time step, `alphas` being abar."""
    signal, deviation = _rates(alphas, step, sample.ndim)
    return signal * sample + deviation * noise


def velocity(
    sample: Float[Array, "B ..."],
    noise: Float[Array, "B ..."],
    alphas: Float[Array, " T"] | Float[np.ndarray, " T"],
    step: Int[Array, " B"],
) -> Float[Array, "B ..."]:
    """v = sqrt(abar) n - sqrt(1 - abar) x_0 (arXiv 2202.00512), what a model with v-prediction learns."""
    signal, deviation = _rates(alphas, step, sample.ndim)
    return signal * noise - deviation * sample


def _rates(alphas: Array | np.ndarray, step: Array, ndim: int) -> tuple[Array, Array]:
    kept = jnp.asarray(alphas, jnp.float32)[step].reshape(-1, *(1,) * (ndim - 1))
    return jnp.sqrt(kept), jnp.sqrt(1 - kept)


def guide(
    unconditional: Float[Array, "B ..."],
    conditional: Float[Array, "B ..."],
    scale: Float[Array, ""] | float,
    rescale: Float[Array, ""] | float = 0.0,
) -> Float[Array, "B ..."]:
    """Classifier-free guidance u + g (c - u), of which the share `rescale` gets the deviation of c back.

    The deviation is that of each example over all else, unbiased (arXiv 2305.08891, section 3.4).
    """
    guided = unconditional + scale * (conditional - unconditional)
    axes = tuple(range(1, guided.ndim))
    deviations = (x.astype(jnp.float32).std(axes, ddof=1, keepdims=True) for x in (conditional, guided))
    of_conditional, of_guided = deviations
    ratio = jnp.where(of_guided > 0, of_conditional / jnp.where(of_guided > 0, of_guided, 1), 1)
    return guided * (rescale * ratio + (1 - rescale)).astype(guided.dtype)
