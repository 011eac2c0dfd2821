"""Every key of transformers' config classes: equal outputs with a value that is not its default, or a refusal by name.

One small model a class has all used keys off their defaults at once, and all harmless ones beside them: were one of
them ignored, or one of the harmless ones of consequence, the outputs would differ. Refusals need no model.
"""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from omnax import hub
from omnax.hub.exactness import page
from omnax.hub.families import bert, opt
from omnax.hub.families.blip2 import formats as blip2
from omnax.hub.families.clip import configs as clip
from omnax.hub.families.dinov2 import TRANSFORMERS as DINOV2
from omnax.hub.families.dinov2 import TRANSFORMERS_REGISTERS as DINOV2_REGISTERS
from omnax.hub.families.qwen_vl import formats as qwen
from omnax.hub.families.qwen_vl import qwen3
from omnax.hub.families.vit.configs import TRANSFORMERS as VIT
from omnax.hub.files.source import open_source
from omnax.hub.keys import HARMLESS, REFUSED, USED, equal
from omnax.kernels.rope import packed_grid_positions
from omnax.kernels.window_attention import ragged_windows
from omnax.models.qwen_vl.language import rotary_of
from omnax.models.qwen_vl.model import forward
from omnax.models.qwen_vl.vision import VisionInput
from oracles import torch, transformers

TOLERANCE = 1e-5
CLASSES = {
    "ViTConfig": VIT,
    "CLIPConfig": clip.CLIP,
    "CLIPTextConfig": clip.CLIP_TEXT,
    "CLIPVisionConfig": clip.CLIP_IMAGE,
    "SiglipConfig": clip.SIGLIP,
    "SiglipTextConfig": clip.SIGLIP_TEXT,
    "SiglipVisionConfig": clip.SIGLIP_IMAGE,
    "Dinov2Config": DINOV2,
    "Dinov2WithRegistersConfig": DINOV2_REGISTERS,
    "BertConfig": bert.BERT_KEYS,
    "OPTConfig": opt.KEYS,
    "Blip2Config": blip2.ROOT,
    "Blip2VisionConfig": blip2.VISION,
    "Blip2QFormerConfig": bert.QFORMER_KEYS,
    "Qwen2_5_VLConfig": qwen.NESTED,
    "Qwen2_5_VLTextConfig": qwen.TEXT,
    "Qwen2_5_VLVisionConfig": qwen.VISION,
    "Qwen3VLConfig": qwen3.ROOT,
    "Qwen3VLTextConfig": qwen3.TEXT,
    "Qwen3VLVisionConfig": qwen3.VISION,
    "Qwen3VLMoeConfig": qwen3.ROOT_EXPERTS,
    "Qwen3VLMoeTextConfig": qwen3.TEXT_EXPERTS,
    "Qwen3VLMoeVisionConfig": qwen3.VISION,
}
SECTIONS = {"text_config", "vision_config", "qformer_config", "rope_parameters", "rope_scaling"}
# Of no consequence for a bare model: which model it is (tests/parity), and the classes of classifiers, which follow.
KINDS = {"model_type", "architectures", "id2label", "num_labels"}
TOKENS = np.array([[98, 3, 4, 97, 99, 5, 1], [98, 5, 6, 7, 8, 97, 99]])


def config_class(name):
    own = ("qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe")
    modules = [transformers, *(getattr(getattr(transformers.models, x), f"configuration_{x}") for x in own)]
    return next(getattr(module, name) for module in modules if hasattr(module, name))


def fields(name):
    """The keys that a class of transformers has, as its files spell them."""
    return {field.name for field in dataclasses.fields(config_class(name))} - {"_out_features", "_out_indices"}


@pytest.mark.parametrize("name", CLASSES)
def test_every_key_of_the_class_has_a_fate(name):
    assert fields(name) <= CLASSES[name].keys.keys()


