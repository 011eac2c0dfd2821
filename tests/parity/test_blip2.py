"""BLIP-2 beside transformers: scores, answers token for token, retrieval, LAVIS's files, published checkpoints."""

import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from omnax import hub
from omnax.hub.families.blip2 import family, formats
from omnax.hub.mapping import save_tensors
from omnax.models.blip2 import model as blip2
from omnax.models.blip2.decoding import Generator
from omnax.models.blip2.model import apply
from omnax.models.generation import Sampling
from oracles import torch, transformers

TOLERANCE = 1e-5
IMAGE_TOKEN, QUERIES = 60, 4
# Every used key away from its default.
VISION = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
VISION |= {"image_size": 30, "patch_size": 10, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-3}
QFORMER = {"hidden_size": 24, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 40}
QFORMER |= {"hidden_act": "gelu_new", "layer_norm_eps": 1e-2, "cross_attention_frequency": 3, "vocab_size": 61}
QFORMER |= {"max_position_embeddings": 20, "hidden_dropout_prob": 0.2, "attention_probs_dropout_prob": 0.3}
OPT = {"model_type": "opt", "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "ffn_dim": 64}
OPT |= {"vocab_size": 64, "max_position_embeddings": 64, "bos_token_id": 2, "pad_token_id": 1}
T5 = {"model_type": "t5", "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "vocab_size": 64}
T5 |= {"feed_forward_proj": "gated-gelu", "dense_act_fn": "gelu", "decoder_start_token_id": 0, "bos_token_id": 1}
LANGUAGES = {
    "opt": OPT,
    "opt, 350m": OPT | {"do_layer_norm_before": False, "word_embed_proj_dim": 32, "enable_bias": False},
    "t5": T5 | {"tie_word_embeddings": False},
    "t5, tied": T5,
}
RNG = np.random.default_rng(0)
IMAGES = RNG.normal(size=(3, 30, 30, 3)).astype(np.float32)
PIXELS = torch.tensor(IMAGES).permute(0, 3, 1, 2)
TEXT = RNG.integers(3, 50, (3, 6))
TOKENS = np.concatenate([np.full((3, QUERIES), IMAGE_TOKEN), TEXT], 1)
MASK = np.ones_like(TOKENS, bool)
MASK[1, QUERIES : QUERIES + 2] = False  # padded on the left: between the image and the text
MASK[2, QUERIES : QUERIES + 5] = False


def randomized(model, scale=0.2):
    torch.manual_seed(0)
    for parameter in model.eval().parameters():
        parameter.data = torch.randn(parameter.shape) * scale
    return model


def config(text=None, **fields):
    fields = {"num_query_tokens": QUERIES, "image_token_index": IMAGE_TOKEN} | fields
    return transformers.Blip2Config(vision_config=VISION, qformer_config=QFORMER, text_config=text, **fields)


def scores(oracle):
    decoder = {} if oracle.config.use_decoder_only_language_model else {"decoder_input_ids": torch.tensor(TEXT)}
    return oracle(
        pixel_values=PIXELS, input_ids=torch.tensor(TOKENS), attention_mask=torch.tensor(MASK * 1), **decoder
    ).logits.numpy()


def our_scores(bundle):
    decoder = [] if bundle.config.t5 is None else [TEXT]
    run = jax.jit(lambda params: apply(bundle.model, params, IMAGES, TOKENS, MASK, *decoder)["logits"])
    return run(bundle.params)


@pytest.fixture(scope="module", params=LANGUAGES)
def pair(request, tmp_path_factory):
    # Larger weights: answers that differ from each other, and end
    oracle = randomized(transformers.Blip2ForConditionalGeneration(config(LANGUAGES[request.param])), 0.4)
    path = tmp_path_factory.mktemp("blip2")
    oracle.save_pretrained(path)
    return oracle, hub.load(path, scan="350m" in request.param)


def close(ours, theirs, where=...):
    theirs = np.asarray(theirs)
    assert np.abs(np.asarray(ours) - theirs)[where].max() < TOLERANCE * max(1, np.abs(theirs).max())


def test_scores_equal_with_padding(pair):
    oracle, bundle = pair
    close(our_scores(bundle), scores(oracle), ... if bundle.config.t5 else MASK)


def test_export_is_read_back(pair, tmp_path):
    oracle, bundle = pair
    hub.save(bundle, tmp_path / "copy")
    for cls in (transformers.Blip2ForConditionalGeneration, transformers.Blip2Model):
        np.testing.assert_array_equal(scores(cls.from_pretrained(tmp_path / "copy").eval()), scores(oracle))


SEARCHES = [
    {"repetition_penalty": 1.3, "min_new_tokens": 3},
    {"num_beams": 5},
    {"num_beams": 3, "min_new_tokens": 4, "repetition_penalty": 1.5, "length_penalty": -1.0},
]


@pytest.mark.parametrize("pair", ["opt", "t5"], indirect=True)
@pytest.mark.parametrize("settings", SEARCHES, ids=str)
def test_answers_are_those_of_generate(pair, settings):
    """With a cache here, stopped at tokens that come early; `generate` by itself and ours with it."""
    oracle, bundle = pair
    inputs = {"pixel_values": PIXELS, "input_ids": torch.tensor(TOKENS), "attention_mask": torch.tensor(MASK * 1)}
    prompt = TOKENS.shape[1] if bundle.config.opt else 1

    def generate(**fields):
        # Padding that is not 0, which transformers' beams would take for none given
        options = {"max_new_tokens": 10, "do_sample": False, "pad_token_id": 62} | fields
        return oracle.generate(**inputs, **options).numpy()[:, prompt:]

    # Tokens that are said early: the search has to end there, or to go round
    free = generate(eos_token_id=63, use_cache=False)
    stops = [int(free[0, 2]), int(free[1, 4])]
    theirs = generate(eos_token_id=stops, use_cache=settings != {}, **settings)
    sampling = Sampling(max_new_tokens=10, stop_tokens=tuple(stops), pad_token=62, **settings)
    ours = Generator(bundle.model, sampling)(bundle.params, IMAGES, TOKENS, MASK)
    width = theirs.shape[1]
    np.testing.assert_array_equal(ours[:, :width], theirs)
    assert (ours[:, width:] == 62).all()


@pytest.mark.parametrize("pair", ["opt", "t5"], indirect=True)
def test_an_image_without_a_prompt(pair):
    """`generate` of pixels alone begins with the first token of the language model's config."""
    oracle, bundle = pair
    theirs = oracle.generate(pixel_values=PIXELS, max_new_tokens=6, do_sample=False, eos_token_id=63).numpy()
    first = oracle.config.text_config.bos_token_id
    tokens = np.full((3, QUERIES + 1), IMAGE_TOKEN)
    tokens[:, -1] = first
    run = Generator(bundle.model, Sampling(max_new_tokens=6, stop_tokens=(63,)))
    ours = run(bundle.params, IMAGES, tokens, np.ones_like(tokens, bool))
    np.testing.assert_array_equal(ours, theirs[:, -6:])
    # Queries before the text are the same as in the places of a token
    c = dataclasses.replace(bundle.config, image_token=None)
    before = Generator(blip2.Blip2(c), run.sampling)(bundle.params, IMAGES, tokens[:, QUERIES:], np.ones((3, 1), bool))
    np.testing.assert_array_equal(before, ours)


@pytest.fixture(scope="module", params=[IMAGE_TOKEN, None], ids=["image token", "none"])
def retrieval(request, tmp_path_factory):
    c = config(image_text_hidden_size=20, image_token_index=request.param)
    c.qformer_config.use_qformer_text_input = True
    oracle = randomized(transformers.Blip2ForImageTextRetrieval(c))
    path = tmp_path_factory.mktemp("retrieval")
    oracle.save_pretrained(path)
    return oracle, hub.load(path)


def compare_retrieval(oracle, bundle):
    """Padded on the right, as BERT's tokenizers do."""
    mask = np.arange(6) < np.array([[6], [4], [2]])
    extra = QUERIES if oracle.config.image_token_index is not None else 0
    tokens = np.pad(TEXT, ((0, 0), (extra, 0)), constant_values=IMAGE_TOKEN)
    inputs = {"pixel_values": PIXELS, "input_ids": torch.tensor(tokens)}
    inputs |= {"attention_mask": torch.tensor(np.pad(mask, ((0, 0), (extra, 0)), constant_values=True) * 1)}
    matched, compared = (oracle(**inputs, use_image_text_matching_head=head) for head in (True, False))
    ours = jax.jit(lambda params: apply(bundle.model, params, IMAGES, TEXT, mask))(bundle.params)
    close(ours["match"], matched.logits_per_image)
    close(ours["cosines"], compared.logits_per_image)
    close(ours["image_embeds"], compared.image_embeds)
    close(ours["text_embeds"], compared.text_embeds)


def test_retrieval_scores_equal_and_are_written_back(retrieval, tmp_path):
    oracle, bundle = retrieval
    compare_retrieval(oracle, bundle)
    hub.save(bundle, tmp_path / "copy")
    again = transformers.Blip2ForImageTextRetrieval.from_pretrained(tmp_path / "copy").eval()
    for one, other in zip(again.state_dict().values(), oracle.state_dict().values(), strict=True):
        assert torch.equal(one, other)
    assert hub.load(tmp_path / "copy").config == bundle.config


def lavis_names(state, heads):
    """The tensors of Blip2ForImageTextRetrieval under LAVIS's names, as the spec's table pairs them."""
    named = {}
    for name, tensor in state.items():
        if name.endswith("self_attn.qkv.bias"):
            block = name.replace("vision_model.encoder.layers", "visual_encoder.blocks")
            query, _, value = tensor.chunk(3)
            named[block.replace("self_attn.qkv.bias", "attn.q_bias")] = query
            named[block.replace("self_attn.qkv.bias", "attn.v_bias")] = value
            continue
        for theirs, ours in (
            ("vision_model.embeddings.class_embedding", "visual_encoder.cls_token"),
            ("vision_model.embeddings.position_embedding", "visual_encoder.pos_embed"),
            ("vision_model.embeddings.patch_embedding", "visual_encoder.patch_embed.proj"),
            ("vision_model.encoder.layers", "visual_encoder.blocks"),
            ("vision_model.post_layernorm", "ln_vision"),
            ("layer_norm", "norm"),
            ("self_attn.qkv", "attn.qkv"),
            ("self_attn.projection", "attn.proj"),
            ("qformer.layernorm", "Qformer.bert.embeddings.LayerNorm"),
            ("qformer.encoder", "Qformer.bert.encoder"),
            ("attention.attention", "attention.self"),
            ("vision_projection", "vision_proj"),
            ("text_projection", "text_proj"),
        ):
            name = name.replace(theirs, ours)
        named[name.replace("embeddings.", "Qformer.bert.embeddings.", 1) if name[:3] == "emb" else name] = tensor
    return named | {"temp": torch.tensor(0.05), "Qformer.bert.embeddings.position_ids": torch.arange(20)[None]} | heads


def test_files_of_lavis(tmp_path):
    """Stage 1's names, the learned temperature, the head of captions; keys without biases; written back alike."""
    settings = {"layer_norm_eps": 1e-5}
    c = config(image_text_hidden_size=20, image_token_index=None)
    c.qformer_config.use_qformer_text_input, c.vision_config.layer_norm_eps = True, 1e-5
    oracle = randomized(transformers.Blip2ForImageTextRetrieval(c))
    head = randomized(transformers.BertForMaskedLM(transformers.BertConfig(hidden_size=24, vocab_size=61))).cls
    heads = {f"Qformer.cls.{name}": tensor for name, tensor in head.state_dict().items()}
    heads["Qformer.cls.predictions.decoder.weight"] = oracle.embeddings.word_embeddings.weight
    tensors = lavis_names(oracle.state_dict(), heads)
    torch.save({"model": tensors, "epoch": 3, "config": {"run": {"lr": 1e-4}}}, tmp_path / "in.pth")
    with pytest.raises(ValueError, match=r"image encoder of width 32, LAVIS's have \[1024, 1408\]"):
        hub.load(tmp_path / "in.pth")
    read = formats.from_transformers(oracle.config.to_dict(), hub_file(oracle), "")
    given = {"vision": read.vision, "qformer": dataclasses.replace(read.qformer, lm_head=True)}
    bundle = hub.load(tmp_path / "in.pth", **given)
    assert bundle.config.temperature and bundle.config.vision_eps == settings["layer_norm_eps"]
    assert bundle.params["temperature"] == jnp.float32(0.05)
    compare_retrieval(oracle, bundle)
    hub.save(bundle, tmp_path / "out.pth")
    written = torch.load(tmp_path / "out.pth", weights_only=True)["model"]
    assert written.keys() == tensors.keys()
    assert all(torch.equal(written[name], tensor) for name, tensor in tensors.items())
    # What transformers has no word for is named: the temperature, and another eps behind the encoder than in it
    with pytest.raises(ValueError, match="no tensor for parameter"):
        hub.save(bundle, tmp_path / "hf", "transformers")


def hub_file(oracle):
    return dict.fromkeys(oracle.state_dict())


def test_the_second_stage_of_lavis(tmp_path):
    """Queries, Q-Former without text, projection: the encoder and the language model lie elsewhere."""
    oracle = randomized(transformers.Blip2ForConditionalGeneration(config(OPT)))
    tensors = {name: x for name, x in oracle.state_dict().items() if not name.startswith("language_model.")}
    tensors = {name.replace("language_projection", "opt_proj"): tensor for name, tensor in tensors.items()}
    tensors = {name: x for name, x in lavis_names(tensors, {}).items() if not name.startswith("visual")}
    del tensors["temp"], tensors["Qformer.bert.embeddings.position_ids"]
    torch.save({"model": tensors}, tmp_path / "in.pth")
    reader = formats.from_transformers(oracle.config.to_dict(), hub_file(oracle), "").qformer
    bundle = hub.load(tmp_path / "in.pth", qformer=reader)
    assert bundle.config.vision is None and bundle.config.language_width == 32
    features = oracle.vision_model.encoder(oracle.vision_model.embeddings(PIXELS)).last_hidden_state
    normed = torch.nn.functional.layer_norm(
        features, (32,), oracle.vision_model.post_layernorm.weight, oracle.vision_model.post_layernorm.bias, 1e-5
    )
    read = oracle.qformer(query_embeds=oracle.query_tokens.expand(3, -1, -1), encoder_hidden_states=normed)
    close(
        apply(bundle.model, bundle.params, features.numpy(), method="prompt"),
        oracle.language_projection(read.last_hidden_state),
    )
    hub.save(bundle, tmp_path / "out.pth")
    written = torch.load(tmp_path / "out.pth", weights_only=True)["model"]
    assert written.keys() == tensors.keys() and all(torch.equal(written[k], x) for k, x in tensors.items())


OPT_SIZES = {"opt2.7b": (2560, 32, 32, 10240), "opt6.7b": (4096, 32, 32, 16384)}
T5_SIZES = {"flant5xl": (2048, 5120, 32), "flant5xxl": (4096, 10240, 64)}
COUNTS = {"opt2.7b": 3_744_761_856, "opt6.7b": 7_752_869_376, "flant5xl": 3_942_446_592, "flant5xxl": 12_229_596_672}


@pytest.mark.parametrize("name", [*COUNTS, "itm"])
def test_published_checkpoints_have_the_published_keys_and_counts(name):
    """Of every directory on the hub; those for COCO have images of 364 pixels, and so more positions."""
    if name == "itm":
        text, count, cls = None, 1_172_032_258, transformers.Blip2ForImageTextRetrieval
        shape = blip2.PUBLISHED["itm-g"].build(False).config
    else:
        cls, count, shape = transformers.Blip2ForConditionalGeneration, COUNTS[name], blip2.config(language=name)
        if name in OPT_SIZES:
            text = {"model_type": "opt", "vocab_size": 50304}
            keys = ("hidden_size", "num_hidden_layers", "num_attention_heads", "ffn_dim")
            text |= dict(zip(keys, OPT_SIZES[name], strict=True))
        else:
            text = {"model_type": "t5", "feed_forward_proj": "gated-gelu", "dense_act_fn": "gelu", "num_layers": 24}
            text |= dict(zip(("d_model", "d_ff", "num_heads"), T5_SIZES[name], strict=True)) | {"vocab_size": 32128}
    c = transformers.Blip2Config(text_config=text, image_token_index=shape.image_token)
    c.qformer_config.vocab_size = 30523
    c.qformer_config.use_qformer_text_input = name == "itm"
    with torch.device("meta"):
        oracle = cls(c)
    shapes = family.abstract(shape)
    ours = {k: tensor.shape for k, tensor in save_tensors(shapes, formats.transformers_table(shape)).items()}
    copies = {"language_model.encoder.embed_tokens.weight", "language_model.decoder.embed_tokens.weight"}
    copies |= {"language_model.lm_head.weight"} if name in OPT_SIZES else set()
    theirs = {k: tuple(tensor.shape) for k, tensor in oracle.state_dict().items() if k not in copies}
    assert ours == theirs
    assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes)) == count
    # The published config.json, pruned to what is not a default of the classes
    document = {"vision_config": {"model_type": "blip_2_vision_model"}, "qformer_config": {"vocab_size": 30523}}
    document |= {"text_config": text and text | {"tie_word_embeddings": False} if name in T5_SIZES else text}
    document["qformer_config"] |= {"qformer_text_input": True} if name == "itm" else {}
    document |= {"model_type": "blip-2", "image_token_index": shape.image_token}
    assert formats.from_transformers(document, dict.fromkeys(ours), "") == shape


