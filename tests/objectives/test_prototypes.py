"""Losses in blocks of rows against those on whole logits: values, gradients, eight devices, and what is kept."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec
from omnax.objectives import self_distillation as dense
from omnax.objectives.prototypes import Factors, blockwise_dino_loss, blockwise_ibot_loss

TOLERANCE = 1e-6
PROTOTYPES, WIDTH = 11, 5


def factors(*shape, seed):
    """In multiples of 1/64, so that logits are exact in whatever order a matrix product sums: at temperature 0.04 their
    rounding would be seen in the targets."""
    rng = np.random.default_rng(seed)
    features = rng.normal(size=(*shape, WIDTH))
    features /= np.linalg.norm(features, axis=-1, keepdims=True)
    prototypes = rng.normal(size=(WIDTH, PROTOTYPES)) / 2
    return Factors(*(jnp.asarray(np.round(64 * x) / 64, jnp.float32) for x in (features, prototypes)))


def logits(x):
    """Whole: [N * M, S, V]."""
    return x.logits(x.features.reshape(-1, *x.features.shape[2:]))


def dense_dino(student, teacher, temperature, axis_name=None):
    z = logits(teacher)
    targets = dense.sinkhorn_targets(z.reshape(-1, PROTOTYPES), temperature, axis_name=axis_name)
    loss, terms = dense.dino_loss(logits(student), targets.reshape(z.shape), axis_name=axis_name)
    return loss, terms | dense.target_statistics(targets, axis_name=axis_name)


def dense_ibot(student, teacher, weights, crops, temperature, axis_name=None):
    weights = weights.reshape(-1)
    targets = dense.sinkhorn_targets(logits(teacher)[:, 0], temperature, mask=weights > 0, axis_name=axis_name)
    loss, terms = dense.ibot_loss(logits(student)[:, 0], targets, weights, crops, axis_name=axis_name)
    return loss, terms | dense.target_statistics(targets, weights > 0, axis_name)


def patch_weights(groups, rows, seed=0):
    """Another number of real rows in each group, none in the first."""
    rng = np.random.default_rng(seed)
    valid = np.arange(rows) < np.arange(groups)[:, None] * rows // groups
    return jnp.asarray(np.where(valid, rng.uniform(0.1, 1, (groups, rows)), 0), jnp.float32)


def equal_with_gradients(whole, blockwise, student, teacher):
    (value, terms), gradients = jax.value_and_grad(whole, (0, 1), has_aux=True)(student, teacher)
    (got, got_terms), got_gradients = jax.jit(jax.value_and_grad(blockwise, (0, 1), has_aux=True))(student, teacher)
    np.testing.assert_allclose(got, value, rtol=TOLERANCE)
    assert got_terms.keys() == terms.keys()
    for name, term in terms.items():
        np.testing.assert_allclose(got_terms[name], term, rtol=TOLERANCE, err_msg=name)
    for own, expected in zip(got_gradients[0], gradients[0], strict=True):
        np.testing.assert_allclose(own, expected, atol=TOLERANCE)
        assert np.abs(expected).max() > 1e-3
    assert not any(np.asarray(x).any() for x in jax.tree.leaves(got_gradients[1]))


@pytest.mark.parametrize("block", [1, 2, 5])
def test_dino_loss_in_blocks(block):
    """Blocks of 1, 2 and all of 3 images, the last padded."""
    student, teacher = factors(2, 3, 5, seed=0), factors(2, 3, 2, seed=1)
    whole = partial(dense_dino, temperature=0.04)
    equal_with_gradients(whole, partial(blockwise_dino_loss, teacher_temperature=0.04, block=block), student, teacher)


@pytest.mark.parametrize("block", [1, 4, 16])
def test_ibot_loss_in_blocks(block):
    student, teacher, weights = factors(4, 13, 1, seed=0), factors(4, 13, 1, seed=1), patch_weights(4, 13)
    whole = partial(dense_ibot, weights=weights, crops=6, temperature=0.04)
    options = {"weights": weights, "num_crops": 6, "teacher_temperature": 0.04, "block": block}
    equal_with_gradients(whole, partial(blockwise_ibot_loss, **options), student, teacher)


def test_eight_devices_equal_one():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    arrays = [factors(8, 5, s, seed=s) for s in (1, 4, 2)] + [patch_weights(8, 5)]

    def losses(patches, crops, crops_t, weights, axis_name=None):
        options = {"teacher_temperature": 0.07, "block": 2, "axis_name": axis_name}
        teacher = Factors(patches.features[..., ::-1], patches.prototypes)
        ibot = blockwise_ibot_loss(patches, teacher, weights, 4 * len(weights), **options)
        return ibot, blockwise_dino_loss(crops, crops_t, **options)

    spread, whole = PartitionSpec("data"), PartitionSpec()
    specs = (*[Factors(spread, whole)] * 3, spread)
    over_devices = jax.shard_map(
        partial(losses, axis_name="data"), mesh=mesh, in_specs=specs, out_specs=whole, check_vma=False
    )
    one, eight = losses(*arrays), jax.jit(over_devices)(*arrays)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5, atol=TOLERANCE), eight, one)


def shapes(jaxpr):
    """Of everything that a program computes, inside loops too."""
    for equation in jaxpr.eqns:
        yield from (variable.aval.shape for variable in equation.outvars)
        for inner in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                yield from shapes(inner)


def test_logits_exist_for_a_block_only():
    """64 rows in 2 groups, blocks of 4: the forward and backward pass never hold more than 2 x 4 rows of prototypes."""
    student, teacher, weights = factors(2, 32, 1, seed=0), factors(2, 32, 1, seed=1), patch_weights(2, 32)

    def rows(loss):
        jaxpr = jax.make_jaxpr(jax.grad(lambda s: loss(s, teacher)[0]))(student).jaxpr
        found = [np.prod(shape, dtype=int) // PROTOTYPES for shape in shapes(jaxpr) if PROTOTYPES in shape]
        return max(found)

    options = {"weights": weights, "num_crops": 4, "teacher_temperature": 0.04}
    assert rows(partial(blockwise_ibot_loss, **options, block=4)) == 8
    assert rows(partial(dense_ibot, weights=weights, crops=4, temperature=0.04)) == 64
