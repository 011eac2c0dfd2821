"""CLIP towers against transformers, OpenAI's class, open_clip and timm, through files that these wrote; and back.

Weights are random with every parameter spread out, so that no bias or scale is invisible.
"""

import json
import sys
import types
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from omnax import hub
from omnax.hub.families.clip import family as clip_hub
from omnax.hub.families.clip import formats as clip_formats
from omnax.hub.mapping import save_tensors
from omnax.models.clip import CLIP, SIZES, ImageTower, TextTower
from omnax.models.clip import config as clip_config
from oracles import timm, torch, transformers

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import open_clip

TOLERANCE = 1e-5
TEXT = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
IMAGE = {"hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 3, "num_attention_heads": 3}
IMAGE |= {"image_size": 28, "patch_size": 14}
TOKENS = np.array([[98, 3, 4, 99, 1, 1, 1], [98, 5, 6, 7, 8, 99, 1], [98, 99, 1, 1, 1, 1, 1]])
PIXELS = np.random.default_rng(0).normal(size=(2, 28, 28, 3)).astype(np.float32)


def randomize(model, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator) * 0.1
        parameter.data = parameter.data + noise if parameter.ndim < 2 or "norm" in name else noise
    return model.eval()


def channels_first(pixels):
    return torch.from_numpy(pixels).permute(0, 3, 1, 2)


def apply(bundle, *inputs, **options):
    method = options.pop("method", None)
    call = jax.jit(lambda params, *x: bundle.model.apply({"params": params}, *x, method=method, **options))
    return jax.tree.map(np.asarray, call(bundle.params, *map(jnp.asarray, inputs)))


def close(ours, theirs):
    np.testing.assert_allclose(ours, theirs.numpy(), atol=TOLERANCE, rtol=0)


def equal_states(a, b):
    a, b = a.state_dict(), b.state_dict()
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


@pytest.mark.parametrize("eos", [99, 2], ids=["eos", "legacy eos"])
def test_transformers_clip(tmp_path, eos):
    text = TEXT | {"vocab_size": 100, "max_position_embeddings": 9, "bos_token_id": 98, "eos_token_id": eos}
    config = transformers.CLIPConfig(text_config=text, vision_config=IMAGE, projection_dim=24)
    oracle = randomize(transformers.CLIPModel(config))
    oracle.save_pretrained(tmp_path / "published")
    bundle = hub.load(tmp_path / "published")
    theirs = oracle(torch.from_numpy(TOKENS), channels_first(PIXELS), output_hidden_states=True)
    ours = apply(bundle, PIXELS, TOKENS)
    close(ours["logits"], theirs.logits_per_image)
    close(ours["image_embeds"], theirs.image_embeds)
    close(ours["text_embeds"], theirs.text_embeds)
    image = apply(bundle, PIXELS, method=CLIP.encode_image, hidden_states=True)
    for layer, states in enumerate(theirs.vision_model_output.hidden_states):
        close(image["hidden_states"][layer], states)
    close(image["pooled"], oracle.vision_model(channels_first(PIXELS)).pooler_output)
    out = apply(bundle, TOKENS, method=CLIP.encode_text, hidden_states=True)
    for layer, states in enumerate(theirs.text_model_output.hidden_states):
        close(out["hidden_states"][layer], states)
    close(out["tokens"], theirs.text_model_output.last_hidden_state)
    mask = torch.from_numpy(np.arange(7) <= TOKENS.argmax(-1)[:, None]).int()
    masked = oracle.text_model(torch.from_numpy(TOKENS), attention_mask=mask).pooler_output
    close(apply(bundle, TOKENS, method=CLIP.encode_text, mask=jnp.asarray(mask.numpy() == 1))["pooled"], masked)
    hub.save(bundle, tmp_path / "saved")
    equal_states(oracle, transformers.CLIPModel.from_pretrained(tmp_path / "saved"))


@pytest.mark.parametrize("projects", [False, True], ids=["bare", "projected"])
@pytest.mark.parametrize("legacy", [False, True], ids=["v5 names", "published names"])
def test_transformers_single_towers(tmp_path, projects, legacy):
    text = TEXT | {"vocab_size": 100, "max_position_embeddings": 9, "eos_token_id": 99, "projection_dim": 20}
    suffix = "WithProjection" if projects else ""
    towers = {
        "text": (transformers.CLIPTextConfig(**text), TextTower, "input_ids", TOKENS),
        "vision": (transformers.CLIPVisionConfig(**IMAGE, projection_dim=20), ImageTower, "pixel_values", PIXELS),
    }
    for name, (config, module, argument, value) in towers.items():
        kind = getattr(transformers, f"CLIP{name.title()}Model{suffix}")
        oracle = randomize(kind(config))
        folder = tmp_path / name
        oracle.save_pretrained(folder)
        if legacy and not projects:
            _add_prefix(folder / "model.safetensors", f"{name}_model.")
        bundle = hub.load(folder)
        assert type(bundle.model) is module
        inputs = channels_first(value) if name == "vision" else torch.from_numpy(value)
        theirs = oracle(**{argument: inputs}, output_hidden_states=True)
        ours = apply(bundle, value, hidden_states=True)
        if projects:
            close(ours["projected"], theirs[f"{'image' if name == 'vision' else name}_embeds"])
        else:
            close(ours["pooled"], theirs.pooler_output)
        close(ours["hidden_states"][-2], theirs.hidden_states[-2])
        hub.save(bundle, tmp_path / "saved" / name)
        equal_states(oracle, kind.from_pretrained(tmp_path / "saved" / name))


def _add_prefix(path, prefix):
    from safetensors.torch import load_file, save_file

    save_file({prefix + key: value for key, value in load_file(path).items()}, path, {"format": "pt"})


def test_transformers_siglip(tmp_path):
    text = TEXT | {"vocab_size": 100, "max_position_embeddings": 7, "projection_size": 48}
    # 30 pixels: no multiple of 14, as the published 384.
    config = transformers.SiglipConfig(text_config=text, vision_config=IMAGE | {"image_size": 30})
    oracle = randomize(transformers.SiglipModel(config))
    oracle.save_pretrained(tmp_path / "published")
    bundle = hub.load(tmp_path / "published")
    pixels = np.random.default_rng(1).normal(size=(2, 30, 30, 3)).astype(np.float32)
    theirs = oracle(torch.from_numpy(TOKENS), channels_first(pixels))
    ours = apply(bundle, pixels, TOKENS)
    close(ours["image_embeds"], theirs.image_embeds)
    close(ours["text_embeds"], theirs.text_embeds)
    close(ours["logits"], theirs.logits_per_image)
    hub.save(bundle, tmp_path / "saved")
    equal_states(oracle, transformers.SiglipModel.from_pretrained(tmp_path / "saved"))


@pytest.fixture
def openai(monkeypatch):
    """clip.model without clip/__init__.py, which asks for setuptools' former pkg_resources."""
    from importlib import metadata

    folder = next(str(f.locate().parent) for f in metadata.files("clip-anytorch") if f.name == "model.py")
    package = types.ModuleType("clip")
    package.__path__ = [folder]
    monkeypatch.setitem(sys.modules, "clip", package)
    from clip import model

    yield model
    sys.modules.pop("clip.model")


@pytest.mark.parametrize("container", ["state dict", "torchscript", "half torchscript"])
def test_openai_archives(tmp_path, openai, container):
    oracle = randomize(openai.CLIP(24, 28, 2, 64, 14, 9, 100, 64, 1, 2))
    path = tmp_path / "archive.pt"
    if container == "half torchscript":
        oracle = openai_half(oracle)
    if container == "state dict":
        torch.save(oracle.state_dict(), path)
    else:
        save_torchscript(oracle, path)
    bundle = hub.load(path)
    assert bundle.config.text.activation == bundle.config.image.trunk.activation == "quick_gelu"
    pixels = PIXELS
    per_image, _ = oracle.float()(channels_first(pixels), torch.from_numpy(TOKENS))
    ours = apply(bundle, pixels, TOKENS)
    close(ours["logits"], per_image)
    if container == "half torchscript":
        kinds = {"/".join(k.key for k in path): leaf.dtype for path, leaf in jax.tree.leaves_with_path(bundle.params)}
        assert kinds["image/projection/kernel"] == kinds["text/encoder/blocks_0/mlp/fc1/kernel"] == jnp.float16
        assert kinds["image/trunk/norm/scale"] == kinds["text/token_embed/embedding"] == jnp.float32


def openai_half(model):
    from clip.model import convert_weights

    convert_weights(model)
    return model


def save_torchscript(model, path):
    """As OpenAI published: parameters under their names, sizes as int64 buffers."""

    class Published(torch.nn.Module):
        def __init__(self):
            super().__init__()
            for name, child in model.named_children():
                self.add_module(name, child)
            for name, parameter in model.named_parameters(recurse=False):
                self.register_parameter(name, parameter)
            for name, value in (("input_resolution", 28), ("context_length", 9), ("vocab_size", 100)):
                self.register_buffer(name, torch.tensor(value))

        def forward(self, scale):
            total = sum(parameter.float().sum() for parameter in self.parameters())
            return scale * (total + self.input_resolution + self.context_length + self.vocab_size)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # tracing and saving TorchScript are deprecated, reading them is not
        torch.jit.save(torch.jit.trace(Published(), torch.ones(())), path)


OPEN_CLIP = {
    "embed_dim": 24,
    "vision_cfg": {"image_size": 28, "layers": 2, "width": 40, "head_width": 20, "patch_size": 14, "mlp_ratio": 2.925},
    "text_cfg": {"context_length": 7, "vocab_size": 100, "width": 32, "heads": 2, "layers": 2},
}


def save_open_clip(model, config, folder):
    from safetensors.torch import save_file

    folder.mkdir()
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    preprocess = {"size": 28, "mode": "RGB", "mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic"}
    document = {"model_cfg": config, "preprocess_cfg": preprocess | {"resize_mode": "squash"}}
    (folder / "open_clip_config.json").write_text(json.dumps(document))


def read_open_clip(model, folder):
    from safetensors.torch import load_file

    model.load_state_dict(load_file(folder / "open_clip_model.safetensors"), strict=True)


@pytest.mark.parametrize("quick", [False, True], ids=["gelu", "quick_gelu"])
def test_open_clip(tmp_path, quick):
    config = OPEN_CLIP | {"quick_gelu": quick}
    oracle = randomize(open_clip.model.CLIP(**config))
    save_open_clip(oracle, config, tmp_path / "published")
    bundle = hub.load(tmp_path / "published")
    assert bundle.processor.image.shortest_edge is None and bundle.processor.image.mean == (0.5, 0.5, 0.5)
    image, text, scale = oracle(channels_first(PIXELS), torch.from_numpy(TOKENS))
    ours = apply(bundle, PIXELS, TOKENS)
    close(ours["image_embeds"], image)
    close(ours["text_embeds"], text)
    close(ours["logit_scale"], scale)
    hub.save(bundle, tmp_path / "saved")
    again = open_clip.model.CLIP(**json.loads((tmp_path / "saved" / "open_clip_config.json").read_text())["model_cfg"])
    read_open_clip(again, tmp_path / "saved")
    equal_states(oracle, again)
    hub.save(bundle, tmp_path / "transformers", format="transformers")
    other = transformers.CLIPModel.from_pretrained(tmp_path / "transformers").eval()
    theirs = other(torch.from_numpy(TOKENS), channels_first(PIXELS))
    close(ours["logits"], theirs.logits_per_image)


def test_open_clip_training_checkpoint_needs_no_config(tmp_path):
    oracle = randomize(open_clip.model.CLIP(**OPEN_CLIP, quick_gelu=True))
    state = {"module." + key: value for key, value in oracle.state_dict().items()}
    torch.save({"epoch": 3, "name": "run", "state_dict": state, "optimizer": {}}, tmp_path / "epoch_3.pt")
    bundle = hub.load(tmp_path / "epoch_3.pt", num_heads=2)
    ours = apply(bundle, PIXELS, method=CLIP.encode_image)
    close(ours["embeds"], oracle.encode_image(channels_first(PIXELS), normalize=True))


EVA = {
    "eva_giant_patch14_clip_224": (28, 64),
    "eva02_large_patch14_clip_224": (42, 64),
    "eva02_enormous_patch14_clip_224": (28, 64),
}


def eva_trunk(name, **options):
    size, width = EVA[name]
    return timm.create_model(
        name, img_size=size, patch_size=14, embed_dim=width, depth=2, num_heads=16, num_classes=24, **options
    )


@pytest.mark.parametrize("name", EVA)
def test_timm_eva_trunks(tmp_path, name):
    oracle = randomize(eva_trunk(name))
    folder = tmp_path / "published"
    folder.mkdir()
    from safetensors.torch import load_file, save_file

    save_file(oracle.state_dict(), folder / "model.safetensors")
    arguments = {"num_heads": 16}
    (folder / "config.json").write_text(json.dumps({"architecture": name, "model_args": arguments}))
    bundle = hub.load(folder)
    size = EVA[name][0]
    pixels = np.random.default_rng(0).normal(size=(2, size, size, 3)).astype(np.float32)
    ours = apply(bundle, pixels)
    close(ours["projected"], oracle(channels_first(pixels)))
    close(ours["tokens"], oracle.forward_features(channels_first(pixels)))
    hub.save(bundle, tmp_path / "saved")
    again = eva_trunk(name)
    again.load_state_dict(load_file(tmp_path / "saved" / "model.safetensors"), strict=True)
    equal_states(oracle, again)


@pytest.mark.parametrize("name", ["eva02_large_patch14_clip_224", "eva_giant_patch14_clip_224"])
def test_eva_clip_in_open_clip_and_in_its_own_names(tmp_path, name):
    trunk = eva_trunk(name)
    text_part = OPEN_CLIP["text_cfg"] | {"width": 64, "heads": 1}  # heads of 64: a bare file does not tell them
    oracle = open_clip.model.CustomTextCLIP(embed_dim=24, vision_cfg={"layers": 1, "width": 64}, text_cfg=text_part)
    oracle.visual = torch.nn.Module()
    oracle.visual.add_module("trunk", trunk)
    oracle.visual.forward = trunk.forward
    randomize(oracle)
    config = OPEN_CLIP | {"custom_text": True, "text_cfg": text_part}
    config["vision_cfg"] = {
        "image_size": EVA[name][0],
        "timm_model_name": name,
        "timm_pool": "token",
        "timm_proj": None,
    }
    save_open_clip(oracle, config, tmp_path / "published")
    size = EVA[name][0]
    pixels = np.random.default_rng(0).normal(size=(2, size, size, 3)).astype(np.float32)
    image = oracle.encode_image(channels_first(pixels), normalize=True)
    text = oracle.encode_text(torch.from_numpy(TOKENS), normalize=True)
    bundle = hub.load(tmp_path / "published")
    ours = apply(bundle, pixels, TOKENS)
    close(ours["image_embeds"], image)
    close(ours["text_embeds"], text)
    hub.save(bundle, tmp_path / "saved")
    state = oracle.state_dict()
    read_open_clip(oracle, tmp_path / "saved")
    for key, value in oracle.state_dict().items():
        assert torch.equal(value, state[key]), key
    torch.save(own_names(state), tmp_path / "eva.pt")
    ours = apply(hub.load(tmp_path / "eva.pt", num_heads=16), pixels, TOKENS)
    close(ours["image_embeds"], image)
    close(ours["text_embeds"], text)


def own_names(state):
    """timm's names back to those of baaivision/EVA's files, with the buffers these hold."""
    renames = [
        ("visual.trunk.", "visual."),
        ("mlp.fc1_g", "mlp.w1"),
        ("mlp.fc1_x", "mlp.w2"),
        ("mlp.norm", "mlp.ffn_ln"),
    ]
    renames += [("attn.norm", "attn.inner_attn_ln"), ("q_proj.bias", "q_bias"), ("v_proj.bias", "v_bias")]
    gated = any("fc1_g" in key for key in state)
    named = {}
    for key, value in state.items():
        for old, new in renames:
            key = key.replace(old, new)
        named[key.replace("mlp.fc2", "mlp.w3") if gated and "visual" in key else key] = value
    return named | {
        "visual.rope.freqs_cos": torch.zeros(4, 8),
        "visual.blocks.0.attn.rope.freqs_sin": torch.zeros(4, 8),
    }


def test_positions_follow_another_image_size(tmp_path):
    config = OPEN_CLIP | {"quick_gelu": False}
    small = randomize(open_clip.model.CLIP(**config))
    save_open_clip(small, config, tmp_path / "published")
    bundle = hub.load(tmp_path / "published", image_size=(56, 56))
    large = open_clip.model.CLIP(**(config | {"vision_cfg": config["vision_cfg"] | {"image_size": 56}})).eval()
    state = small.state_dict()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        open_clip.model.resize_pos_embed(state, large)
    large.load_state_dict(state)
    pixels = np.random.default_rng(0).normal(size=(1, 56, 56, 3)).astype(np.float32)
    close(
        apply(bundle, pixels, method=CLIP.encode_image)["embeds"],
        large.encode_image(channels_first(pixels), normalize=True),
    )
    assert bundle.processor.image.crop == (56, 56)


@pytest.mark.parametrize("length", [5, 12])
def test_positions_follow_another_context_length(tmp_path, length):
    small = randomize(open_clip.model.CLIP(**OPEN_CLIP))
    save_open_clip(small, OPEN_CLIP, tmp_path / "published")
    bundle = hub.load(tmp_path / "published", context_length=length)
    text = OPEN_CLIP["text_cfg"] | {"context_length": length}
    other = open_clip.model.CLIP(**(OPEN_CLIP | {"text_cfg": text})).eval()
    state = small.state_dict()
    open_clip.model.resize_text_pos_embed(state, other)
    other.load_state_dict({name: value for name, value in state.items() if name != "attn_mask"})
    tokens = np.array([[98, 3, 4, 99, *[0] * (length - 4)]])
    ours = apply(bundle, tokens, method=CLIP.encode_text)["embeds"]
    close(ours, other.encode_text(torch.from_numpy(tokens), normalize=True))
    assert bundle.processor.context_length == length


# Our sizes -> open_clip's names of them.
PUBLISHED = {
    **{size: f"ViT-{size.replace('/', '-').replace('@', '-')}" for size in SIZES if size[0] in "BLHgb"},
    **{size: size.replace("/", "-").replace("@", "-").replace("+", "-plus") for size in SIZES if size[0] == "E"},
    "SigLIP-B/16": "ViT-B-16-SigLIP",
    "SigLIP-So400m/14@384": "ViT-SO400M-14-SigLIP-384",
}


@pytest.mark.parametrize("size", PUBLISHED)
def test_published_names_and_shapes(size):
    """The tensors that we read and write for a size are those of open_clip's model: names, shapes and no others."""
    document = open_clip.get_model_config(PUBLISHED[size])
    kind = open_clip.model.CustomTextCLIP if document.pop("custom_text", False) else open_clip.model.CLIP
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = {name: tuple(tensor.shape) for name, tensor in kind(**document).state_dict().items()}
    custom = kind is open_clip.model.CustomTextCLIP
    config = clip_config(size)
    table = clip_formats.open_clip_table(config, custom_text=custom, timm_trunk=custom)
    ours = {name: tensor.shape for name, tensor in save_tensors(clip_hub.abstract_params(config), table).items()}
    assert ours == theirs


def test_bad_files_and_overrides_are_named(tmp_path):
    oracle = randomize(open_clip.model.CLIP(**OPEN_CLIP))
    state = oracle.state_dict()
    state["visual.ln_prex.weight"] = state.pop("visual.ln_pre.weight")
    torch.save(state, tmp_path / "damaged.pt")
    with pytest.raises(ValueError, match=r"missing 'visual\.ln_pre\.weight'.*nearest: 'visual\.ln_prex\.weight'"):
        hub.load(tmp_path / "damaged.pt", num_heads=2)
    save_open_clip(oracle, OPEN_CLIP, tmp_path / "published")
    with pytest.raises(ValueError, match="unknown field 'activatoin' of CLIPConfig; nearest: 'activation'"):
        hub.load(tmp_path / "published", activatoin="gelu")
    bundle = hub.load(tmp_path / "published")
    with pytest.raises(ValueError, match="timm format holds an EVA image tower alone"):
        hub.save(bundle, tmp_path / "out", format="timm")


@pytest.mark.parametrize("saved", [False, True])
def test_a_pad_token_of_one_character_is_cut_out_of_texts_as_in_transformers(tmp_path, saved):
    """A "!" that is a special token (laion's) is none of the pieces of a word; neither is it a part of "?!"."""
    from omnax.data.text.bpe import load_tokenizer, train_tokenizer

    train_tokenizer(["wow really this is a cat! what?!"] * 5, 60, pad="!").save(tmp_path)
    published = transformers.CLIPTokenizer.from_pretrained(tmp_path)
    if saved:  # as one file, by transformers 5
        published.save_pretrained(tmp_path / "again")
        tokenizer = load_tokenizer(tmp_path / "again")
    else:
        tokenizer = load_tokenizer(tmp_path)
    texts = ["wow! really?!", "!!", "a!b ! c", "x <|ENDOFTEXT|> y", "a<|endoftext|>b <|startoftext|>", "A  CAT 12", ""]
    for text in texts:
        expected = published(text, padding="max_length", max_length=30, return_tensors="np").input_ids
        np.testing.assert_array_equal(tokenizer(text, context_length=30), expected, text)
