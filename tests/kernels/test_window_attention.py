"""Window attention against dense attention with the equivalent mask, the published partitions, and its cost."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from omnax.kernels.attention import attention
from omnax.kernels.window_attention import (
    RaggedWindows,
    _join,
    _partition,
    _split,
    ragged_window_attention,
    ragged_windows,
    window_attention,
)
from references import window_attention as reference

TOLERANCE = 1e-5
HEADS, KEY_HEADS, WIDTH = 4, 2, 6


def inputs(batch, *tokens):
    """Query, key, value and the cotangent of the output, float32."""
    rng = np.random.default_rng(0)
    shapes = [(batch, *tokens, heads, WIDTH) for heads in (HEADS, KEY_HEADS, KEY_HEADS, HEADS)]
    return [rng.normal(size=shape).astype(np.float32) for shape in shapes]


def check(function, query, key, value, cotangent, masks):
    """Values and gradients of each batch row equal those of dense attention with its mask [T, T]."""

    @jax.jit
    def run(query, key, value, cotangent):
        out, pull_back = jax.vjp(function, query, key, value)
        return out, *pull_back(cotangent)

    results = run(query, key, value, cotangent)
    for row, mask in enumerate(masks):
        *qkv, flow = (np.float64(x[row]).reshape(-1, *x.shape[-2:]) for x in (query, key, value, cotangent))
        expected = reference.dense(*qkv, mask, flow)
        for got, want in zip(results, expected, strict=True):
            np.testing.assert_allclose(np.reshape(got[row], want.shape), want, atol=TOLERANCE)


CASES = {
    "square": ((4, 6), (2, 3), None),
    "shifted": ((6, 6), (3, 3), (1, 2)),
    "padded": ((5, 7), (3, 4), None),
    "padded and shifted": ((5, 7), (3, 4), (2, 1)),
    "window larger than the grid": ((2, 3), (4, 4), (2, 0)),
    "sequence": ((11,), (4,), (2,)),
    "video": ((3, 4, 2), (2, 2, 2), (1, 0, 1)),
}


@pytest.mark.parametrize("name", CASES)
def test_equals_dense_attention(name):
    grid, window, shift = CASES[name]
    mask = reference.grid_mask(grid, window, shift or (0,) * len(grid))
    check(partial(window_attention, window=window, shift=shift), *inputs(2, *grid), [mask, mask])


@settings(max_examples=6, deadline=None, derandomize=True)
@given(st.tuples(st.integers(1, 6), st.integers(1, 6)), st.tuples(st.integers(1, 4), st.integers(1, 4)), st.data())
def test_any_grid_and_window(grid, window, data):
    shift = tuple(data.draw(st.integers(0, side - 1)) for side in window)
    query, key, value, cotangent = inputs(1, *grid)
    mask = reference.grid_mask(grid, window, shift)
    check(partial(window_attention, window=window, shift=shift), query, key, value, cotangent, [mask])


def test_masked_cells_neither_see_nor_are_seen():
    keep = np.ones((2, 5, 4), bool)
    keep[0, 3:], keep[1, :, 2:] = False, False  # a smaller image in each row of the batch
    function = partial(window_attention, window=(3, 2), shift=(1, 1), mask=jnp.asarray(keep))
    windows = reference.grid_mask((5, 4), (3, 2), (1, 1))
    masks = [windows & row.ravel() & row.reshape(-1, 1) for row in keep]
    query, key, value, cotangent = inputs(2, 5, 4)
    check(function, query, key, value, cotangent, masks)
    assert not np.any(np.asarray(function(query, key, value))[~keep])


def test_shifted_windows_are_those_of_swin():
    size, window, shift = (8, 6), (4, 3), (2, 1)
    parts = _split(jnp.asarray(_partition(size, window, shift))[None], window, shift)
    np.testing.assert_array_equal(parts[:, :, None] == parts[:, None], reference.swin_mask(size, window, shift))


def test_split_and_join_are_inverse():
    x = jnp.arange(2 * 5 * 7 * 3).reshape(2, 5, 7, 3)
    windows = _split(x, (2, 3), (1, 2))
    assert windows.shape == (2 * 3 * 3, 6, 3)
    np.testing.assert_array_equal(_join(windows, (5, 7), (2, 3), (1, 2)), x)


RAGGED = {
    "published": ([(1, 10, 14), (2, 6, 4), (1, 8, 8)], (8, 8), (0, 0), 2, 256),
    "odd and shifted, over merge blocks": ([(1, 6, 10), (2, 4, 6)], (7, 7), (3, 3), 2, 110),
    "plain order": ([(1, 3, 5), (1, 1, 1)], (2, 3), (1, 0), 1, None),
}


@pytest.mark.parametrize("name", RAGGED)
def test_ragged_equals_dense_attention(name):
    grids, window, shift, merge, length = RAGGED[name]
    windows = ragged_windows(grids, window, shift=shift, merge=merge, length=length)
    length = windows.slot.shape[1]
    mask = reference.packed_mask(grids, window, shift, merge, length)
    check(lambda *qkv: ragged_window_attention(*qkv, windows), *inputs(1, length), [mask])


def test_ragged_rows_share_their_buckets():
    """Two rows of different images in one batch, one of them with no image at all in a third: padding stays zero."""
    rows = [[(1, 4, 6), (1, 2, 2)], [(2, 3, 3)], []]
    plans = [ragged_windows(grids, (2, 4), length=30, count=8) for grids in rows]
    windows = RaggedWindows(*map(np.concatenate, zip(*plans, strict=True)))
    masks = [reference.packed_mask(grids, (2, 4), (0, 0), 1, 30) for grids in rows]
    query, key, value, cotangent = inputs(3, 30)
    check(lambda *qkv: ragged_window_attention(*qkv, windows), query, key, value, cotangent, masks)
    assert not np.any(ragged_window_attention(query, key, value, windows)[2])


def test_layers_may_share_the_window_layout():
    windows = ragged_windows([(1, 5, 4), (1, 2, 3)], (3, 3), length=32)
    x = np.random.default_rng(0).normal(size=(1, 32, 2, 6)).astype(np.float32)
    once = windows.split(x)
    inside = [attention(*(once,) * 3, segment_ids=windows.segment_ids)]
    inside.append(attention(*(inside[0],) * 3, segment_ids=windows.segment_ids))
    outside = x
    for _ in range(2):
        outside = ragged_window_attention(*(outside,) * 3, windows)
    np.testing.assert_allclose(windows.join(inside[1]), outside, atol=TOLERANCE)


@pytest.mark.parametrize(
    ("grid", "lengths"),
    [
        ((1, 10, 14), [0, 64, 112, 128, 140]),
        ((1, 16, 20), [0, 64, 128, 160, 224, 288, 320]),
        ((2, 6, 4), [0, 24, 48]),
        ((1, 8, 8), [0, 64]),
    ],
)
def test_windows_are_those_of_qwen(grid, lengths):
    """Against transformers, and against the bounds noted from it by hand."""
    from oracles import torch
    from transformers.vision_utils import get_vision_window_index

    token = ragged_windows([grid], (8, 8), merge=2).token[0]
    occupied = token < np.prod(grid)
    order, bounds = get_vision_window_index(torch.tensor([grid]), 2, 112, 14)
    np.testing.assert_array_equal(token[occupied].reshape(-1, 4)[:, 0] // 4, order)
    np.testing.assert_array_equal(np.cumsum(occupied.sum(1)), bounds[1:])
    np.testing.assert_array_equal(bounds, lengths)


def test_windows_of_a_pack_are_those_of_qwen():
    from oracles import torch
    from transformers.vision_utils import get_vision_window_index

    grids = [(1, 10, 14), (3, 18, 4), (1, 8, 8)]
    token = ragged_windows(grids, (8, 8), merge=2, length=512).token[0]
    order, _ = get_vision_window_index(torch.tensor(grids), 2, 112, 14)
    np.testing.assert_array_equal(token[token < 512].reshape(-1, 4), 4 * order.numpy()[:, None] + np.arange(4))


def flops(function, *shape):
    x = jax.ShapeDtypeStruct((1, *shape, 2, 16), jnp.float32)
    return jax.jit(function).lower(x, x, x).compile().cost_analysis()["flops"]


def test_cost_is_linear_in_tokens():
    """Compiled FLOPs double with the tokens, for dense attention they grow fourfold."""
    regular = [flops(partial(window_attention, window=(4, 4), shift=(2, 2)), 16, side) for side in (16, 32)]
    image = (1, 13, 10)  # 130 tokens, cut windows at two edges
    ragged = []
    for count in (2, 4):
        windows = ragged_windows([image] * count, (4, 4))
        ragged.append(flops(lambda *qkv, windows=windows: ragged_window_attention(*qkv, windows), 130 * count))
    for few, many in (regular, ragged):
        assert many / few == pytest.approx(2, rel=0.05)
    few, many = (flops(attention, tokens) for tokens in (256, 512))
    assert many / few > 3.8 and regular[1] < many / 8


def test_bad_input_is_named():
    query, key, value, _ = inputs(1, 4, 4)
    for window, shift in (((2,), None), ((2, 2), (2, 0)), ((2, 2), (0, -1)), ((2, 0), None)):
        with pytest.raises(ValueError, match=r"do not fit a grid of shape \(4, 4\)"):
            window_attention(query, key, value, window=window, shift=shift)
    with pytest.raises(ValueError, match="4 windows do not fit in 3"):
        ragged_windows([(1, 4, 4)], (2, 2), count=3)
    with pytest.raises(ValueError, match="16 patches do not fit in length 8"):
        ragged_windows([(1, 4, 4)], (2, 2), length=8)