@pytest.mark.parametrize("name", CLASSES)
def test_absent_keys_are_what_the_library_takes_them_to_be(name):
    theirs = config_class(name)()
    for key, entry in CLASSES[name].keys.items():
        if key in fields(name) - SECTIONS - KINDS and entry.fate != HARMLESS:
            default = getattr(theirs, key)
            if entry.default is None:  # worked out of the other keys
                continue
            if name == "Qwen2_5_VLTextConfig" and key == "sliding_window":  # None once windows are off
                continue
            assert equal(entry.default, default), (key, entry.default, default)


REFUSALS = {
    "tie_last_hidden_states": True,
    "per_layer_config": {"0": {"hidden_size": 4}},
    "pooler_act": "relu",
    "quantization_config": {"quant_method": "bitsandbytes"},
    "pruned_heads": {"0": [1]},
}


@pytest.mark.parametrize("name", CLASSES)
def test_refused_and_unknown_keys_are_named(name):
    section = CLASSES[name]
    refused = [key for key, entry in section.keys.items() if entry.fate == REFUSED and key in REFUSALS]
    assert set(refused) >= {"tie_last_hidden_states", "per_layer_config"}
    for key in [*refused, "hiden_size"]:
        with pytest.raises(ValueError, match=f"'{key}' is "):
            section.read({key: REFUSALS.get(key, 8)})
    for key, entry in section.keys.items():
        if entry.fate == USED and entry.kind != "any":
            with pytest.raises(ValueError, match=f"'{key}' is .*expected"):
                section.read({key: float("nan")})


HARMLESS_VALUES = {
    "attention_dropout": 0.5,
    "attention_probs_dropout_prob": 0.5,
    "hidden_dropout_prob": 0.5,
    "drop_path_rate": 0.5,
    "initializer_range": 0.3,
    "initializer_factor": 0.7,
    "problem_type": "multi_label_classification",
    "output_hidden_states": True,
    "chunk_size_feed_forward": 2,
    "is_encoder_decoder": False,
    "bos_token_id": 7,
    "pad_token_id": 3,
    "encoder_stride": 4,
    "apply_layernorm": False,
    "reshape_hidden_states": False,
    "use_cache": False,
}


def harmless_of(name):
    """Values that are not the defaults, of the harmless keys of a class."""
    keys = CLASSES[name].keys
    return {key: HARMLESS_VALUES[key] for key in fields(name) & HARMLESS_VALUES.keys() if keys[key].fate == HARMLESS}


def randomized(model):
    generator = torch.Generator().manual_seed(0)
    for parameter in model.eval().parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * (0.2 if parameter.ndim > 1 else 0.4)
    return model


def published(model, path, checked, *, elsewhere=()):
    """The bundle of a model that transformers wrote, all of whose used keys are off their defaults.

    `checked`: name of a config class -> its place in config.json, where it is not the whole.
    """
    randomized(model).save_pretrained(path)
    document = json.loads((path / "config.json").read_text())
    for name, place in checked.items():
        part = document[place] if place else document
        for key, entry in CLASSES[name].keys.items():
            if entry.fate == USED and key in fields(name) - SECTIONS - KINDS - set(elsewhere):
                assert key in part and not equal(part[key], entry.default), f"{name}.{key} is at its default"
    return hub.load(path)


def ours(bundle, *inputs, **options):
    return jax.jit(lambda params, *x: bundle.model.apply({"params": params}, *x, **options))(bundle.params, *inputs)


def pixels(*shape):
    array = np.random.default_rng(0).normal(size=(2, *shape)).astype(np.float32)
    return array, torch.from_numpy(array).permute(0, 3, 1, 2)


def close(got, expected):
    expected = np.asarray(expected)
    np.testing.assert_allclose(got, expected, atol=TOLERANCE * max(1, np.abs(expected).max()), rtol=0)


def same_again(bundle, path, model, call):
    """What `hub.save` writes is the same function to the library."""
    hub.save(bundle, path)
    again = type(model).from_pretrained(path).eval()
    for one, other in zip(call(again), call(model), strict=True):
        torch.testing.assert_close(one, other, atol=TOLERANCE, rtol=0)


SHAPE = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3}
LAYERS = {**SHAPE, "intermediate_size": 40, "layer_norm_eps": 1e-2}


