"""The table engine: every kind of row in both directions, strictness, layouts in memory, shards, host memory."""

import tracemalloc
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from omnax.hub.files.tensors import LazyTensor, TensorFile
from omnax.hub.mapping import Row, Table, load_params, save_tensors
from omnax.hub.rows import conv, dense, heads, merge_heads, norm, packed_heads
from omnax.models.layers import stack_layers

RNG = np.random.default_rng(0)


def tensor_file(**arrays) -> TensorFile:
    tensors = {name: LazyTensor(x.shape, x.dtype, lambda x=x: x) for name, x in arrays.items()}
    return TensorFile(Path("file"), tensors)


def random(*shape):
    return RNG.normal(size=shape).astype(np.float32)


def abstract(tree):
    return jax.tree.map(
        lambda shape: jax.ShapeDtypeStruct(shape, jnp.float32), tree, is_leaf=lambda x: isinstance(x, tuple)
    )


def assert_saves_back(params, table, arrays):
    saved = save_tensors(params, table)
    assert set(saved) == set(arrays)
    for name, expected in arrays.items():
        assert saved[name].shape == expected.shape and saved[name].dtype == expected.dtype
        assert saved[name].read().tobytes() == np.ascontiguousarray(expected).tobytes(), name


# Two layers of a torch-like model: width 6, 3 heads of 2, kernel 2x2 on 3 channels.
LAYERS = {
    f"blocks.{i}.{name}": random(*shape)
    for i in (0, 1)
    for name, shape in {
        "norm.weight": (6,),
        "norm.bias": (6,),
        "qkv.weight": (18, 6),
        "qkv.bias": (18,),
        "proj.weight": (6, 6),
        "proj.bias": (6,),
    }.items()
}
STEM = {"conv.weight": random(6, 3, 2, 2), "conv.bias": random(6), "head.weight": random(5, 6), "head.bias": random(5)}
TABLE = Table(
    [
        *conv("conv", "stem"),
        *norm("blocks.{i}.norm", "encoder/blocks_{i}/norm"),
        *packed_heads("blocks.{i}.qkv", "encoder/blocks_{i}/attn"),
        *merge_heads("blocks.{i}.proj", "encoder/blocks_{i}/out"),
        *dense("head", "head"),
    ]
)
BLOCK = {
    "norm": {"scale": (6,), "bias": (6,)},
    "attn": {name: {"kernel": (6, 3, 2), "bias": (3, 2)} for name in ("query", "key", "value")},
    "out": {"kernel": (3, 2, 6), "bias": (6,)},
}
TARGET = abstract(
    {
        "stem": {"kernel": (2, 2, 3, 6), "bias": (6,)},
        "encoder": {"blocks_0": BLOCK, "blocks_1": BLOCK},
        "head": {"kernel": (6, 5), "bias": (5,)},
    }
)


def scanned(target):
    return {
        **target,
        "encoder": {
            "blocks": jax.tree.map(
                lambda x: jax.ShapeDtypeStruct((2, *x.shape), x.dtype), target["encoder"]["blocks_0"]
            )
        },
    }


def test_torch_layers_by_hand():
    params = load_params(tensor_file(**LAYERS, **STEM), TABLE, TARGET)
    assert params["stem"]["kernel"][1, 0, 2, 4] == STEM["conv.weight"][4, 2, 1, 0]
    assert params["head"]["kernel"][3, 4] == STEM["head.weight"][4, 3]
    attn = params["encoder"]["blocks_1"]["attn"]
    packed = LAYERS["blocks.1.qkv.weight"]
    assert attn["query"]["kernel"][4, 2, 1] == packed[2 * 2 + 1, 4]
    assert attn["key"]["kernel"][4, 2, 1] == packed[6 + 2 * 2 + 1, 4]
    assert attn["value"]["kernel"][4, 0, 1] == packed[12 + 1, 4]
    assert attn["value"]["bias"][1, 0] == LAYERS["blocks.1.qkv.bias"][12 + 2]
    assert params["encoder"]["blocks_0"]["out"]["kernel"][2, 1, 5] == LAYERS["blocks.0.proj.weight"][5, 2 * 2 + 1]
    assert_saves_back(params, TABLE, LAYERS | STEM)


