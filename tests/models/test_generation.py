"""Autoregressive decoding: the rules that choose a token beside transformers', the loop on a toy, compilations."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from omnax.configs.qwen_vl import tiny
from omnax.data.conversations.qwen_vl import Visual, Windows, collate, make_processor, pack
from omnax.data.drawn.visual_questions import documents
from omnax.models.generation import Sampling, choose, decode, penalise, start
from omnax.models.qwen_vl.decoding import Generator
from omnax.models.qwen_vl.model import QwenVL, init_params
from PIL import Image

LOGITS = np.random.default_rng(0).normal(0, 2, 12).astype(np.float32)
DRAWS = 20_000


@pytest.mark.parametrize(
    "fields",
    [
        {"temperature": 1.0},
        {"temperature": 0.7, "top_k": 4},
        {"temperature": 1.5, "top_p": 0.8},
        {"temperature": 0.5, "top_k": 6, "top_p": 0.9},
        {"temperature": 1.0, "top_p": 1e-6},  # one token is always left
        {"temperature": 1.0, "top_k": 99},
    ],
)
def test_draws_are_distributed_as_transformers_scores(fields):
    from oracles import torch, transformers

    process = transformers.generation.logits_process
    rules = [process.TemperatureLogitsWarper(fields["temperature"])]
    rules += [process.TopKLogitsWarper(fields["top_k"])] if "top_k" in fields else []
    rules += [process.TopPLogitsWarper(fields["top_p"])] if "top_p" in fields else []
    scores = torch.tensor(LOGITS[None])
    for rule in rules:
        scores = rule(None, scores)
    expected = scores.softmax(-1)[0].numpy()
    drawn = choose(jnp.tile(LOGITS, (DRAWS, 1)), Sampling(**fields), jax.random.key(0))
    shares = np.bincount(drawn, minlength=len(LOGITS)) / DRAWS
    assert not shares[expected == 0].any()
    # Five standard deviations of a share of so many draws
    assert (abs(shares - expected) <= 5 * np.sqrt(expected * (1 - expected) / DRAWS)).all()


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"temperature": 0.5, "top_k": 1},
        {"temperature": 1.0, "top_p": 0.0},
        *({"temperature": temperature} for temperature in (1e-2, 1e-6, 1e-30, 1e-38, 1e-44)),
        {"temperature": 1e-30, "top_k": 5, "top_p": 1e-9},
    ],
)
def test_greedy_is_the_likeliest(fields):
    """Temperatures near 0 are, as their limit is: nothing overflows."""
    assert choose(jnp.asarray(LOGITS[None]), Sampling(**fields), jax.random.key(0)).tolist() == [LOGITS.argmax()]


def test_repetition_penalty_equals_transformers_and_presence_is_subtracted_once():
    from oracles import torch, transformers

    prompt, answer = np.array([[1, 1, 5]]), np.array([[7, 7]])
    seen = [np.isin(np.arange(12), x)[None] for x in (prompt, answer)]
    rule = transformers.generation.logits_process.RepetitionPenaltyLogitsProcessor(1.3)
    expected = rule(torch.tensor(np.c_[prompt, answer]), torch.tensor(LOGITS[None])).numpy()
    got = penalise(jnp.asarray(LOGITS[None]), *seen, Sampling(repetition_penalty=1.3))
    np.testing.assert_array_equal(got, expected)
    got = penalise(jnp.asarray(LOGITS[None]), *seen, Sampling(presence_penalty=0.5))
    np.testing.assert_array_equal(got, LOGITS[None] - 0.5 * (np.arange(12) == 7))


def count(tokens, cache):
    """A language of numbers 0 ... 9: after n comes n + 1."""
    return jax.nn.one_hot((tokens + 1) % 10, 10), cache + 1


def begin(first, sampling):
    """Prompts of two tokens; `first` follows them."""
    prompt = jnp.array([[1, 2]] * len(first))
    logits = jax.nn.one_hot(jnp.array(first), 10)
    return start(logits, jnp.int32(0), prompt, jnp.ones_like(prompt, bool), sampling, jax.random.key(0))


def test_rows_stop_by_themselves_and_the_loop_with_the_last():
    sampling = Sampling(max_new_tokens=8, stop_tokens=(5, 9), pad_token=0)
    state = decode(count, begin([3, 7, 5], sampling), sampling, 8)
    assert state.tokens.tolist() == [[3, 4, 5, 0, 0, 0, 0, 0], [7, 8, 9, 0, 0, 0, 0, 0], [5, 0, 0, 0, 0, 0, 0, 0]]
    assert state.done.all() and state.step == state.cache == 3


def test_decoding_in_pieces_equals_one_run():
    """With a penalty that depends on the answer so far: 9 is not said twice, nor is the prompt."""
    sampling = Sampling(max_new_tokens=12, repetition_penalty=2.0, temperature=0.3)
    whole = decode(count, begin([3, 8], sampling), sampling, 12)
    state = begin([3, 8], sampling)
    for limit in (1, 5, 12):
        state = decode(count, state, sampling, limit)
        assert state.step == limit
    np.testing.assert_array_equal(state.tokens, whole.tokens)


@pytest.mark.parametrize("fields", [{"top_p": 1.5}, {"temperature": -1}, {"max_new_tokens": 0}, {"top_k": -1}])
def test_settings_out_of_range_are_named(fields):
    ((name, value),) = fields.items()
    with pytest.raises(ValueError, match=f"Sampling.{name} is {value}, expected a value from"):
        Sampling(**fields)


def test_each_bucket_compiles_once():
    """Prompts of other lengths and pictures of other sizes and number share their buckets; the next bucket does not."""
    c = tiny("published")
    one = {"text": dataclasses.replace(c.text, depth=1)}
    one["vision"] = dataclasses.replace(c.vision, depth=1, full_blocks=())
    model = QwenVL(dataclasses.replace(c, **one))
    params = init_params(model, jax.random.key(0))
    processor = make_processor(documents(), model.config)
    generator = Generator(model, Sampling(max_new_tokens=2))

    def answer(question, *sizes):
        content = [*[{"type": "image"}] * len(sizes), {"type": "text", "text": question}]
        visuals = [Visual([Image.new("RGB", (columns, rows))]) for rows, columns in sizes]
        row = pack([processor([{"role": "user", "content": content}], visuals)])
        batch = collate([row], Windows.of(model.config.vision))
        generator(params, batch, jax.random.key(0), on_tokens=lambda tokens: None)
        return generator._prefill._cache_size(), generator._continue._cache_size()

    assert answer("where ?", (56, 56)) == (1, 1)
    assert answer("what color ? " * 8, (56, 84)) == (1, 1)
    assert answer("where ?", (84, 56), (56, 56)) == (1, 1)
    assert answer("what color ? " * 30, (112, 112)) == (2, 2)
