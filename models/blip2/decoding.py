"""Texts that a BLIP-2 says of images: by its language model, or by the Q-Former's own head of captions."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from ..generation import Sampling, Step, beam_search, decode, start
from .model import Blip2, apply


def answers(
    step: Step,
    logits: Float[Array, "B V"],
    cache: Any,
    prompt: Int[Array, "B T"],
    prompt_mask: Bool[Array, "B T"],
    sampling: Sampling,
    rng: Array,
) -> Int[Array, "B T"]:
    """What follows a prompt, by beams or token by token (see models/generation.py)."""
    if sampling.num_beams > 1:
        rows = lambda cache, index: cache.rows(index)  # noqa: E731
        return beam_search(step, rows, logits, cache, prompt, prompt_mask, sampling)[0]
    state = start(logits, cache, prompt, prompt_mask, sampling, rng)
    return decode(step, state, sampling, sampling.max_new_tokens).tokens


def answer(
    model: Blip2,
    params: Any,
    image: Float[Array, "B X Y C"],
    tokens: Int[Array, "B T"],
    mask: Bool[Array, "B T"],
    sampling: Sampling,
    rng: Array,
) -> Int[Array, "B T"]:
    """What the language model says behind the tokens, among which or before which the image stands."""

    def step(tokens: Int[Array, " B"], cache: Any) -> tuple[Float[Array, "B V"], Any]:
        return apply(model, params, tokens, cache, method="extend_answer")

    options = {"method": "start_answer"}
    logits, cache = apply(model, params, image, tokens, mask, sampling.max_new_tokens, **options)
    if model.config.t5 is not None:  # a repetition is one of what the decoder said
        tokens, mask = jnp.zeros_like(tokens[:, :1]), jnp.ones_like(mask[:, :1])
    return answers(step, logits, cache, tokens, mask, sampling, rng)


def caption(
    model: Blip2, params: Any, image: Float[Array, "B X Y C"], begin: int, sampling: Sampling, rng: Array
) -> Int[Array, "B T"]:
    """What the Q-Former's head says behind the token `begin` ([DEC]): stage 1's captions."""
    features = apply(model, params, image, method="encode_image")
    _, kept = apply(model, params, features, method="query")
    cache = apply(model, params, kept, sampling.max_new_tokens + 1, method="start_caption")

    def step(tokens: Int[Array, " B"], cache: Any) -> tuple[Float[Array, "B V"], Any]:
        logits, cache = apply(model, params, tokens[:, None], cache, method="extend_caption")
        return logits[:, -1], cache

    prompt = jnp.full((len(image), 1), begin, jnp.int32)
    logits, cache = step(prompt[:, 0], cache)
    return answers(step, logits, cache, prompt, jnp.ones_like(prompt, bool), sampling, rng)


@dataclasses.dataclass(frozen=True)
class Generator:
    """Compiled generation with one model; every number of images and length of prompts compiles once.

    With `begin`, its id, captions are those of the Q-Former's head; else answers are the language model's.
    """

    model: Blip2
    sampling: Sampling
    begin: int | None = None

    @functools.cached_property
    def _run(self) -> Callable[..., Int[Array, "B T"]]:
        if self.begin is not None:
            return jax.jit(
                lambda params, image, rng: caption(self.model, params, image, self.begin or 0, self.sampling, rng)
            )
        return jax.jit(
            lambda params, image, tokens, mask, rng: answer(self.model, params, image, tokens, mask, self.sampling, rng)
        )

    def __call__(self, params: Any, *inputs: Any, rng: Array | None = None) -> Int[np.ndarray, "B T"]:
        """Tokens [B, max_new_tokens] of images, or of (images, tokens, mask); padding follows a stop token."""
        return np.asarray(self._run(params, *inputs, jax.random.key(0) if rng is None else rng))
