"""IP-Adapters beside diffusers: every published variant through a file, on small random UNets."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import oracles  # noqa: F401
import pytest
import safetensors.torch
import torch
from diffusers.image_processor import IPAdapterMaskProcessor
from omnax import hub
from omnax.hub.families.stable_diffusion import ip_adapter as family
from omnax.hub.mapping import save_tensors
from omnax.models.layers import stack_layers
from omnax.models.stable_diffusion import ip_adapter, sizes
from omnax.models.stable_diffusion.images import ImageContext, attend_with_images, mask_of_queries
from omnax.models.stable_diffusion.unet import UNet
from references.stable_diffusion import added, apply, close, inputs, to_torch, write_unets

CONTEXT = 64  # channels of the tokens
RNG = np.random.default_rng(0)


def names_and_shapes(kind, features):
    """image_proj of the published code, variant by variant: ip_adapter.py, resampler.py, ip_adapter_faceid.py."""

    def perceiver(prefix, width, queries):
        shapes = {"proj_in.weight": (width, features), "proj_in.bias": (width,)}
        shapes |= {"proj_out.weight": (CONTEXT, width), "proj_out.bias": (CONTEXT,)}
        shapes |= {"norm_out.weight": (CONTEXT,), "norm_out.bias": (CONTEXT,)}
        if queries:
            shapes["latents"] = (1, queries, width)
        for i in range(4):
            for norm in ("0.norm1", "0.norm2", "1.0"):
                shapes |= {f"layers.{i}.{norm}.{part}": (width,) for part in ("weight", "bias")}
            shapes |= {f"layers.{i}.0.{name}.weight": (width, width) for name in ("to_q", "to_out")}
            shapes[f"layers.{i}.0.to_kv.weight"] = (2 * width, width)
            shapes[f"layers.{i}.1.1.weight"], shapes[f"layers.{i}.1.3.weight"] = (4 * width, width), (width, 4 * width)
        return {prefix + name: shape for name, shape in shapes.items()}

    def mlp(inner, hidden, outer):
        shapes = {"proj.0.weight": (hidden, inner), "proj.0.bias": (hidden,)}
        return shapes | {"proj.2.weight": (outer, hidden), "proj.2.bias": (outer,)}

    norm = {"norm.weight": (CONTEXT,), "norm.bias": (CONTEXT,)}
    return {
        "base": {"proj.weight": (4 * CONTEXT, features), "proj.bias": (4 * CONTEXT,), **norm},
        "full": mlp(features, features, CONTEXT) | {"proj.3.weight": (CONTEXT,), "proj.3.bias": (CONTEXT,)},
        "plus": perceiver("", 128, 6),
        "faceid": mlp(features, 2 * features, 4 * CONTEXT) | norm,
        "portrait": mlp(features, 2 * features, 16 * CONTEXT) | norm,
        "faceid-plus": mlp(14, 28, 4 * CONTEXT) | norm | perceiver("perceiver_resampler.", CONTEXT, 0),
    }[kind]


def drawn(shapes, seed):
    rng = np.random.default_rng(seed)
    return {
        name: torch.tensor(rng.normal(size=shape) * (shape[-1] ** -0.5 if len(shape) > 1 else 0.5), dtype=torch.float32)
        for name, shape in shapes.items()
    }


def attention_layers(unet):
    """(number, name, width) of every attention processor, as diffusers numbers them."""
    for n, name in enumerate(unet.attn_processors):
        module = unet.get_submodule(name.removesuffix(".processor"))
        yield n, name, module.to_q.weight.shape[0]


def state(kind, unet, features, seed=0):
    """An adapter's file, as two dicts."""
    shapes = {}
    for n, _, width in attention_layers(unet):
        if n % 2:
            shapes |= {f"{n}.{name}.weight": (width, CONTEXT) for name in ("to_k_ip", "to_v_ip")}
    return {"image_proj": drawn(names_and_shapes(kind, features), seed), "ip_adapter": drawn(shapes, seed + 1)}


