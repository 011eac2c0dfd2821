"""Attention over a mesh's `context` axis: values and gradients of one device, and memory that falls with the axis."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from omnax.kernels.attention import attention


def mesh_of(**axes):
    return jax.make_mesh(tuple(axes.values()), tuple(axes), axis_types=(AxisType.Auto,) * len(axes))


def draw(batch=2, length=48, keys=None, heads=8, key_heads=8, width=8):
    rng = np.random.default_rng(0)
    shapes = (batch, length, heads, width), *[(batch, keys or length, key_heads, width)] * 2
    return tuple(jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes)


def value_and_gradients(arrays, words):
    def total(arrays):
        out = attention(*arrays, **words)
        return (out * jnp.cos(jnp.arange(out.size)).reshape(out.shape)).sum(), out

    (_, out), gradients = jax.jit(jax.value_and_grad(total, has_aux=True))(arrays)
    return jax.device_get((out, gradients))


# Three documents and padding in one row, and one document in the other: packed.
IDS = jnp.asarray(np.stack([np.repeat([1, 2, 3, 0], [7, 20, 12, 9]), np.ones(48)]), jnp.int32)
CASES = {
    "all": {},
    "causal": {"causal": True},
    "packed": {"segment_ids": IDS},
    "packed, causal": {"segment_ids": IDS, "causal": True},
    "window": {"causal": True, "window": 10, "block_size": 4},
    "padding": {"key_lengths": jnp.asarray([17, 0])},
    "packed with padding, in blocks": {"segment_ids": IDS, "key_lengths": jnp.asarray([31, 48]), "block_size": 4},
}


@pytest.mark.parametrize("key_heads", [8, 2], ids=["by heads", "ring"])
@pytest.mark.parametrize("case", CASES)
def test_eight_devices_equal_one(case, key_heads):
    arrays = draw(key_heads=key_heads)
    expected = value_and_gradients(arrays, CASES[case])
    with jax.set_mesh(mesh_of(context=8)):
        found = value_and_gradients(arrays, CASES[case])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), found, expected)


def test_beside_the_other_axes_with_other_keys_and_blocks_that_do_not_divide():
    for arrays, words in (
        (draw(heads=8, key_heads=2), {"causal": True, "segment_ids": IDS}),  # tensor takes 2 key heads, the ring 1
        (draw(heads=4, key_heads=1), {"causal": True, "block_size": 10}),  # 24 positions in blocks of 10
        (draw(keys=16, key_heads=2), {"key_lengths": jnp.asarray([3, 16])}),  # cross attention
        (draw(keys=16), {"segment_ids": (IDS, IDS[:, 5:21])}),
    ):
        expected = value_and_gradients(arrays, words)
        with jax.set_mesh(mesh_of(data=2, tensor=2, context=2)):
            found = value_and_gradients(arrays, words)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), found, expected)


def test_lengths_that_the_axis_does_not_divide_are_gathered():
    arrays = draw(length=45)
    expected = value_and_gradients(arrays, {"causal": True})
    with jax.set_mesh(mesh_of(context=8)):
        found = value_and_gradients(arrays, {"causal": True})
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), found, expected)


@pytest.mark.parametrize("key_heads", [8, 1], ids=["by heads", "ring"])
def test_memory_of_a_device_falls_with_the_axis(key_heads, capsys):
    shapes = draw(1, 16, key_heads=key_heads)
    temporaries = []
    for size in (1, 2, 4, 8):
        mesh = mesh_of(context=size)
        spread = NamedSharding(mesh, PartitionSpec(None, "context"))
        arrays = [jax.ShapeDtypeStruct((1, 4096, *x.shape[2:]), x.dtype, sharding=spread) for x in shapes]

        def total(*arrays):
            return attention(*arrays, causal=True, block_size=32).sum()

        with jax.set_mesh(mesh):
            compiled = jax.jit(jax.grad(total, (0, 1, 2))).lower(*arrays).compile()
        temporaries.append(compiled.memory_analysis().temp_size_in_bytes)
    with capsys.disabled():
        print(f"\ntemporaries of a device, context = 1, 2, 4, 8: {[f'{size / 2**20:.1f} MiB' for size in temporaries]}")
    assert temporaries[2] < 0.7 * temporaries[1] and temporaries[3] < 0.7 * temporaries[2]
