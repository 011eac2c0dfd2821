"""The ViT by itself: published sizes, position variants, pooling, layouts. (Parity with others: tests/parity.)"""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from omnax.models import vit
from omnax.models.layers import stack_layers, unstack_layers

TINY = {
    "width": 16,
    "depth": 3,
    "num_heads": 2,
    "mlp_dim": 24,
    "patch_size": 4,
    "image_size": (8, 12),
    "num_classes": 5,
}

# (variant, resolution, parameters without head, with 1000 classes, with 21843 classes, GMACs): spec vit_clip.md A2
PUBLISHED = [
    ("Ti/16", 224, 5524416, 5717416, 9740115, 1.25),
    ("S/32", 224, 22493952, 22878952, 30903507, 1.14),
    ("S/16", 224, 21665664, 22050664, 30075219, 4.60),
    ("B/32", 224, 87455232, 88224232, 104252499, 4.41),
    ("B/16", 224, 85798656, 86567656, 102595923, 17.56),
    ("B/16", 384, 86090496, 86859496, 102887763, 55.48),
    ("B/8", 224, 85807872, 86576872, 102605139, 78.15),
    ("L/32", 224, 305510400, 306535400, 327899475, 15.38),
    ("L/16", 224, 303301632, 304326632, 325690707, 61.55),
    ("L/16", 384, 303690752, 304715752, 326079827, 191.07),
    ("H/14", 224, 630764800, 632045800, 658745683, 167.29),
    ("g/14", 224, 1011202432, 1012611432, 1041979219, 267.03),
    ("G/14", 224, 1842775680, 1844440680, 1879144275, 483.75),
]


def build(**fields):
    config = vit.ViTConfig(**(TINY | fields))
    model = vit.ViT(config)
    image = jax.random.normal(jax.random.key(0), (2, *config.image_size, 3))
    return model, model.init(jax.random.key(1), image)["params"], image


def count(config):
    params = jax.eval_shape(vit.ViT(config).init, jax.random.key(0), jnp.zeros((1, *config.image_size, 3)))["params"]
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))


@pytest.mark.parametrize("variant,resolution,trunk,classes_1k,classes_21k,gmacs", PUBLISHED)
def test_published_parameter_counts(variant, resolution, trunk, classes_1k, classes_21k, gmacs):
    for classes, expected in ((0, trunk), (1000, classes_1k), (21843, classes_21k)):
        config = vit.config(variant, image_size=resolution, num_classes=classes, scan=True)
        assert count(config) == expected
    config = vit.config(variant, image_size=resolution, num_classes=0)
    assert config.num_forward_flops() / 2e9 == pytest.approx(gmacs, abs=0.005)


@pytest.mark.parametrize("variant,expected", [("B/16", 103186515), ("H/14", 660385363)])
def test_representation_layer_counts(variant, expected):
    width = vit.SIZES[variant.split("/")[0]][0]
    assert count(vit.config(variant, num_classes=21843, pre_logits_dim=width, scan=True)) == expected


def test_every_size_of_the_table_is_a_config():
    assert {size: vit.config(f"{size}/16").width for size in vit.SIZES} == {s: v[0] for s, v in vit.SIZES.items()}


def test_scanned_equals_unrolled_and_the_layouts_convert():
    model, params, image = build()
    scanned = vit.ViT(vit.ViTConfig(**TINY, scan=True, remat="full"))
    stacked = stack_layers(params)
    assert jax.tree.map(jnp.shape, stacked) == jax.tree.map(jnp.shape, scanned.init(jax.random.key(0), image)["params"])
    jax.tree.map(np.testing.assert_array_equal, unstack_layers(stacked), params)

    def loss(model, params):
        return jnp.square(model.apply({"params": params}, image, hidden_states=True)["hidden_states"]).mean()

    value, gradient = jax.value_and_grad(loss, argnums=1)(model, params)
    scan_value, scan_gradient = jax.value_and_grad(loss, argnums=1)(scanned, stacked)
    np.testing.assert_allclose(value, scan_value, rtol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), stack_layers(gradient), scan_gradient)


