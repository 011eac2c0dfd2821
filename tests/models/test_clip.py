"""CLIP by itself: published sizes, pooling rules, masks, layouts. (Parity with others: tests/parity/test_clip.py.)"""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from omnax.models import clip, eva
from omnax.models.layers import stack_layers

# variant: (parameters of all, of the image tower, GFLOPs of one image and of one text): spec vit_clip.md B2.1
PUBLISHED = {
    "B/32": (151277313, 87849216, 8.82, 5.96),
    "B/16": (149620737, 86192640, 35.13, 5.96),
    "L/14": (427616513, 303966208, 162.03, 13.3),
    "L/14@336": (427944193, 304293888, 381.92, 13.3),
    "H/14": (986109441, 632076800, 334.59, 47.09),
    "H/14@378": (986714881, 632682240, None, 47.09),
    "g/14": (1366678273, 1012645632, 534.06, 47.09),
    "bigG/14": (2539567105, 1844907264, 967.5, 97.86),
    "EVA01-g/14": (1136435841, 1012588928, 534.06, 13.3),
    "EVA01-g/14+": (1366621569, 1012588928, 534.06, 47.09),
    "EVA02-B/16": (149691137, 86263040, 35.13, 5.96),
    "EVA02-L/14": (427755457, 304105152, 162.0, 13.3),
    "EVA02-L/14@336": (428083137, 304432832, None, 13.3),
    "EVA02-E/14": (4704589569, 4350556928, 2264.33, 47.09),
    "EVA02-E/14+": (5044889089, 4350556928, 2264.33, 97.86),
    "SigLIP-B/16": (203155970, 92884224, None, 11.02),
    "SigLIP-So400m/14@384": (877960498, 428225600, None, 53.13),
}
TRUNK = {"num_classes": 0, "width": 16, "depth": 2, "num_heads": 2, "mlp_dim": 24, "patch_size": 4, "image_size": 8}
TEXT = clip.TextConfig(12, 2, 2, 20, vocab_size=50, context_length=10, projection_dim=6)


def tiny(**fields):
    return clip.CLIPConfig(clip.ImageConfig(clip.ViTConfig(**TRUNK), 6), clip.dataclasses.replace(TEXT, **fields))


def build(config):
    model = clip.CLIP(config)
    image = jax.random.normal(jax.random.key(0), (2, 8, 8, 3))
    tokens = jnp.array([[40, 3, 4, 49, 0, 0], [40, 5, 49, 0, 0, 0]])
    return model, jax.jit(model.init)(jax.random.key(1), image, tokens)["params"], image, tokens


def count(tree):
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize("variant", PUBLISHED)
def test_published_parameter_counts_and_flops(variant):
    total, visual, image_gflops, text_gflops = PUBLISHED[variant]
    config = clip.config(variant, scan=True)
    image = jnp.zeros((1, *config.image.trunk.image_size, 3))
    params = jax.eval_shape(clip.CLIP(config).init, jax.random.key(0), image, jnp.zeros((1, 4), int))["params"]
    assert (count(params), count(params["image"])) == (total, visual)
    image_flops, text_flops = config.num_forward_flops()
    if image_gflops is not None:
        np.testing.assert_allclose(image_flops / 1e9, image_gflops, rtol=2e-3)
    np.testing.assert_allclose(text_flops / 1e9, text_gflops, rtol=2e-3)


def test_every_size_is_tested():
    assert set(PUBLISHED) == set(clip.SIZES)


def test_pooling_rules():
    """The end of text is the largest id, the first `eos_id`, or a position; textual inversion adds larger ids."""
    tokens = jnp.array([[40, 7, 49, 0], [40, 49, 49, 49], [40, 60, 7, 49], [40, 1, 2, 3]])
    assert clip.pool_index(tokens, "argmax", 49).tolist() == [2, 1, 1, 0]
    assert clip.pool_index(tokens, "eos", 49).tolist() == [2, 1, 3, 0]
    assert clip.pool_index(tokens, "last", 49).tolist() == [3] * 4
    assert clip.pool_index(tokens, "first", 49).tolist() == [0] * 4


def test_causal_text_ignores_what_follows_and_the_padding_mask_changes_nothing_before_it():
    model, params, _, tokens = build(tiny())
    encode = jax.jit(lambda t, mask=None: model.apply({"params": params}, t, mask=mask, method=clip.CLIP.encode_text))
    out = encode(tokens)
    padded = encode(jnp.pad(tokens, ((0, 0), (0, 3))))
    np.testing.assert_allclose(padded["embeds"], out["embeds"], atol=1e-6)
    np.testing.assert_allclose(padded["tokens"][:, :6], out["tokens"], atol=1e-6)
    mask = jnp.arange(6) <= tokens.argmax(-1)[:, None]
    np.testing.assert_allclose(encode(tokens, mask)["embeds"], out["embeds"], atol=1e-6)
    both_ways = clip.CLIP(tiny(causal=False))
    other = both_ways.apply({"params": params}, tokens, method=clip.CLIP.encode_text)
    assert np.abs(other["embeds"] - out["embeds"]).max() > 1e-3