@pytest.mark.parametrize(
    ("vision", "language", "trainable"),
    [
        ("eva_clip_g", "", 186_702_654),
        ("clip_L", "", 183_163_710),
        ("eva_clip_g", "opt2.7b", 107_133_696 - 2816),
        ("eva_clip_g", "opt6.7b", 108_314_880 - 2816),
        ("eva_clip_g", "flant5xl", 106_739_968 - 2816),
        ("eva_clip_g", "flant5xxl", 108_314_880 - 2816),
        ("clip_L", "flant5xl", 103_200_256 - 2048),
    ],
)
def test_published_files_of_lavis_have_the_published_keys_and_counts(vision, language, trainable):
    """What LAVIS saves of a pretrained model: neither the frozen encoder nor the language model (spec, 2.4 and 3.1)."""
    c = blip2.config(vision, language)
    width, norm = c.vision.width, 2 * c.vision.width
    c = dataclasses.replace(c, vision=None, opt=None, t5=None, image_token=None)
    shapes = family.abstract(c)
    assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes)) == trainable + norm
    projection = "" if not language else "opt_proj" if "opt" in language else "t5_proj"
    ours = {k: x.shape for k, x in save_tensors(shapes, formats.lavis_table(c, projection)).items()}
    layer, hidden = "Qformer.bert.encoder.layer", (768, 768)
    expected = {"query_tokens": (1, 32, 768), "ln_vision.weight": (width,), "ln_vision.bias": (width,)}
    expected |= {f"Qformer.bert.embeddings.LayerNorm.{x}": (768,) for x in ("weight", "bias")}

    def linear(name, rows, columns):
        return {f"{name}.weight": (rows, columns), f"{name}.bias": (rows,)}

    for i in range(12):
        for kind, source in (("attention", 768), *([("crossattention", width)] if i % 2 == 0 else [])):
            part = f"{layer}.{i}.{kind}"
            for name, columns in (("query", 768), ("key", source), ("value", source)):
                expected |= linear(f"{part}.self.{name}", 768, columns)
            expected |= linear(f"{part}.output.dense", *hidden)
            expected |= {f"{part}.output.LayerNorm.{x}": (768,) for x in ("weight", "bias")}
        for kind in ("_query", *([] if language else [""])):
            expected |= linear(f"{layer}.{i}.intermediate{kind}.dense", 3072, 768)
            expected |= linear(f"{layer}.{i}.output{kind}.dense", 768, 3072)
            expected |= {f"{layer}.{i}.output{kind}.LayerNorm.{x}": (768,) for x in ("weight", "bias")}
    if language:
        expected |= linear(projection, blip2.config(vision, language).language_width, 768)
    else:
        expected |= {"Qformer.bert.embeddings.word_embeddings.weight": (30523, 768), "temp": ()}
        expected |= {"Qformer.bert.embeddings.position_embeddings.weight": (512, 768)}
        expected |= linear("vision_proj", 256, 768) | linear("text_proj", 256, 768) | linear("itm_head", 2, 768)
        expected |= linear("Qformer.cls.predictions.transform.dense", *hidden)
        expected |= {f"Qformer.cls.predictions.transform.LayerNorm.{x}": (768,) for x in ("weight", "bias")}
        expected |= {"Qformer.cls.predictions.bias": (30523,)}
    assert ours == expected


