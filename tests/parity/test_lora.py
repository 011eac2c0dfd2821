"""Low-rank adapters for Stable Diffusion beside diffusers and PEFT: kohya's names and diffusers' own."""

import json

import jax
import numpy as np
import oracles  # noqa: F401
import pytest
import safetensors.torch
import torch
import transformers
from diffusers.loaders import StableDiffusionLoraLoaderMixin as Loader
from omnax import hub
from omnax.hub.bundle import assemble
from omnax.hub.families.stable_diffusion import ldm
from omnax.hub.families.stable_diffusion.lora import add_lora
from references.stable_diffusion import apply, close, inputs, randomized, to_torch, write_unets

RANK = 3
BLOCK = "attentions.0.transformer_blocks.0"
MODULES = [
    f"down_blocks.0.{BLOCK}.attn1.to_q",
    f"down_blocks.0.{BLOCK}.attn2.to_k",
    f"mid_block.{BLOCK}.attn1.to_out.0",
    f"mid_block.{BLOCK}.ff.net.0.proj",
    f"up_blocks.1.{BLOCK}.ff.net.2",
    f"up_blocks.1.{BLOCK}.attn2.to_v",
    "down_blocks.0.attentions.0.proj_in",
]
TEXT_MODULES = ["encoder.layers.0.self_attn.q_proj", "encoder.layers.1.self_attn.out_proj"]
TOKENS = np.array([[5, 6, 7, 98]])


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """(UNets by form, a text encoder): each an oracle and what `hub` makes of its directory."""
    folder = tmp_path_factory.mktemp("models")
    unets = {name: (oracle, hub.load(path)) for name, (oracle, path) in write_unets(folder).items()}
    config = transformers.CLIPTextConfig(
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        vocab_size=99,
        max_position_embeddings=9,
        eos_token_id=98,
    )
    text = randomized(transformers.CLIPTextModel(config))
    text.save_pretrained(folder / "text")
    return unets, (text, hub.load(folder / "text"))


def fresh(model):
    copy = type(model)(model.config) if hasattr(model.config, "model_type") else type(model).from_config(model.config)
    copy.load_state_dict(model.state_dict())
    return copy.eval()


def factors(model, modules, seed=0):
    """module -> (down, up), as the layer's own kind has them."""
    rng, pairs = np.random.default_rng(seed), {}
    for name in modules:
        out, *inner = model.get_submodule(name).weight.shape
        ones = [1] * (len(inner) - 1)
        draw = lambda *shape: torch.tensor(0.3 * rng.normal(size=shape), dtype=torch.float32)  # noqa: E731
        pairs[name] = draw(RANK, *inner), draw(out, RANK, *ones)
    return pairs


def kohya(pairs, prefix, alpha):
    state = {}
    for name, (down, up) in pairs.items():
        module = f"{prefix}{name.replace('.', '_')}"
        state |= {f"{module}.lora_down.weight": down, f"{module}.lora_up.weight": up}
        state[f"{module}.alpha"] = torch.tensor(alpha)
    return state


def peft(pairs, prefix, ends=("lora_A.weight", "lora_B.weight")):
    return {f"{prefix}{name}.{end}": x for name, pair in pairs.items() for end, x in zip(ends, pair, strict=True)}


def text_path(model, name):
    """The module in whatever version of transformers made the model."""
    return name if not hasattr(model, "text_model") else f"text_model.{name}"


@pytest.mark.parametrize("kind", ["kohya", "peft"])
def test_unet_and_text_encoder_equal(models, kind, tmp_path):
    unets, (text, text_bundle) = models
    unet, unet_bundle = unets["1.5"]
    pairs = factors(unet, MODULES)
    text_pairs = factors(text, [text_path(text, name) for name in TEXT_MODULES], seed=1)
    named = {f"text_model.{name.removeprefix('text_model.')}": pair for name, pair in text_pairs.items()}
    path = tmp_path / "pytorch_lora_weights.safetensors"
    if kind == "kohya":
        state = kohya(pairs, "lora_unet_", 2.0) | kohya(named, "lora_te_", 6.0)
    else:
        state = peft(pairs, "unet.") | peft(named, "text_encoder.")
    safetensors.torch.save_file({name: x.contiguous() for name, x in state.items()}, path)
    oracle, text_oracle = fresh(unet), fresh(text)
    loaded, alphas = Loader.lora_state_dict(str(path))
    Loader.load_lora_into_unet(loaded, alphas, oracle, adapter_name="a")
    bundle = assemble({"unet": unet_bundle, "text_encoder": text_bundle}, "diffusers", {}, {})
    tuned = add_lora(bundle, path)
    arrays = inputs("1.5")
    theirs = oracle(to_torch(arrays["latents"]), 9, to_torch(arrays["context"])).sample
    assert (theirs - unet(to_torch(arrays["latents"]), 9, to_torch(arrays["context"])).sample).abs().max() > 1e-2
    close(apply(tuned.components["unet"], arrays, 9), theirs)
    # The text encoder by the formula: what PEFT wraps is named by the version of transformers.
    factor = {"kohya": 6.0 / RANK, "peft": 1.0}[kind]
    for name, (down, up) in text_pairs.items():
        text_oracle.get_submodule(name).weight.data += factor * up @ down
    component = tuned.components["text_encoder"]
    run = jax.jit(lambda params: component.model.apply({"params": params}, TOKENS)["tokens"])
    close(run(component.params), text_oracle(torch.tensor(TOKENS)).last_hidden_state)