def test_vit(tmp_path):
    own = {"hidden_act": "relu", "image_size": [10, 15], "patch_size": 5, "num_channels": 4, "qkv_bias": False}
    config = transformers.ViTConfig(**LAYERS, **own, pooler_output_size=10, **harmless_of("ViTConfig"))
    model = transformers.ViTModel(config)
    bundle = published(model, tmp_path / "in", {"ViTConfig": ""})
    array, tensor = pixels(10, 15, 4)
    expected, got = model(tensor), ours(bundle, array)
    close(got["tokens"], expected.last_hidden_state)
    close(got["pre_logits"], expected.pooler_output)
    same_again(bundle, tmp_path / "out", model, lambda m: [m(tensor).pooler_output])


@pytest.mark.parametrize("classes", [{}, {"num_labels": 3}, {"id2label": {0: "a", 1: "b", 2: "b", 3: "c"}}], ids=str)
@pytest.mark.parametrize("name", ["ViTForImageClassification", "Dinov2ForImageClassification"])
def test_classes_are_counted_as_the_library_counts_them(tmp_path, name, classes):
    """Of `id2label`, of `num_labels`, or two; a head of another size is refused by its tensor."""
    own = {"image_size": 20, "patch_size": 10} | ({"intermediate_size": 40} if name[0] == "V" else {})
    config = getattr(transformers, name.replace("ForImageClassification", "Config"))(**SHAPE, **own, **classes)
    model = randomized(getattr(transformers, name)(config))
    model.save_pretrained(tmp_path / "in")
    bundle = hub.load(tmp_path / "in")
    assert bundle.config.num_classes == config.num_labels == len(bundle.labels or "ab")
    hub.save(bundle, tmp_path / "out")
    again = type(model).from_pretrained(tmp_path / "out")
    assert again.config.id2label == config.id2label  # equal names stay two
    torch.testing.assert_close(again.classifier.weight, model.classifier.weight, atol=0, rtol=0)
    document = json.loads((tmp_path / "in" / "config.json").read_text())
    document.pop("label2id", None)
    (tmp_path / "in" / "config.json").write_text(json.dumps(document | {"id2label": {str(i): "x" for i in range(7)}}))
    with pytest.raises(ValueError, match=r"classifier\.weight"):
        hub.load(tmp_path / "in")


def test_clip(tmp_path):
    text = {**LAYERS, "vocab_size": 100, "max_position_embeddings": 9, "hidden_act": "tanh", "eos_token_id": 97}
    text |= {"projection_dim": 20} | harmless_of("CLIPTextConfig")
    image = {**LAYERS, "hidden_size": 36, "image_size": 31, "patch_size": 10, "num_channels": 4, "hidden_act": "gelu"}
    image |= {"projection_dim": 22} | harmless_of("CLIPVisionConfig")
    own = {"projection_dim": 16, "logit_scale_init_value": 1.5, **harmless_of("CLIPConfig")}
    model = transformers.CLIPModel(transformers.CLIPConfig(text_config=text, vision_config=image, **own))
    places = {"CLIPConfig": "", "CLIPTextConfig": "text_config", "CLIPVisionConfig": "vision_config"}
    bundle = published(model, tmp_path / "in", places)
    array, tensor = pixels(31, 31, 4)
    tokens = torch.from_numpy(TOKENS)
    expected, got = model(tokens, tensor), ours(bundle, array, TOKENS)
    close(got["logits"], expected.logits_per_image)
    close(got["text_embeds"], expected.text_embeds)
    same_again(bundle, tmp_path / "out", model, lambda m: [m(tokens, tensor).logits_per_image])
    # What old files were written with wins, with the defaults for what it leaves out.
    document = json.loads((tmp_path / "in" / "config.json").read_text())
    old = {key: value for key, value in document["text_config"].items() if key not in ("layer_norm_eps", "hidden_act")}
    read = clip.from_transformers(document | {"text_config_dict": old})
    theirs = transformers.CLIPConfig(**document | {"text_config_dict": old}).text_config
    assert (read.text.eps, read.text.activation) == (theirs.layer_norm_eps, theirs.hidden_act) == (1e-5, "quick_gelu")