def test_hidden_states_start_with_the_embeddings_and_end_before_the_norm():
    model, params, image = build()
    out = model.apply({"params": params}, image, hidden_states=True)
    assert out["hidden_states"].shape == (4, 2, 7, 16)
    last = out["hidden_states"][-1]
    normed = (last - last.mean(-1, keepdims=True)) / jnp.sqrt(last.var(-1, keepdims=True) + 1e-6)
    np.testing.assert_allclose(out["tokens"], normed * params["norm"]["scale"] + params["norm"]["bias"], atol=1e-5)
    np.testing.assert_array_equal(out["patches"], out["tokens"][:, 1:].reshape(2, 2, 3, 16))


def test_pooling():
    _, params, image = build(pool="token")
    out = {
        pool: vit.ViT(vit.ViTConfig(**TINY, pool=pool)).apply({"params": params}, image)
        for pool in ("token", "gap", "gap_all")
    }
    tokens = out["token"]["tokens"]
    np.testing.assert_array_equal(out["token"]["pooled"], tokens[:, 0])
    np.testing.assert_allclose(out["gap"]["pooled"], tokens[:, 1:].mean(1), atol=1e-6)
    np.testing.assert_allclose(out["gap_all"]["pooled"], tokens.mean(1), atol=1e-6)
    features = vit.ViT(vit.ViTConfig(**TINY, pool="none")).apply({"params": params}, image)
    assert set(features) == {"tokens", "patches"}


