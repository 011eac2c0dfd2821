"""Qwen2.5-VL beside transformers: small random models that it wrote, in every kind of prompt."""

import copy
import dataclasses
import functools
import itertools
import json
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from omnax import hub
from omnax.data.conversations.qwen_vl import Buckets, Visual, Windows, collate, make_processor, pack
from omnax.hub.families.qwen_vl import family as qwen_hub
from omnax.models.generation import Sampling
from omnax.models.qwen_vl.decoding import Generator, vision_input
from omnax.models.qwen_vl.model import NOTES_VISION, SIZES, config, forward
from omnax.models.qwen_vl.vision import VisionConfig, VisionEncoder
from oracles import torch, transformers
from PIL import Image
from references.chat import tiny_tokenizer, tokenizer_json
from safetensors.numpy import load_file, save_file

TOLERANCE = 1e-5
TOKENIZER = tiny_tokenizer()
IDS = {name: TOKENIZER.token_to_id(f"<|{name}|>") for name in ("image_pad", "video_pad", "vision_start", "vision_end")}
PIXELS = {"min_pixels": 28 * 28, "max_pixels": 200 * 200}


def random_oracle(tied):
    torch.manual_seed(0)
    text = {
        "vocab_size": 270,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 1e6},
    }
    vision = {
        "depth": 4,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_heads": 4,
        "patch_size": 14,
        "window_size": 112,
        "out_hidden_size": 64,
        "fullatt_block_indexes": [1, 3],
        "tokens_per_second": 2,
    }
    model = transformers.Qwen2_5_VLForConditionalGeneration(
        transformers.Qwen2_5_VLConfig(
            text_config=text,
            vision_config=vision,
            tie_word_embeddings=tied,
            image_token_id=IDS["image_pad"],
            video_token_id=IDS["video_pad"],
            vision_start_token_id=IDS["vision_start"],
            vision_end_token_id=IDS["vision_end"],
        )
    ).eval()
    for name, parameter in model.named_parameters():
        parameter.copy_(parameter * 3 if parameter.ndim > 1 else parameter + 0.1 * torch.randn_like(parameter))
        assert torch.isfinite(parameter).all(), name
    return model


@pytest.fixture(scope="module")
def oracle():
    return random_oracle(tied=True)


@pytest.fixture(scope="module")
def directory(oracle, tmp_path_factory):
    path = tmp_path_factory.mktemp("qwen")
    oracle.save_pretrained(path)
    (path / "tokenizer.json").write_text(json.dumps(tokenizer_json()))
    (path / "preprocessor_config.json").write_text(json.dumps(PIXELS))
    (path / "video_preprocessor_config.json").write_text(json.dumps(PIXELS))
    return path


@pytest.fixture(scope="module")
def bundle(directory):
    return hub.load(directory)


@pytest.fixture(scope="module")
def untied(tmp_path_factory):
    """A model with a head of its own, as transformers writes it, and the directory."""
    path = tmp_path_factory.mktemp("untied")
    oracle = random_oracle(tied=False)
    oracle.save_pretrained(path)
    return oracle, path


