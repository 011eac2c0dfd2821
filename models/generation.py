"""Autoregressive decoding for any language model: sampling rules and jitted loops over a step function.

`decode` follows one answer a row, `beam_search` several. The rules and their order are those of transformers'
generate(): repetition penalty, least length, temperature, top-k, top-p.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

# select(cache, rows) -> the cache of those rows, in that order
Select = Callable[[Any, Int[Array, " B"]], Any]
# step(tokens [B], cache) -> (logits [B, V] of the token after them, cache)
Step = Callable[[Int[Array, " B"], Any], tuple[Float[Array, "B V"], Any]]


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How the next token is chosen. `temperature` or `top_p` 0 is greedy; `top_k` 0 and `top_p` 1 cut nothing.

    More than one beam is a search for the answer of the highest sum of log probabilities / length^`length_penalty`.
    """

    max_new_tokens: int = 128
    min_new_tokens: int = 0  # no stop token before
    num_beams: int = 1
    length_penalty: float = 1.0
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
            ("min_new_tokens", 0, self.max_new_tokens),
            ("num_beams", 1, float("inf")),
            ("temperature", 0, float("inf")),
            ("top_k", 0, float("inf")),
            ("top_p", 0, 1),
            ("repetition_penalty", 1e-6, float("inf")),
        ):
            if not low <= getattr(self, name) <= high:
                raise ValueError(f"Sampling.{name} is {getattr(self, name)}, expected a value from {low} to {high}")
        if self.num_beams > 1 and not self.greedy:
            raise ValueError(f"Sampling: {self.num_beams} beams are a search, not a draw, got {self.temperature=}")

    @property
    def greedy(self) -> bool:
        """Whether nothing is drawn."""
        return self.temperature < float(jnp.finfo(jnp.float32).tiny) or self.top_k == 1 or self.top_p == 0


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
        logits = penalise(state.logits, state.in_prompt, state.in_answer, sampling)
        chosen = choose(forbid_stops(logits, state.step, sampling), sampling, key)
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


def forbid_stops(logits: Float[Array, "B V"], step: Int[Array, ""], sampling: Sampling) -> Float[Array, "B V"]:
    """No stop token before the least length."""
    if not sampling.min_new_tokens or not sampling.stop_tokens:
        return logits
    stops = jnp.asarray(sampling.stop_tokens, jnp.int32)
    return jnp.where(step < sampling.min_new_tokens, logits.at[:, stops].set(-jnp.inf), logits)


def choose(logits: Float[Array, "B V"], sampling: Sampling, rng: Array) -> Int[Array, " B"]:
    """The next token of each row."""
    if sampling.greedy:
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


@flax.struct.dataclass
class Beams:
    """The K likeliest unfinished answers of each row, the best K finished ones, and where the search stands."""

    cache: Any  # of B · K rows
    logits: Float[Array, "C V"]  # C = B · K
    tokens: Int[Array, "B K T"]
    scores: Float[Array, "B K"]  # sums of log probabilities, the highest first
    ended: Int[Array, "B K T"]
    ended_scores: Float[Array, "B K"]  # those sums over length^penalty
    is_ended: Bool[Array, "B K"]
    hopeful: Bool[Array, " B"]  # an unfinished answer may still beat the worst finished one
    stuck: Bool[Array, ""]  # every continuation has ended
    step: Int[Array, ""]
    in_prompt: Bool[Array, "C V"]


_NEVER = -1e9  # as transformers scores what cannot be chosen