def test_scanned_layout_is_the_stacked_unrolled_one():
    file = tensor_file(**LAYERS, **STEM)
    params = load_params(file, TABLE, scanned(TARGET))
    jax.tree.map(np.testing.assert_array_equal, params, stack_layers(load_params(file, TABLE, TARGET)))
    assert_saves_back(params, TABLE, LAYERS | STEM)


def test_stacks_in_the_file():
    """A layer axis in the file, in memory, in both, in neither."""
    unrolled = {f"layer_{i}/kernel": random(3, 4) for i in range(3)}
    stacked = {"layer/kernel": np.stack(list(unrolled.values()))}
    rows = [
        Row("layer_{i}/kernel", "blocks_{i}/kernel", "D F -> F D"),
        Row("layer/kernel", "blocks_{i}/kernel", "D F -> F D"),
    ]
    flat, scan = (
        abstract({f"blocks_{i}": {"kernel": (4, 3)} for i in range(3)}),
        abstract({"blocks": {"kernel": (3, 4, 3)}}),
    )
    expected = np.swapaxes(stacked["layer/kernel"], 1, 2)
    for arrays in (unrolled, stacked):
        table = Table(rows if arrays is unrolled else rows[::-1])
        in_scan = load_params(tensor_file(**arrays), table, scan)
        in_flat = load_params(tensor_file(**arrays), table, flat)
        np.testing.assert_array_equal(in_scan["blocks"]["kernel"], expected)
        np.testing.assert_array_equal(np.stack([in_flat[f"blocks_{i}"]["kernel"] for i in range(3)]), expected)
        assert_saves_back(in_scan, table, arrays)
        assert_saves_back(in_flat, table, arrays)


def test_experts_stack_below_layers():
    arrays = {f"layers.{i}.experts.{e}.up.weight": random(5, 4) for i in range(2) for e in range(3)}
    table = Table([Row("layers.{i}.experts.{e}.up.weight", "blocks_{i}/experts/up", "F D -> D F")])
    flat = load_params(
        tensor_file(**arrays), table, abstract({f"blocks_{i}": {"experts": {"up": (3, 4, 5)}} for i in range(2)})
    )
    scan = load_params(tensor_file(**arrays), table, abstract({"blocks": {"experts": {"up": (2, 3, 4, 5)}}}))
    for i in range(2):
        for e in range(3):
            expected = arrays[f"layers.{i}.experts.{e}.up.weight"].T
            np.testing.assert_array_equal(flat[f"blocks_{i}"]["experts"]["up"][e], expected)
            np.testing.assert_array_equal(scan["blocks"]["experts"]["up"][i, e], expected)
    assert_saves_back(flat, table, arrays)
    assert_saves_back(scan, table, arrays)


def test_unequal_parts_packed_along_another_axis():
    """Grouped queries, and gate and up projections on the last axis of stacked experts."""
    arrays = {"qkv": random(8 + 4 + 4, 6), "gate_up": random(3, 6, 10)}
    table = Table(
        [
            Row("qkv", ("query", "key", "value"), "(N H) D -> D N H"),
            Row("gate_up", ("gate", "up"), axis=2),
        ]
    )
    target = abstract({"query": (6, 4, 2), "key": (6, 2, 2), "value": (6, 2, 2), "gate": (3, 6, 5), "up": (3, 6, 5)})
    params = load_params(tensor_file(**arrays), table, target)
    assert params["key"][5, 1, 0] == arrays["qkv"][8 + 2, 5]
    np.testing.assert_array_equal(params["up"], arrays["gate_up"][..., 5:])
    assert_saves_back(params, table, arrays)


def test_axes_merged_in_memory_need_their_sizes():
    arrays = {"patch": random(7, 3, 2, 4, 5)}
    table = Table([Row("patch", "kernel", "D C T X Y -> (C T X Y) D", sizes={"C": 3, "T": 2, "X": 4})])
    params = load_params(tensor_file(**arrays), table, abstract({"kernel": (120, 7)}))
    np.testing.assert_array_equal(params["kernel"], arrays["patch"].reshape(7, -1).T)
    assert_saves_back(params, table, arrays)