@pytest.fixture(scope="module")
def unets(tmp_path_factory):
    """form -> (oracle, what `hub` makes of its directory)."""
    made = write_unets(tmp_path_factory.mktemp("unets"))
    return {name: (oracle, hub.load(path)) for name, (oracle, path) in made.items()}


def fresh_oracle(unet):
    """A copy: loading an adapter changes a UNet of diffusers."""
    copy = type(unet).from_config(unet.config)
    copy.load_state_dict(unet.state_dict())
    return copy.eval()


def saved(tmp_path, adapter, name="adapter.bin"):
    if name.endswith(".bin"):
        torch.save(adapter, tmp_path / name)
    else:
        flat = {f"{part}.{key}": tensor for part, tensors in adapter.items() for key, tensor in tensors.items()}
        safetensors.torch.save_file(flat, tmp_path / name)
    return hub.load(tmp_path / name)


def draw(*shape):
    return RNG.normal(size=shape).astype(np.float32)


def tokens_of(bundle, *inputs):
    return jax.jit(lambda params, *x: bundle.model.apply({"params": params}, *x))(bundle.params, *inputs)


# variant -> (form of the UNet, shape of an image's features, images)
VARIANTS = {
    "base": ("1.5", (10,), 1),
    "full": ("2.1", (5, 12), 1),
    "plus": ("XL", (5, 12), 2),
    "faceid": ("1.5", (10,), 1),
    "portrait": ("1.5", (10,), 3),
}


@pytest.mark.parametrize("kind", VARIANTS)
def test_adapters_equal(unets, kind, tmp_path):
    form, shape, images = VARIANTS[kind]
    unet, ours = unets[form]
    adapter = state(kind, unet, shape[-1])
    bundle = saved(tmp_path, adapter)
    oracle = fresh_oracle(unet)
    oracle._load_ip_adapter_weights([adapter], low_cpu_mem_usage=False)
    for name, processor in oracle.attn_processors.items():
        if name.endswith("attn2.processor"):
            processor.scale = [0.6]
    arrays, features = inputs(form), draw(2, images, *shape)
    conditions = {"image_embeds": [torch.tensor(features)]} | (added(arrays) or {})
    theirs = oracle(to_torch(arrays["latents"]), 500, to_torch(arrays["context"]), added_cond_kwargs=conditions)
    output = tokens_of(bundle, features)
    expected = oracle.encoder_hid_proj([torch.tensor(features)])[0]
    close(output.tokens.reshape(expected.shape[0], images, -1, CONTEXT).reshape(-1), expected.reshape(-1))
    placed = ip_adapter.place(ours.config, bundle.config, output, 0.6)
    close(apply(ours, arrays, 500, images=placed), theirs.sample)
    # Without scale the base's output, bit for bit; with it another.
    silent = ip_adapter.place(ours.config, bundle.config, output, 0.0)
    base = apply(ours, arrays, 500)
    np.testing.assert_array_equal(apply(ours, arrays, 500, images=silent), base)
    assert np.abs(theirs.sample.permute(0, 2, 3, 1).numpy() - base).max() > 1e-2
    # Both kinds of files, back and forth.
    hub.save(bundle, tmp_path / "copy.bin")
    copy = torch.load(tmp_path / "copy.bin")
    assert all(torch.equal(copy[part][key], x) for part, tensors in adapter.items() for key, x in tensors.items())
    hub.save(bundle, tmp_path / "copy.safetensors", "safetensors")
    jax.tree.map(np.testing.assert_array_equal, hub.load(tmp_path / "copy.safetensors").params, bundle.params)


