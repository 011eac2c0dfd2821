"""The dense product against einsum in float64, in the form of every platform, and inside flax's layers."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from omnax.kernels import dense
from omnax.kernels.dense import dot_general

# name: (x, kernel, einsum)
CASES = {
    "Dense": ((2, 3, 5), (5, 4), "btd,df->btf"),
    "to heads": ((2, 3, 5), (5, 4, 6), "btd,dnh->btnh"),
    "from heads": ((2, 3, 4, 6), (4, 6, 5), "btnh,nhd->btd"),
    "vector": ((5,), (5, 4), "d,df->f"),
}


def numbers(case):
    x_shape, kernel_shape, _ = CASES[case]
    inner = next(n for n in range(1, 3) if x_shape[-n:] == kernel_shape[:n])
    return (tuple(range(len(x_shape) - inner, len(x_shape))), tuple(range(inner))), ((), ())


@pytest.mark.parametrize("form", ["here", "apart", "joined"])
@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients(case, form):
    x_shape, kernel_shape, formula = CASES[case]
    rng = np.random.default_rng(0)
    x, kernel = rng.normal(size=x_shape), rng.normal(size=kernel_shape)
    forms = dict(zip(("apart", "joined"), dense._forms(numbers(case), None), strict=True))
    forms["here"] = lambda x, kernel: dot_general(x, kernel, numbers(case))
    out, pull_back = jax.vjp(forms[form], jnp.float32(x), jnp.float32(kernel))
    expected = np.einsum(formula, x, kernel)
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-5)
    gradient = rng.normal(size=expected.shape)
    inputs, result = formula.split("->")
    of_x, of_kernel = inputs.split(",")
    to_x, to_kernel = pull_back(jnp.float32(gradient))
    np.testing.assert_allclose(to_x, np.einsum(f"{result},{of_kernel}->{of_x}", gradient, kernel), atol=1e-5)
    np.testing.assert_allclose(to_kernel, np.einsum(f"{of_x},{result}->{of_kernel}", x, gradient), atol=1e-5)


def test_axes_are_joined_on_cpus_only():
    def gradient(x, kernel):
        return jax.grad(lambda kernel: dot_general(x, kernel, numbers("Dense")).sum())(kernel)

    traced = jax.jit(gradient).trace(jnp.ones((2, 3, 5)), jnp.ones((5, 4)))
    joined, apart = (traced.lower(lowering_platforms=(name,)).as_text() for name in ("cpu", "tpu"))
    assert "contracting_dims = [0] x [0]" in joined and "contracting_dims = [0, 1] x [0, 1]" not in joined
    assert "contracting_dims = [0, 1] x [0, 1]" in apart and "contracting_dims = [0] x [0]" not in apart


def test_other_axes_are_refused():
    with pytest.raises(AssertionError, match="not last with first axes"):
        dot_general(jnp.ones((2, 3)), jnp.ones((4, 3)), (((1,), (1,)), ((), ())))


def gradients(layer):
    """Of the squares of a layer's outputs, per example: gradients(layer)(params, x)."""

    def total(params, x):
        return jnp.square(layer.apply(params, x).astype(jnp.float32)).sum()

    return jax.jit(jax.vmap(jax.grad(total, (0, 1)), (None, 0)))


def test_in_flax_layers_under_vmap_and_bfloat16():
    x = jax.random.normal(jax.random.key(0), (4, 3, 8))
    for layer in (
        nn.Dense(5),
        nn.DenseGeneral((2, 3)),
        nn.DenseGeneral(4, axis=(-2, -1)),
        nn.Dense(5, dtype="bfloat16"),
    ):
        ours, params = layer.clone(dot_general=dot_general), layer.init(jax.random.key(1), x[0])

        rows = [gradients(layer)(params, x) for layer in (ours, layer)]
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), *rows)


def test_sharded_equals_one_device():
    mesh = jax.make_mesh((2, 2), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)
    x, kernel = jax.random.normal(jax.random.key(0), (4, 3, 8)), jax.random.normal(jax.random.key(1), (8, 2, 5))
    run = jax.jit(jax.grad(lambda x, kernel: jnp.square(dot_general(x, kernel, numbers("to heads"))).sum(), (0, 1)))
    specs = PartitionSpec("data", None, None), PartitionSpec(None, "tensor", None)
    sharded = run(*(jax.device_put(a, NamedSharding(mesh, s)) for a, s in zip((x, kernel), specs, strict=True)))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), sharded, run(x, kernel))