def test_siglip(tmp_path):
    text = {**LAYERS, "vocab_size": 100, "max_position_embeddings": 9, "hidden_act": "tanh", "projection_size": 36}
    image = {**LAYERS, "hidden_size": 36, "image_size": 31, "patch_size": 10, "num_channels": 4, "hidden_act": "gelu"}
    text, image = text | harmless_of("SiglipTextConfig"), image | harmless_of("SiglipVisionConfig")
    own = harmless_of("SiglipConfig")
    model = transformers.SiglipModel(transformers.SiglipConfig(text_config=text, vision_config=image, **own))
    places = {"SiglipConfig": "", "SiglipTextConfig": "text_config", "SiglipVisionConfig": "vision_config"}
    bundle = published(model, tmp_path / "in", places, elsewhere=["vision_use_head"])
    array, tensor = pixels(31, 31, 4)
    tokens = torch.from_numpy(TOKENS)
    expected, got = model(tokens, tensor), ours(bundle, array, TOKENS)
    close(got["logits"], expected.logits_per_image)
    same_again(bundle, tmp_path / "out", model, lambda m: [m(tokens, tensor).logits_per_image])
    headless = transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**image, vision_use_head=False))
    bundle = published(headless, tmp_path / "tower", {"SiglipVisionConfig": ""})
    close(ours(bundle, array)["tokens"], headless(tensor).last_hidden_state)
    same_again(bundle, tmp_path / "again", headless, lambda m: [m(tensor).last_hidden_state])
    document = json.loads((tmp_path / "in" / "config.json").read_text())
    document["vision_config"]["vision_use_head"] = False
    with pytest.raises(ValueError, match="'vision_use_head' is False, expected True"):
        clip.from_transformers(document)


@pytest.mark.parametrize("registers", [0, 3])
def test_dinov2(tmp_path, registers):
    own = {**SHAPE, "layer_norm_eps": 1e-2, "mlp_ratio": 3, "hidden_act": "relu", "image_size": 20, "patch_size": 5}
    own |= {"num_channels": 4, "qkv_bias": False, "layerscale_value": 0.3}
    if registers:  # a gated MLP has an activation of its own
        config = transformers.Dinov2WithRegistersConfig(
            **own, num_register_tokens=registers, use_swiglu_ffn=True, **harmless_of("Dinov2WithRegistersConfig")
        )
        model, name, elsewhere = transformers.Dinov2WithRegistersModel(config), "Dinov2WithRegistersConfig", ()
    else:
        config = transformers.Dinov2Config(**own, use_mask_token=False, **harmless_of("Dinov2Config"))
        model, name, elsewhere = transformers.Dinov2Model(config), "Dinov2Config", ("use_swiglu_ffn",)
    bundle = published(model, tmp_path / "in", {name: ""}, elsewhere=elsewhere)
    array, tensor = pixels(20, 20, 4)
    close(ours(bundle, array)["tokens"], model(tensor).last_hidden_state)
    same_again(bundle, tmp_path / "out", model, lambda m: [m(tensor).last_hidden_state])


YARN = {"rope_type": "yarn", "rope_theta": 5000.0, "mrope_section": [1, 1, 2], "factor": 3.0}
YARN |= {"original_max_position_embeddings": 24, "beta_fast": 5.0, "beta_slow": 0.5, "truncate": False}
ROPES = {
    "yarn": YARN | {"attention_factor": 1.3},
    "yarn with mscale": YARN | {"mscale": 2.0, "mscale_all_dim": 0.7},
    "yarn by default": {"rope_type": "yarn", "factor": 4.0, "mrope_section": [1, 1, 2]},
    "linear": {"rope_type": "linear", "factor": 2.5, "mrope_section": [2, 1, 1]},
}
QWEN_TEXT = {
    "vocab_size": 100,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "hidden_act": "gelu",
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-2,
    "use_sliding_window": True,  # from a layer on that does not exist
    "sliding_window": 3,
    "max_window_layers": 2,
    "layer_types": ["full_attention"] * 2,
}
QWEN_VISION = {
    "depth": 2,
    "hidden_size": 24,
    "hidden_act": "relu",
    "intermediate_size": 40,
    "num_heads": 3,
    "in_channels": 2,
    "patch_size": 4,
    "spatial_merge_size": 3,
    "temporal_patch_size": 1,
    "tokens_per_second": 5,
    "window_size": 31,  # two merged patches a side, and some pixels
    "out_hidden_size": 32,
    "fullatt_block_indexes": [1],
}


