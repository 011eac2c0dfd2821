"""Sizes, frames, patches and positions of Qwen2.5-VL: worked examples by hand, and transformers on random sizes."""

import math

import numpy as np
import pytest
from omnax.data.conversations.vision_tokens import (
    FrameSampling,
    Segment,
    mrope_positions,
    num_tokens,
    patchify_frames,
    smart_resize,
)
from omnax.kernels.rope import packed_grid_positions
from omnax.kernels.window_attention import ragged_windows

RANDOM_SIZES = 500


def random_grids(rng):
    """Up to three items of even sides, of one or a few temporal patches."""
    return [
        (int(rng.choice([1, 1, 2, 5])), 2 * int(rng.integers(1, 20)), 2 * int(rng.integers(1, 20)))
        for _ in range(rng.integers(1, 4))
    ]


@pytest.mark.parametrize(
    ("size", "bounds", "expected"),
    [
        ((480, 640), (3136, 12845056), (476, 644)),
        ((42, 42), (784, 12845056), (56, 56)),  # 1.5 and, below, 2.5 units round to the even 2
        ((70, 70), (784, 12845056), (56, 56)),
        ((28, 28), (3136, 12845056), (56, 56)),  # grown to the least area
        ((4000, 6000), (3136, 1003520), (812, 1204)),  # shrunk by sqrt(24e6 / 1003520) = 4.890
        ((10, 2000), (784, 12845056), (28, 420)),  # below half a unit the area is 0: grown by sqrt(784 / 20000) = 0.198
    ],
)
def test_worked_examples_of_smart_resize(size, bounds, expected):
    assert smart_resize(*size, 28, *bounds) == expected


def test_smart_resize_equals_transformers():
    from oracles import transformers

    oracle = transformers.models.qwen2_vl.image_processing_pil_qwen2_vl.smart_resize
    rng = np.random.default_rng(0)
    for _ in range(RANDOM_SIZES):
        height, width = (int(x) for x in np.exp(rng.uniform(np.log(20), np.log(5000), 2)))
        factor = int(rng.choice([28, 32]))
        bounds = (4 * factor**2, int(rng.choice([64, 1280, 16384])) * factor**2)
        expected = oracle(height, width, factor, *bounds)
        assert smart_resize(height, width, factor, *bounds) == expected, (height, width, factor, bounds)


def test_aspect_ratio_is_bounded():
    assert smart_resize(28, 28 * 200, 28, 784, 12845056) == (28, 5600)
    with pytest.raises(ValueError, match="image of 10x2001 pixels: expected an aspect ratio of at most 200"):
        smart_resize(10, 2001, 28, 3136, 12845056)


def qwen_vl_utils_count(total, video_fps, fps=2, low=4, high=768):
    """qwen-vl-utils vision_process.py smart_nframes, written again from spec 4.2."""
    count = total / video_fps * fps
    count = min(min(max(count, math.ceil(low / 2) * 2), math.floor(min(high, total) / 2) * 2), total)
    return math.floor(count / 2) * 2


def test_frame_sampling_equals_the_published_rule():
    from oracles import torch

    rng = np.random.default_rng(1)
    for _ in range(RANDOM_SIZES):
        total, video_fps = int(rng.integers(4, 5000)), float(rng.choice([1, 10, 23.976, 25, 29.97, 60]))
        count = qwen_vl_utils_count(total, video_fps)
        expected = torch.linspace(0, total - 1, count).round().long().numpy()
        np.testing.assert_array_equal(FrameSampling().indices(total, video_fps), expected)


def test_worked_examples_of_frame_sampling():
    sampling = FrameSampling()
    assert sampling.indices(100, 25.0).tolist() == [0, 14, 28, 42, 57, 71, 85, 99]  # 4 s at 2 a second
    assert sampling.indices(30, 30.0).tolist() == [0, 10, 19, 29]  # at least 4
    assert len(sampling.indices(100_000, 25.0)) == 768
    assert sampling.indices(7, 7.0, num_frames=6).tolist() == [0, 1, 2, 4, 5, 6]
    with pytest.raises(ValueError, match="video of 1 frames"):
        sampling.indices(1, 25.0)
    with pytest.raises(ValueError, match="video of 6 frames: expected 2 to 6 sampled frames, got 8"):
        sampling.indices(6, 25.0, num_frames=8)