@pytest.mark.parametrize("shortcut", [False, True])
def test_faceid_plus_equals(unets, shortcut, tmp_path):
    unet, ours = unets["1.5"]
    adapter = state("faceid-plus", unet, 12)
    bundle = hub.load(saved_path(tmp_path, adapter), shortcut=shortcut)
    oracle = fresh_oracle(unet)
    oracle._load_ip_adapter_weights([adapter], low_cpu_mem_usage=False)
    features, identity, arrays = draw(2, 1, 5, 12), draw(2, 1, 14), inputs("1.5")
    projection = oracle.encoder_hid_proj.image_projection_layers[0]
    projection.clip_embeds, projection.shortcut = torch.tensor(features), shortcut
    conditions = {"image_embeds": [torch.tensor(identity)]}
    theirs = oracle(to_torch(arrays["latents"]), 9, to_torch(arrays["context"]), added_cond_kwargs=conditions)
    output = tokens_of(bundle, features, identity)
    close(apply(ours, arrays, 9, images=ip_adapter.place(ours.config, bundle.config, output)), theirs.sample)
    hub.save(bundle, tmp_path / "copy.bin")
    assert hub.load(tmp_path / "copy.bin", shortcut=shortcut).config == bundle.config
    with pytest.raises(ValueError, match="takes face embeddings beside image features"):
        tokens_of(bundle, features)


@pytest.mark.parametrize("scan", [False, True])
def test_faceid_with_low_rank_terms_equals(unets, scan, tmp_path):
    """The terms go into every projection of both attentions, the image's own keys and values left out."""
    unet, ours = unets["1.5"]
    adapter, shapes = state("faceid", unet, 10), {}
    for n, _, width in attention_layers(unet):
        for x in ("to_q", "to_k", "to_v", "to_out"):
            inner = CONTEXT if n % 2 and x in ("to_k", "to_v") else width
            shapes |= {f"{n}.{x}_lora.down.weight": (3, inner), f"{n}.{x}_lora.up.weight": (width, 3)}
    adapter["ip_adapter"] |= {name: 0.3 * x for name, x in drawn(shapes, 9).items()}
    oracle = fresh_oracle(unet)
    for n, name, _ in attention_layers(unet):
        module = oracle.get_submodule(name.removesuffix(".processor"))
        for x in ("to_q", "to_k", "to_v", "to_out"):
            down, up = (adapter["ip_adapter"][f"{n}.{x}_lora.{part}.weight"] for part in ("down", "up"))
            (module.to_out[0] if x == "to_out" else getattr(module, x)).weight.data += 0.8 * up @ down
    oracle._load_ip_adapter_weights([adapter], low_cpu_mem_usage=False)
    bundle = saved(tmp_path, adapter)
    assert bundle.config.rank == 3
    features, arrays = draw(2, 1, 10), inputs("1.5")
    conditions = {"image_embeds": [torch.tensor(features)]}
    theirs = oracle(to_torch(arrays["latents"]), 9, to_torch(arrays["context"]), added_cond_kwargs=conditions)
    images = ip_adapter.place(ours.config, bundle.config, tokens_of(bundle, features))
    params = stack_layers(ours.params) if scan else ours.params
    config = dataclasses.replace(ours.config, scan=scan)
    tuned = ip_adapter.add_low_rank(ours.config, params, bundle.params, 0.8)
    tuned = dataclasses.replace(ours, model=UNet(config), config=config, params=tuned)
    close(apply(tuned, arrays, 9, images=images), theirs.sample)
    hub.save(bundle, tmp_path / "copy.bin")
    copy = torch.load(tmp_path / "copy.bin")["ip_adapter"]
    assert all(torch.equal(copy[key], x) for key, x in adapter["ip_adapter"].items())


def saved_path(tmp_path, adapter):
    torch.save(adapter, tmp_path / "adapter.bin")
    return tmp_path / "adapter.bin"


