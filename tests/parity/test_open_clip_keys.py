"""Every key of open_clip's configs, at a value that is not its default: equal to open_clip, or refused by its name."""

import copy
import dataclasses
import json

import jax
import numpy as np
import pytest
from omnax import hub
from oracles import timm, torch

import open_clip  # isort: skip  # after the oracles, which make torchvision importable
from safetensors.torch import load_file, save_file  # isort: skip

ATOL = 1e-5  # normalised embeddings
VISION = {"image_size": 28, "layers": 2, "width": 32, "head_width": 16, "patch_size": 14, "mlp_ratio": 2.0}
TEXT = {"context_length": 7, "vocab_size": 50, "width": 32, "layers": 2}  # without heads (8) and eos_id (2)
BASE = {"embed_dim": 24, "vision_cfg": VISION, "text_cfg": TEXT}
RNG = np.random.default_rng(0)
PIXELS = RNG.normal(size=(2, 28, 28, 3)).astype(np.float32)
TOKENS = np.array([[48, 3, 2, 49, 4, 0, 0], [48, 5, 6, 7, 2, 49, 0]])
# Key -> value, where open_clip builds a model with it; what all its models share with others stands in "unchanged".
EQUAL = {
    "vision_cfg": {
        "head_width": 8,
        "ls_init_value": 0.1,
        "patch_dropout": 0.5,
        "attn_pooler_queries": 3,
        "attn_pooler_heads": 2,
        "no_ln_pre": True,
        "pos_embed_type": "sin_cos_2d",
        "final_ln_after_pool": True,
        "pool_type": "avg",
        "act_kwargs": {"approximate": "tanh"},
        "norm_kwargs": {"eps": 0.1},
        "block_type": "default",
        "timm_model_pretrained": True,  # the keys of timm's towers without one
        "timm_pool": "token",
        "timm_proj": "none",
        "timm_proj_bias": True,
        "timm_drop": 0.1,
        "timm_drop_path": 0.1,
        "layers": 3,
        "width": 64,
        "mlp_ratio": 3.0,
        "patch_size": 7,
        "image_size": 42,
    },
    "text_cfg": {
        "context_length": 9,
        "vocab_size": 60,
        "hf_tokenizer_name": "x",
        "tokenizer_mode": "x",
        "tokenizer_kwargs": {"clean": "lower"},
        "width": 64,
        "heads": 2,
        "layers": 3,
        "mlp_ratio": 3.0,
        "ls_init_value": 0.1,
        "pad_id": 3,
        "no_causal_mask": True,
        "final_ln_after_pool": True,
        "pool_type": "eos",
        "eos_id": 49,
        "proj_bias": True,
        "proj_type": "none",
        "act_kwargs": {"approximate": "tanh"},
        "norm_kwargs": {"eps": 0.1},
        "block_type": "default",
        "hf_model_pretrained": False,
        "hf_proj_type": "x",
        "hf_pooler_type": "x",
    },
    "": {"embed_dim": 32, "quick_gelu": True, "init_logit_scale": 1.0, "init_logit_bias": -10.0},
}
EQUAL[""] |= {"nonscalar_logit_scale": True}
BESIDE = {("text_cfg", "proj_type"): {"embed_dim": 32}, ("text_cfg", "eos_id"): {"text_cfg": {"pool_type": "eos"}}}
REFUSED = {
    "vision_cfg": {
        "attentional_pool": True,
        "output_tokens": True,
        "block_type": "custom",
        "timm_model_name": "fastvit_mci4",
        "pool_type": "none",
        "layers": [3, 4, 6, 3],
        "norm_kwargs": {"elementwise_affine": False},
    },
    "text_cfg": {
        "embed_cls": True,
        "output_tokens": True,
        "hf_model_name": "roberta-base",
        "pool_type": "none",
        "block_type": "custom",
        "unheard": 1,
    },
    "": {"multimodal_cfg": {"width": 4}, "unheard": 1},
}
for section in ("vision_cfg", "text_cfg"):
    for key in ("qk_norm", "scaled_cosine_attn", "scale_heads", "scale_attn_inner", "scale_attn", "scale_fc"):
        REFUSED[section][key] = True


def with_key(section, key, value):
    config = copy.deepcopy(BASE)
    for place, entries in BESIDE.get((section, key), {}).items():
        config[place] = config[place] | entries if isinstance(entries, dict) else entries
    (config[section] if section else config)[key] = value
    return config


def published(config, folder, model=None):
    folder.mkdir()
    tensors = (model or open_clip.model.CLIP(**BASE)).state_dict()
    save_file(tensors, folder / "open_clip_model.safetensors")
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config}))


def randomize(model):
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model.eval()


def embeddings(model, pixels, tokens):
    image = model.encode_image(torch.from_numpy(pixels).permute(0, 3, 1, 2), normalize=True)
    return image.numpy(), model.encode_text(torch.from_numpy(tokens), normalize=True).numpy()