def picture(rows, columns, seed):
    pixels = np.random.default_rng(seed).integers(0, 256, (rows, columns, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def ask(kinds, text="what?"):
    return [{"role": "user", "content": [*({"type": kind} for kind in kinds), {"type": "text", "text": text}]}]


PROMPTS = {
    "text": ([], []),
    "image": (["image"], [Visual([picture(140, 196, 0)])]),
    "three images": (["image"] * 3, [Visual([picture(*size, 1)]) for size in ((56, 84), (28, 28), (130, 61))]),
    "video": (["video"], [Visual([picture(84, 112, i) for i in range(8)], fps=0.25)]),
    "image and video": (
        ["image", "video"],
        [Visual([picture(60, 60, 2)]), Visual([picture(56, 56, i) for i in range(3)], fps=4.0)],
    ),
}


def rows_of(bundle, names):
    processor = make_processor(bundle.processor, bundle.config)
    rows = []
    for name in names:
        kinds, visuals = PROMPTS[name]
        rows.append(pack([processor(ask(kinds, name), visuals)]))
    return rows


# One shape for all prompts, so that each model compiles once
BUCKETS = Buckets(tokens=(352,), patches=(512,), windows=32)


def batch_of(bundle, rows):
    return collate(rows, Windows.of(bundle.config.vision), BUCKETS, with_visuals=True)


@functools.partial(jax.jit, static_argnums=0)
def logits_of(model, params, batch):
    return forward(
        model,
        params,
        batch["tokens"],
        batch["positions"],
        vision=vision_input(batch),
        visual_index=batch["visual_index"],
        segment_ids=batch["segment_ids"],
    ).logits


def kinds_of(example):
    """transformers' mm_token_type_ids: 0 text, 1 image, 2 video."""
    return (example.tokens == IDS["image_pad"]) + 2 * (example.tokens == IDS["video_pad"])


def media_of(example):
    """(kind, patches, grid) of each image and video."""
    kinds = kinds_of(example)
    starts = kinds[(kinds > 0) & (np.r_[0, kinds[:-1]] != kinds)]
    bounds = np.cumsum([0, *(math.prod(grid) for grid in example.grids)])
    parts = [example.patches[i:j] for i, j in itertools.pairwise(bounds)]
    return zip(starts, parts, example.grids, strict=True)


def oracle_inputs(*examples):
    """Rows in the arguments of transformers, padded on the left.

    Positions are given, since 5.23 misplaces text after a video.
    """
    length = max(len(example.tokens) for example in examples)

    def padded(arrays):
        rows = [np.pad(a, [(length - len(a), 0), *[(0, 0)] * (a.ndim - 1)]) for a in arrays]
        return torch.tensor(np.stack(rows).astype(np.int64))

    inputs = {
        "input_ids": padded([example.tokens for example in examples]),
        "mm_token_type_ids": padded([kinds_of(example) for example in examples]),
        "attention_mask": padded([np.ones_like(example.tokens) for example in examples]),
        "position_ids": padded([example.positions for example in examples]).permute(2, 0, 1),
    }
    media = [item for example in examples for item in media_of(example)]
    for value, pixels, grids in ((1, "pixel_values", "image_grid_thw"), (2, "pixel_values_videos", "video_grid_thw")):
        if chosen := [(patches, grid) for kind, patches, grid in media if kind == value]:
            inputs[pixels] = torch.tensor(np.concatenate([patches for patches, _ in chosen]))
            inputs[grids] = torch.tensor([grid for _, grid in chosen])
    return inputs


@pytest.mark.parametrize("name", PROMPTS)
def test_logits_equal(oracle, bundle, name):
    ((example, _),) = rows = rows_of(bundle, [name])
    batch = batch_of(bundle, rows)
    logits = logits_of(bundle.model, bundle.params, batch)
    expected = oracle(**oracle_inputs(example)).logits[0].numpy()
    np.testing.assert_allclose(logits[0, : len(example.tokens)], expected, atol=TOLERANCE)


def test_vision_features_equal(oracle, bundle):
    ((example, _),) = rows = rows_of(bundle, ["three images"])
    batch = batch_of(bundle, rows)
    features = bundle.model.apply({"params": bundle.params}, vision_input(batch), method="encode")
    expected = oracle.model.visual(torch.tensor(example.patches), grid_thw=torch.tensor(example.grids)).pooler_output
    np.testing.assert_allclose(features.merged[0, : len(expected)], expected.numpy(), atol=TOLERANCE)


def test_padded_batch_and_packed_row_equal_the_rows_alone(bundle):
    """Rows of different length beside each other, and one after the other in a single row."""
    names = ["text", "image", "three images", "image and video"]
    rows = rows_of(bundle, names)

    logits = functools.partial(logits_of, bundle.model, bundle.params)
    together = logits(batch_of(bundle, rows))
    packed = logits(batch_of(bundle, [pack([example for example, _ in rows])]))
    end = 0
    for i, row in enumerate(rows):
        length = len(row[0].tokens)
        alone = logits(batch_of(bundle, [row]))[0, :length]
        np.testing.assert_allclose(together[i, :length], alone, atol=TOLERANCE, err_msg=names[i])
        np.testing.assert_allclose(packed[0, end : end + length], alone, atol=TOLERANCE, err_msg=names[i])
        end += length


@pytest.mark.parametrize(
    ("names", "penalty"), [(("text", "image", "three images"), 1.0), (("video",), 1.2), (("image and video",), 1.2)]
)
def test_generation_equals_token_for_token(bundle, untied, names, penalty):
    """With cache, streamed; several prompts as one batch, which both libraries pad (on other sides).

    With a head of its own: a small random model with tied embeddings says one word again and again.
    """
    oracle, path = untied
    model = hub.load(path)
    rows = rows_of(bundle, names)
    seen = []
    generator = Generator(model.model, Sampling(max_new_tokens=8, repetition_penalty=penalty))
    answers = generator(model.params, batch_of(bundle, rows), jax.random.key(0), on_tokens=seen.append)
    np.testing.assert_array_equal(np.concatenate(seen, 1), answers)
    inputs = oracle_inputs(*(example for example, _ in rows))
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "repetition_penalty": penalty}
    expected = oracle.generate(**inputs, **options)[:, inputs["input_ids"].shape[1] :].numpy()
    np.testing.assert_array_equal(answers, expected)
    assert penalty == 1 or all(len(set(answer)) > 3 for answer in answers.tolist())


def test_video_generation_with_cache_equals_without(bundle, untied):
    ((example, _),) = rows = rows_of(bundle, ["video"])
    batch = batch_of(bundle, rows)
    model = hub.load(untied[1])
    answer = Generator(model.model, Sampling(max_new_tokens=5))(model.params, batch, jax.random.key(0))[0]
    for i, token in enumerate(answer):
        longer = dataclasses.replace(
            example,
            tokens=np.r_[example.tokens, answer[:i]],
            labels=np.r_[example.labels, answer[:i]],
            visual_index=np.r_[example.visual_index, np.full(i, -1, np.int32)],
            positions=np.r_[
                example.positions, np.repeat(len(example.tokens) + example.rope_delta + np.arange(i)[:, None], 3, 1)
            ],
        )
        batch = batch_of(bundle, [pack([longer])])
        logits = logits_of(model.model, model.params, batch)
        assert logits[0, len(longer.tokens) - 1].argmax() == token


def test_export_reads_back(oracle, bundle, tmp_path):
    """In transformers; the processor's files are copied as they are, the chat template byte for byte."""
    template = b"{{ messages[0].content }}\n"
    files = bundle.processor | {"chat_template.jinja": template}
    hub.save(dataclasses.replace(bundle, processor=files), tmp_path / "saved")
    again = transformers.Qwen2_5_VLForConditionalGeneration.from_pretrained(tmp_path / "saved")
    for name, tensor in oracle.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
    assert (tmp_path / "saved" / "chat_template.jinja").read_bytes() == template
    assert hub.load(tmp_path / "saved").processor == files


# Prefixes of vision, text and head in files of other eras and fine-tunes (spec 3.1)
ERAS = [
    ("model.visual.", "model.language_model.", "lm_head."),
    ("model.visual.", "model.language_model.model.", "lm_head."),
    ("visual.", "language_model.model.", "language_model.lm_head."),
]


@pytest.mark.parametrize("prefixes", ERAS, ids=["memory", "wrapped", "language_model"])
def test_every_era_of_names_loads(untied, tmp_path, prefixes):
    new = dict(zip(("visual.", "model.", "lm_head."), prefixes, strict=True))
    published = load_file(untied[1] / "model.safetensors")
    renamed = {re.sub(r"^\w+\.", lambda old: new[old[0]], name): tensor for name, tensor in published.items()}
    (tmp_path / "config.json").write_text((untied[1] / "config.json").read_text())
    save_file(renamed, tmp_path / "model.safetensors")
    assert len(renamed) == len(published) and renamed.keys() != published.keys()
    jax.tree.map(np.testing.assert_array_equal, hub.load(tmp_path).params, hub.load(untied[1]).params)


def test_untied_head_loads_and_exports(untied, tmp_path):
    oracle, path = untied
    bundle = hub.load(path)
    tokens = np.arange(12)[None] * 7 % 256
    positions = np.broadcast_to(np.arange(12)[None, :, None], (1, 12, 3))
    got = forward(bundle.model, bundle.params, tokens, positions).logits
    np.testing.assert_allclose(got, oracle(input_ids=torch.tensor(tokens)).logits.numpy(), atol=TOLERANCE)
    hub.save(bundle, tmp_path / "saved")
    published, saved = (load_file(folder / "model.safetensors") for folder in (path, tmp_path / "saved"))
    assert published.keys() == saved.keys() and "lm_head.weight" in saved
    assert all(published[name].tobytes() == saved[name].tobytes() for name in saved)


def test_scanned_equals_unrolled(bundle, directory):
    scanned = hub.load(directory, scan=True)
    rows = rows_of(bundle, ["image and video"])
    batch = batch_of(bundle, rows)
    one, other = (logits_of(b.model, b.params, batch) for b in (bundle, scanned))
    np.testing.assert_allclose(one, other, atol=TOLERANCE)
    answer = Generator(scanned.model, Sampling(max_new_tokens=2))(scanned.params, batch, jax.random.key(0))
    last = len(rows[0][0].tokens) - 1
    assert answer[0, 0] == one[0, last].argmax()


# Unique parameters, visual ones, and language ones without a head: spec 2.1, counted on the meta device
COUNTS = {
    "3B": (3754622976, 668684288, 3085938688),
    "7B": (8292166656, 676550144, 7070619136),
    "32B": (33452718336, 688841984, 31985308672),
    "72B": (73410777344, 704573696, 71460495360),
}


@pytest.mark.parametrize("size", SIZES)
def test_published_sizes_have_the_published_keys_and_counts(size):
    from omnax.hub.families.qwen_vl.formats import config_to_json, table
    from omnax.hub.mapping import save_tensors

    ours = config(size)
    params = qwen_hub.abstract(ours)
    count = lambda tree: sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))  # noqa: E731
    language = {name: part for name, part in params["language"].items() if name != "lm_head"}
    assert (count(params), count(params["visual"]), count(language)) == COUNTS[size]
    with torch.device("meta"):
        published = config_to_json(ours)
        model = transformers.Qwen2_5_VLForConditionalGeneration(transformers.Qwen2_5_VLConfig(**published))
    names = {
        name.replace("model.visual.", "visual.").replace("model.language_model.", "model."): tuple(tensor.shape)
        for name, tensor in model.state_dict().items()
        if not (ours.text.tie_embeddings and name == "lm_head.weight")
    }
    assert {name: tensor.shape for name, tensor in save_tensors(params, table(ours)).items()} == names