def beam_search(
    step: Step,
    select: Select,
    logits: Float[Array, "B V"],
    cache: Any,
    prompt: Int[Array, "B T"],
    prompt_mask: Bool[Array, "B T"],
    sampling: Sampling,
) -> tuple[Int[Array, "B T"], Float[Array, " B"]]:
    """The best answers [B, max_new_tokens] and their scores; the arguments are those of `start`.

    The search of transformers with early_stopping=False: it ends where no unfinished answer, at its present length,
    beats the worst of K finished ones.
    """
    (batch, vocab), count, length = logits.shape, sampling.num_beams, sampling.max_new_tokens
    rows = jnp.repeat(jnp.arange(batch), count)
    tokens = jnp.full((batch, count, length), sampling.pad_token, jnp.int32)
    never = jnp.full((batch, count), _NEVER)
    in_prompt = jnp.zeros((batch, vocab), bool).at[jnp.arange(batch)[:, None], prompt].max(prompt_mask)[rows]
    begin = Beams(
        cache=select(cache, rows),
        logits=logits[rows],
        tokens=tokens,
        scores=never.at[:, 0].set(0.0),  # else all beams would say the same
        ended=tokens,
        ended_scores=never,
        is_ended=jnp.zeros((batch, count), bool),
        hopeful=jnp.ones(batch, bool),
        stuck=jnp.bool_(False),
        step=jnp.int32(0),
        in_prompt=in_prompt,
    )

    def unfinished(beams: Beams) -> Bool[Array, ""]:
        return (beams.step < length) & beams.hopeful.any() & ~beams.stuck

    end = jax.lax.while_loop(unfinished, lambda beams: _advance(step, select, beams, sampling), begin)
    return end.ended[:, 0], end.ended_scores[:, 0]


def _advance(step: Step, select: Select, beams: Beams, sampling: Sampling) -> Beams:
    """Every beam by one token; candidates that end leave the race."""
    batch, count, length = beams.tokens.shape
    vocab = beams.logits.shape[1]
    written = jnp.arange(length) < beams.step
    log_probs = jax.nn.log_softmax(beams.logits)
    if sampling.repetition_penalty != 1 or sampling.presence_penalty:
        said = jnp.zeros_like(beams.in_prompt).at[jnp.arange(batch * count)[:, None], beams.tokens.reshape(-1, length)]
        log_probs = penalise(log_probs, beams.in_prompt, said.max(written), sampling)
    log_probs = forbid_stops(log_probs, beams.step, sampling)
    totals = log_probs.reshape(batch, count, vocab) + beams.scores[..., None]
    # As many candidates as leave K to go on with where every stop token is among them
    top, index = jax.lax.top_k(totals.reshape(batch, -1), max(2, 1 + len(sampling.stop_tokens)) * count)
    origin, token = index // vocab, (index % vocab).astype(jnp.int32)
    candidates = _take(beams.tokens, origin).at[:, :, beams.step].set(token)
    stops = jnp.isin(token, jnp.asarray(sampling.stop_tokens, jnp.int32)) | (beams.step + 1 >= length)

    scores, place = jax.lax.top_k(top + stops * _NEVER, count)
    first = jnp.arange(top.shape[1]) < count  # the others are there to go on with
    divisor = (beams.step + 1).astype(jnp.float32) ** sampling.length_penalty
    final = top / divisor + ~beams.hopeful[:, None] * _NEVER + ~(stops & first) * _NEVER
    ended_scores, best = jax.lax.top_k(jnp.concatenate([beams.ended_scores, final], 1), count)
    ended = _take(jnp.concatenate([beams.ended, candidates], 1), best)
    is_ended = _take(jnp.concatenate([beams.is_ended, stops & first], 1), best)

    worst = jnp.where(is_ended, ended_scores.min(1, keepdims=True), _NEVER)
    hopeful = beams.hopeful & (scores[:, :1] / divisor > worst).any(1)
    rows = (_take(origin, place) + count * jnp.arange(batch)[:, None]).reshape(-1)
    logits, cache = step(_take(token, place).reshape(-1), select(beams.cache, rows))
    return dataclasses.replace(
        beams,
        cache=cache,
        logits=logits,
        tokens=_take(candidates, place),
        scores=scores,
        ended=ended,
        ended_scores=ended_scores,
        is_ended=is_ended,
        hopeful=hopeful,
        stuck=stops.all(),
        step=beams.step + 1,
    )


def _take(x: Array, index: Int[Array, "B K"]) -> Array:
    """x[b, index[b, k]] for all b and k."""
    return x[jnp.arange(len(x))[:, None], index]