def test_a_language_model_of_another_config_is_refused(tmp_path):
    randomized(transformers.Blip2ForConditionalGeneration(config(OPT))).save_pretrained(tmp_path)
    document = json.loads((tmp_path / "config.json").read_text())
    for text, words in (
        (T5, "holds the tensors of opt, .* is of t5"),
        (OPT | {"hidden_size": 48}, "does not fit the model"),
        ({"model_type": "llama"}, "'model_type' is 'llama', expected one of"),
        (OPT | {"layer_norm_elementwise_affine": False}, "layer_norm_elementwise_affine"),
    ):
        (tmp_path / "config.json").write_text(json.dumps(document | {"text_config": text}))
        with pytest.raises(ValueError, match=words):
            hub.load(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(document))
    (tmp_path / "processor_config.json").write_text(json.dumps({"num_query_tokens": 32}))
    with pytest.raises(ValueError, match="'num_query_tokens' is 32, expected 4"):
        hub.load(tmp_path)


@pytest.mark.parametrize("vision", ["clip_L", "eva02_clip_E"])
def test_other_image_encoders_are_those_without_their_last_block(vision):
    """And their tokens pass no norm of their own: beside CLIPVisionModel's last hidden states but one, and timm's."""
    small = {"width": 32, "depth": 2, "num_heads": 2, "mlp_dim": 48, "patch_size": 10, "image_size": 30}
    trunk = dataclasses.replace(blip2.VISIONS[vision], **small)
    c = blip2.Blip2Config(qformer=blip2.qformer(trunk, text=False, depth=1), vision=trunk)
    assert not trunk.final_norm and trunk.pool == "none" and blip2.VISIONS[vision].depth in (23, 63)
    shapes = jax.eval_shape(lambda: blip2.init_params(blip2.Blip2(c), jax.random.key(0)))
    assert "norm" not in shapes["vision"] and ("pre_norm" in shapes["vision"]) == (vision == "clip_L")
    assert trunk.activation == ("quick_gelu" if vision == "clip_L" else "gelu")