@pytest.mark.parametrize("name", ["image", "video"])
def test_bfloat16_is_as_near_as_transformers(oracle, directory, name):
    """The two libraries round at different places: what counts is the distance of each from its float32 logits.

    Twice that of transformers, since a maximum over some ten thousand logits has its own spread.
    """
    bundle = hub.load(directory, dtype=jnp.bfloat16)
    ((example, _),) = rows = rows_of(bundle, [name])
    inputs = oracle_inputs(example)
    exact = oracle(**inputs).logits[0].numpy()
    theirs = copy.deepcopy(oracle).to(torch.bfloat16)(**inputs).logits[0].float().numpy()
    ours = logits_of(bundle.model, bundle.params, batch_of(bundle, rows))[0, : len(exact)]
    error, allowed = (np.abs(np.asarray(x, np.float32) - exact) for x in (ours, theirs))
    assert error.max() < 2 * allowed.max() < 0.1 * np.abs(exact).max() and error.mean() < 1.2 * allowed.mean()


def test_notes_encoder_reduces_to_the_published_one(oracle, bundle):
    """Windows of 8 in the grid of patches, not shifted, no global query, patches of 14, the full blocks (spec 1.1).

    Also with its second, displaced partition in every other windowed block, displaced by nothing.
    """
    ((example, _),) = rows = rows_of(bundle, ["three images"])
    regular = vision_input(batch_of(bundle, rows))
    expected = oracle.model.visual(torch.tensor(example.patches), grid_thw=torch.tensor(example.grids)).pooler_output
    shape = {
        name: getattr(bundle.config.vision, name) for name in ("depth", "width", "num_heads", "mlp_dim", "out_width")
    }
    for shifted in (False, True):
        own = {"patch_size": 14, "window": 8, "shifted": shifted, "full_blocks": (1, 3), "global_query_every": 0}
        encoder = VisionEncoder(VisionConfig(**NOTES_VISION | own | shape))
        vision = dataclasses.replace(regular, shifted_windows=regular.windows if shifted else None)
        features = encoder.apply({"params": bundle.params["visual"]}, vision)[0, : len(expected)]
        np.testing.assert_allclose(features, expected.numpy(), atol=TOLERANCE)