def qwen_model(rope, **vision):
    text = QWEN_TEXT | {"rope_parameters": rope} | harmless_of("Qwen2_5_VLTextConfig")
    own = {"image_token_id": 90, "video_token_id": 91, "tie_word_embeddings": True}
    vision = QWEN_VISION | harmless_of("Qwen2_5_VLVisionConfig") | vision
    config = transformers.Qwen2_5_VLConfig(text_config=text, vision_config=vision, **own)
    return transformers.Qwen2_5_VLForConditionalGeneration(config)


def qwen_logits(bundle):
    positions = jnp.broadcast_to(jnp.arange(40)[None, :, None], (1, 40, 3))
    tokens = jnp.arange(40)[None] * 7 % 89
    logits = jax.jit(lambda params: forward(bundle.model, params, tokens, positions).logits)(bundle.params)
    return logits, torch.arange(40)[None] * 7 % 89


def test_qwen_vl(tmp_path):
    model = qwen_model(ROPES["yarn"])
    places = {"Qwen2_5_VLConfig": "", "Qwen2_5_VLTextConfig": "text_config", "Qwen2_5_VLVisionConfig": "vision_config"}
    bundle = published(model, tmp_path / "in", places)
    logits, tokens = qwen_logits(bundle)
    close(logits, model(input_ids=tokens).logits)
    grids = [(1, 12, 15), (1, 6, 9)]
    patches = np.random.default_rng(1).normal(size=(12 * 15 + 6 * 9, 2 * 16)).astype(np.float32)
    positions, frames = packed_grid_positions(grids, merge=3)
    side = (bundle.config.vision.window,) * 2
    vision = VisionInput(patches[None], positions[None, :, 1:], frames[None], ragged_windows(grids, side, merge=3))
    got = jax.jit(lambda params: bundle.model.apply({"params": params}, vision, method="encode"))(bundle.params)
    close(got.merged[0], model.model.visual(torch.from_numpy(patches), grid_thw=torch.tensor(grids)).pooler_output)
    assert bundle.config.tokens_per_second == 5 and side == (6, 6)
    same_again(bundle, tmp_path / "out", model, lambda m: [m(input_ids=tokens).logits])


@pytest.mark.parametrize("name", [name for name in ROPES if name != "yarn"])
def test_rotary_scaling_of_qwen_vl(tmp_path, name):
    """In the form of transformers 5, and flat as the first releases have it; both are written back."""
    model = randomized(qwen_model(ROPES[name]))
    model.save_pretrained(tmp_path)
    bundle = hub.load(tmp_path)
    logits, tokens = qwen_logits(bundle)
    close(logits, model(input_ids=tokens).logits)
    document = json.loads((tmp_path / "config.json").read_text())
    text = document.pop("text_config")
    rope = text.pop("rope_parameters")
    theta, kind = rope.pop("rope_theta"), rope.pop("rope_type")
    flat = {**text, **document, "rope_theta": theta, "rope_scaling": rope | {"type": kind}}
    assert qwen.config_from_json(flat) == bundle.config == qwen.config_from_json(qwen.config_to_json(bundle.config))


