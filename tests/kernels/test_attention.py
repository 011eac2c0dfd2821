"""Attention against the query-by-query twin, values and gradients, dense and in blocks; what each back end is given."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, NamedSharding, PartitionSpec, use_abstract_mesh
from omnax.kernels import attention_splash, attention_table
from omnax.kernels.attention import attention
from omnax.kernels.attention_platform import Platform
from omnax.kernels.attention_rows import attend_rows
from references import attention as reference

TOLERANCE = 1e-5
FULL = (2, 4, 7, 10)  # B, N, T, S of the tables below


def problem(batch, length, keys, heads, key_heads, width, seed=0):
    """Random query, key, value and cotangent."""
    rng = np.random.default_rng(seed)
    shapes = (batch, length, heads, width), (batch, keys, key_heads, width), (batch, keys, key_heads, width)
    return tuple(rng.normal(size=shape).astype(np.float32) for shape in (*shapes, shapes[0]))


def rules(shape, mask_axes=None, causal=False, segments=False, offset=None, window=None, lengths=None, seed=0):
    """Options for `attention` and the same for its twin; mask_axes says which of B, N, T, S a mask really has.

    The twin knows masks alone: a window and lengths are given to it as one.
    """
    batch, _, length, keys = shape
    rng = np.random.default_rng(seed)
    ours, twin = {"causal": causal}, {"causal": causal, "mask": None, "segments": None, "offsets": np.zeros(batch, int)}
    if mask_axes is not None:
        sizes = [size if kept == "1" else 1 for size, kept in zip(shape, mask_axes, strict=True)]
        ours["mask"] = jnp.asarray(rng.random(sizes) < 0.6)
        twin["mask"] = np.broadcast_to(ours["mask"], shape)
    if segments:
        twin["segments"] = rng.integers(0, 3, (batch, length)), rng.integers(0, 3, (batch, keys))
        ours["segment_ids"] = tuple(jnp.asarray(ids, jnp.int32) for ids in twin["segments"])
    twin["mask"] = None if mask_axes is None and window is None and lengths is None else _as_mask(shape, twin["mask"])
    if window is not None:
        ours["window"] = window
        places = np.broadcast_to(0 if offset is None else offset, batch)[:, None] + np.arange(length)
        twin["mask"] &= (np.arange(keys) > places[..., None] - window)[:, None]
    if lengths is not None:
        ours["key_lengths"] = jnp.asarray(lengths)
        twin["mask"] &= (np.arange(keys) < np.array(lengths)[:, None])[:, None, None]
    if offset is not None:
        ours["query_offset"] = jnp.asarray(offset) if isinstance(offset, list) else offset
        twin["offsets"] = np.broadcast_to(offset, batch)
    return ours, twin


def _as_mask(shape, mask):
    return np.ones(shape, bool) if mask is None else mask.copy()


def run(arrays, **options):
    """Output and gradients of `attention`."""

    @jax.jit
    def forward_backward(*inputs, cotangent):
        out, pull_back = jax.vjp(functools.partial(attention, **options), *inputs)
        return out, *pull_back(cotangent.astype(out.dtype))

    return forward_backward(*arrays[:3], cotangent=arrays[3])


def check(arrays, ours, twin, tolerance=TOLERANCE, **options):
    expected = reference.attention(*arrays, scale=options.get("scale", arrays[0].shape[-1] ** -0.5), **twin)
    for result, wanted in zip(run(arrays, **ours, **options), expected[:4], strict=True):
        np.testing.assert_allclose(np.asarray(result, np.float64), wanted, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("axes", [(2, 4), (1, 4), (1, 1)], ids=str)
def test_a_bias_is_added_and_learned(axes):
    """Learned relative positions: gradients reach the bias, hidden keys get none of it."""
    arrays = problem(*FULL[:1], 7, 10, 4, 2, 8)
    ours, twin = rules(FULL, mask_axes="1001", causal=True, offset=3)
    bias = np.random.default_rng(1).normal(size=(*axes, 7, 10)).astype(np.float32)
    out, pull_back = jax.vjp(lambda q, k, v, bias: attention(q, k, v, bias=bias, **ours), *arrays[:3], bias)
    whole = np.broadcast_to(bias, FULL)
    expected = list(reference.attention(*arrays, scale=8**-0.5, bias=whole, **twin))
    expected[4] = expected[4].sum(tuple(i for i in (0, 1) if axes[i] == 1), keepdims=True)
    for result, wanted in zip((out, *pull_back(arrays[3])), expected, strict=True):
        np.testing.assert_allclose(result, wanted, rtol=TOLERANCE, atol=TOLERANCE)
    with pytest.raises(ValueError, match="bias needs the dense XLA back end"):
        attention(*arrays[:3], bias=bias, block_size=4)


@pytest.mark.parametrize("block_size", [None, 3])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"causal": True},
        {"causal": True, "offset": 3},
        {"causal": True, "offset": [0, 2]},
        {"segments": True},
        {"causal": True, "window": 2},
        {"causal": True, "window": 4, "offset": [0, 3], "segments": True},
        {"lengths": [10, 4]},
        {"lengths": [0, 9], "causal": True, "window": 3},
        {"mask_axes": "1111"},
        {"mask_axes": "0110"},
        {"mask_axes": "1001", "causal": True, "segments": True, "offset": [3, 1]},
    ],
    ids=str,
)
def test_every_rule_against_the_twin(options, block_size):
    check(problem(2, 7, 10, 4, 2, 8), *rules(FULL, **options), block_size=block_size)


@settings(max_examples=8, deadline=None, derandomize=True)
@given(
    sizes=st.tuples(st.integers(1, 3), st.integers(1, 9), st.integers(1, 9), st.integers(1, 3), st.integers(1, 3)),
    width=st.integers(1, 9),
    mask_axes=st.none() | st.text("01", min_size=4, max_size=4),
    causal=st.booleans(),
    segments=st.booleans(),
    block_size=st.none() | st.integers(1, 9),
    seed=st.integers(0, 99),
)
def test_any_shape_against_the_twin(sizes, width, mask_axes, causal, segments, block_size, seed):
    batch, length, keys, key_heads, group = sizes
    arrays = problem(batch, length, keys, key_heads * group, key_heads, width, seed)
    shape = batch, key_heads * group, length, keys
    check(arrays, *rules(shape, mask_axes, causal, segments, seed=seed), block_size=block_size, scale=0.7)


@pytest.mark.parametrize("block_size", [None, 4])
def test_one_array_of_segments_is_the_pair_of_it(block_size):
    arrays = problem(2, 9, 9, 2, 2, 4)
    ids = jnp.asarray(np.sort(np.random.default_rng(1).integers(0, 3, (2, 9))))
    one, pair = (run(arrays, segment_ids=ids, block_size=block_size) for ids in (ids, (ids, ids)))
    jax.tree.map(np.testing.assert_array_equal, one, pair)


@pytest.mark.parametrize("block_size", [None, 4])
def test_queries_that_see_nothing_give_zeros_and_take_no_gradient(block_size):
    arrays = problem(2, 6, 8, 2, 1, 4)
    mask = np.ones((2, 1, 6, 8), bool)
    mask[0, :, 2:5] = False
    out, to_query, to_key, to_value = run(arrays, mask=jnp.asarray(mask), block_size=block_size)
    np.testing.assert_array_equal(out[0, 2:5], 0)
    np.testing.assert_array_equal(to_query[0, 2:5], 0)
    assert np.isfinite(to_key).all() and np.isfinite(to_value).all()
    for result in run(arrays, mask=jnp.zeros((1, 1, 1, 1), bool), block_size=block_size):
        np.testing.assert_array_equal(result, 0)


@pytest.mark.parametrize("block_size", [None, 4])
def test_softmax_is_float32_and_safe(block_size):
    """Logits of ±3000: exp would overflow, and bfloat16 logits would be 8 to 16 apart."""
    arrays = problem(1, 5, 9, 2, 2, 8)
    check(tuple(30 * x for x in arrays[:2]) + arrays[2:], *rules((1, 2, 5, 9)), tolerance=1e-3, block_size=block_size)


@pytest.mark.parametrize("block_size", [None, 4])
def test_bfloat16_is_the_rounding_of_the_inputs(block_size):
    """Against the twin on the rounded inputs; what is left is the rounding of weights and results, 2⁻⁸ each."""
    arrays = tuple(jnp.asarray(x, jnp.bfloat16) for x in problem(2, 7, 10, 4, 2, 8))
    assert {x.dtype for x in run(arrays, causal=True, block_size=block_size)} == {jnp.dtype(jnp.bfloat16)}
    ours, twin = rules(FULL, causal=True)
    check(tuple(np.asarray(x, np.float32) for x in arrays), ours, twin)
    check(arrays, ours, twin, tolerance=0.02, block_size=block_size)


def temporary_bytes(length, block_size):
    """Of forward and backward."""
    shape = jax.ShapeDtypeStruct((1, length, 2, 8), jnp.float32)
    total = jax.grad(lambda *x: attention(*x, causal=True, block_size=block_size).sum(), (0, 1, 2))
    return jax.jit(total).lower(shape, shape, shape).compile().memory_analysis().temp_size_in_bytes


def test_blocks_make_memory_linear_in_length():
    linear, quadratic = ([temporary_bytes(length, size) for length in (1024, 4096)] for size in (64, None))
    assert linear[1] < 4.2 * linear[0]
    assert quadratic[1] > 8 * quadratic[0]
    assert linear[1] < quadratic[1] / 50


def test_blocks_that_nobody_sees_are_passed_over():
    query, key, value, cotangent = problem(1, 8, 12, 1, 1, 4)
    key[:, 8:] = np.nan  # positions 8 … 11 are in the future of all queries
    assert all(np.isfinite(x[:, :8]).all() for x in run((query, key, value, cotangent), causal=True, block_size=4))


def test_sharded_equals_one_device():
    arrays = problem(4, 6, 6, 4, 2, 4)
    mesh = jax.make_mesh((2, 2), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)
    sharding = NamedSharding(mesh, PartitionSpec("data", None, "tensor", None))
    for block_size in (None, 4):
        sharded = run([jax.device_put(x, sharding) for x in arrays], causal=True, block_size=block_size)
        one = run(arrays, causal=True, block_size=block_size)
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-6), sharded, one)


# The kernels of other platforms: splash interpreted, and what is lowered for platforms that are not here.


@pytest.fixture
def interpreted(monkeypatch):
    make = functools.partial(attention_splash.splash.make_splash_mha_single_device, interpret=True)
    monkeypatch.setattr(attention_splash.splash, "make_splash_mha_single_device", make)
    attention.clear_cache()
    yield
    attention.clear_cache()


@pytest.mark.parametrize("packed", [True, False])
def test_splash_against_the_twin(interpreted, packed):
    """Lengths that are not multiples of the tiles, grouped queries; packed and causal, or queries and keys apart."""
    length, keys = (130, 130) if packed else (20, 140)
    arrays = problem(1, length, keys, 2, 1, 4)
    ours, twin = rules((1, 2, length, keys), causal=packed)
    if packed:
        ids = np.sort(np.random.default_rng(0).integers(0, 3, (1, length)))
        ours["segment_ids"], twin["segments"] = jnp.asarray(ids, jnp.int32), (ids, ids)
    check(arrays, ours, twin, backend="splash")


@pytest.mark.parametrize("options", [{"causal": True, "window": 5}, {"lengths": [0, 17]}], ids=str)
def test_splash_is_told_windows_and_lengths(interpreted, options):
    check(problem(2, 20, 20, 2, 1, 4), *rules((2, 2, 20, 20), **options), backend="splash")


def test_splash_maps_over_the_mesh(interpreted):
    arrays = problem(2, 10, 10, 4, 2, 4)
    mesh = jax.make_mesh((2, 2), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)
    with jax.set_mesh(mesh):
        sharding = NamedSharding(mesh, PartitionSpec("data", None, "tensor", None))
        sharded = run([jax.device_put(x, sharding) for x in arrays], causal=True, backend="splash")
    assert sharded[0].sharding.spec == sharding.spec
    one = run(arrays, causal=True, backend="xla")
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5), sharded, one)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=lambda dtype: dtype.__name__)
@pytest.mark.parametrize(("keys", "causal"), [(13, False), (13, True), (21, False)])
def test_rows_are_those_of_xla(dtype, keys, causal):
    arrays = [jnp.asarray(x, dtype) for x in problem(2, 13, keys, 2, 2, 8)[:3]]

    def run(attend):
        total = lambda *x: (attend(*x).astype(jnp.float32) * jnp.arange(1.0, 9)).sum()  # noqa: E731
        return attend(*arrays), jax.grad(total, (0, 1, 2))(*arrays)

    ours = run(lambda *x: attend_rows(*x, causal, 0.3, interpret=True))
    xla = run(lambda *x: attention(*x, causal=causal, scale=0.3, backend="xla"))
    tolerance = 1e-5 if dtype == jnp.float32 else 0.02  # two steps of bfloat16: XLA fuses roundings away
    close = functools.partial(np.testing.assert_allclose, rtol=tolerance, atol=3 * tolerance)
    jax.tree.map(lambda a, b: close(a.astype(jnp.float32), b.astype(jnp.float32)), ours, xla)


def test_rows_map_over_the_mesh():
    arrays = problem(4, 10, 10, 4, 4, 8)[:3]
    expected = attend_rows(*arrays, False, 0.3, interpret=True)
    with jax.set_mesh(jax.make_mesh((2, 2), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)):
        found = jax.jit(lambda *x: attend_rows(*x, False, 0.3, interpret=True))(*arrays)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_rows_hold_no_logits_in_memory():
    """One kernel each way, and no array of it is quadratic in length."""
    text = lowered("tpu", jnp.bfloat16, length=197, backend="rows")
    assert text.count("tpu_custom_call") == 2 and "197x197" not in text


def lowered(platform, dtype, length=128, **options):
    """StableHLO of forward and backward for a platform that is not here."""
    shape = jax.ShapeDtypeStruct((2, length, 2, 64), dtype)
    total = jax.grad(lambda *x: attention(*x, **options).astype(jnp.float32).sum(), (0, 1, 2))
    return jax.jit(total).trace(shape, shape, shape).lower(lowering_platforms=(platform,)).as_text()


@pytest.mark.parametrize(("keys", "kernels"), [(1024, 2), (32760, 3)])
def test_splash_lowers_for_tpus(keys, kernels):
    """Forward and one backward kernel; for long rows of keys two, for the one holds a part per tile of keys."""
    assert lowered("tpu", jnp.bfloat16, length=keys, backend="splash").count("tpu_custom_call") == kernels


@pytest.mark.parametrize(
    ("length", "head_dim", "tiles"),
    [
        (197, 64, (256, 256, 256, 256, 256)),
        (577, 64, (640, 640, 640, 640, 640)),
        (1370, 80, (768, 768, 384, 1536, 512)),
        (4096, 128, (1024, 1024, 512, 2048, 512)),
        (3000, 128, (1024, 1024, 512, 1024, 512)),
        (4096, 256, (512, 512, 512, 1024, 512)),
    ],
)
def test_tiles_are_few_and_equal(length, head_dim, tiles):
    largest = attention_splash.largest_tiles("TPU v5 lite", head_dim)
    sizes = attention_splash.block_sizes(length, length, largest)
    found = sizes.block_q, sizes.block_kv, sizes.block_kv_compute, sizes.block_kv_dkv, sizes.block_kv_dkv_compute
    assert found == tiles
    assert sizes.block_kv % sizes.block_kv_compute == 0 and sizes.block_kv_dkv % sizes.block_kv_dkv_compute == 0
    assert sizes.use_fused_bwd_kernel


TABLE = """
ViT/16 at 224 pixels, float32              | xla | xla         | xla         | xla
ViT/16 at 224 pixels                       | xla | cudnn       | cudnn       | rows
ViT/16 at 224 pixels, inference            | xla | cudnn       | cudnn       | rows
ViT/14 at 224 pixels, heads of 88 (g)      | xla | cudnn       | cudnn       | rows
ViT/16 at 384 pixels                       | xla | cudnn       | cudnn       | rows
ViT/14 at 518 pixels                       | xla | cudnn       | cudnn       | splash
CLIP's text tower, causal                  | xla | cudnn       | cudnn       | rows
text with padding behind                   | xla | cudnn       | cudnn       | xla
odd length with a mask                     | xla | cudnn, mask | cudnn, mask | xla
odd length with a mask, inference          | xla | cudnn, mask | cudnn, mask | xla
frames packed, Qwen2.5-VL, heads of 80     | xla | cudnn, mask | cudnn, mask | splash
windows of patches, Qwen2.5-VL             | xla | cudnn       | cudnn       | xla
language model, causal, grouped            | xla | cudnn       | cudnn       | splash
documents packed, causal, grouped          | xla | cudnn, mask | cudnn, mask | splash
sliding window of 1024                     | xla | cudnn       | cudnn       | splash
heads of 256, causal                       | xla | xla         | cudnn       | splash
long video, 32760 tokens                   | xla | cudnn       | cudnn       | splash
one new token after a prompt, grouped      | xla | cudnn       | cudnn       | xla
eight new tokens after a prompt            | xla | cudnn, mask | cudnn, mask | xla
"""


def test_the_back_end_of_every_call_on_every_platform():
    """Read from what is lowered for platforms that are not here: what `python -m omnax.kernels.attention` prints."""
    wanted = {name.strip(): cells for name, *cells in (line.split("|") for line in TABLE.strip().splitlines())}
    assert list(wanted) == [row.name for row in attention_table.ROWS]
    for row in attention_table.ROWS:
        found = [attention_table.backend(row, on) for on in attention_table.PLATFORMS.values()]
        assert found == [cell.strip() for cell in wanted[row.name]], row.name


def test_without_an_nvidia_gpu_nothing_is_left_to_cudnn():
    row = attention_table.ROWS[1]
    assert attention_table.backend(row, Platform("gpu", "AMD Instinct MI300X")) == "xla"


def test_cudnn_without_a_mask_holds_nothing_quadratic(monkeypatch):
    """Padding and windows are told in words; a mask of them would be [B, N, T, S]."""
    length, gpu = 2048, attention_table.PLATFORMS["gpu, H100"]
    row = attention_table.Row("", length, words={"causal": True, "window": 64})
    arrays = {"key_lengths": lambda b, *_: jax.ShapeDtypeStruct((b,), jnp.int32)}
    lengths = attention_table.Row("", length + 1, arrays=arrays)
    for each in (row, lengths):
        text = attention_table.lowered(each, gpu)
        assert f"{length}x{length}x" not in text and f"{length + 2}x{length + 2}x" not in text


@pytest.fixture
def cudnn_by_xla(monkeypatch):
    """JAX's own statement of what cuDNN is told, so that what we tell it can be computed here."""
    of_xla = functools.partial(jax.nn.dot_product_attention)
    monkeypatch.setattr(
        jax.nn,
        "dot_product_attention",
        lambda *x, implementation, **options: of_xla(*x, implementation="xla", **options),
    )
    attention.clear_cache()
    yield
    attention.clear_cache()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"causal": True},
        {"causal": True, "window": 3},
        {"lengths": [9, 4]},
        {"lengths": [0, 9], "causal": True},
        {"lengths": [6, 9], "causal": True, "window": 2},
        {"causal": True, "offset": [0, 2]},
        {"segments": True, "mask_axes": "1011"},
    ],
    ids=str,
)
def test_cudnn_is_told_the_truth(cudnn_by_xla, options):
    """Odd lengths, for which the gradient takes another way; bfloat16, as above 2⁻⁸ a result."""
    arrays = tuple(jnp.asarray(x, jnp.bfloat16) for x in problem(2, 7, 9, 4, 2, 8))
    check(arrays, *rules((2, 4, 7, 9), **options), tolerance=0.03, backend="cudnn")
    one = arrays[0][:, :1], *arrays[1:3], arrays[3][:, :1]
    check(one, *rules((2, 4, 1, 9), causal=True, offset=[2, 5]), tolerance=0.03, backend="cudnn")