def test_patch_order_by_hand():
    """A frame of 4x6 patches: blocks of 2x2 row by row (spec 2.3), pixels as (channel, time, row, column)."""
    rows, columns = np.mgrid[:8, :12]
    frames = np.stack([rows // 2, columns // 2, 100 * (rows % 2) + columns % 2], -1).astype(np.float32)[None]
    patches, grid = patchify_frames(frames, 2)
    assert grid == (1, 4, 6)
    order = [(0, 0), (0, 1), (1, 0), (1, 1), (0, 2), (0, 3), (1, 2), (1, 3), (0, 4)]
    parts = patches.reshape(24, 3, 2, 2, 2)
    assert [(int(p[0, 0, 0, 0]), int(p[1, 0, 0, 0])) for p in parts[:9]] == order
    np.testing.assert_array_equal(parts[5, 2], [[[0, 1], [100, 101]]] * 2)  # an image is the same frame twice


def test_odd_frames_repeat_the_last():
    frames = np.arange(3, dtype=np.float32)[:, None, None, None] * np.ones((1, 4, 4, 1), np.float32)
    patches, grid = patchify_frames(frames, 2)
    assert grid == (2, 2, 2) and patches[4:].min() == patches[4:].max() == 2


def test_patches_and_coordinates_equal_transformers():
    from oracles import torch
    from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VisionTransformerPretrainedModel as Tower
    from transformers.vision_utils import get_vision_position_ids

    assert Tower is not None
    rng = np.random.default_rng(2)
    for _ in range(RANDOM_SIZES):
        grids = random_grids(rng)
        positions, frames = packed_grid_positions(grids, merge=2)
        expected = get_vision_position_ids(torch.tensor(grids), 2).numpy()
        np.testing.assert_array_equal(positions[:, 1:], expected)
        lengths = [h * w for t, h, w in grids for _ in range(t)]
        np.testing.assert_array_equal(frames, np.repeat(np.arange(1, len(lengths) + 1), lengths))


def test_windows_equal_transformers():
    """Order of merged units and bounds of the windows, read off the ragged kernel's plan."""
    from oracles import torch
    from transformers.vision_utils import get_vision_cu_seqlens, get_vision_window_index

    rng = np.random.default_rng(3)
    for _ in range(RANDOM_SIZES):
        grids = random_grids(rng)
        total = sum(math.prod(grid) for grid in grids)
        token = ragged_windows(grids, (8, 8), merge=2).token[0]
        occupied = token < total
        order, bounds = get_vision_window_index(torch.tensor(grids), 2, 112, 14)
        np.testing.assert_array_equal(token[occupied].reshape(-1, 4)[:, 0] // 4, order)
        np.testing.assert_array_equal(np.r_[0, np.cumsum(occupied.sum(1))], bounds)
        _, frames = packed_grid_positions(grids, merge=2)
        np.testing.assert_array_equal(
            np.r_[0, np.cumsum(np.bincount(frames)[1:])], get_vision_cu_seqlens(torch.tensor(grids))
        )


def random_segments(rng, videos):
    segments = []
    for grid in random_grids(rng):
        segments.append(Segment(int(rng.integers(1, 6))))
        seconds = float(rng.choice([0.083, 0.5, 1.0, 2.0])) if videos else None
        grid = grid if videos else (1, *grid[1:])
        segments.append(Segment(num_tokens(grid), grid, seconds))
    return [*segments, Segment(int(rng.integers(1, 6)))]


@pytest.mark.parametrize("videos", [False, True])
def test_positions_equal_transformers(videos):
    """With videos under the switch that repeats transformers 5.23's advance (spec 2.8); its images are right."""
    from oracles import torch, transformers

    config = transformers.Qwen2_5_VLConfig(vision_config={"tokens_per_second": 2, "depth": 1})
    with torch.device("meta"):
        model = transformers.models.qwen2_5_vl.modeling_qwen2_5_vl.Qwen2_5_VLModel(config)
    rng = np.random.default_rng(4)
    for _ in range(RANDOM_SIZES // 2):
        segments = random_segments(rng, videos)
        positions, delta = mrope_positions(segments, 2, advance_by_space=videos)
        kinds = np.concatenate([np.full(s.length, 0 if s.grid is None else 1 + videos) for s in segments])
        grids = torch.tensor([s.grid for s in segments if s.grid])
        options = {"video_grid_thw": grids} if videos else {"image_grid_thw": grids}
        if videos:
            options["second_per_grid_ts"] = torch.tensor([s.seconds_per_grid for s in segments if s.grid])
        ids = torch.zeros((1, len(kinds)), dtype=torch.long)
        expected, expected_delta = model.get_rope_index(ids, mm_token_type_ids=torch.tensor(kinds)[None], **options)
        np.testing.assert_array_equal(positions, expected[:, 0].T.numpy())
        assert delta == int(expected_delta)


def test_worked_example_of_positions():
    """Three tokens, a video (6, 4, 4) at 1 s a grid, text: the text starts behind the video's last moment."""
    segments = [Segment(3), Segment(24, (6, 4, 4), 1.0), Segment(2)]
    positions, delta = mrope_positions(segments, 2)
    assert positions[3:7].tolist() == [[3, 3, 3], [3, 3, 4], [3, 4, 3], [3, 4, 4]]
    assert positions[7].tolist() == [5, 3, 3] and positions[26].tolist() == [13, 4, 4]
    assert positions[27:].tolist() == [[14] * 3, [15] * 3] and delta == 16 - 29
    assert mrope_positions(segments, 2, advance_by_space=True)[0][27].tolist() == [5] * 3


def test_image_positions_by_hand():
    positions, delta = mrope_positions([Segment(2), Segment(6, (1, 4, 6)), Segment(1)], 2)
    assert positions[2:8].tolist() == [[2, 2, 2], [2, 2, 3], [2, 2, 4], [2, 3, 2], [2, 3, 3], [2, 3, 4]]
    assert positions[8].tolist() == [5, 5, 5] and delta == 6 - 9