def test_linear_stored_as_convolution():
    arrays = {"proj.weight": random(4, 6, 1, 1)}
    rows = [Row("proj.weight", "kernel", "F D -> D F"), Row("proj.weight", "kernel", "F D 1 1 -> D F")]
    params = load_params(tensor_file(**arrays), Table(rows), abstract({"kernel": (6, 4)}))
    np.testing.assert_array_equal(params["kernel"], arrays["proj.weight"][..., 0, 0].T)
    assert_saves_back(params, Table(rows[1:]), arrays)


def test_alternative_layouts_of_one_parameter():
    """Packed or separate: whichever the file holds; saved as the first."""
    packed = {"qkv.weight": random(18, 6)}
    separate = dict(zip(("q.weight", "k.weight", "v.weight"), np.split(packed["qkv.weight"], 3), strict=True))
    parts = [row for x in ("query", "key", "value") for row in heads(x[0], f"attn/{x}")]
    table = Table([*packed_heads("qkv", "attn"), *parts])
    target = abstract({"attn": {x: {"kernel": (6, 3, 2)} for x in ("query", "key", "value")}})
    for arrays in (packed, separate):
        assert_saves_back(load_params(tensor_file(**arrays), table, target), table, packed)
    with pytest.raises(ValueError, match=r"unexpected 'q\.weight', got \(6, 6\)"):
        load_params(tensor_file(**packed, **separate), table, target)


def test_renames_ignored_and_optional():
    table = Table(
        [*dense("head", "head"), Row("mask_token", "mask_token", optional=True)],
        renames=[(r"^model\.", ""), (r"^classifier\.", "head.")],
        ignore=[r".*\.position_ids"],
    )
    target = abstract({"head": {"kernel": (6, 5), "bias": (5,)}, "mask_token": (1, 6)})
    arrays = {"model.classifier.weight": random(5, 6), "model.head.bias": random(5), "embed.position_ids": np.arange(3)}
    params = load_params(tensor_file(**arrays), table, target)
    np.testing.assert_array_equal(params["head"]["kernel"], arrays["model.classifier.weight"].T)
    np.testing.assert_array_equal(params["mask_token"], np.zeros((1, 6)))
    with pytest.raises(ValueError, match=r"'model\.head\.bias' and 'classifier\.bias' are two names of one tensor"):
        load_params(tensor_file(**arrays, **{"classifier.bias": random(5)}), table, target)


def test_all_that_is_wrong_is_named():
    arrays = LAYERS | STEM
    arrays["blocks.0.nrom.weight"] = arrays.pop("blocks.0.norm.weight")
    arrays["blocks.1.qkv.weight"] = random(18, 5)
    arrays["head.bias"] = np.arange(5)
    arrays["blocks.2.norm.weight"] = random(6)
    with pytest.raises(ValueError) as caught:
        load_params(tensor_file(**arrays), TABLE, TARGET)
    assert str(caught.value).splitlines() == [
        "file does not fit the model:",
        "  missing 'blocks.0.norm.weight', expected (6,) for encoder/blocks_0/norm/scale; "
        "nearest: 'blocks.2.norm.weight', 'blocks.0.nrom.weight'",
        "  unexpected 'blocks.0.nrom.weight', got (6,); nearest: 'blocks.0.norm.weight'",
        "  unexpected 'blocks.2.norm.weight', got (6,); nearest: 'blocks.0.norm.weight'",
        "  unfit 'blocks.1.qkv.weight', got shape (18, 5), expected (18, 6) "
        "for encoder/blocks_1/attn/key/kernel (6, 3, 2)",
        "  unfit 'head.bias', got dtype int64, expected a floating-point one for head/bias",
    ]


def test_saving_what_the_format_lacks():
    with pytest.raises(ValueError, match=r"this format has no tensor for parameter 'extra/kernel' \(2, 3\)"):
        save_tensors({"extra": {"kernel": np.zeros((2, 3))}}, TABLE)