QWEN3_TEXT = {
    "vocab_size": 100,
    "hidden_size": 40,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "head_dim": 8,
    "hidden_act": "gelu",
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-2,
    "attention_bias": True,
}
QWEN3_EXPERTS = {"moe_intermediate_size": 12, "num_experts_per_tok": 3, "num_experts": 5}
QWEN3_VISION = {
    "depth": 3,
    "hidden_size": 24,
    "hidden_act": "relu",
    "intermediate_size": 40,
    "num_heads": 3,
    "in_channels": 2,
    "patch_size": 4,
    "spatial_merge_size": 3,
    "temporal_patch_size": 1,
    "out_hidden_size": 40,
    "num_position_embeddings": 26,
    "deepstack_visual_indexes": [2, 0],
}
QWEN3_YARN = YARN | {"mrope_section": [2, 1, 1], "mrope_interleaved": True}
QWEN3_ROPES = {
    "yarn": QWEN3_YARN | {"attention_factor": 1.3},
    "yarn by default": {"rope_type": "yarn", "factor": 4.0, "mrope_section": [2, 1, 1]},
    "linear": {"rope_type": "linear", "factor": 2.5, "mrope_section": [2, 1, 1]},
}


def qwen3_model(name, rope):
    experts = QWEN3_EXPERTS if "Moe" in name else {}
    text = QWEN3_TEXT | experts | {"rope_parameters": rope} | harmless_of(f"{name}TextConfig")
    vision = QWEN3_VISION | harmless_of(f"{name}VisionConfig")
    own = {"image_token_id": 90, "video_token_id": 91, "tie_word_embeddings": True}
    config = config_class(f"{name}Config")(text_config=text, vision_config=vision, **own)
    return getattr(transformers, f"{name}ForConditionalGeneration")(config)


@pytest.mark.parametrize("name", ["Qwen3VL", "Qwen3VLMoe"])
def test_qwen3_vl(tmp_path, name):
    model = qwen3_model(name, QWEN3_ROPES["yarn"])
    places = {f"{name}Config": "", f"{name}TextConfig": "text_config", f"{name}VisionConfig": "vision_config"}
    # In files of transformers 5 it is called num_local_experts
    bundle = published(model, tmp_path / "in", places, elsewhere=["num_experts"])
    assert bundle.config.text.num_experts == (5 if "Moe" in name else 0)
    logits, tokens = qwen_logits(bundle)
    close(logits, model(input_ids=tokens).logits)
    grids = [(1, 12, 15), (2, 6, 9)]
    patches = np.random.default_rng(1).normal(size=(12 * 15 + 2 * 6 * 9, 2 * 16)).astype(np.float32)
    positions, frames = packed_grid_positions(grids, merge=3)
    sizes = np.repeat([grid[1:] for grid in grids], [np.prod(grid) for grid in grids], axis=0).astype(np.int32)
    vision = VisionInput(patches[None], positions[None, :, 1:], frames[None], grid_sizes=sizes[None])
    got = jax.jit(lambda params: bundle.model.apply({"params": params}, vision, method="encode"))(bundle.params)
    expected = model.model.visual(torch.from_numpy(patches), grid_thw=torch.tensor(grids))
    for ours, theirs in zip(
        [got.merged, *got.deep], [expected.pooler_output, *expected.deepstack_features], strict=True
    ):
        close(ours[0], theirs)
    same_again(bundle, tmp_path / "out", model, lambda m: [m(input_ids=tokens).logits])


@pytest.mark.parametrize("name", [name for name in QWEN3_ROPES if name != "yarn"])
def test_rotary_scaling_of_qwen3_vl(tmp_path, name):
    """In the form of transformers 5, and as the releases have it; both are written back."""
    model = randomized(qwen3_model("Qwen3VL", QWEN3_ROPES[name]))
    model.save_pretrained(tmp_path)
    bundle = hub.load(tmp_path)
    logits, tokens = qwen_logits(bundle)
    close(logits, model(input_ids=tokens).logits)
    document = json.loads((tmp_path / "config.json").read_text())
    rope = document["text_config"].pop("rope_parameters")
    document["text_config"] |= {"rope_theta": rope.pop("rope_theta"), "rope_scaling": rope}
    assert qwen3.config_from_json(document) == bundle.config
    assert qwen3.config_from_json(qwen3.config_to_json(bundle.config)) == bundle.config


