"""`hub.save` after each load, in every format of the family: the publishing library reads equal outputs, or a refusal.

Nothing here runs in JAX: a checkpoint that a library wrote goes through `hub.load` and `hub.save`, and the library of
the format that was written computes the same as the one it came from. Formats that no library here reads (npz, DINOv2's
own files) are brought back to the first by another load and save.
"""

import json

import numpy as np
import pytest
from omnax import hub
from omnax.hub.families import FAMILIES
from oracles import timm, torch, transformers

import open_clip  # isort: skip  # after the oracles, which make torchvision importable
from safetensors.torch import load_file, save_file  # isort: skip

TOLERANCE = 1e-5
DIRECTORIES = ("transformers", "timm", "open_clip")
SHAPE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
LAYERS = {**SHAPE, "intermediate_size": 64}
IMAGE = {**LAYERS, "image_size": 32, "patch_size": 8}
TEXT = {**LAYERS, "vocab_size": 60, "max_position_embeddings": 8, "bos_token_id": 57}
TINY = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
VISION_CFG = {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8, "mlp_ratio": 2.0}
TEXT_CFG = {"context_length": 8, "vocab_size": 60, "width": 32, "heads": 2, "layers": 2}
PIXELS = torch.from_numpy(np.random.default_rng(0).normal(size=(2, 3, 32, 32)).astype(np.float32))
TOKENS = torch.tensor([[57, 3, 2, 59, 0, 0, 0, 0], [57, 5, 6, 7, 2, 8, 59, 0]])


def of_transformers(name, **fields):
    def make():
        config = getattr(transformers, name.partition("Model")[0].partition("For")[0] + "Config")
        return getattr(transformers, name)(config(**fields))

    return make


def pair(name, text=(), image=()):
    text, image = TEXT | dict(text), IMAGE | dict(image)
    own = {"projection_dim": 24} if name == "CLIP" else {}
    return lambda: getattr(transformers, f"{name}Model")(
        getattr(transformers, f"{name}Config")(text_config=text, vision_config=image, **own)
    )


def of_timm(name, **arguments):
    return lambda: timm.create_model(name, **(TINY | {"num_classes": 5} | arguments))


def of_open_clip(vision=(), text=(), **own):
    cfg = {"embed_dim": 24, "vision_cfg": VISION_CFG | dict(vision), "text_cfg": TEXT_CFG | dict(text), **own}

    def make():
        model = open_clip.model.CLIP(**cfg)
        model.cfg = cfg
        return model

    return make