@pytest.mark.parametrize(
    ("platform", "length", "options", "kernel"),
    [
        ("tpu", 2048, {"causal": True}, "pallas_call"),
        ("tpu", 2048, {"mask": jnp.ones((1, 1, 1, 2048), bool)}, None),
        ("tpu", 256, {}, None),
        ("cpu", 2048, {}, None),
    ],
)
def test_auto_follows_the_platform_of_the_mesh(platform, length, options, kernel):
    device = AbstractDevice(device_kind=platform, num_cores=1, platform=platform)
    mesh = AbstractMesh((1,), ("data",), axis_types=(AxisType.Auto,), abstract_device=device)
    shape = jax.ShapeDtypeStruct((1, length, 2, 64), jnp.float32)
    with use_abstract_mesh(mesh):
        jaxpr = str(jax.make_jaxpr(functools.partial(attention, **options))(shape, shape, shape))
    assert ("pallas_call" in jaxpr) == (kernel == "pallas_call")


@pytest.mark.parametrize(
    ("shape", "options", "message"),
    [
        ((2, 7, 10, 3, 2, 8), {}, "3 query heads are not a multiple of 2 key heads"),
        ((2, 7, 10, 2, 2, 8), {"query_offset": 3}, "query_offset needs causal=True"),
        ((2, 7, 10, 2, 2, 8), {"segment_ids": jnp.zeros((2, 7), int)}, "7 queries and 10 keys, expected a pair"),
        ((2, 7, 7, 2, 2, 8), {"window": 3}, "window needs causal=True"),
        ((2, 7, 7, 2, 2, 8), {"window": 0, "causal": True}, "window must be at least 1, got 0"),
        (
            (2, 7, 7, 2, 2, 8),
            {"backend": "splash", "key_lengths": jnp.ones(2, int), "segment_ids": jnp.zeros((2, 7), int)},
            "'splash' takes key_lengths without segment_ids",
        ),
        ((2, 7, 7, 2, 2, 8), {"block_size": 0}, "block_size must be at least 1, got 0"),
        ((2, 7, 7, 2, 2, 8), {"backend": "splash", "mask": jnp.ones((1, 1, 7, 7), bool)}, "'splash' takes no mask"),
        ((2, 7, 7, 2, 2, 8), {"backend": "rows", "key_lengths": jnp.ones(2, int)}, "'rows' takes rows that are seen"),
        ((2, 7, 7, 2, 1, 8), {"backend": "rows"}, "'rows' takes as many key heads as heads"),
        ((2, 7, 7, 2, 2, 8), {"backend": "cudnn"}, "'cudnn' takes bfloat16 and float16, got float32"),
    ],
)
def test_bad_input_is_named(shape, options, message):
    with pytest.raises(ValueError, match=message):
        attention(*problem(*shape)[:3], **options)


def test_cudnn_names_the_shapes_it_does_not_take():
    def ask(length, width, **options):
        query = jnp.zeros((1, length, 2, width), jnp.bfloat16)
        attention(query, query, query, backend="cudnn", **options)

    with pytest.raises(ValueError, match=r"multiple of 8 up to 128 \(256 from Hopper on\), got 12"):
        ask(8, 12)
    with pytest.raises(ValueError, match="no blockwise masks"):
        ask(8, 16, causal=True, query_offset=1, block_size=4)