@pytest.mark.parametrize("section, key", [(section, key) for section, keys in EQUAL.items() for key in keys])
def test_used_and_harmless_keys(tmp_path, section, key):
    config = with_key(section, key, EQUAL[section][key])
    model = randomize(open_clip.model.CLIP(**config))
    published(config, tmp_path / "in", model)
    bundle = hub.load(tmp_path / "in")
    tokens = np.pad(TOKENS, ((0, 0), (0, 2))) if key == "context_length" else TOKENS
    pixels = np.pad(PIXELS, ((0, 0), (0, 14), (0, 14), (0, 0))) if key == "image_size" else PIXELS
    expected = embeddings(model, pixels, tokens)
    ours = jax.jit(bundle.model.apply)({"params": bundle.params}, pixels, tokens)
    np.testing.assert_allclose(ours["image_embeds"], expected[0], atol=ATOL, rtol=0)
    np.testing.assert_allclose(ours["text_embeds"], expected[1], atol=ATOL, rtol=0)
    hub.save(bundle, tmp_path / "out")
    saved = json.loads((tmp_path / "out" / "open_clip_config.json").read_text())["model_cfg"]
    again = open_clip.model.CLIP(**saved).eval()
    state = load_file(tmp_path / "out" / "open_clip_model.safetensors")
    again.load_state_dict({name: x.reshape(again.state_dict()[name].shape) for name, x in state.items()}, strict=True)
    for got, wanted in zip(embeddings(again, pixels, tokens), expected, strict=True):
        np.testing.assert_array_equal(got, wanted)


@pytest.mark.parametrize("section, key", [(section, key) for section, keys in REFUSED.items() for key in keys])
def test_refused_keys(tmp_path, section, key):
    published(with_key(section, key, REFUSED[section][key]), tmp_path / "in")
    with pytest.raises(ValueError, match=f"'{key}'"):
        hub.load(tmp_path / "in")


def test_the_tables_know_every_key():
    """The keys of open_clip's own classes, and nothing that the tests above leave out."""
    from omnax.hub.families.clip import open_clip as tables

    for section, table, cls in (
        ("vision_cfg", tables.VISION, open_clip.model.CLIPVisionCfg),
        ("text_cfg", tables.TEXT, open_clip.model.CLIPTextCfg),
    ):
        fields = {field.name for field in dataclasses.fields(cls)}
        assert set(table.keys) == fields
        assert fields == (EQUAL[section].keys() | REFUSED[section].keys()) - {"unheard"}


def test_what_towers_are_is_said(tmp_path):
    kinds = {
        "a ResNet": ("vision_cfg", "layers", [3, 4, 6, 3]),
        "a CoCa model": ("", "multimodal_cfg", {"width": 4}),
        "a text tower of transformers": ("text_cfg", "hf_model_name", "roberta-base"),
        "'fastvit_mci4': an image tower of timm's": ("vision_cfg", "timm_model_name", "fastvit_mci4"),
    }
    for i, (kind, entry) in enumerate(kinds.items()):
        published(with_key(*entry), tmp_path / str(i))
        with pytest.raises(ValueError, match=kind):
            hub.load(tmp_path / str(i))


def test_compiled_checkpoints(tmp_path):
    """torch.compile puts `_orig_mod.` before every name."""
    model = randomize(open_clip.model.CLIP(**BASE))
    state = {f"module._orig_mod.{key}": value for key, value in model.state_dict().items()}
    torch.save({"state_dict": state}, tmp_path / "run.pt")
    plain = hub.load(tmp_path / "run.pt", num_heads=2)
    image = embeddings(model, PIXELS, TOKENS)[0]
    assert image.shape == (2, 24) and plain.params["image"]["projection"]["kernel"].shape == (32, 24)
    save_file({f"_orig_mod.{key}": value for key, value in model.state_dict().items()}, tmp_path / "a.safetensors")
    assert jax.tree.all(
        jax.tree.map(
            lambda a, b: bool((a == b).all()), plain.params, hub.load(tmp_path / "a.safetensors", num_heads=2).params
        )
    )


TOWERS = {  # timm's name, sizes, what open_clip is told of it
    "rotary": ("vit_pe_core_tiny_patch16_384", {"img_size": 32, "patch_size": 8, "embed_dim": 48}, "map", None),
    "27 of 384 pixels": ("vit_so400m_patch14_siglip_384", {"img_size": 35, "patch_size": 14}, "map", "none"),
    "class token with a head": ("vit_large_patch14_clip_224", {"img_size": 28, "patch_size": 14}, "token", None),
}


@pytest.mark.parametrize("tower", TOWERS)
def test_towers_of_timm(tmp_path, tower):
    name, sizes, pool, proj = TOWERS[tower]
    classes = 0 if proj == "none" else 64
    sizes = {"embed_dim": 64, "depth": 2, "num_classes": classes} | sizes
    trunk = timm.create_model(name, global_pool=pool, **sizes)
    vision = {"image_size": sizes["img_size"], "timm_model_name": name, "timm_pool": pool, "timm_proj": proj}
    config = {"embed_dim": 64, "vision_cfg": vision, "text_cfg": TEXT, "custom_text": True}
    oracle = open_clip.model.CustomTextCLIP(64, VISION, TEXT)
    oracle.visual = torch.nn.Module()
    oracle.visual.add_module("trunk", trunk)
    oracle.visual.forward = trunk.forward
    published(config, tmp_path / "in", randomize(oracle))
    bundle = hub.load(tmp_path / "in")
    pixels = np.resize(PIXELS, (2, sizes["img_size"], sizes["img_size"], 3))
    expected = embeddings(oracle, pixels, TOKENS)
    ours = jax.jit(bundle.model.apply)({"params": bundle.params}, pixels, TOKENS)
    np.testing.assert_allclose(ours["image_embeds"], expected[0], atol=ATOL, rtol=0)
    np.testing.assert_allclose(ours["text_embeds"], expected[1], atol=ATOL, rtol=0)
    hub.save(bundle, tmp_path / "out")
    saved = json.loads((tmp_path / "out" / "open_clip_config.json").read_text())["model_cfg"]
    assert saved["vision_cfg"]["image_size"] == sizes["img_size"]
    oracle.load_state_dict(load_file(tmp_path / "out" / "open_clip_model.safetensors"), strict=True)
    np.testing.assert_array_equal(embeddings(oracle, pixels, TOKENS)[0], expected[0])
