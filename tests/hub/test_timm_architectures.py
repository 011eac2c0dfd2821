"""What timm registers under each name, and the arguments its classes take, against our tables of them."""

import functools
import inspect

import pytest
from omnax.hub.families.vit import timm as ours
from omnax.hub.families.vit.architectures import architectures, expand
from oracles import timm, torch

MODULES = (timm.models.vision_transformer, timm.models.deit, timm.models.eva)
CLASSES = {"VisionTransformer": "vit", "VisionTransformerDistilled": "distilled", "Eva": "eva"}
SIZES = {"img_size", "patch_size", "embed_dim", "depth", "mlp_ratio"}  # tensors show them
LOADING = {"pretrained_cfg", "pretrained_filter_fn", "pretrained_strict", "feature_cfg"}
# Registered in the same files, and refused by name: other blocks, norms, rotary kinds.
STRANGERS = ("aimv2_", "beit3_", "_sapiens2", "_dinov3", "_lingbot", "_rope_mixed_", "_xp_", "_rpn_", "_18x2_")
STRANGERS += ("vit_dlittle", "vit_dwee", "vit_pwee", "vit_dpwee", "test_vit4")


@functools.cache
def registered():
    """Name -> (class, arguments), by running timm's functions up to the point where they would build the model."""

    def stop(cls, variant, pretrained, **arguments):
        return cls, arguments

    found = {}
    with pytest.MonkeyPatch.context() as patch:
        for module in MODULES:
            patch.setattr(
                module, "build_model_with_cfg", lambda cls, variant, pretrained, **arguments: (cls, arguments)
            )
        for name in timm.list_models():
            function = timm.models.model_entrypoint(name)
            if any(function.__module__ == module.__name__ for module in MODULES):
                cls, arguments = function()
                found[name] = CLASSES[cls.__name__], {k: v for k, v in arguments.items() if k not in LOADING}
    return found


def in_our_words(arguments):
    """Classes and partial functions as the names that our table has for them."""
    words = {key: value for key, value in arguments.items() if key not in SIZES}
    if norm := words.pop("norm_layer", None):
        assert norm.func is timm.layers.LayerNorm
        words["eps"] = norm.keywords["eps"]
    if gated := words.pop("mlp_layer", None):
        assert gated.func is timm.layers.GluMlp and gated.keywords["gate_last"] is False
        words["gated"] = True
    if words.get("act_layer") is torch.nn.SiLU:
        words["act_layer"] = "silu"
    return words


def test_every_architecture_is_timms():
    theirs = registered()
    assert architectures().keys() <= theirs.keys()
    for name, table in architectures().items():
        cls, arguments = theirs[name]
        own = {"class": cls, **in_our_words(arguments)}
        defaults = ours._INSIDE | {key: entry.default for key, entry in ours._SECTIONS[cls].keys.items()}
        for key in (table.keys() | own.keys()) - {"dynamic_img_size"}:
            assert table.get(key, defaults[key]) == own.get(key, defaults[key]), (name, key)


def test_the_others_are_refused_by_name():
    others = registered().keys() - architectures().keys()
    assert others and all(any(part in name for part in STRANGERS) for name in others)
    with pytest.raises(ValueError, match=r"unknown architecture 'vit_small_patch16_dinov3'; nearest: "):
        ours.arguments_of("config.json", {"architecture": "vit_small_patch16_dinov3"})


@pytest.mark.parametrize("cls, table", [("vision_transformer.VisionTransformer", "vit"), ("eva.Eva", "eva")])
def test_the_tables_know_every_argument(cls, table):
    """Names and defaults of the classes themselves; an unknown argument is refused by its name."""
    module, name = cls.split(".")
    signature = inspect.signature(getattr(getattr(timm.models, module), name).__init__).parameters
    keys = ours._SECTIONS[table].keys
    assert keys.keys() - {"strict_img_size"} == signature.keys() - {"self"}
    for key, entry in keys.items():
        if entry.fate == "used" and entry.kind != "any" and key != "act_layer" and key != "norm_layer":
            assert entry.default == signature[key].default, key
    architecture = {"vit": "vit_tiny_patch16_224", "eva": "vit_pe_core_tiny_patch16_384"}[table]
    for key, entry in keys.items():
        if entry.fate == "refused":
            wrong = {"architecture": architecture, "model_args": {key: "other"}}
            with pytest.raises(ValueError, match=f"'{key}'"):
                ours.arguments_of("config.json", wrong)
    with pytest.raises(ValueError, match="'unheard' is unknown"):
        ours.arguments_of("config.json", {"architecture": architecture, "model_args": {"unheard": 1}})


def test_braces():
    assert list(expand("x{1,2}_{3,4} y")) == ["x1_3", "x1_4", "x2_3", "x2_4", "y"]
