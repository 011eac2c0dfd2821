"""The vision encoder, published and as the notes describe it, beside a NumPy twin; low-rank terms."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from omnax.benchmarks.qwen_vl_flops import flops
from omnax.kernels.rope import packed_grid_positions
from omnax.kernels.window_attention import ragged_windows
from omnax.models import lora
from omnax.models.qwen_vl.model import NOTES_VISION, config
from omnax.models.qwen_vl.vision import VisionConfig, VisionEncoder, VisionInput
from references import qwen_vl as reference

SMALL = {"depth": 4, "width": 32, "num_heads": 2, "mlp_dim": 40, "out_width": 24, "patch_size": 2}
GRIDS = [(1, 10, 12), (2, 6, 4), (1, 2, 20)]
LENGTH = 256
TOLERANCE = 2e-5  # float32 through four blocks of unit scale, beside float64

PUBLISHED = VisionConfig(**SMALL, window=4, full_blocks=(1, 3))
NOTES = VisionConfig(**NOTES_VISION | SMALL)
CONFIGS = {
    "published": PUBLISHED,
    "notes": NOTES,
    "notes, carried": dataclasses.replace(NOTES, global_query_every=2, global_query_carry=True),
    "notes, with a full block": dataclasses.replace(NOTES, window=3, full_blocks=(2,)),
    "notes, scanned": dataclasses.replace(NOTES, scan=True),
}


def vision_input(grids, side, length=LENGTH, seed=0):
    rng = np.random.default_rng(seed)
    coordinates, frames = packed_grid_positions(grids, merge=2, length=length)
    patches = rng.normal(size=(1, length, 24)).astype(np.float32) * (frames > 0)[None, :, None]
    plans = [
        ragged_windows(grids, (side, side), shift=shift, merge=2, length=length) for shift in ((0, 0), (side // 2,) * 2)
    ]
    return VisionInput(patches, coordinates[None, :, 1:], frames[None], *plans)


@functools.cache
def parameters(c):
    """Of unit scale, every leaf random."""
    shapes = jax.eval_shape(
        lambda: VisionEncoder(c).init(jax.random.key(0), vision_input(GRIDS, c.window), 4)["params"]
    )
    leaves, structure = jax.tree.flatten(shapes)
    rng = np.random.default_rng(1)
    scale = lambda x: 0.3 if len(x.shape) > 1 else 0.2  # noqa: E731
    return jax.tree.unflatten(structure, [rng.normal(0, scale(x), x.shape).astype(np.float32) for x in leaves])


@functools.cache
def encoder(c):
    return jax.jit(lambda params, vision: VisionEncoder(c).apply({"params": params}, vision, 4))


@pytest.mark.parametrize("name", CONFIGS)
def test_encoder_equals_the_twin(name):
    """Dense masks patch by patch: windows with ragged edges, shifted ones, global queries, several items and frames."""
    c = CONFIGS[name]
    params, vision = parameters(c), vision_input(GRIDS, c.window)
    count = sum(np.prod(grid) for grid in GRIDS)
    got = encoder(c)(params, vision)[0, : count // 4]
    unrolled = params
    if c.scan:
        layers = [jax.tree.map(lambda leaf, i=i: leaf[i], params["encoder"]["blocks"]) for i in range(c.depth)]
        unrolled = params | {"encoder": {f"blocks_{i}": layer for i, layer in enumerate(layers)}}
    expected = reference.encoder(
        jax.tree.map(lambda leaf: leaf.astype(np.float64), unrolled),
        vision.patches[0, :count],
        GRIDS,
        heads=c.num_heads,
        window=c.window,
        full=c.full_blocks,
        shifted=c.shifted,
        every=c.global_query_every,
        carry=c.global_query_carry,
    )
    np.testing.assert_allclose(got, expected, atol=TOLERANCE * np.abs(expected).max())


def test_notes_without_their_own_are_the_published_configuration():
    """No query, no shift, windows of 8, patches of 14, four full blocks; tests/parity compares the functions."""
    own = {"patch_size": 14, "window": 8, "shifted": False, "full_blocks": (7, 15, 23, 31), "global_query_every": 0}
    assert config("7B", vision=NOTES_VISION | own) == config("7B")


@pytest.mark.parametrize("side", [2, 4, 8])
def test_windows_of_patches_are_windows_of_merged_units(side):
    """The twin's rule of the notes (spec 1.1), unshifted, beside the published one of units of 2x2 patches."""
    frame, row, column = reference.layout(GRIDS).T
    units = np.column_stack([frame, row // 2 // (side // 2), column // 2 // (side // 2)])
    np.testing.assert_array_equal(reference.window_of(reference.layout(GRIDS), side, 0) - [0, 1, 1], units)


def test_notes_count_of_parameters():
    published, notes = (config("7B", vision=v) for v in ({}, NOTES_VISION))
    assert notes.vision.patch_dim == 1536 and notes.vision.modes().tolist() == [1, 2] * 16
    shape = lambda c: jax.eval_shape(  # noqa: E731
        lambda: VisionEncoder(c.vision).init(
            jax.random.key(0),
            dataclasses.replace(
                vision_input(GRIDS, c.vision.window), patches=jnp.zeros((1, LENGTH, c.vision.patch_dim))
            ),
            4,
        )["params"]
    )
    assert shape(notes)["global_query"].shape == (8, 1280)
    counts = [sum(x.size for x in jax.tree.leaves(shape(c))) for c in (published, notes)]
    assert counts[0] == 676_550_144  # spec 2.1
    assert counts[1] - counts[0] == 10_240 + (1536 - 1176) * 1280


def test_two_hops_reach_the_whole_frame_and_no_other():
    """One corner patch of a 28x28 frame changes every feature of its frame within a group, and none elsewhere."""
    c = dataclasses.replace(NOTES, depth=2, global_query_every=2)
    grids, length = [(1, 28, 28), (1, 4, 4)], 800
    vision = vision_input(grids, c.window, length)
    params = parameters(dataclasses.replace(c))
    run = encoder(c)
    moved = vision.patches.copy()
    moved[0, 0] += 10
    before, after = (run(params, dataclasses.replace(vision, patches=p))[0] for p in (vision.patches, moved))
    changed = np.abs(np.asarray(after - before)).max(-1) > 0
    assert changed[:196].all() and not changed[196:].any()
    local = dataclasses.replace(c, global_query_every=0)
    without = {k: v for k, v in params.items() if k != "global_query"}
    before, after = (
        encoder(local)(without, dataclasses.replace(vision, patches=p))[0] for p in (vision.patches, moved)
    )
    assert (np.abs(np.asarray(after - before)).max(-1) > 0).sum() < 40  # two windows wide at most


def test_gradients_reach_global_queries_and_patches():
    """Against differences of the twin-checked function along one direction."""
    c = dataclasses.replace(NOTES, depth=2, global_query_every=2, mlp_dim=16)
    vision, params = vision_input(GRIDS, c.window), parameters(c)

    @jax.jit
    def loss(query, patches):
        out = VisionEncoder(c).apply(
            {"params": params | {"global_query": query}}, dataclasses.replace(vision, patches=patches), 4
        )
        return jnp.tanh(out[0, :53]).sum()

    point = (jnp.asarray(params["global_query"]), jnp.asarray(vision.patches))
    grads = jax.grad(loss, argnums=(0, 1))(*point)
    rng = np.random.default_rng(2)
    for i in range(2):
        direction = rng.normal(size=point[i].shape).astype(np.float32) * (np.asarray(point[i]) != 0)
        direction /= np.linalg.norm(direction)
        step = 3e-2
        ahead, behind = (
            loss(*(x + sign * step * direction if j == i else x for j, x in enumerate(point))) for sign in (1, -1)
        )
        slope = (ahead - behind) / (2 * step)
        np.testing.assert_allclose((grads[i] * direction).sum(), slope, rtol=2e-2, atol=2e-3)


def test_windowed_blocks_cost_linear_flops():
    """Compiled, at the released width: four times the patches cost four times as much, with full attention more."""
    windowed = VisionConfig(depth=1, full_blocks=())
    full = dataclasses.replace(windowed, full_blocks=(0,))
    growth, of_full = (flops(c, 4096) / flops(c, 1024) for c in (windowed, full))
    assert 3.99 < growth < 4.01 and of_full > 4.8


@pytest.mark.parametrize("inner,features", [((6,), (2, 4)), ((2, 4), (6,))])
def test_low_rank_term_starts_at_zero_and_merges(inner, features):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, 3, *inner)).astype(np.float32)
    module = lora.LowRank(features, 2)
    params = module.init(jax.random.key(0), x)["params"]
    assert not np.any(module.apply({"params": params}, x))
    assert np.abs(params["a"]).max() <= np.prod(inner) ** -0.5
    params = {"a": params["a"], "b": rng.normal(size=params["b"].shape).astype(np.float32)}
    kernel = rng.normal(size=(*inner, *features)).astype(np.float32)
    merged = lora.merge({"attn": {"query": {"kernel": kernel}, "query_lora": params}}, 0.5)
    axes = len(inner)
    expected = np.tensordot(x, kernel, axes) + 0.5 * module.apply({"params": params}, x)
    assert list(merged["attn"]) == ["query"]
    np.testing.assert_allclose(np.tensordot(x, merged["attn"]["query"]["kernel"], axes), expected, atol=1e-5)
    stacked = {name: np.stack([leaf, 2 * leaf]) for name, leaf in params.items()}
    scanned = lora.merge({"blocks": {"query": {"kernel": np.stack([kernel] * 2)}, "query_lora": stacked}}, 0.5)
    second = kernel + 0.5 * 4 * (np.tensordot(params["a"], params["b"], 1))
    np.testing.assert_allclose(scanned["blocks"]["query"]["kernel"][1], second, atol=1e-5)
