"""T5, Flan-T5 and umT5 beside transformers: hidden states and scores with padding, caches, exports, published sizes."""

import dataclasses
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
    bundle = dataclasses.replace(bundle, processor={"spiece.model": b"words"})
    hub.save(bundle, tmp_path / "copy")
    assert hub.load(tmp_path / "copy").processor == {"spiece.model": b"words"}
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


# Values that are not the default. Untied, transformers makes three tables of embeddings.
REFUSED = {"is_encoder_decoder": "is_encoder_decoder", "tie_word_embeddings": "encoder.embed_tokens.weight"}
OTHER = {
    "vocab_size": 96,
    "d_model": 24,
    "d_kv": 8,
    "d_ff": 40,
    "num_layers": 1,
    "num_decoder_layers": 1,
    "num_heads": 2,
    "relative_attention_num_buckets": 6,
    "relative_attention_max_distance": 9,
    "layer_norm_epsilon": 0.1,
    "feed_forward_proj": "gated-silu",
    "dense_act_fn": "tanh",
    "scale_decoder_outputs": False,
    "dropout_rate": 0.5,
    "initializer_factor": 3.0,
    "classifier_dropout": 0.5,
    "use_cache": False,
    "tie_word_embeddings": False,
    "bos_token_id": 5,
    "eos_token_id": 7,
    "pad_token_id": 9,
    "is_decoder": True,
    "is_encoder_decoder": False,
    "dtype": "float32",
    "chunk_size_feed_forward": 1,
}


@pytest.mark.parametrize("kind", family.KEYS)
def test_every_key_of_the_published_class_has_a_fate(kind):
    """The defaults are the class's own, and no key that it writes is missing in the table."""
    defaults = {"t5": transformers.T5Config, "mt5": transformers.MT5Config, "umt5": transformers.UMT5Config}[kind]()
    written = defaults.to_dict()
    keys = family.KEYS[kind].keys
    assert not written.keys() - keys.keys()
    derived = {"num_decoder_layers", "dense_act_fn", "is_gated_act", "scale_decoder_outputs", "tie_word_embeddings"}
    for name, key in keys.items():
        if key.fate == "used" and name in written and name not in derived | {"model_type", "architectures"}:
            assert key.default == written[name], name
    assert family.from_transformers({"model_type": kind}) == family.from_transformers(written)


@pytest.mark.parametrize("name", OTHER)
def test_other_values_of_a_key_give_the_published_function(name, tmp_path):
    torch.manual_seed(0)
    settings = {**TINY, **FORMS["t5-2019"][1], "num_layers": 1, "num_decoder_layers": 1} | {name: OTHER[name]}
    config = transformers.T5Config(**settings)
    setattr(config, name, OTHER[name])  # some are overwritten by the class when it is made
    oracle = transformers.T5ForConditionalGeneration(config).eval()
    with torch.no_grad():
        for parameter in oracle.parameters():
            parameter.normal_(0, 0.2)
    oracle.save_pretrained(tmp_path)
    if name in REFUSED:
        with pytest.raises(ValueError, match=REFUSED[name]):
            hub.load(tmp_path)
        return
    oracle = transformers.T5ForConditionalGeneration.from_pretrained(tmp_path).eval()  # what it reads back governs
    bundle = hub.load(tmp_path)
    ours = bundle.model.apply({"params": bundle.params}, TOKENS, REPLY, MASK)["logits"]
    theirs = scores(oracle).logits.numpy()
    np.testing.assert_allclose(ours, theirs, rtol=TOLERANCE, atol=TOLERANCE * max(1, np.abs(theirs).max()))


def test_what_no_t5_here_does_is_refused_by_name(tmp_path):
    config = {"model_type": "t5", "feed_forward_proj": "gated-swiglu", "pruned_heads": {"0": [1]}, "sparse": True}
    with pytest.raises(ValueError, match=r"feed_forward_proj.*expected one of.*pruned_heads.*'sparse' is unknown"):
        family.from_transformers(config)