def test_half_the_scale_twice_is_the_whole(models, tmp_path):
    unet, bundle = models[0]["1.5"]
    path = tmp_path / "lora.safetensors"
    safetensors.torch.save_file(kohya(factors(unet, MODULES), "lora_unet_", 2.0), path)
    once, twice = add_lora(bundle, path), add_lora(add_lora(bundle, path, 0.5), path, 0.5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), once.params, twice.params)


def test_names_of_other_eras_mean_the_same(models, tmp_path):
    unet, bundle = models[0]["2.1"]
    pairs = factors(unet, [name for name in MODULES if ".ff." not in name])
    backwards = {new: old for old, new in ldm.unet_names(bundle.config).items()}
    attention = {name: pair for name, pair in pairs.items() if ".attn" in name}
    early = {}
    for name, pair in attention.items():
        layer, _, projection = name.removesuffix(".0").rpartition(".")
        for x, tensor in zip(("down", "up"), pair, strict=True):
            early[f"unet.{layer}.processor.{projection}_lora.{x}.weight"] = tensor
    rest = {name: pair for name, pair in pairs.items() if name not in attention}
    flat = {name: tuple(x.flatten(1) for x in pair) for name, pair in pairs.items()}
    files = {
        "reference": peft(pairs, "unet."),
        "ldm": kohya({ldm.renamed(name, backwards): pair for name, pair in pairs.items()}, "lora_unet_", float(RANK)),
        "lora.down": peft(flat, "unet.", ("lora.down.weight", "lora.up.weight")),
        "base_model": peft(pairs, "base_model.model."),
        "early": early | peft(rest, "unet."),
    }
    tuned = {}
    for name, state in files.items():
        torch.save(state, tmp_path / f"{name}.bin")
        tuned[name] = add_lora(bundle, tmp_path / f"{name}.bin").params
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), tuned[name], tuned["reference"])
    assert not np.array_equal(
        *(
            x["encoder"]["middle"]["attention"]["transformer"]["blocks_0"]["attn1"]["out"]["kernel"]
            for x in (tuned["reference"], bundle.params)
        )
    )


def test_alpha_in_the_header_counts(models, tmp_path):
    unet, bundle = models[0]["1.5"]
    state, path = peft(factors(unet, MODULES), "unet."), tmp_path / "lora.safetensors"
    settings = {"unet.r": RANK, "unet.lora_alpha": 2 * RANK, "unet.use_dora": False}
    safetensors.torch.save_file(state, path, {"format": "pt", "lora_adapter_metadata": json.dumps(settings)})
    doubled = add_lora(bundle, path).params
    safetensors.torch.save_file(state, path)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), doubled, add_lora(bundle, path, 2.0).params)
    settings["unet.use_rslora"] = True
    safetensors.torch.save_file(state, path, {"lora_adapter_metadata": json.dumps(settings)})
    with pytest.raises(ValueError, match="metadata has 'use_rslora': True"):
        add_lora(bundle, path)


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("lora_unet_down_blocks_0_attentions_0_proj_inn.lora_up.weight", (4, 3), "no weight of this model.*proj_in'"),
        ("lora_unet_mid_block_attentions_0_proj_in.dora_scale", (4,), "holds DoRA"),
        ("lora_unet_mid_block_attentions_0_proj_in.hada_w1_a", (4, 4), "holds LoHa"),
        ("lora_unet_mid_block_attentions_0_proj_in.lora_up.weight", (32, 3, 1, 1), "lacks its other half"),
        ("lora_unet_mid_block_attentions_0_proj_in.diff", (4,), "no weight of this model"),
        ("transformer.blocks.0.lora_A.weight", (3, 4), "begins with none of"),
        ("lora_te_text_model_encoder_layers_0_mlp_fc1.lora_up.weight", (4, 3), "changes 'text_encoder', which"),
    ],
)
def test_what_is_no_pair_for_a_weight_is_refused_by_name(models, name, shape, message, tmp_path):
    bundle = models[0]["1.5"][1]
    safetensors.torch.save_file({name: torch.zeros(shape)}, tmp_path / "lora.safetensors")
    with pytest.raises(ValueError, match=message):
        add_lora(bundle, tmp_path / "lora.safetensors")


def test_an_adapter_of_another_base_is_named_by_its_shapes(models, tmp_path):
    unet = models[0]["1.5"][0]
    pairs = factors(unet, MODULES)
    wrong = {name: (down[:, :-1], up) for name, (down, up) in pairs.items()}
    torch.save(peft(wrong, "unet."), tmp_path / "lora.bin")
    with pytest.raises(ValueError, match=r"'.*\.weight' changes by \(.*\), expected \("):
        add_lora(models[0]["1.5"][1], tmp_path / "lora.bin")
