"""Qwen3-VL beside transformers, dense and with experts: small random models that it wrote, in every kind of prompt."""

import dataclasses
import functools
import itertools
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from omnax import hub
from omnax.data.conversations.qwen_vl import Buckets, Visual, Windows, collate, make_processor, pack
from omnax.hub.families.qwen_vl import family as qwen_hub
from omnax.hub.families.qwen_vl import qwen3 as formats
from omnax.hub.mapping import save_tensors
from omnax.models.generation import Sampling
from omnax.models.qwen_vl.decoding import Generator, vision_input
from omnax.models.qwen_vl.model import forward
from omnax.models.qwen_vl.qwen3 import SIZES, config
from oracles import torch, transformers
from PIL import Image
from references.chat import tiny_tokenizer, tokenizer_json
from safetensors.numpy import load_file, save_file

TOLERANCE = 1e-5
TOKENIZER = tiny_tokenizer()
IDS = {name: TOKENIZER.token_to_id(f"<|{name}|>") for name in ("image_pad", "video_pad", "vision_start", "vision_end")}
TEXT = {
    "vocab_size": 270,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 24,  # four heads of it are wider than the model
    "rope_parameters": {
        "rope_type": "default",
        "mrope_section": [6, 3, 3],
        "mrope_interleaved": True,
        "rope_theta": 5e6,
    },
}
EXPERTS = {"moe_intermediate_size": 48, "num_experts": 8, "num_experts_per_tok": 2}
VISION = {
    "depth": 4,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_heads": 4,
    "patch_size": 16,
    "out_hidden_size": 64,
    "num_position_embeddings": 66,  # a square of 64 and two that are not used
    "deepstack_visual_indexes": [0, 2, 1],
}
KINDS = ("dense", "experts")


def random_oracle(kind, tied=False):
    torch.manual_seed(0)
    name = "Qwen3VLMoe" if kind == "experts" else "Qwen3VL"
    text = TEXT | (EXPERTS if kind == "experts" else {})
    tokens = {f"{name}_token_id": IDS[f"{name}_pad"] for name in ("image", "video")}
    tokens |= {f"vision_{end}_token_id": IDS[f"vision_{end}"] for end in ("start", "end")}
    settings = getattr(transformers, f"{name}Config")(
        text_config=text, vision_config=VISION, tie_word_embeddings=tied, **tokens
    )
    model = getattr(transformers, f"{name}ForConditionalGeneration")(settings).eval()
    if kind == "experts":
        model.set_experts_implementation("eager")
    for name, parameter in model.named_parameters():
        scale = 0.3 * parameter.shape[-1] ** -0.5 / 0.02 if "mlp" in name else 3.0
        noise = torch.randn_like(parameter)
        if "gate.weight" in name:  # which the library leaves at zero
            parameter.copy_(0.3 * noise)
        else:
            parameter.copy_(parameter * scale if parameter.ndim > 1 else parameter + 0.1 * noise)
        assert torch.isfinite(parameter).all(), name
    return model


@pytest.fixture(scope="module")
def oracles_(tmp_path_factory):
    """{kind: (model of transformers, the directory that it wrote, what hub reads in it)}"""
    found = {}
    for kind in KINDS:
        path = tmp_path_factory.mktemp(kind)
        oracle = random_oracle(kind, tied=False)
        oracle.save_pretrained(path)
        (path / "tokenizer.json").write_text(json.dumps(tokenizer_json()))
        size = {"shortest_edge": 32 * 32, "longest_edge": 200 * 200}
        (path / "preprocessor_config.json").write_text(json.dumps({"size": size}))
        clip = {"shortest_edge": 32 * 32, "longest_edge": 8 * 120 * 120}
        (path / "video_preprocessor_config.json").write_text(json.dumps({"size": clip}))
        found[kind] = oracle, path, hub.load(path)
    return found


