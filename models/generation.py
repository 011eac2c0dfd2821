"""Autoregressive decoding for any language model: sampling rules and one jitted loop over a step function.

The order of the rules is that of transformers' generate(): repetition penalty, temperature, top-k, top-p.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

# step(tokens [B], cache) -> (logits [B, V] of the token after them, cache)
Step = Callable[[Int[Array, " B"], Any], tuple[Float[Array, "B V"], Any]]


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How the next token is chosen. `temperature` or `top_p` 0 is greedy; `top_k` 0 and `top_p` 1 cut nothing."""

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0  # over prompt and answer, arXiv 1909.05858, section 4.1
    presence_penalty: float = 0.0  # subtracted from every token of the answer so far
    stop_tokens: tuple[int, ...] = ()
    pad_token: int = 0  # what follows a stop token

    def __post_init__(self) -> None:
        for name, low, high in (
            ("max_new_tokens", 1, float("inf")),
            ("temperature", 0, float("inf")),
            ("top_k", 0, float("inf")),
            ("top_p", 0, 1),
            ("repetition_penalty", 1e-6, float("inf")),
        ):
            if not low <= getattr(self, name) <= high:
                raise ValueError(f"Sampling.{name} is {getattr(self, name)}, expected a value from {low} to {high}")


@flax.struct.dataclass
class Decoding:
    """An answer in the making: `tokens` [B, max_new_tokens], of which `step` columns are written."""

    cache: Any
    logits: Float[Array, "B V"]  # of the token to choose next
    tokens: Int[Array, "B T"]
    step: Int[Array, ""]
    done: Bool[Array, " B"]
    in_prompt: Bool[Array, "B V"]
    in_answer: Bool[Array, "B V"]
    rng: Array


def start(
    logits: Float[Array, "B V"],
    cache: Any,
    prompt: Int[Array, "B T"],
    prompt_mask: Bool[Array, "B T"],
    sampling: Sampling,
    rng: Array,
) -> Decoding:
    """The state after the prompt: its cache, and the logits at each row's last token."""
    batch, vocab = logits.shape
    rows = jnp.arange(batch)[:, None]
    in_prompt = jnp.zeros((batch, vocab), bool).at[rows, prompt].max(prompt_mask)
    tokens = jnp.full((batch, sampling.max_new_tokens), sampling.pad_token, jnp.int32)
    done = jnp.zeros(batch, bool)
    return Decoding(cache, logits, tokens, jnp.int32(0), done, in_prompt, jnp.zeros_like(in_prompt), rng)


def decode(step: Step, state: Decoding, sampling: Sampling, limit: Int[Array, ""] | int) -> Decoding:
    """Chooses tokens until `limit` columns are written or all rows have stopped; call again with more to go on.

    A loop on the device: nothing returns to the host in between.
    """

    def unfinished(state: Decoding) -> Bool[Array, ""]:
        return (state.step < jnp.minimum(limit, sampling.max_new_tokens)) & ~state.done.all()

    def advance(state: Decoding) -> Decoding:
        key = jax.random.fold_in(state.rng, state.step)
        chosen = choose(penalise(state.logits, state.in_prompt, state.in_answer, sampling), sampling, key)
        chosen = jnp.where(state.done, sampling.pad_token, chosen)
        stopped = jnp.isin(chosen, jnp.asarray(sampling.stop_tokens, jnp.int32)) if sampling.stop_tokens else False
        said = jax.nn.one_hot(chosen, state.logits.shape[1], dtype=bool) & ~state.done[:, None]
        logits, cache = step(chosen, state.cache)
        return dataclasses.replace(
            state,
            cache=cache,
            logits=logits,
            tokens=state.tokens.at[:, state.step].set(chosen),
            step=state.step + 1,
            done=state.done | stopped,
            in_answer=state.in_answer | said,
        )

    return jax.lax.while_loop(unfinished, advance, state)


def penalise(
    logits: Float[Array, "B V"], in_prompt: Bool[Array, "B V"], in_answer: Bool[Array, "B V"], sampling: Sampling
) -> Float[Array, "B V"]:
    """Makes tokens that occurred less likely."""
    if sampling.repetition_penalty != 1:
        weaker = jnp.where(logits < 0, logits * sampling.repetition_penalty, logits / sampling.repetition_penalty)
        logits = jnp.where(in_prompt | in_answer, weaker, logits)
    if sampling.presence_penalty:
        logits = logits - sampling.presence_penalty * in_answer
    return logits


def choose(logits: Float[Array, "B V"], sampling: Sampling, rng: Array) -> Int[Array, " B"]:
    """The next token of each row."""
    if sampling.temperature < jnp.finfo(jnp.float32).tiny or sampling.top_k == 1 or sampling.top_p == 0:
        return jnp.argmax(logits, -1).astype(jnp.int32)
    # The likeliest becomes 0, so that a temperature near 0 leaves it where others overflow to -inf
    logits = (logits - jnp.max(logits, -1, keepdims=True)) / sampling.temperature
    if sampling.top_k:
        lowest = jax.lax.top_k(logits, min(sampling.top_k, logits.shape[-1]))[0][:, -1:]
        logits = jnp.where(logits < lowest, -jnp.inf, logits)
    if sampling.top_p < 1:
        logits = _nucleus(logits, sampling.top_p)
    return jax.random.categorical(rng, logits).astype(jnp.int32)


def _nucleus(logits: Float[Array, "B V"], top_p: float) -> Float[Array, "B V"]:
    """Keeps the smallest set of likeliest tokens whose probability reaches top_p (arXiv 1904.09751), at least one."""
    ordered = jnp.sort(logits, -1, descending=True)
    probability = jax.nn.softmax(ordered, -1)
    # A token is kept while the probability before it is below top_p
    kept = (jnp.cumsum(probability, -1) - probability < top_p).at[:, 0].set(True)
    lowest = jnp.min(jnp.where(kept, ordered, jnp.inf), -1, keepdims=True)
    return jnp.where(logits < lowest, -jnp.inf, logits)