def test_two_adapters_with_masks_and_scales_by_place(unets, tmp_path):
    """The first sees two images, each where its mask is; the second has a scale of its own in one transformer."""
    unet, ours = unets["1.5"]
    adapters = [state("base", unet, 10), state("plus", unet, 12, seed=7)]
    oracle = fresh_oracle(unet)
    oracle._load_ip_adapter_weights(adapters, low_cpu_mem_usage=False)
    for name, processor in oracle.attn_processors.items():
        if name.endswith("attn2.processor"):
            processor.scale = [0.7, 0.4 if name.startswith("up_blocks.1.attentions.1") else 0.0]
    mask = np.zeros((2, 16, 16), np.float32)
    mask[0, :, :7], mask[1, 5:] = 1, 1
    features, arrays = [draw(2, 2, 10), draw(2, 1, 5, 12)], inputs("1.5")
    masks = [torch.tensor(mask)[None], torch.ones(1, 1, 16, 16)]
    theirs = oracle(
        to_torch(arrays["latents"]),
        9,
        to_torch(arrays["context"]),
        added_cond_kwargs={"image_embeds": [torch.tensor(x) for x in features]},
        cross_attention_kwargs={"ip_adapter_masks": masks},
    )
    bundles = [saved(tmp_path, adapter, f"{i}.safetensors") for i, adapter in enumerate(adapters)]
    first, second = (tokens_of(bundle, x) for bundle, x in zip(bundles, features, strict=True))
    images = ip_adapter.merge(
        ip_adapter.place(ours.config, bundles[0].config, first, 0.7, jnp.asarray(mask)),
        ip_adapter.place(ours.config, bundles[1].config, second, {"up_1_1": 0.4}, jnp.ones((1, 16, 16))),
    )
    close(apply(ours, arrays, 9, images=images), theirs.sample)


@pytest.mark.filterwarnings("ignore:The aspect ratio of the mask")  # of masks that do not fit: padded or cut
@pytest.mark.parametrize(("shape", "queries"), [((16, 16), 64), ((16, 24), 54), ((10, 21), 63), ((33, 20), 40)])
def test_masks_of_queries_equal(shape, queries):
    mask = RNG.integers(0, 2, shape).astype(np.float32)
    theirs = IPAdapterMaskProcessor.downsample(torch.tensor(mask)[None], 1, queries, 1)[0, :, 0]
    np.testing.assert_allclose(mask_of_queries(jnp.asarray(mask), queries), theirs, atol=1e-6)


def test_one_softmax_over_text_and_image(unets, tmp_path):
    """A joint softmax weighs the two attentions by their sums of exponentials (spec: the notes' form)."""
    query, key, value = (jnp.asarray(draw(1, n, 2, 4)) for n in (5, 3, 3))
    image_key, image_value = (jnp.asarray(draw(1, 1, 2, 8)) for _ in range(2))
    context = ImageContext(image_key, image_value, jnp.float32(0.3), joint=True)
    got = attend_with_images(query, key, value, images=[context])
    for n in range(2):
        heads = [np.asarray(x[0, 0].reshape(2, 2, 4)[:, n], np.float64) for x in (image_key, image_value)]
        logits = [np.asarray(query[0, :, n], np.float64) @ k.T / 2 for k in (np.asarray(key[0, :, n]), heads[0])]
        text, image = (np.exp(x) for x in logits)
        total = text.sum(1, keepdims=True) + 0.3 * image.sum(1, keepdims=True)
        expected = (text @ np.asarray(value[0, :, n]) + 0.3 * image @ heads[1]) / total
        np.testing.assert_allclose(got[0, :, n], expected, atol=1e-5)
    # In a UNet, tokens appended to the text's are the same as such keys and values through the text's projections.
    unet, ours = unets["1.5"]
    adapter = state("base", unet, 10)
    shared = {}
    for n, name, _ in attention_layers(unet):
        if n % 2:
            module = unet.get_submodule(name.removesuffix(".processor"))
            shared |= {f"{n}.to_k_ip.weight": module.to_k.weight.data, f"{n}.to_v_ip.weight": module.to_v.weight.data}
    joint = hub.load(saved_path(tmp_path, adapter | {"ip_adapter": shared}), mode="joint")
    torch.save({"image_proj": adapter["image_proj"]}, tmp_path / "appended.bin")
    appended = hub.load(tmp_path / "appended.bin")
    assert appended.config.mode == "appended" and appended.config.layer_widths == ()
    arrays, features = inputs("1.5"), draw(2, 1, 10)
    output = tokens_of(joint, features)
    images = ip_adapter.place(ours.config, joint.config, output)
    context = ip_adapter.append(jnp.asarray(arrays["context"]), tokens_of(appended, features))
    np.testing.assert_allclose(
        apply(ours, arrays, 9, images=images), apply(ours, arrays | {"context": context}, 9), atol=1e-5
    )