@pytest.mark.parametrize(
    "text,words",
    [
        ({"decoder_sparse_step": 2}, "'decoder_sparse_step' is 2, expected 1"),
        ({"mlp_only_layers": [0]}, r"'mlp_only_layers' is \[0\], expected"),
        ({"norm_topk_prob": False}, "'norm_topk_prob' is False, expected True"),
        ({"num_local_experts": 6}, "'num_experts' is 5, 'num_local_experts' 6"),
        ({"num_experts_per_tok": 6}, "experts_per_token 6 .* num_experts 5"),
        ({"rope_parameters": {"mrope_interleaved": False}}, "'mrope_interleaved' is False, expected True"),
        ({"rope_parameters": {"mrope_section": [1, 2, 1]}}, r"\(1, 2, 1\) cannot be interleaved"),
        ({"sliding_window": 8}, "'sliding_window' is 8, expected None"),
        ({"shared_expert_intermediate_size": 8}, "'shared_expert_intermediate_size' is unknown"),
    ],
)
def test_what_qwen3_vl_cannot_do_is_refused_by_name(text, words):
    small = QWEN3_TEXT | QWEN3_EXPERTS | {"rope_parameters": {"mrope_section": [2, 1, 1]}}
    document = {"model_type": "qwen3_vl_moe", "text_config": small | text}
    with pytest.raises(ValueError, match=words):
        config = qwen3.config_from_json(document | {"vision_config": QWEN3_VISION})
        rotary_of(config.text, jnp.zeros((1, 1, 3), jnp.int32))
    for key, value in (("patch_size", [4, 4]), ("deepstack_visual_indexes", [0, 3]), ("rope_theta", 5000.0)):
        with pytest.raises(ValueError, match=key.replace("visual_indexes", "blocks")):
            qwen3.config_from_json(document | {"text_config": small, "vision_config": QWEN3_VISION | {key: value}})


def test_a_config_as_transformers_4_49_writes_it():
    """Of the vision tower only what differs from the defaults; text at the root; what is absent is a default."""
    vision = {"hidden_size": 1280, "model_type": "qwen2_5_vl", "out_hidden_size": 2048, "tokens_per_second": 2}
    document = {
        "architectures": ["Qwen2_5_VLForConditionalGeneration"],
        "model_type": "qwen2_5_vl",
        "hidden_size": 2048,
        "intermediate_size": 11008,
        "max_window_layers": 70,
        "num_attention_heads": 16,
        "num_hidden_layers": 36,
        "num_key_value_heads": 2,
        "rope_scaling": {"mrope_section": [16, 24, 24], "rope_type": "default", "type": "default"},
        "sliding_window": None,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.49.0",
        "use_cache": True,
        "vision_config": {**vision, "in_chans": 3, "spatial_patch_size": 14},
        "vocab_size": 151936,
    }
    config = qwen.config_from_json(document)
    theirs = transformers.Qwen2_5_VLConfig(**document)
    assert (config.text.eps, config.text.rope_theta) == (theirs.text_config.rms_norm_eps, 1e6) == (1e-5, 1e6)
    tower = theirs.vision_config
    assert (config.vision.depth, config.vision.num_heads) == (tower.depth, tower.num_heads) == (32, 16)
    assert config.vision.mlp_dim == tower.intermediate_size and config.tokens_per_second == 2
    del document["vision_config"]["tokens_per_second"]
    assert qwen.config_from_json(document).tokens_per_second == 4