@pytest.mark.parametrize("grid", [(4, 4), (3, 5)])
def test_sincos_tables_equal_their_formulas(grid):
    width = 8
    table = vit.sincos_2d(grid, width)
    for (row, column), vector in ((i, table[i]) for i in np.ndindex(*grid)):
        omega = [10000 ** (-j / (width / 4 - 1)) for j in range(width // 4)]
        expected = [f(p * w) for p in (column, row) for f in (math.sin, math.cos) for w in omega]
        np.testing.assert_allclose(vector, expected, atol=1e-6)
    for position, vector in enumerate(vit.sincos_1d(7, width)):
        expected = [f(position / 10000 ** (2 * i / width)) for i in range(width // 2) for f in (math.sin, math.cos)]
        np.testing.assert_allclose(vector, expected, atol=1e-6)


@pytest.mark.parametrize("pos_embed", [name for name in vit.POSITIONS if name != "none"])
def test_position_variants_break_permutation_symmetry_and_follow_the_image_size(pos_embed):
    model, params, image = build(pos_embed=pos_embed, pool="gap")
    mirrored = jnp.concatenate([image[:, 4:], image[:, :4]], axis=1)  # the two rows of patches exchanged
    a, b = (model.apply({"params": params}, x)["pooled"] for x in (image, mirrored))
    assert np.abs(a - b).max() > 1e-4
    larger = jnp.concatenate([image, image], axis=1)
    assert model.apply({"params": params}, larger)["patches"].shape == (2, 4, 3, 16)


def test_class_token_order_conversion():
    """Original order -> big_vision order: the class token absorbs its position (spec A2)."""
    model, params, image = build()
    embed = params["embed"]
    converted = params | {
        "embed": {"cls_token": embed["cls_token"] + embed["pos_embed"][:, :1], "pos_embed": embed["pos_embed"][:, 1:]}
    }
    other = vit.ViT(vit.ViTConfig(**TINY, class_position=False))
    np.testing.assert_allclose(
        model.apply({"params": params}, image)["logits"], other.apply({"params": converted}, image)["logits"], atol=1e-6
    )


def test_drop_path_drops_whole_examples_and_keeps_the_mean():
    model, params, image = build(drop_path=0.5, depth=2)
    image = jnp.broadcast_to(image[:1], (512, *image.shape[1:]))
    params = jax.tree.map(lambda p: p + 0.05, params)

    def apply(train):
        out = model.apply(
            {"params": params}, image, train=train, hidden_states=True, rngs={"dropout": jax.random.key(2)}
        )
        return out["hidden_states"]

    trained, evaluated = apply(True), apply(False)
    np.testing.assert_allclose(trained[1], evaluated[1], atol=1e-6)  # rate 0 at the first block
    branch = trained[2] - trained[1]
    dropped = np.abs(branch).max((1, 2)) == 0
    assert 0.15 < dropped.mean() < 0.35  # both branches dropped: a quarter of the examples
    assert np.isfinite(trained).all()


def test_patch_dropout_keeps_the_class_token_and_a_random_share():
    model, params, image = build(patch_dropout=0.5)
    assert "patches" in model.apply({"params": params}, image)
    out = model.apply({"params": params}, image, train=True, rngs={"dropout": jax.random.key(0)}, hidden_states=True)
    embeddings = model.apply({"params": params}, image, hidden_states=True)["hidden_states"][0]
    assert out["tokens"].shape == (2, 4, 16) and "patches" not in out  # 1 + int(6 / 2)
    for kept, whole in zip(out["hidden_states"][0], embeddings, strict=True):
        np.testing.assert_array_equal(kept[0], whole[0])
        rows = [int(np.flatnonzero((whole == row).all(-1))[0]) for row in np.asarray(kept[1:])]
        assert len(set(rows)) == 3 and 0 not in rows


@pytest.mark.parametrize("init", vit.INITS)
def test_initialisers(init):
    """Spec A2, "Init used in training"."""
    config = vit.ViTConfig(**(TINY | {"width": 64, "mlp_dim": 256, "num_heads": 4, "depth": 2, "init": init}))
    params = vit.ViT(config).init(jax.random.key(0), jnp.zeros((1, 8, 12, 3)))["params"]
    block = params["encoder"]["blocks_0"]
    std = {
        "patch": params["patch_embed"]["kernel"].std(),
        "position": params["embed"]["pos_embed"].std(),
        "query": block["attn"]["query"]["kernel"].std(),
        "head": params["head"]["kernel"].std(),
        "mlp_bias": block["mlp"]["fc1"]["bias"].std(),
    }
    xavier, lecun = math.sqrt(2 / (64 + 64)), math.sqrt(1 / 48)
    expected = {
        "big_vision": {"patch": lecun, "position": 1 / 8, "query": xavier, "head": 0, "mlp_bias": 1e-6},
        "vision_transformer": {"patch": lecun, "position": 0.02, "query": xavier, "head": 0, "mlp_bias": 1e-6},
        "timm": {"patch": math.sqrt(1 / 3 / 48), "position": 0.02, "query": 0.02, "head": 0.02, "mlp_bias": 0},
        "hf": {"patch": 0.02, "position": 0.02, "query": 0.02, "head": 0.02, "mlp_bias": 0},
        "openai": {
            "patch": math.sqrt(1 / 3 / 48),
            "position": 1 / 8,
            "query": math.sqrt(1 / 2 / 64),
            "head": 0.02,
            "mlp_bias": math.sqrt(1 / 3 / 64),
        },
    }[init]
    for name, value in expected.items():
        np.testing.assert_allclose(std[name], value, rtol=0.15, atol=1e-9, err_msg=name)


def test_bfloat16_body_gives_float32_logits_and_parameters():
    config = vit.ViTConfig(**TINY)
    model = vit.ViT(config, dtype=jnp.bfloat16)
    image = jax.random.normal(jax.random.key(0), (2, 8, 12, 3))
    params = model.init(jax.random.key(1), image)["params"]
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(jnp.float32)}
    out = model.apply({"params": params}, image)
    assert out["tokens"].dtype == jnp.bfloat16 and out["logits"].dtype == jnp.float32


@pytest.mark.parametrize(
    "fields,message",
    [
        ({"pool": "mean"}, "pool is 'mean', expected one of"),
        ({"image_size": 3}, r"image_size \(3, 3\) is smaller than patch_size \(4, 4\)"),
        ({"distilled": True, "num_registers": 1}, "distilled needs pool 'token', no registers"),
        ({"rope": True, "num_heads": 8}, "rope needs heads of a multiple of 4 channels, got 2"),
        ({"num_heads": 3}, "width 16 is not divisible by num_heads 3"),
        ({"class_token": False}, "pool 'token' needs class_token"),
        ({"width": 18, "pos_embed": "sincos2d"}, "width 18 is not divisible by 4"),
    ],
)
def test_bad_configs_are_named(fields, message):
    with pytest.raises(ValueError, match=message):
        vit.ViTConfig(**(TINY | fields))


def test_bad_inputs_are_named():
    with pytest.raises(ValueError, match="unknown ViT variant 'XL/16'"):
        vit.config("XL/16")
    model, params, image = build()
    with pytest.raises(ValueError, match="9x12 pixels is not divisible into 4x4"):
        model.apply({"params": params}, jnp.zeros((1, 9, 12, 3)))
    with pytest.raises(ValueError, match="1 channels, expected 3"):
        model.apply({"params": params}, image[..., :1])
    with pytest.raises(ValueError, match="unknown remat policy 'everything'"):
        vit.ViT(vit.ViTConfig(**TINY, remat="everything")).apply({"params": params}, image)