def test_dtypes():
    stored = {"head.weight": random(5, 6).astype(ml_dtypes.bfloat16), "head.bias": random(5).astype(np.float64)}
    table = Table(dense("head", "head"))
    target = abstract({"head": {"kernel": (6, 5), "bias": (5,)}})
    kept = load_params(tensor_file(**stored), table, target)["head"]
    assert (kept["kernel"].dtype, kept["bias"].dtype) == (jnp.bfloat16, jnp.float32)
    assert save_tensors({"head": kept}, table)["head.weight"].read().tobytes() == stored["head.weight"].tobytes()
    cast = load_params(tensor_file(**stored), table, target, dtype=jnp.float16)["head"]
    assert (cast["kernel"].dtype, cast["bias"].dtype) == (jnp.float16, jnp.float16)
    np.testing.assert_array_equal(cast["kernel"], stored["head.weight"].T.astype(np.float16))


def test_optional_files_of_integers_keep_their_dtype():
    target = {"count": jax.ShapeDtypeStruct((), jnp.int32)}
    params = load_params(tensor_file(count=np.int64(7)), Table([Row("count", "count")]), target, dtype=jnp.bfloat16)
    assert params["count"].dtype == jnp.int32 and params["count"] == 7


@pytest.mark.parametrize("layout", ["unrolled", "scanned"])
def test_tensors_stream_into_their_shards(layout):
    """8 devices hold their parts only, equal to the unsharded load, and only those parts are read."""
    mesh = jax.make_mesh((4, 2), ("fsdp", "tensor"), (AxisType.Auto,) * 2)
    width, wide = 16, 32
    arrays = {
        f"blocks.{i}.fc.{leaf}": random(*shape)
        for i in range(2)
        for leaf, shape in (("weight", (wide, width)), ("bias", (wide,)))
    }
    table = Table(dense("blocks.{i}.fc", "blocks_{i}/fc"))
    leaf = {"fc": {"kernel": (width, wide), "bias": (wide,)}}
    target = abstract({f"blocks_{i}": leaf for i in range(2)})
    specs = {"kernel": PartitionSpec("fsdp", "tensor"), "bias": PartitionSpec("tensor")}
    if layout == "scanned":
        target = abstract({"blocks": {"fc": {"kernel": (2, width, wide), "bias": (2, wide)}}})
        specs = {name: PartitionSpec(None, *spec) for name, spec in specs.items()}

    def shard(path, x):
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, specs[path[-1].key]))

    sharded = load_params(tensor_file(**arrays), table, jax.tree_util.tree_map_with_path(shard, target))
    whole = load_params(tensor_file(**arrays), table, target)
    jax.tree.map(np.testing.assert_array_equal, sharded, whole)
    for path, x in jax.tree_util.tree_leaves_with_path(sharded):
        assert x.sharding.is_equivalent_to(NamedSharding(mesh, specs[path[-1].key]), x.ndim)
        assert x.addressable_shards[0].data.size == x.size // (8 if path[-1].key == "kernel" else 2)
    assert_saves_back(sharded, table, arrays)


def test_host_memory_stays_near_the_largest_tensor(tmp_path):
    """Sixteen tensors of 4 MB onto 8 devices, in both layouts: what NumPy holds at any time is about one of them."""
    from omnax.hub.files.readers import open_tensors
    from omnax.hub.files.writers import write_safetensors

    size = 1024 * 1024
    arrays = {f"blocks.{i}.fc.weight": random(1024, 1024) for i in range(16)}
    write_safetensors(tmp_path / "a", tensor_file(**arrays))
    table = Table(dense("blocks.{i}.fc", "blocks_{i}/fc"))
    mesh = jax.make_mesh((8,), ("fsdp",), (AxisType.Auto,))

    def place(x):
        spec = PartitionSpec(*[None] * (len(x.shape) - 1), "fsdp")
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec))

    for target in (
        abstract({f"blocks_{i}": {"fc": {"kernel": (1024, 1024)}} for i in range(16)}),
        abstract({"blocks": {"fc": {"kernel": (16, 1024, 1024)}}}),
    ):
        tracemalloc.start()
        params = load_params(open_tensors(tmp_path / "a"), table, jax.tree.map(place, target))
        kept, peak = tracemalloc.get_traced_memory()  # kept: the CPU backend adopts aligned arrays as device memory
        tracemalloc.stop()
        assert sum(x.nbytes for x in jax.tree.leaves(params)) == 16 * 4 * size
        assert peak - kept < 2 * 4 * size