@pytest.mark.parametrize(
    "text,words",
    [
        ({"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}, "'use_sliding_window' is True"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "'layer_types' is"),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "'rope_type' is 'dynamic', expected one of"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "'factor' is None"),
        ({"rope_parameters": {"rope_type": "default", "slope": 2}}, "text_config, rope_parameters: 'slope' is unknown"),
        ({"head_dim": 16}, "'head_dim' is 16, expected 32 / 4 channels"),
        ({"hidden_act": "linear"}, "'hidden_act' is 'linear'"),
        ({"attention_bias": False}, "'attention_bias' is unknown"),
    ],
)
def test_what_qwen_vl_cannot_do_is_refused_by_name(text, words):
    small = {key: value for key, value in QWEN_TEXT.items() if key not in ("layer_types", "use_sliding_window")}
    document = {"model_type": "qwen2_5_vl", "text_config": small | text, "vision_config": QWEN_VISION}
    with pytest.raises(ValueError, match=words):
        qwen.config_from_json(document)
    for key, value in (("window_size", 11), ("in_chans", 3), ("rope_theta", 5000.0), ("spatial_patch_size", 14)):
        with pytest.raises(ValueError, match=f"'{key}' is {value}, expected"):
            qwen.config_from_json(document | {"text_config": small, "vision_config": QWEN_VISION | {key: value}})


def test_half_precision_files_compute_as_if_read_in_float32(tmp_path):
    """Parameters stay as the file has them; sums of embeddings and positions are not rounded to it."""
    text = {**LAYERS, "vocab_size": 100, "max_position_embeddings": 9, "eos_token_id": 97}
    image = {**LAYERS, "image_size": 30, "patch_size": 10}
    clip_model = transformers.CLIPModel(transformers.CLIPConfig(text_config=text, vision_config=image))
    dino = transformers.Dinov2WithRegistersModel(
        transformers.Dinov2WithRegistersConfig(**SHAPE, image_size=20, patch_size=5, num_register_tokens=2)
    )
    for number, model in enumerate((clip_model, dino)):
        path = tmp_path / str(number)
        randomized(model).to(torch.bfloat16).save_pretrained(path)
        document = json.loads((path / "config.json").read_text())
        del document["dtype"]
        (path / "config.json").write_text(json.dumps(document))
        bundle = hub.load(path)
        assert {str(leaf.dtype) for leaf in jax.tree.leaves(bundle.params)} == {"bfloat16"}
        model = model.float()
        if model is dino or number:
            array, tensor = pixels(20, 25, 3)
            close(ours(bundle, array)["tokens"], model(tensor).last_hidden_state)
        else:
            array, tensor = pixels(30, 30, 3)
            expected, got = model(torch.from_numpy(TOKENS), tensor), ours(bundle, array, TOKENS)
            close(got["text_embeds"], expected.text_embeds)
            close(got["logits"], expected.logits_per_image)


def test_the_page_of_keys_is_up_to_date():
    print(page())
    assert (Path(__file__).parents[2] / "docs" / "exactness.md").read_text() == page()


def test_a_config_written_by_another_era_reads_alike(tmp_path):
    """What transformers 4 wrote into every section of CLIP's files, null and false, changes nothing."""
    old = {"add_cross_attention": False, "bad_words_ids": None, "chunk_size_feed_forward": 0, "diversity_penalty": 0.0}
    old |= {"id2label": {"0": "LABEL_0", "1": "LABEL_1"}, "is_decoder": False, "pruned_heads": {}, "torchscript": False}
    old |= {"tie_word_embeddings": True, "top_k": 50, "torch_dtype": None, "dropout": 0.0, "typical_p": 1.0}
    document = {"model_type": "clip", "projection_dim": 16, "text_config": {"vocab_size": 100}, "vision_config": {}}
    sections = {name: document[name] | old for name in ("text_config", "vision_config")}
    assert clip.from_transformers(document | sections) == clip.from_transformers(document)


def test_the_reader_of_a_saved_directory_is_the_reader_of_loads(tmp_path):
    """A model with a field that transformers' file has no word for: refused by name, nothing written."""
    image = {**LAYERS, "image_size": 30, "patch_size": 10}
    model = transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**image))
    randomized(model).save_pretrained(tmp_path / "in")
    bundle = hub.load(tmp_path / "in")
    assert open_source(tmp_path / "in").config["model_type"] == "clip_vision_model"
    trunk = dataclasses.replace(bundle.config.trunk, pool="gap")
    with pytest.raises(ValueError, match=r"'transformers' cannot say trunk\.pool='gap', reads as 'token'"):
        hub.save(dataclasses.replace(bundle, config=dataclasses.replace(bundle.config, trunk=trunk)), tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["in"]
