"""Mask samplers: exact counts, bounds, the published distribution of ratios, and independence of who draws them."""

import numpy as np
import pytest
from omnax.data.images import masking
from omnax.data.images.masking import MaskConfig

GRID = (16, 16)


def rng(seed=0):
    return np.random.default_rng(seed)


def transform(config, positions, grid=GRID, seed=3):
    apply = masking.mask_crops(config, grid, seed)
    return np.stack([apply({"position": p}, np.random.default_rng((seed, p)))["masked"] for p in positions])


def test_random_masks_hide_exactly_the_target():
    masks = [masking.random_mask((3, 5), target, rng(target)) for target in range(16)]
    assert [mask.sum() for mask in masks] == list(range(16))
    share = np.mean([masking.random_mask(GRID, 64, rng(i)) for i in range(400)], 0)
    assert np.abs(share - 0.25).max() < 0.1  # every patch alike


@pytest.mark.parametrize("target", [0, 5, 40, 128, 200, 256])
def test_block_masks_never_exceed_the_target_and_come_near_it(target):
    counts = np.array([masking.block_mask(GRID, target, rng(i), largest=128).sum() for i in range(60)])
    assert counts.max() <= target
    assert counts.mean() >= 0.9 * min(target, 220)


def twin_block_mask(grid, target, draw):
    """The loop of dinov2:dinov2/data/masking.py, patch by patch, on the same random numbers."""
    hidden = set()
    while len(hidden) < target:
        budget = min(target - len(hidden), grid[0] * grid[1] // 2)
        found = None
        for _ in range(10):
            area = draw.uniform(min(4, budget), max(4, budget))
            aspect = np.exp(draw.uniform(np.log(0.3), np.log(1 / 0.3)))
            height, width = round(np.sqrt(area * aspect)), round(np.sqrt(area / aspect))
            if not (width < grid[1] and height < grid[0]):
                continue
            top, left = draw.integers(grid[0] - height + 1), draw.integers(grid[1] - width + 1)
            block = {(i, j) for i in range(top, top + height) for j in range(left, left + width)}
            if 0 < len(block - hidden) <= budget:
                found = block
                break
        if found is None:
            break
        hidden |= found
    mask = np.zeros(grid, bool)
    for i, j in hidden:
        mask[i, j] = True
    return mask


@pytest.mark.parametrize("grid", [(16, 16), (6, 9)])
def test_block_masks_equal_the_loop(grid):
    config = MaskConfig()
    for seed in range(40):
        target = seed % (grid[0] * grid[1] // 2)
        got = masking.make_mask(config, grid, target, rng(seed))
        np.testing.assert_array_equal(got, twin_block_mask(grid, target, rng(seed)))


def test_stratified_ratios_are_the_published_ones():
    """collate.py: half of the crops, one in each of the strata of [0.1, 0.5]; spec: mean ratio .299 of the masked."""
    config = MaskConfig(group=32)
    masks = transform(config, range(64))
    for group in np.split(masks, 2):
        counts = np.sort(group.reshape(64, -1).sum(1))
        assert (counts[:32] == 0).all() and (counts[32:] > 0).all()
        edges = np.linspace(0.1, 0.5, 33)
        assert (counts[32:] <= np.ceil(256 * edges[1:])).all()
        assert counts.sum() <= masking.masked_bound(config, GRID)
        assert abs(counts[32:].mean() / 256 - 0.3) < 0.02


def test_published_bounds():
    assert masking.masked_bound(MaskConfig(group=32), (16, 16)) == 2496
    assert masking.masked_bound(MaskConfig(group=12), (16, 16)) == 967
    assert masking.masked_bound(MaskConfig(group=64), (14, 14)) == 3771
    assert masking.masked_bound(MaskConfig(stratified=False, ratio=(0.4, 0.75), group=4), (8, 8)) == 8 * 48


def test_masks_depend_on_seed_and_position_only():
    config = MaskConfig(group=4)
    everything = transform(config, range(16))
    np.testing.assert_array_equal(transform(config, [13, 2]), everything[[13, 2]])
    assert (transform(config, range(16), seed=4) != everything).any()
    groups = [np.sort(x.reshape(8, -1).sum(1)) for x in np.split(everything, 4)]
    assert any((groups[0] != other).any() for other in groups[1:])


@pytest.mark.parametrize("kind", ["random", "ibot_block"])
def test_independent_masks(kind):
    """iBOT: each crop by itself; the notes' preset masks 40 to 75 % of every crop."""
    config = MaskConfig(kind=kind, ratio=(0.4, 0.75), share=1.0, stratified=False)
    ratios = transform(config, range(100)).reshape(200, -1).mean(1)
    assert ratios.max() <= 0.75
    if kind == "random":
        assert ratios.min() >= 0.4 - 1 / 256 and abs(ratios.mean() - 0.575) < 0.02
    half = MaskConfig(kind=kind, ratio=(0.1, 0.5), share=0.5, stratified=False)
    unmasked = (transform(half, range(100)).reshape(200, -1).sum(1) == 0).mean()
    assert 0.35 < unmasked < 0.65


@pytest.mark.parametrize(
    "fields,message",
    [
        ({"kind": "blocks"}, "mask kind is 'blocks', expected one of"),
        ({"ratio": (0.5, 0.2)}, r"mask ratio must be a range, got \(0.5, 0.2\)"),
    ],
)
def test_bad_configs_are_named(fields, message):
    with pytest.raises(ValueError, match=message):
        MaskConfig(**fields)
