"""T5, Flan-T5 and umT5 beside transformers: hidden states and scores with padding, caches, exports, published sizes."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import oracles  # noqa: F401
import pytest
import torch
import transformers
from omnax import hub
from omnax.hub.families import t5 as family
from omnax.hub.mapping import save_tensors
from omnax.models import t5

TOLERANCE = 1e-5
TINY = {"d_model": 32, "d_kv": 12, "d_ff": 48, "num_layers": 2, "num_decoder_layers": 3, "num_heads": 4}
TINY |= {"vocab_size": 64}
FORMS = {
    "flan": (transformers.T5Config, {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}),
    "t5-2019": (transformers.T5Config, {"feed_forward_proj": "relu"}),
    "blip2": (transformers.T5Config, {"feed_forward_proj": "gated-gelu", "dense_act_fn": "gelu"}),
    "mt5": (transformers.MT5Config, {"layer_norm_epsilon": 1e-3}),
    "umt5": (transformers.UMT5Config, {"relative_attention_num_buckets": 8, "relative_attention_max_distance": 20}),
}
RNG = np.random.default_rng(0)
TOKENS, REPLY = RNG.integers(2, 64, (2, 40)), RNG.integers(2, 64, (2, 27))
MASK = np.arange(40) < np.array([[40], [31]])


def random_oracle(name, encoder=False):
    torch.manual_seed(0)
    cls, settings = FORMS[name]
    auto = transformers.AutoModelForTextEncoding if encoder else transformers.AutoModelForSeq2SeqLM
    model = auto.from_config(cls(**TINY, **settings)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.2)
    return model


@pytest.fixture(scope="module", params=FORMS)
def pair(request, tmp_path_factory):
    """An oracle, and what `hub` makes of the directory that it writes."""
    oracle = random_oracle(request.param)
    path = tmp_path_factory.mktemp(request.param)
    oracle.save_pretrained(path)
    return oracle, hub.load(path), path


def scores(oracle):
    with torch.no_grad():
        return oracle(
            input_ids=torch.tensor(TOKENS), attention_mask=torch.tensor(MASK), decoder_input_ids=torch.tensor(REPLY)
        )


def test_hidden_states_and_scores_equal_with_padding(pair):
    oracle, bundle, _ = pair
    theirs = scores(oracle)
    ours = bundle.model.apply({"params": bundle.params}, TOKENS, REPLY, MASK)
    encoded = np.abs(ours["encoded"] - theirs.encoder_last_hidden_state.numpy())[MASK].max()
    assert encoded < TOLERANCE
    # The largest score is about 100 in the forms that scale by nothing: float32 of that size, not of one.
    logits = theirs.logits.numpy()
    np.testing.assert_allclose(ours["logits"], logits, rtol=TOLERANCE, atol=TOLERANCE * max(1, np.abs(logits).max()))


def test_tokens_one_by_one_equal_all_at_once(pair):
    _, bundle, _ = pair
    model, variables = bundle.model, {"params": bundle.params}
    whole = model.apply(variables, TOKENS, REPLY, MASK)
    cache = model.apply(variables, whole["encoded"], MASK, 30, method="start")
    extend = jax.jit(lambda tokens, cache: model.apply(variables, tokens, cache, method="extend"))
    steps = []
    for i in range(8):
        logits, cache = extend(REPLY[:, i : i + 1], cache)
        steps.append(logits)
    scale = np.abs(whole["logits"]).max()
    np.testing.assert_allclose(jnp.concatenate(steps, 1), whole["logits"][:, :8], atol=TOLERANCE * scale)
    assert cache.own.length.tolist() == [8, 8]


def test_export_is_read_back(pair, tmp_path):
    oracle, bundle, _ = pair
    hub.save(bundle, tmp_path / "copy")
    copy = transformers.AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "copy").eval()
    assert torch.equal(scores(oracle).logits, scores(copy).logits)


@pytest.mark.parametrize("name", ["flan", "umt5"])
def test_an_encoder_alone(name, tmp_path):
    oracle = random_oracle(name, encoder=True)
    oracle.save_pretrained(tmp_path)
    bundle = hub.load(tmp_path, scan=True, remat="full")
    assert bundle.config.decoder_depth == 0
    with torch.no_grad():
        theirs = oracle(input_ids=torch.tensor(TOKENS), attention_mask=torch.tensor(MASK)).last_hidden_state.numpy()
    ours = bundle.model.apply({"params": bundle.params}, TOKENS, mask=MASK)["encoded"]
    assert np.abs(ours - theirs)[MASK].max() < TOLERANCE


@pytest.mark.parametrize(
    ("size", "count"), [("flan-t5-xl", 2_849_757_184), ("flan-t5-xxl", 11_135_332_352), ("umt5-xxl", None)]
)
def test_published_sizes_have_the_published_keys_and_counts(size, count):
    config = t5.config(size, tie_embeddings=count is None)
    shapes = family.abstract(config)
    ours = {name: tensor.shape for name, tensor in save_tensors(shapes, family.table(config)).items()}
    cls = transformers.UMT5Config if size.startswith("umt5") else transformers.T5Config
    names = ("vocab_size", "d_model", "num_layers", "num_heads", "d_kv", "d_ff")
    published = cls(**dict(zip(names, t5.SIZES[size], strict=True)), feed_forward_proj="gated-gelu")
    with torch.device("meta"):
        oracle = transformers.AutoModelForSeq2SeqLM.from_config(published)
    theirs = {name: tuple(tensor.shape) for name, tensor in oracle.state_dict().items()}
    copies = {"encoder.embed_tokens.weight", "decoder.embed_tokens.weight", *(["lm_head.weight"] if not count else [])}
    assert ours == {name: shape for name, shape in theirs.items() if name not in copies}
    if count:  # shared/spec: Flan-T5's head is not its embedding
        assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes)) == count
