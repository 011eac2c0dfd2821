"""OPT beside transformers: scores with padding on either side, caches, exports, every form and key, published sizes."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from omnax import hub
from omnax.hub.families import opt as family
from omnax.hub.mapping import save_tensors
from omnax.models import opt
from oracles import torch, transformers

TOLERANCE = 1e-5
TINY = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "ffn_dim": 48, "vocab_size": 64}
TINY |= {"max_position_embeddings": 40}
FORMS = {
    "2.7b": {},
    "350m": {"do_layer_norm_before": False, "word_embed_proj_dim": 20},
    "galactica": {"enable_bias": False, "activation_function": "gelu"},
    "untied": {"tie_word_embeddings": False, "_remove_final_layer_norm": True},
}
RNG = np.random.default_rng(0)
TOKENS = RNG.integers(3, 64, (3, 11))
MASK = np.arange(11) < np.array([[11], [7], [9]])
SIDES = {"right": MASK, "left": MASK[:, ::-1]}


def random_oracle(**settings):
    torch.manual_seed(0)
    model = transformers.OPTForCausalLM(transformers.OPTConfig(**TINY | settings)).eval()
    for parameter in model.parameters():
        parameter.normal_(0, 0.2)
    return model


@pytest.fixture(scope="module", params=FORMS)
def pair(request, tmp_path_factory):
    oracle = random_oracle(**FORMS[request.param])
    path = tmp_path_factory.mktemp("opt")
    oracle.save_pretrained(path)
    return oracle, hub.load(path, scan=request.param == "350m")


def scores(oracle, mask):
    return oracle(torch.tensor(TOKENS), attention_mask=torch.tensor(mask.astype(np.int64))).logits.numpy()


@pytest.mark.parametrize("side", SIDES)
def test_scores_equal_with_padding(pair, side):
    oracle, bundle = pair
    mask = SIDES[side]
    theirs = scores(oracle, mask)
    ours = bundle.model.apply({"params": bundle.params}, TOKENS, mask)["logits"]
    assert np.abs(ours - theirs)[mask].max() < TOLERANCE * np.abs(theirs).max()


def test_tokens_one_by_one_behind_a_prompt_equal_all_at_once(pair):
    oracle, bundle = pair
    model, variables, more = bundle.model, {"params": bundle.params}, RNG.integers(3, 64, (3, 3))

    @jax.jit
    def extend(tokens, mask, cache):
        hidden, cache = model.apply(variables, tokens, mask, cache, method="decode")
        return model.apply(variables, hidden, method="logits"), cache

    for side in SIDES.values():
        mask = np.pad(side, ((0, 0), (0, 3)), constant_values=True)
        tokens = np.concatenate([TOKENS, more], 1)
        theirs = oracle(torch.tensor(tokens), attention_mask=torch.tensor(mask.astype(np.int64))).logits.numpy()
        cache = model.apply(variables, 3, 16, method="start")
        logits, cache = extend(TOKENS, side, cache)
        steps = [logits]
        for i in range(3):
            logits, cache = extend(more[:, i : i + 1], np.ones((3, 1), bool), cache)
            steps.append(logits)
        assert np.abs(jnp.concatenate(steps, 1) - theirs)[mask].max() < TOLERANCE * np.abs(theirs).max()
        assert cache.length.tolist() == mask.sum(1).tolist()


def test_export_is_read_back(pair, tmp_path):
    oracle, bundle = pair
    hub.save(bundle, tmp_path / "copy")
    copy = transformers.OPTForCausalLM.from_pretrained(tmp_path / "copy").eval()
    np.testing.assert_array_equal(scores(oracle, MASK), scores(copy, MASK))


@pytest.mark.parametrize(("size", "count"), [("2.7b", 2_651_596_800), ("6.7b", 6_658_473_984), ("350m", None)])
def test_published_sizes_have_the_published_keys_and_counts(size, count):
    shape = opt.config(size)
    shapes = family.abstract(shape)
    ours = {name: tensor.shape for name, tensor in save_tensors(shapes, family.table(shape)).items()}
    names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "ffn_dim")
    settings = dict(zip(names, opt.SIZES[size], strict=True))
    if size == "350m":
        settings |= {"do_layer_norm_before": False, "word_embed_proj_dim": 512}
    with torch.device("meta"):
        oracle = transformers.OPTForCausalLM(transformers.OPTConfig(**settings))
    theirs = {name: tuple(tensor.shape) for name, tensor in oracle.state_dict().items()}
    assert ours == {name: shape for name, shape in theirs.items() if name != "lm_head.weight"}
    assert count in (None, sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes)))


OTHER = {
    "vocab_size": 70,
    "hidden_size": 40,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "ffn_dim": 20,
    "max_position_embeddings": 30,
    "activation_function": "gelu_new",
    "dropout": 0.5,
    "attention_dropout": 0.5,
    "layerdrop": 0.5,
    "init_std": 0.5,
    "bos_token_id": 5,
    "use_cache": False,
}


@pytest.mark.parametrize("name", OTHER)
def test_other_values_of_a_key_give_the_published_function(name, tmp_path):
    oracle = random_oracle(**{name: OTHER[name]})
    oracle.save_pretrained(tmp_path)
    bundle = hub.load(tmp_path)
    ours = bundle.model.apply({"params": bundle.params}, TOKENS)["logits"]
    theirs = oracle(torch.tensor(TOKENS)).logits.numpy()
    np.testing.assert_allclose(ours, theirs, atol=TOLERANCE * np.abs(theirs).max())


def test_what_no_opt_here_does_is_refused_by_name():
    with pytest.raises(ValueError, match=r"layer_norm_elementwise_affine.*'sparse' is unknown"):
        family.from_transformers({"model_type": "opt", "layer_norm_elementwise_affine": False, "sparse": True})


def test_more_tokens_than_positions_are_refused():
    model = opt.OPT(opt.config("125m", depth=1, max_positions=10))
    with pytest.raises(ValueError, match="11 tokens with the answer's, expected at most 10"):
        jax.eval_shape(model.init, jax.random.key(0), TOKENS)