def test_outputs():
    config = clip.dataclasses.replace(tiny(), logit_bias_init=-10.0)
    model, params, image, tokens = build(config)
    out = model.apply({"params": params}, image, tokens)
    np.testing.assert_allclose(jnp.linalg.norm(out["image_embeds"], axis=-1), 1, atol=1e-6)
    np.testing.assert_allclose(out["logit_scale"], 1 / 0.07, rtol=1e-6)
    cosines = np.asarray(out["image_embeds"]) @ np.asarray(out["text_embeds"]).T
    np.testing.assert_allclose(out["logits"], cosines / 0.07 - 10, atol=1e-5)
    text = model.apply({"params": params}, tokens, hidden_states=True, method=clip.CLIP.encode_text)
    assert text["hidden_states"].shape == (3, 2, 6, 12)
    np.testing.assert_allclose(text["embeds"], out["text_embeds"], atol=1e-6)


def test_scanned_equals_unrolled_and_bfloat16_keeps_float32_embeddings():
    model, params, image, tokens = build(tiny())
    expected = model.apply({"params": params}, image, tokens)
    config = tiny(scan=True)
    trunk = clip.dataclasses.replace(config.image.trunk, scan=True)
    config = clip.dataclasses.replace(config, image=clip.dataclasses.replace(config.image, trunk=trunk))
    scanned = clip.CLIP(config).apply({"params": stack_layers(params)}, image, tokens)
    np.testing.assert_allclose(scanned["logits"], expected["logits"], atol=1e-5)
    half = clip.CLIP(tiny(), dtype=jnp.bfloat16).apply({"params": params}, image, tokens)
    assert half["image_embeds"].dtype == half["logits"].dtype == jnp.float32
    np.testing.assert_allclose(half["logits"], expected["logits"], atol=0.3)  # 8 bits of mantissa at a scale of 14


def test_initialisation_of_the_text_tower():
    config = clip.TextConfig(64, 4, 2, 256, vocab_size=500, projection_dim=32)
    params = jax.jit(clip.TextTower(config).init)(jax.random.key(0), jnp.zeros((1, 5), int))["params"]
    block = params["encoder"]["blocks_0"]
    std = {
        "token": (params["token_embed"]["embedding"], 0.02),
        "position": (params["pos_embed"], 0.01),
        "query": (block["attn"]["query"]["kernel"], 64**-0.5),
        "out": (block["attn"]["out"]["kernel"], 64**-0.5 * 8**-0.5),
        "fc1": (block["mlp"]["fc1"]["kernel"], 128**-0.5),
        "fc2": (block["mlp"]["fc2"]["kernel"], 64**-0.5 * 8**-0.5),
        "fc2 bias": (block["mlp"]["fc2"]["bias"], (3 * 256) ** -0.5),
        "projection": (params["projection"]["kernel"], 64**-0.5),
    }
    for name, (leaf, expected) in std.items():
        np.testing.assert_allclose(leaf.std(), expected, rtol=0.15, err_msg=name)


def test_eva_initialisation_is_rescaled_by_depth():
    config = eva.EvaConfig(**TRUNK, gated=True, sub_norm=True, mlp_norm=True)
    params = jax.jit(eva.Eva(config).init)(jax.random.key(0), jnp.zeros((1, 8, 8, 3)))["params"]
    ratios = jax.tree.map(lambda new, old: (new / old).mean(), eva.rescale_init(params, 2), params)["encoder"]
    np.testing.assert_allclose(ratios["blocks_1"]["attn"]["out"]["kernel"], 0.5, rtol=1e-6)
    np.testing.assert_allclose(ratios["blocks_0"]["mlp"]["fc2"]["kernel"], 0.5**0.5, rtol=1e-6)
    np.testing.assert_allclose(ratios["blocks_1"]["mlp"]["fc1"]["kernel"], 1)
    stacked = eva.rescale_init(stack_layers(params), 2)
    jax.tree.map(np.testing.assert_array_equal, stacked, stack_layers(eva.rescale_init(params, 2)))


def test_bad_configs_and_inputs_are_named():
    with pytest.raises(ValueError, match="unknown CLIP variant 'B/64'"):
        clip.config("B/64")
    with pytest.raises(ValueError, match=r"unknown fields \['colour'\]"):
        clip.config("B/32", colour="red")
    with pytest.raises(ValueError, match=r"TextConfig\.pool is 'mean', expected one of"):
        tiny(pool="mean")
    with pytest.raises(ValueError, match="unknown EVA variant"):
        eva.config("EVA03")
    with pytest.raises(ValueError, match="rope and patch_dropout exclude each other"):
        eva.config("EVA02-B/16", patch_dropout=0.5)
    model, params, image, _ = build(tiny())
    with pytest.raises(ValueError, match="text of 11 tokens, expected at most 10"):
        model.apply({"params": params}, image, jnp.zeros((2, 11), int))
