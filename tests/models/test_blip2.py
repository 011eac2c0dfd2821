"""BLIP-2's passes beside each other, and stage 1's three losses with all gradients beside a statement in torch."""

import dataclasses
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from omnax import hub
from omnax.models.blip2 import model as blip2
from omnax.models.blip2.decoding import caption
from omnax.models.blip2.model import apply
from omnax.models.generation import Sampling
from omnax.models.vit import ViTConfig
from omnax.train.recipes.blip2 import recipe
from omnax.train.rules import flatten, unflatten

RNG = np.random.default_rng(0)
BEGIN, BATCH, LENGTH = 40, 4, 6
TRUNK = ViTConfig(
    32, 1, 2, 48, (10, 10), (20, 20), num_classes=0, pool="none", final_norm=False, activation="gelu",
    pos_interpolation="bicubic",
)  # fmt: skip
SMALL = {"width": 24, "depth": 2, "num_heads": 2, "mlp_dim": 40, "vocab_size": 41, "max_positions": 16}
QUIET = {"dropout": 0.0, "attention_dropout": 0.0}
CONFIG = blip2.Blip2Config(
    qformer=blip2.qformer(TRUNK, text=True, lm_head=True, **SMALL, **QUIET),
    vision=TRUNK,
    num_queries=3,
    embed_dim=16,
    temperature=True,
)
IMAGES = RNG.normal(size=(BATCH, 20, 20, 3)).astype(np.float32)
TOKENS = RNG.integers(4, 40, (BATCH, LENGTH))
MASK = np.arange(LENGTH) < np.array([[6], [4], [3], [5]])
TOKENS = np.where(MASK, TOKENS, 0)


@pytest.fixture(scope="module")
def drawn():
    model = blip2.Blip2(CONFIG)
    shapes = jax.eval_shape(lambda: blip2.init_params(model, jax.random.key(0)))
    rng = np.random.default_rng(1)
    params = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(0, 0.2, leaf.shape), jnp.float32), shapes)
    return model, params | {"temperature": jnp.float32(0.3)}


def test_captions_behind_kept_queries_equal_one_pass(drawn):
    """The queries' keys and values serve the text; scores and gradients are those of one masked pass over both."""
    model, params = drawn

    def cached(params):
        image = apply(model, params, IMAGES, method="encode_image")
        cache = apply(model, params, apply(model, params, image, method="query")[1], LENGTH, method="start_caption")
        return apply(model, params, TOKENS, cache, MASK, method="extend_caption")[0]

    def whole(params):
        image = apply(model, params, IMAGES, method="encode_image")
        return apply(model, params, image, TOKENS, MASK, method="caption_in_one_pass")

    def both(params):
        outputs = [run(params) for run in (cached, whole)]
        gradients = [jax.grad(lambda p, run=run: (run(p) * MASK[..., None]).std())(params) for run in (cached, whole)]
        return outputs, gradients

    (one, other), (kept, together) = jax.jit(both)(params)
    np.testing.assert_allclose(np.asarray(one)[MASK], np.asarray(other)[MASK], atol=2e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), kept, together)


def test_generated_captions_are_the_likeliest_tokens_of_one_pass(drawn):
    model, params = drawn
    sampling = Sampling(max_new_tokens=4)
    said = jax.jit(lambda p: caption(model, p, IMAGES, BEGIN, sampling, jax.random.key(0)))(params)
    text = jnp.concatenate([jnp.full((BATCH, 1), BEGIN), said[:, :-1]], 1)
    image = apply(model, params, IMAGES, method="encode_image")
    scores = apply(model, params, image, text, jnp.ones(text.shape, bool), method="caption_in_one_pass")
    np.testing.assert_array_equal(said, scores.argmax(-1))


def oracle():
    """transformers' retrieval model of the same sizes, with BERT's head of captions."""
    from oracles import torch, transformers

    torch.manual_seed(0)
    vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    reader = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 40}
    reader |= {"vocab_size": 41, "max_position_embeddings": 16, "use_qformer_text_input": True}
    c = transformers.Blip2Config(
        vision_config=vision | {"image_size": 20, "patch_size": 10}, qformer_config=reader,
        num_query_tokens=3, image_text_hidden_size=16,
    )  # fmt: skip
    model = transformers.Blip2ForImageTextRetrieval(c)
    head = transformers.BertForMaskedLM(transformers.BertConfig(hidden_size=24, vocab_size=41)).cls.predictions
    for parameter in (*model.parameters(), *head.parameters()):
        parameter.data = torch.randn(parameter.shape) * 0.2
    head.decoder.weight, head.decoder.bias = model.embeddings.word_embeddings.weight, head.bias
    return model.eval(), head.eval()