def picture(rows, columns, seed):
    pixels = np.random.default_rng(seed).integers(0, 256, (rows, columns, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def ask(kinds, text="what?"):
    return [{"role": "user", "content": [*({"type": kind} for kind in kinds), {"type": "text", "text": text}]}]


def clip(frames, size, fps=2.0):
    return Visual([picture(*size, i) for i in range(frames)], fps=fps)


PROMPTS = {
    "text": ([], []),
    "three images": (["image"] * 3, [Visual([picture(*size, 1)]) for size in ((64, 96), (32, 32), (130, 61))]),
    "two videos": (["video", "video"], [clip(5, (64, 96), fps=0.7), clip(2, (40, 40))]),
    "image and video": (["image", "video"], [Visual([picture(60, 60, 2)]), clip(3, (64, 64), fps=4.0)]),
}
BUCKETS = Buckets(tokens=(320,), patches=(256,))  # one shape for all, so that each model compiles once


def rows_of(bundle, names, **options):
    processor = make_processor(bundle.processor, bundle.config, **options)
    return [pack([processor(ask(PROMPTS[name][0], name), PROMPTS[name][1])]) for name in names]


def batch_of(bundle, rows):
    return collate(rows, Windows.of(bundle.config.vision), BUCKETS, with_visuals=True)


@functools.partial(jax.jit, static_argnums=0)
def outputs_of(model, params, batch):
    return forward(
        model,
        params,
        batch["tokens"],
        batch["positions"],
        vision=vision_input(batch),
        visual_index=batch["visual_index"],
        segment_ids=batch["segment_ids"],
    )


def kinds_of(example):
    """transformers' mm_token_type_ids: 0 text, 1 image, 2 video."""
    return (example.tokens == IDS["image_pad"]) + 2 * (example.tokens == IDS["video_pad"])


def oracle_inputs(items, *examples):
    """Rows in the arguments of transformers, padded on the left; `items` say for each row what its visuals are."""
    length = max(len(example.tokens) for example in examples)

    def padded(arrays):
        return torch.tensor(np.stack([np.pad(a, (length - len(a), 0)) for a in arrays]).astype(np.int64))

    inputs = {
        "input_ids": padded([example.tokens for example in examples]),
        "mm_token_type_ids": padded([kinds_of(example) for example in examples]),
        "attention_mask": padded([np.ones_like(example.tokens) for example in examples]),
    }
    media = []
    for kinds, example in zip(items, examples, strict=True):
        bounds = np.cumsum([0, *(math.prod(grid) for grid in example.grids)])
        parts = [example.patches[i:j] for i, j in itertools.pairwise(bounds)]
        media += zip(kinds, parts, example.grids, strict=True)
    for value, pixels, grids in (
        ("image", "pixel_values", "image_grid_thw"),
        ("video", "pixel_values_videos", "video_grid_thw"),
    ):
        if chosen := [(patches, grid) for kind, patches, grid in media if kind == value]:
            inputs[pixels] = torch.tensor(np.concatenate([patches for patches, _ in chosen]))
            inputs[grids] = torch.tensor([grid for _, grid in chosen])
    return inputs


@pytest.mark.parametrize("name", PROMPTS)
@pytest.mark.parametrize("kind", KINDS)
def test_logits_positions_and_load_equal(oracles_, kind, name):
    oracle, _, bundle = oracles_[kind]
    ((example, _),) = rows = rows_of(bundle, [name])
    out = outputs_of(bundle.model, bundle.params, batch_of(bundle, rows))
    inputs = oracle_inputs([PROMPTS[name][0]], example)
    options = {"output_router_logits": True} if kind == "experts" else {}
    expected = oracle(**inputs, **options)
    length = len(example.tokens)
    np.testing.assert_allclose(out.logits[0, :length], expected.logits[0].numpy(), atol=TOLERANCE)
    grids = {key: inputs.get(key) for key in ("image_grid_thw", "video_grid_thw")}
    positions, delta = oracle.model.get_rope_index(inputs["input_ids"], inputs["mm_token_type_ids"], **grids)
    np.testing.assert_array_equal(example.positions, positions[:, 0].T)
    assert example.rope_delta == int(delta)
    if kind == "experts":
        for layer, logits in enumerate(expected.router_logits):
            probability = logits.softmax(-1)
            np.testing.assert_allclose(out.load.probability[layer, 0], probability.sum(0), rtol=1e-4)
            counts = np.bincount(probability.topk(2).indices.flatten(), minlength=8)
            np.testing.assert_array_equal(out.load.chosen[layer, 0], counts)
        assert out.load.tokens[:, 0].tolist() == [length] * 4


def test_vision_features_and_deepstack_equal(oracles_):
    """Every DeepStack output too, in the order of the blocks; scanned blocks are the same function."""
    oracle, path, bundle = oracles_["dense"]
    ((example, _),) = rows = rows_of(bundle, ["three images"])
    vision = vision_input(batch_of(bundle, rows))
    expected = oracle.model.visual(torch.tensor(example.patches), grid_thw=torch.tensor(example.grids))
    for loaded in (bundle, hub.load(path, scan=True)):
        found = loaded.model.apply({"params": loaded.params}, vision, method="encode")
        wanted = [expected.pooler_output, *expected.deepstack_features]
        for got, features in zip([found.merged, *found.deep], wanted, strict=True):
            np.testing.assert_allclose(got[0, : len(features)], features.numpy(), atol=TOLERANCE)


@pytest.mark.parametrize("kind", KINDS)
def test_scanned_padded_and_packed_equal_rows_alone(oracles_, kind):
    _, path, bundle = oracles_[kind]
    names = ["text", "two videos", "image and video"]
    rows = rows_of(bundle, names)
    scanned = hub.load(path, scan=True)
    together = outputs_of(scanned.model, scanned.params, batch_of(bundle, rows)).logits
    packed = outputs_of(bundle.model, bundle.params, batch_of(bundle, [pack([example for example, _ in rows])])).logits
    end = 0
    for i, row in enumerate(rows):
        length = len(row[0].tokens)
        alone = outputs_of(bundle.model, bundle.params, batch_of(bundle, [row])).logits[0, :length]
        np.testing.assert_allclose(together[i, :length], alone, atol=TOLERANCE, err_msg=names[i])
        np.testing.assert_allclose(packed[0, end : end + length], alone, atol=TOLERANCE, err_msg=names[i])
        end += length


@pytest.mark.parametrize("kind", KINDS)
def test_generation_equals_token_for_token(oracles_, kind):
    """With cache, streamed; several prompts as one batch, which both libraries pad (on other sides)."""
    oracle, _, bundle = oracles_[kind]
    names = list(PROMPTS)
    rows = rows_of(bundle, names)
    seen = []
    generator = Generator(bundle.model, Sampling(max_new_tokens=8, repetition_penalty=1.2))
    answers = generator(bundle.params, batch_of(bundle, rows), jax.random.key(0), on_tokens=seen.append)
    np.testing.assert_array_equal(np.concatenate(seen, 1), answers)
    inputs = oracle_inputs([PROMPTS[name][0] for name in names], *(example for example, _ in rows))
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "repetition_penalty": 1.2}
    expected = oracle.generate(**inputs, **options)[:, inputs["input_ids"].shape[1] :].numpy()
    np.testing.assert_array_equal(answers, expected)
    assert len(np.unique(answers)) > 4


@pytest.mark.parametrize("format", formats.FORMATS)
@pytest.mark.parametrize("kind", KINDS)
def test_exports_read_back(oracles_, tmp_path, kind, format):
    """In all layouts of the experts, by hub to the bit, by transformers in those that it reads."""
    oracle, _, bundle = oracles_[kind]
    hub.save(bundle, tmp_path / "saved", format)
    again = hub.load(tmp_path / "saved")
    jax.tree.map(np.testing.assert_array_equal, again.params, bundle.params)
    if kind == "experts":
        assert (again.format, bundle.format) == (format, formats.FIVE)
        names = load_file(tmp_path / "saved" / "model.safetensors").keys()
        assert any("experts.7.down_proj.weight" in name for name in names) == (format == formats.SPLIT)
    if format != formats.SPLIT:
        read = type(oracle).from_pretrained(tmp_path / "saved")
        for name, tensor in oracle.state_dict().items():
            assert torch.equal(read.state_dict()[name], tensor), name


def test_config_is_written_as_the_releases_have_it(oracles_, tmp_path):
    """Without what was read, for a model that was made here; transformers reads the same model in it."""
    for kind in KINDS:
        oracle, _, bundle = oracles_[kind]
        hub.save(dataclasses.replace(bundle, metadata=None), tmp_path / kind)
        assert hub.load(tmp_path / kind).config == bundle.config
        read = type(oracle).from_pretrained(tmp_path / kind)
        tokens = torch.arange(12)[None] * 7 % 256
        torch.testing.assert_close(read(input_ids=tokens).logits, oracle(input_ids=tokens).logits, atol=1e-6, rtol=0)


# Prefixes of vision, text and head in files of other eras and fine-tunes (spec 3.1)
ERAS = [("visual.", "model.", "lm_head."), ("model.visual.", "language_model.model.", "language_model.lm_head.")]


@pytest.mark.parametrize("prefixes", ERAS)
def test_names_of_other_eras_load(oracles_, tmp_path, prefixes):
    _, path, bundle = oracles_["dense"]
    published = load_file(path / "model.safetensors")
    old = ("model.visual.", "model.language_model.", "lm_head.")

    def renamed(name):
        prefix = next(prefix for prefix in old if name.startswith(prefix))
        return prefixes[old.index(prefix)] + name.removeprefix(prefix)

    (tmp_path / "config.json").write_text((path / "config.json").read_text())
    save_file({renamed(name): tensor for name, tensor in published.items()}, tmp_path / "model.safetensors")
    jax.tree.map(np.testing.assert_array_equal, hub.load(tmp_path).params, bundle.params)


def test_the_root_says_whether_embeddings_are_tied(tmp_path):
    """Not the text section, as transformers has it."""
    oracle = random_oracle("dense", tied=True)
    oracle.save_pretrained(tmp_path)
    document = json.loads((tmp_path / "config.json").read_text())
    document["text_config"]["tie_word_embeddings"] = False
    (tmp_path / "config.json").write_text(json.dumps(document))
    bundle = hub.load(tmp_path)
    assert bundle.config.text.tie_embeddings and "lm_head" not in bundle.params["language"]
    tokens = np.arange(12)[None] * 7 % 256
    positions = np.broadcast_to(np.arange(12)[None, :, None], (1, 12, 3))
    got = forward(bundle.model, bundle.params, tokens, positions).logits
    np.testing.assert_allclose(got, oracle(input_ids=torch.tensor(tokens)).logits.numpy(), atol=TOLERANCE)


# Unique parameters, visual ones, language ones without a head: spec 2.2, counted on the meta device
COUNTS = {
    "2B": (2127532032, 406957056, 1720574976),
    "4B": (4437815808, 415347712, 4022468096),
    "8B": (8767123696, 576388336, 7568405504),
    "32B": (33357390064, 595266800, 31984210944),
    "30B-A3B": (31070754032, 538631408, 30220957696),
    "235B-A22B": (235670022896, 576388336, 234471304704),
}


@pytest.mark.parametrize("size", SIZES)
def test_published_sizes_have_the_published_keys_and_counts(size):
    ours = config(size)
    params = qwen_hub.abstract(ours)
    count = lambda tree: sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))  # noqa: E731
    language = {name: part for name, part in params["language"].items() if name != "lm_head"}
    assert (count(params), count(params["visual"]), count(language)) == COUNTS[size]
    name = "Qwen3VLMoe" if ours.text.num_experts else "Qwen3VL"
    with torch.device("meta"):
        published = formats.config_to_json(ours)
        settings = getattr(transformers, f"{name}Config")(**published)
        model = getattr(transformers, f"{name}ForConditionalGeneration")(settings)
    names = {
        name: tuple(tensor.shape)
        for name, tensor in model.state_dict().items()
        if not (ours.text.tie_embeddings and name == "lm_head.weight")
    }
    tensors = save_tensors(params, qwen_hub.table(ours, formats.FIVE))
    assert {name: tensor.shape for name, tensor in tensors.items()} == names


@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_is_as_near_as_transformers(oracles_, kind):
    """What counts is the distance of each from the float32 logits: the two libraries round at different places."""
    oracle, path, bundle = oracles_[kind]
    half = hub.load(path, dtype=jnp.bfloat16)
    ((example, _),) = rows = rows_of(bundle, ["image and video"])
    inputs = oracle_inputs([PROMPTS["image and video"][0]], example)
    exact = oracle(**inputs).logits[0].numpy()
    theirs = type(oracle).from_pretrained(path, dtype=torch.bfloat16)(**inputs).logits[0].float().numpy()
    ours = outputs_of(half.model, half.params, batch_of(bundle, rows)).logits[0, : len(exact)]
    error, allowed = (np.abs(np.asarray(x, np.float32) - exact) for x in (ours, theirs))
    # A maximum has its own spread, and now and then a token goes to another expert
    assert error.max() < 2 * allowed.max() and error.mean() < 1.2 * allowed.mean()
