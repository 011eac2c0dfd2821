"""Rotary embeddings against the complex-number twin, the published implementations, and their defining property."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from omnax.kernels.rope import (
    LinearScaling,
    Llama3Scaling,
    NtkScaling,
    YarnScaling,
    apply_rope,
    grid_positions,
    mixed_frequencies,
    mixed_table,
    packed_grid_positions,
    rope_1d,
    rope_axial,
    rope_multimodal,
    segment_positions,
    sequence_positions,
)
from references import rope as reference

TOLERANCE = 1e-6
TOKENS, HEADS = 7, 2

YARN = YarnScaling(factor=3.0, original_length=64)
# name: (rope, interleaved pairs, twin's angles of positions [T, A])
VARIANTS = {
    "half": (rope_1d(16), False, lambda p: reference.angles_1d(p[:, 0], 16, 1e4)),
    "pairs": (rope_1d(16, theta=500.0), True, lambda p: reference.angles_1d(p[:, 0], 16, 500.0)),
    "qwen tower": (rope_axial((8, 8)), False, lambda p: reference.angles_axial(p, (8, 8), 1e4)),
    "eva": (rope_axial((6, 6)), True, lambda p: reference.angles_axial(p, (6, 6), 1e4)),
    "longcat": (rope_axial((8, 6, 6)), True, lambda p: reference.angles_axial(p, (8, 6, 6), 1e4)),
    "sections": (
        rope_multimodal((2, 3, 3), theta=100),
        False,
        lambda p: reference.angles_multimodal(p, (2, 3, 3), 100, False),
    ),
    "interleaved": (
        rope_multimodal((4, 2, 2), theta=500, interleaved=True),
        False,
        lambda p: reference.angles_multimodal(p, (4, 2, 2), 500, True),
    ),
    "yarn": (
        rope_1d(16, scaling=YARN),
        False,
        lambda p: np.array([[reference.angle(t, f) for f in reference.yarn(16, 1e4, 3.0, 64)] for t in p[:, 0]]),
    ),
}


def inputs(rope, seed=0):
    """Random x and cotangent [T, N, H], integer positions [T, A] (negative ones too)."""
    rng = np.random.default_rng(seed)
    x, cotangent = rng.normal(size=(2, TOKENS, HEADS, 2 * len(rope.axes))).astype(np.float32)
    return x, cotangent, rng.integers(-9, 40, (TOKENS, max(rope.axes) + 1)).astype(np.int32)


@pytest.mark.parametrize("name", VARIANTS)
def test_values_and_gradients_equal_the_twin(name):
    rope, interleaved, angles = VARIANTS[name]
    x, cotangent, positions = inputs(rope)
    factor = 0.1 * np.log(3) + 1 if name == "yarn" else 1.0

    @jax.jit
    def run(x, positions, cotangent):
        turned, pull_back = jax.vjp(lambda x: apply_rope(x, *rope.table(positions), interleaved=interleaved), x)
        return turned, pull_back(cotangent)[0]

    value, gradient = run(x, positions, cotangent)
    expected = angles(positions)
    np.testing.assert_allclose(value, reference.rotate(np.float64(x), expected, interleaved, factor), atol=TOLERANCE)
    # The transpose of a rotation is the rotation back.
    back = reference.rotate(np.float64(cotangent), -expected, interleaved, factor)
    np.testing.assert_allclose(gradient, back, atol=TOLERANCE)


@pytest.mark.parametrize("name", VARIANTS)
def test_logits_depend_on_relative_positions_only(name):
    rope, interleaved, _ = VARIANTS[name]
    query, key, positions = inputs(rope, seed=1)

    def logits(query_positions, key_positions):
        q = apply_rope(query, *rope.table(query_positions), interleaved=interleaved)
        k = apply_rope(key, *rope.table(key_positions), interleaved=interleaved)
        return np.einsum("tnh,snh->nts", q, k)

    at_home = logits(positions, positions)
    for axis in range(positions.shape[1]):
        shift = np.zeros(positions.shape[1], np.int32)
        shift[axis] = 23
        # The angles are rounded at 1e-6 of their size, up to 60 radians, and the logits add sixteen products.
        np.testing.assert_allclose(logits(positions + shift, positions + shift), at_home, atol=2e-4)
        assert np.abs(logits(positions + shift, positions) - at_home).max() > 0.05


@settings(max_examples=6, deadline=None, derandomize=True)
@given(st.lists(st.integers(1, 4), min_size=1, max_size=3), st.booleans(), st.integers(0, 2))
def test_any_axial_split(half_widths, interleaved, batch_axes):
    widths = [2 * half for half in half_widths]
    rope = rope_axial(widths, theta=100.0)
    x, _, positions = inputs(rope)
    expected = reference.rotate(np.float64(x), reference.angles_axial(positions, widths, 100.0), interleaved)
    batched = x[(None,) * batch_axes]  # a table without batch axes serves them all
    turned = apply_rope(batched, *rope.table(positions), interleaved=interleaved)
    np.testing.assert_allclose(turned, expected[(None,) * batch_axes], atol=TOLERANCE)


def test_angles_are_float32_for_half_precision():
    rope = rope_1d(16)
    x = jnp.asarray(inputs(rope)[0], jnp.bfloat16)
    positions = jnp.arange(1000, 1000 + TOKENS)[:, None]  # whole numbers that bfloat16 does not have
    cos, sin = rope.table(positions)
    assert cos.dtype == sin.dtype == jnp.float32
    turned = apply_rope(x, cos, sin)
    assert turned.dtype == jnp.bfloat16
    exact = reference.rotate(np.float64(x), reference.angles_1d(positions[:, 0], 16, 1e4), False)
    np.testing.assert_allclose(np.float64(turned), exact, rtol=2**-8, atol=1e-6)  # one rounding to bfloat16


def test_scalings_equal_their_definitions():
    ladder = 1e4 ** (-np.arange(0, 64, 2) / 64)
    np.testing.assert_allclose(rope_1d(64, scaling=LinearScaling(4.0)).frequencies, ladder / 4)
    ntk = np.array(rope_1d(64, scaling=NtkScaling(4.0)).frequencies)
    np.testing.assert_allclose(ntk[[0, -1]], [1, ladder[-1] / 4])  # fastest kept, slowest interpolated
    yarn = rope_1d(64, scaling=YarnScaling(4.0, 2048))
    np.testing.assert_allclose(yarn.frequencies, reference.yarn(64, 1e4, 4.0, 2048))
    np.testing.assert_allclose(yarn.attention_factor, 1.1386294361119891)
    llama = rope_1d(64, theta=5e5, scaling=Llama3Scaling(8.0, 8192))
    np.testing.assert_allclose(llama.frequencies, reference.llama3(64, 5e5, 8.0, 8192, 1.0, 4.0))


PUBLISHED = {
    "linear": (LinearScaling(3.0), {"factor": 3.0}),
    "dynamic": (NtkScaling(5.0 * 96 / 64 - 4.0), {"factor": 5.0}),
    "yarn": (YARN, {"factor": 3.0, "original_max_position_embeddings": 64}),
    "yarn untruncated": (
        YarnScaling(3.0, 64, beta_fast=20, beta_slow=2, truncate=False, attention_factor=1.5),
        {
            "factor": 3.0,
            "original_max_position_embeddings": 64,
            "beta_fast": 20,
            "beta_slow": 2,
            "truncate": False,
            "attention_factor": 1.5,
        },
    ),
    "llama3": (
        Llama3Scaling(8.0, 64, 1.0, 4.0),
        {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64},
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_scalings_equal_transformers(name):
    from oracles import transformers
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaling, parameters = PUBLISHED[name]
    kind = name.split()[0]
    config = transformers.Qwen2Config(
        hidden_size=64,
        num_attention_heads=2,
        max_position_embeddings=64,
        rope_parameters={"rope_type": kind, "rope_theta": 1e4, **parameters},
    )
    frequencies, factor = ROPE_INIT_FUNCTIONS[kind](config, "cpu", seq_len=96)
    ours = rope_1d(32, scaling=scaling)
    np.testing.assert_allclose(ours.frequencies, frequencies, rtol=TOLERANCE)  # theirs are computed in float32
    assert ours.attention_factor == pytest.approx(factor)


@pytest.mark.parametrize(("interleaved", "scaling"), [(False, None), (True, None), (True, YARN)])
def test_multimodal_equals_transformers(interleaved, scaling):
    from oracles import torch
    from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl as qwen25
    from transformers.models.qwen3_vl import modeling_qwen3_vl as qwen3

    sections = (4, 2, 2) if interleaved else (2, 3, 3)
    parameters = {"rope_theta": 1e6, "mrope_section": list(sections), "rope_type": "default"}
    if scaling is not None:
        parameters |= {"rope_type": "yarn", "factor": 3.0, "original_max_position_embeddings": 64}
    sizes = {"hidden_size": 32, "num_attention_heads": 2, "head_dim": 16, "rope_parameters": parameters}
    theirs = (
        qwen3.Qwen3VLTextRotaryEmbedding(qwen3.Qwen3VLTextConfig(**sizes))
        if interleaved
        else qwen25.Qwen2_5_VLRotaryEmbedding(qwen25.Qwen2_5_VLTextConfig(**sizes))
    )
    rope = rope_multimodal(sections, theta=1e6, interleaved=interleaved, scaling=scaling)
    x, _, positions = inputs(rope)
    cos, sin = theirs(torch.tensor(x), torch.tensor(positions.T[:, None]))
    expected, _ = qwen3.apply_rotary_pos_emb(*(torch.tensor(x)[None],) * 2, cos, sin, unsqueeze_dim=2)
    np.testing.assert_allclose(
        apply_rope(x, *rope.table(positions)), expected[0], atol=5e-6
    )  # their float32 frequencies


def test_qwen_tower_equals_transformers():
    """Positions in merge-block order for images and a video, frames as segments, 2-D rotation."""
    from oracles import torch
    from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl as qwen25
    from transformers.vision_utils import get_vision_cu_seqlens, get_vision_position_ids

    grids = [(1, 4, 6), (3, 2, 4), (1, 6, 2)]
    positions, segments = packed_grid_positions(np.array(grids), merge=2, length=64)
    tensor = torch.tensor(grids)
    expected = get_vision_position_ids(tensor, 2, include_temporal=True)
    np.testing.assert_array_equal(positions[:60], expected)
    np.testing.assert_array_equal(np.cumsum(np.bincount(segments)[1:]), get_vision_cu_seqlens(tensor)[1:])
    assert not positions[60:].any() and not segments[60:].any()

    config = qwen25.Qwen2_5_VLVisionConfig(hidden_size=32, num_heads=2)
    cos, sin = qwen25.Qwen2_5_VLVisionRotaryEmbedding(config)(torch.zeros(()), expected[:, 1:])
    x = np.random.default_rng(0).normal(size=(60, 2, 16)).astype(np.float32)
    turned, _ = qwen25.apply_rotary_pos_emb_vision(*(torch.tensor(x),) * 2, cos, sin)
    np.testing.assert_allclose(apply_rope(x, *rope_axial((8, 8)).table(positions[:60, 1:])), turned, atol=TOLERANCE)


def test_eva_equals_timm():
    from oracles import torch
    from timm.layers.pos_embed_sincos import RotaryEmbeddingCat, apply_rot_embed_cat

    table = RotaryEmbeddingCat(12, in_pixels=False, feat_shape=[3, 5], ref_feat_shape=[16, 16]).get_embed()
    x = np.random.default_rng(0).normal(size=(15, 2, 12)).astype(np.float32)
    expected = apply_rot_embed_cat(torch.tensor(x).transpose(0, 1), table).transpose(0, 1)
    positions = grid_positions((3, 5), reference=(16, 16))
    turned = apply_rope(x, *rope_axial((6, 6)).table(positions), interleaved=True)
    np.testing.assert_allclose(turned, expected, atol=5e-6)  # float32 powers again


def test_merge_block_order_by_hand():
    positions, segments = packed_grid_positions([(1, 4, 6)], merge=2)
    first = [(0, 0), (0, 1), (1, 0), (1, 1), (0, 2), (0, 3), (1, 2), (1, 3), (0, 4)]
    np.testing.assert_array_equal(positions[:9, 1:], first)
    np.testing.assert_array_equal(segments, 1)
    row_major, _ = packed_grid_positions([(2, 3, 4)])
    np.testing.assert_array_equal(row_major, grid_positions((2, 3, 4)))


def test_position_builders():
    np.testing.assert_array_equal(sequence_positions(3, offset=5)[:, 0], [5, 6, 7])
    np.testing.assert_array_equal(sequence_positions(2, jnp.array([0, 4]))[..., 0], [[0, 1], [4, 5]])
    packed = jnp.array([[7, 7, 7, 2, 2, 9], [1, 2, 2, 2, 2, 0]])
    np.testing.assert_array_equal(segment_positions(packed)[..., 0], [[0, 1, 2, 0, 1, 0], [0, 0, 1, 2, 3, 0]])
    np.testing.assert_array_equal(grid_positions((2, 3)), [[0, 0], [0, 1], [0, 2], [1, 0], [1, 1], [1, 2]])
    np.testing.assert_allclose(grid_positions((2, 4), reference=(16, 16))[-1], [8, 12])
    assert grid_positions((2, 1, 3)).shape == (6, 3)


def test_a_token_without_a_place_is_not_turned():
    x = inputs(rope_axial((8, 8)))[0]
    np.testing.assert_array_equal(apply_rope(x, *rope_axial((8, 8)).table(jnp.zeros((TOKENS, 2), jnp.int32))), x)


def test_bad_input_is_named():
    x = inputs(rope_1d(16))[0]
    with pytest.raises(ValueError, match=r"positions must have 2 axes, got shape \(4, 3\)"):
        rope_axial((8, 8)).table(jnp.zeros((4, 3)))
    with pytest.raises(ValueError, match="4 angles cannot turn 16 channels"):
        apply_rope(x, *rope_1d(8).table(sequence_positions(TOKENS)))
    with pytest.raises(ValueError, match="must be even, got 7"):
        rope_axial((8, 7))
    with pytest.raises(ValueError, match=r"\(2, 3, 3\) cannot be interleaved"):
        rope_multimodal((2, 3, 3), theta=1e6, interleaved=True)
    with pytest.raises(ValueError, match=r"\(1, 3, 4\) is not a multiple of the merge size 2"):
        packed_grid_positions([(1, 3, 4)], merge=2)
    with pytest.raises(ValueError, match="24 patches do not fit in length 20"):
        packed_grid_positions([(1, 4, 6)], length=20)


MATRICES = {
    "1-D": rope_1d(16).matrix(),
    "axial": rope_axial((8, 8)).matrix(),
    "sections": rope_multimodal((2, 3, 3), theta=100).matrix(),
    "interleaved": rope_multimodal((4, 2, 2), theta=500, interleaved=True).matrix(),
    "mixed": mixed_frequencies(8, heads=1)[0],
    "mixed, three axes": np.random.default_rng(5).normal(size=(8, 3)),
}


@pytest.mark.parametrize("name", MATRICES)
def test_turning_twice_is_turning_by_the_sum(name):
    """R(p) R(q) = R(p + q), R(0) = 1, R(-p) is the inverse, and logits depend on differences: in every form."""
    matrix = jnp.asarray(MATRICES[name], jnp.float32)
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(2, TOKENS, HEADS, 16)).astype(np.float32)
    p, q, shift = rng.integers(-9, 30, (3, TOKENS, matrix.shape[1])).astype(np.int32)

    def turn(x, positions):
        return apply_rope(x, *mixed_table(positions, matrix))

    # Angles up to 60 radians are rounded at 1e-6 of their size, twice
    np.testing.assert_allclose(turn(turn(x, p), q), turn(x, p + q), atol=1e-4)
    np.testing.assert_array_equal(turn(x, 0 * p), x)
    np.testing.assert_allclose(turn(turn(x, p), -p), x, atol=1e-5)
    logits = lambda s: (turn(x, p + s) * turn(y, q + s)).sum(-1)  # noqa: E731
    np.testing.assert_allclose(logits(shift), logits(0), atol=1e-3)


@pytest.mark.parametrize("name", ["half", "qwen tower", "longcat", "sections", "interleaved"])
def test_every_rope_is_its_matrix(name):
    rope, interleaved, _ = VARIANTS[name]
    x, _, positions = inputs(rope)
    table = mixed_table(positions, jnp.asarray(rope.matrix(), jnp.float32))
    got = apply_rope(x, *table, interleaved=interleaved)
    np.testing.assert_allclose(got, apply_rope(x, *rope.table(positions), interleaved=interleaved), atol=2e-5)


def test_interleaved_is_sectioned_up_to_a_permutation_of_frequencies():
    """Each axis has as many pairs in both, of other speeds. With channels permuted alike they are one rotation."""
    sections = (4, 2, 2)
    mixed, blocks = (rope_multimodal(sections, theta=500, interleaved=flag) for flag in (True, False))
    order = np.argsort(mixed.axes, kind="stable")  # pairs of time, height, width in turn
    np.testing.assert_array_equal(np.array(mixed.axes)[order], blocks.axes)
    assert sorted(mixed.frequencies) == sorted(blocks.frequencies)
    x, _, positions = inputs(mixed)
    permuted = mixed.matrix()[order]
    np.testing.assert_array_equal(permuted != 0, blocks.matrix() != 0)  # sectioned, with other speeds
    channels = np.r_[order, order + 8]
    turned = apply_rope(x, *mixed.table(positions))[..., channels]
    again = apply_rope(x[..., channels], *mixed_table(positions, jnp.asarray(permuted, jnp.float32)))
    np.testing.assert_allclose(turned, again, atol=2e-5)
    assert (
        abs(again - apply_rope(x[..., channels], *blocks.table(positions))).max() > 0.1
    )  # so weights do not carry over


def test_mixed_frequencies_of_each_head_can_be_learnt():
    """Fixed at first they are ladders along two directions at right angles; their gradient is that of the angles."""
    frequencies = jnp.asarray(mixed_frequencies(8, heads=3))
    speeds = np.linalg.norm(frequencies, axis=-1)
    np.testing.assert_allclose(speeds, np.tile(10.0 ** (-np.arange(4) / 4), (3, 2)), rtol=1e-5)
    np.testing.assert_allclose((frequencies[:, :4] * frequencies[:, 4:]).sum(-1), 0, atol=1e-6)
    assert abs(frequencies[0] - frequencies[1]).max() > 0.1
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(2, 6, 3, 16)).astype(np.float32))
    positions, target = grid_positions((2, 3)), jnp.asarray(rng.normal(size=x.shape).astype(np.float32))

    @jax.jit
    def loss(frequencies):
        return (apply_rope(x, *mixed_table(positions, frequencies), per_head=True) * target).sum()

    gradient, direction = jax.grad(loss)(frequencies), rng.normal(size=frequencies.shape).astype(np.float32)
    slope = (loss(frequencies + 1e-2 * direction) - loss(frequencies - 1e-2 * direction)) / 2e-2
    np.testing.assert_allclose((gradient * direction).sum(), slope, rtol=1e-2)
    shared = apply_rope(x[:, :, :1], *mixed_table(positions, frequencies[0]))
    turned = apply_rope(x, *mixed_table(positions, frequencies), per_head=True)
    np.testing.assert_allclose(turned[:, :, :1], shared, atol=1e-6)
    with pytest.raises(ValueError, match="an even number of pairs, got 5"):
        mixed_frequencies(5)