def losses_in_torch(model, head, temperature, images, texts):
    """Section 3.2 of the paper in torch; `images` and `texts` are the negatives drawn for texts and images."""
    from oracles import torch

    cross, count, rows = torch.nn.functional.cross_entropy, 3, torch.arange(BATCH)
    normalize = torch.nn.functional.normalize
    tokens, mask = torch.tensor(TOKENS), torch.tensor(MASK)
    features = model.vision_model(torch.tensor(IMAGES).permute(0, 3, 1, 2)).last_hidden_state
    queries = model.query_tokens.expand(BATCH, -1, -1)
    read = model.qformer(query_embeds=queries, encoder_hidden_states=features).last_hidden_state
    alone = model.qformer(
        query_embeds=model.embeddings(input_ids=tokens), query_length=0, attention_mask=mask * 1
    ).last_hidden_state
    image = normalize(model.vision_projection(read), dim=-1)
    text = normalize(model.text_projection(alone[:, 0]), dim=-1)
    to_text = torch.einsum("iqe,je->ijq", image, text.detach()).max(-1).values / temperature
    to_image = torch.einsum("ie,jqe->ijq", text, image.detach()).max(-1).values / temperature
    contrast = (cross(to_text, rows, label_smoothing=0.1) + cross(to_image, rows, label_smoothing=0.1)) / 2

    def together(features, tokens, mask):
        x = model.embeddings(input_ids=tokens, query_embeds=model.query_tokens.expand(len(tokens), -1, -1))
        options = {"query_length": count, "encoder_hidden_states": features, "attention_mask": mask}
        return model.qformer(query_embeds=x, **options).last_hidden_state

    pairs = torch.cat([features, features[images], features]), torch.cat([tokens, tokens, tokens[texts]])
    kept = torch.nn.functional.pad(torch.cat([mask, mask, mask[texts]]), (count, 0), value=True)
    scores = model.itm_head(together(*pairs, kept * 1)[:, :count]).mean(1)
    match = cross(scores, torch.tensor([1] * BATCH + [0] * 2 * BATCH))

    begun = tokens.clone()
    begun[:, 0] = BEGIN
    drawn = torch.tensor(np.asarray(blip2.task_mask("caption", count, MASK)))[:, None]
    bias = torch.zeros(drawn.shape).masked_fill(~drawn, torch.finfo(torch.float32).min)
    logits = head(together(features, begun, bias)[:, count:])[:, :-1]
    labels = torch.where(mask, tokens, -100)[:, 1:]
    said = cross(logits.reshape(-1, 41), labels.reshape(-1), ignore_index=-100, label_smoothing=0.1)
    return contrast, match, said


def test_losses_and_gradients_of_the_first_stage(tmp_path, monkeypatch):
    from oracles import torch

    images, texts = np.array([1, 2, 3, 0]), np.array([2, 3, 1, 0])
    drawn = iter([images, texts])
    monkeypatch.setattr(recipe.image_text, "draw_negatives", lambda *_, **__: jnp.asarray(next(drawn)))
    theirs, head = oracle()
    temperature = torch.tensor(0.3, requires_grad=True)

    def loaded(name):
        """The oracle's parameters in our layout."""
        theirs.save_pretrained(tmp_path / name)
        bundle = hub.load(tmp_path / name)
        leaves = flatten(bundle.params) | {"temperature": jnp.asarray(temperature.detach().numpy())}
        parts = {"head_dense": head.transform.dense, "head_norm": head.transform.LayerNorm}
        for part, module in parts.items():
            kernel = "kernel" if part == "head_dense" else "scale"
            leaves[f"qformer/{part}/{kernel}"] = jnp.asarray(module.weight.detach().numpy().T)
            leaves[f"qformer/{part}/bias"] = jnp.asarray(module.bias.detach().numpy())
        leaves["qformer/head_bias"] = jnp.asarray(head.bias.detach().numpy())
        return bundle.config, unflatten(leaves)

    read, params = loaded("in")
    expected_config = dataclasses.replace(read.qformer, lm_head=True, **QUIET)
    model = blip2.Blip2(dataclasses.replace(read, qformer=expected_config, temperature=True))
    with torch.enable_grad():
        for parameter in (*theirs.parameters(), *head.parameters()):
            parameter.requires_grad_(True)
        parts = losses_in_torch(theirs, head, temperature, images, texts)
        sum(parts).backward()
    tokenizer = SimpleNamespace(id=lambda token: BEGIN)
    data = SimpleNamespace(reader_tokenizer=tokenizer)
    settings = SimpleNamespace(smoothing=0.1, negatives="hard", gather_gradient=False, data=data)
    batch = {"image": jnp.asarray(IMAGES), "tokens": jnp.asarray(TOKENS, jnp.int32)}

    def loss(params):
        return recipe.stage_1(settings, model, params, None, batch, jax.random.key(0))

    (_, (terms, _)), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    for name, part in zip(("contrast", "match", "caption"), parts, strict=True):
        np.testing.assert_allclose(terms[name], part.detach(), rtol=1e-5, err_msg=name)
    for parameter in (*theirs.parameters(), *head.parameters(), temperature):
        parameter.data = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
    _, expected = loaded("gradients")
    expected, found = flatten(expected), flatten(gradients)
    assert expected.keys() == found.keys()
    for path, gradient in expected.items():
        scale = max(1.0, float(jnp.abs(gradient).max()))
        np.testing.assert_allclose(found[path], gradient, atol=1e-5 * scale, err_msg=path)