DINO = {**SHAPE, "image_size": 28, "patch_size": 14}
SOURCES = {
    "ViT, classifier": of_transformers("ViTForImageClassification", **IMAGE, num_labels=5),
    "ViT": of_transformers("ViTModel", **IMAGE),
    "CLIP": pair("CLIP", {"eos_token_id": 59}),
    "CLIP of 2021": pair("CLIP", {"eos_token_id": 2}),
    "CLIP, towers of two activations": pair("CLIP", {"eos_token_id": 59}, {"hidden_act": "gelu"}),
    "CLIP, eps of images": pair("CLIP", {"eos_token_id": 59}, {"layer_norm_eps": 1e-2}),
    "CLIP text tower": of_transformers("CLIPTextModelWithProjection", **TEXT, eos_token_id=59, projection_dim=24),
    "CLIP image tower": of_transformers("CLIPVisionModelWithProjection", **IMAGE, projection_dim=24),
    "SigLIP": pair("Siglip", {"projection_size": 32}),
    "SigLIP text tower": of_transformers("SiglipTextModel", **TEXT),
    "SigLIP image tower": of_transformers("SiglipVisionModel", **IMAGE),
    "SigLIP image tower without head": of_transformers("SiglipVisionModel", **IMAGE, vision_use_head=False),
    "DINOv2": of_transformers("Dinov2Model", **DINO),
    "DINOv2 without mask token": of_transformers("Dinov2Model", **DINO, use_mask_token=False),
    "DINOv2, classifier": of_transformers("Dinov2ForImageClassification", **DINO, num_labels=5),
    "DINOv2, registers": of_transformers("Dinov2WithRegistersModel", **DINO, num_register_tokens=3),
    "DINOv2, zero registers": of_transformers("Dinov2WithRegistersModel", **DINO, num_register_tokens=0),
    "timm ViT": of_timm("vit_tiny_patch16_224"),
    "timm ViT, average": of_timm("vit_tiny_patch16_224", global_pool="avg"),
    "timm ViT, tokens": of_timm("vit_tiny_patch16_224", num_classes=0, global_pool=""),
    "timm ViT, attention pool": of_timm("vit_base_patch16_siglip_224", num_classes=0),
    "timm CLIP ViT": of_timm("vit_base_patch32_clip_224"),
    "timm DeiT, distilled": of_timm("deit_tiny_distilled_patch16_224"),
    "timm DeiT III": of_timm("deit3_small_patch16_224"),
    "timm registers": of_timm("vit_medium_patch16_reg4_gap_256"),
    "timm query-key norm": of_timm("vit_small_patch16_224", qk_norm=True),
    "timm rotary": of_timm("vit_pe_core_tiny_patch16_384"),
    "timm EVA": of_timm("eva02_base_patch14_224", num_classes=0),
    "timm DINOv2": of_timm("vit_small_patch14_dinov2", num_classes=0, img_size=28, patch_size=14),
    "timm DINOv2, registers": of_timm("vit_small_patch14_reg4_dinov2", num_classes=0, img_size=28, patch_size=14),
    "open_clip": of_open_clip(),
    "open_clip, quick GELU": of_open_clip(quick_gelu=True),
    "open_clip, pool eos": of_open_clip(text={"pool_type": "eos", "eos_id": 59}, quick_gelu=True),
    "open_clip, pool last": of_open_clip(text={"pool_type": "last"}),
    "open_clip, pool avg": of_open_clip({"pool_type": "avg"}),
    "open_clip, norm after avg": of_open_clip({"pool_type": "avg", "final_ln_after_pool": True}),
    "open_clip, two activations": of_open_clip({"act_kwargs": {"approximate": "tanh"}}),
    "open_clip, eps of images": of_open_clip({"norm_kwargs": {"eps": 1e-2}}),
    "open_clip, bias of logits": of_open_clip(init_logit_bias=-10.0),
    "open_clip, no causal mask": of_open_clip(text={"no_causal_mask": True}),
}


def randomized(model):
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * (0.2 if parameter.ndim > 1 else 0.4)
    return model.eval()


def write(model, path):
    """As the library itself writes it."""
    if isinstance(model, open_clip.model.CLIP):
        path.mkdir()
        save_file(model.state_dict(), path / "open_clip_model.safetensors")
        (path / "open_clip_config.json").write_text(json.dumps({"model_cfg": model.cfg, "preprocess_cfg": {}}))
    elif hasattr(model, "save_pretrained"):
        model.save_pretrained(path)
    else:
        timm.models.save_for_hf(model, path, safe_serialization=True)


def read(path, format):
    """The model that the library of a format makes of a directory."""
    if format == "timm":
        return timm.create_model(f"local-dir:{path}", pretrained=True).eval()
    if format == "transformers":
        (name,) = json.loads((path / "config.json").read_text())["architectures"]
        model, report = getattr(transformers, name).from_pretrained(path, output_loading_info=True)
        without_pooler = all(name.startswith("pooler.") for name in report["missing_keys"])  # ViTs without one
        assert without_pooler and not report["unexpected_keys"], report
        return model.eval()
    cfg = json.loads((path / "open_clip_config.json").read_text())["model_cfg"]
    kind = open_clip.model.CustomTextCLIP if cfg.pop("custom_text", False) else open_clip.model.CLIP
    model = kind(**cfg)
    state = load_file(path / "open_clip_model.safetensors")
    model.load_state_dict({name: x.reshape(model.state_dict()[name].shape) for name, x in state.items()}, strict=True)
    return model.eval()