def test_an_adapter_of_another_base_is_named(unets, tmp_path):
    bundle = saved(tmp_path, state("base", unets["2.1"][0], 10))
    output = tokens_of(bundle, draw(1, 1, 10))
    with pytest.raises(ValueError, match=r"another base model: 6 layers .* expected 4 of .*16, 32"):
        ip_adapter.place(unets["1.5"][1].config, bundle.config, output)
    with pytest.raises(ValueError, match=r"image features \[1, 10\], expected \[B, I, 10\] for a linear adapter"):
        tokens_of(bundle, draw(1, 10))
    with pytest.raises(ValueError, match=r"scales for \['up_9_9'\], expected some of"):
        ip_adapter.place(unets["2.1"][1].config, bundle.config, output, {"up_9_9": 1.0})
    with pytest.raises(ValueError, match="3 scales, expected one or as many as the 6"):
        ip_adapter.place(unets["2.1"][1].config, bundle.config, output, [1.0, 2.0, 3.0])


# Parameters of the published files (spec controlnet_ip_adapter.md 2.7).
COUNTS = {
    "ip-adapter_sd15": 22_319_616,
    "ip-adapter-plus_sd15": 49_087_488,
    "ip-adapter-full-face_sd15": 21_794_304,
    "ip-adapter_sdxl": 351_285_248,
    "ip-adapter_sdxl_vit-h": 349_188_096,
    "ip-adapter-plus_sdxl_vit-h": 423_748_864,
    "ip-adapter-faceid_sd15": 48_354_816,
    "ip-adapter-faceid-plus_sd15": 78_260_736,
    "ip-adapter-faceid-plusv2_sd15": 78_260_736,
    "ip-adapter-faceid-portrait_sd15": 32_291_328,
    "ip-adapter-faceid_sdxl": 535_507_968,
    "ip-adapter-faceid-plusv2_sdxl": 743_707_648,
}


@pytest.mark.parametrize("name", COUNTS)
def test_published_adapters_have_the_published_counts(name):
    config = sizes.ip_adapter(name)
    tensors = save_tensors(family.abstract(config), family.table(config))
    assert sum(math.prod(tensor.shape) for tensor in tensors.values()) == COUNTS[name]
    numbers = [key.split(".")[1] for key in tensors if key.endswith("to_k_ip.weight")]
    assert sorted(map(int, numbers)) == list(range(1, 140 if "sdxl" in name else 32, 2))
    if "faceid" in name and "portrait" not in name:
        lora = [key for key in tensors if "_lora." in key]
        assert len(lora) == 8 * 2 * len(numbers)
        assert len(lora) + 2 * len(numbers) == (288 if "sd15" in name else 1260)


def test_the_numbers_of_layers_are_those_of_diffusers(unets):
    for oracle, ours in unets.values():
        widths = [width for n, _, width in attention_layers(oracle) if n % 2]
        places = [name for n, name, _ in attention_layers(oracle) if n % 2]
        expected = [(name, width) for name, depth, width in ours.config.transformers for _ in range(depth)]
        assert [width for _, width in expected] == widths
        for (ours_name, _), theirs in zip(expected, places, strict=True):
            kind, *numbers = ours_name.split("_")
            assert theirs.startswith({"down": "down_blocks.", "up": "up_blocks.", "middle": "mid_block."}[kind])
            assert all(number in theirs for number in numbers)