def outputs(model):
    """What the model says, by names that its counterparts in other libraries share."""
    name = type(model).__name__
    if hasattr(model, "encode_text"):  # open_clip
        image, text = model.encode_image(PIXELS, normalize=True), model.encode_text(TOKENS, normalize=True)
        logits = model.logit_scale.exp() * image @ text.T
        bias = getattr(model, "logit_bias", None)
        return {"image": image, "text": text, "logits": logits if bias is None else logits + bias}
    if not hasattr(model, "save_pretrained"):  # timm
        pixels = PIXELS[..., : model.patch_embed.img_size[0], : model.patch_embed.img_size[1]]
        found = {"tokens": model.forward_features(pixels)}
        return found | ({"logits": model(pixels)} if model.num_classes else {"pooled": model(pixels)})
    if "config" in dir(model) and hasattr(model.config, "text_config"):
        out = model(input_ids=TOKENS, pixel_values=PIXELS)
        return {"image": out.image_embeds, "text": out.text_embeds, "logits": out.logits_per_image}
    size = getattr(model.config, "image_size", 0)
    out = model(TOKENS) if "Text" in name else model(PIXELS[..., :size, :size])
    words = {"logits": "logits", "last_hidden_state": "tokens", "pooler_output": "pooled of transformers"}
    words |= {"image_embeds": "image", "text_embeds": "text"}
    return {words[key]: value for key, value in out.items() if key in words}


def compare(expected, got):
    shared = expected.keys() & got.keys()
    assert shared, (expected.keys(), got.keys())
    for name in shared:
        scale = max(1.0, float(expected[name].abs().max()))
        torch.testing.assert_close(got[name], expected[name], atol=TOLERANCE * scale, rtol=0, msg=name)


OUTCOMES = []


@pytest.mark.parametrize("source", SOURCES)
def test_saves_are_read_as_the_same_or_refused(tmp_path, source):
    model = randomized(SOURCES[source]())
    write(model, tmp_path / "in")
    bundle = hub.load(tmp_path / "in")
    expected = outputs(read(tmp_path / "in", bundle.format))
    family = next(family for family in FAMILIES if isinstance(bundle.config, family.config))
    for number, format in enumerate(family.formats):
        ending = "" if format in DIRECTORIES else ".npz" if format == "npz" else ".safetensors"
        path = tmp_path / f"{number}{ending}"
        try:
            hub.save(bundle, path, format)
        except ValueError as error:
            assert format != bundle.format, error
            assert not path.exists() and len(str(error)) > 20
            OUTCOMES.append("refused")
            print(f"{source:33} {format:13} refused: {str(error).removeprefix(f'{path}: ')[:110]}")
            continue
        if format in DIRECTORIES:
            compare(expected, outputs(read(path, format)))
        else:
            unsaid = family.unsaid(bundle.config, format)
            hub.save(hub.load(path, **unsaid), tmp_path / "back", bundle.format)
            compare(expected, outputs(read(tmp_path / "back", bundle.format)))
        OUTCOMES.append("equal")
        print(f"{source:33} {format:13} equal")


def test_nothing_else_than_equal_or_refused():
    """Last of this file: `-s` shows the table above and its sums."""
    print({outcome: OUTCOMES.count(outcome) for outcome in ("equal", "refused")})
    assert set(OUTCOMES) <= {"equal", "refused"}


@pytest.mark.parametrize("source", ["timm ViT", "open_clip", "SigLIP", "DINOv2"])
def test_compiled_models_are_read_without_their_prefix(tmp_path, source):
    """torch.compile puts `_orig_mod.` before every name; what is saved has none."""
    model = randomized(SOURCES[source]())
    write(model, tmp_path / "in")
    (file,) = (tmp_path / "in").glob("*.safetensors")
    save_file({f"_orig_mod.{name}": tensor for name, tensor in load_file(file).items()}, file)
    bundle = hub.load(tmp_path / "in")
    hub.save(bundle, tmp_path / "out")
    compare(outputs(model), outputs(read(tmp_path / "out", bundle.format)))
