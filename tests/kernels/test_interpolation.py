"""Every interpolation rule against the library call it restates."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.ndimage
import torch
import torch.nn.functional as F
from omnax.kernels.interpolation import resample_patch_kernel, resize_grid, sample_grid
from omnax.kernels.resize_matrices import METHODS, resize_matrix

TOLERANCE = 1e-5
SHAPES = [
    ((16, 16), (24, 24)),
    ((14, 14), (7, 7)),
    ((37, 37), (16, 16)),
    ((7, 7), (5, 11)),
    ((6, 9), (8, 3)),
    ((4, 4), (1, 2)),
]


def _torch(mode, **options):
    def resize(table, shape):
        x = torch.from_numpy(table).permute(2, 0, 1)[None]
        return F.interpolate(x, size=shape, mode=mode, **options)[0].permute(1, 2, 0).numpy()

    return resize


def _offset(table, shape):
    x = torch.from_numpy(table).permute(2, 0, 1)[None]
    factors = tuple(float(o + 0.1) / i for o, i in zip(shape, table.shape, strict=False))
    return F.interpolate(x, scale_factor=factors, mode="bicubic")[0].permute(1, 2, 0).numpy()


def _zoom(table, shape):
    return scipy.ndimage.zoom(table, (shape[0] / table.shape[0], shape[1] / table.shape[1], 1), order=1)


def _naflex(table, shape):
    scale = jnp.array(shape) / jnp.array(table.shape[:2])
    shape3 = (*shape, table.shape[2])
    return jax.image.scale_and_translate(table, shape3, (0, 1), scale, jnp.zeros(2), "bilinear", antialias=True)


REFERENCES = {
    "bicubic": _torch("bicubic", align_corners=False),
    "bicubic_antialias": _torch("bicubic", align_corners=False, antialias=True),
    "bicubic_offset": _offset,
    "bicubic_align_corners": _torch("bicubic", align_corners=True),
    "bilinear": _torch("bilinear", align_corners=False),
    "bilinear_align_corners": _zoom,
    "bilinear_antialias": _naflex,
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape_in,shape_out", SHAPES)
def test_equals_the_library_call(method, shape_in, shape_out):
    table = np.random.default_rng(0).normal(size=(*shape_in, 3)).astype(np.float32)
    got = resize_grid(jnp.asarray(table), shape_out, method)
    np.testing.assert_allclose(got, REFERENCES[method](table, shape_out), atol=TOLERANCE)


@pytest.mark.parametrize("method", METHODS)
def test_keeps_constants_and_equal_grids(method):
    np.testing.assert_allclose(resize_matrix(9, 14, method).sum(1), 1, atol=1e-6)
    table = jnp.asarray(np.random.default_rng(1).normal(size=(5, 5, 2)), jnp.float32)
    assert resize_grid(table, (5, 5), method) is table


def test_unknown_method_is_named():
    with pytest.raises(ValueError, match=r"nearest.*bicubic_antialias"):
        resize_matrix(3, 4, "nearest")


def test_patch_kernel_equals_timm():
    from oracles import timm

    kernel = np.random.default_rng(2).normal(size=(14, 14, 3, 5)).astype(np.float32)
    for size in ((16, 16), (8, 10), (32, 32)):
        expected = timm.layers.resample_patch_embed(torch.from_numpy(kernel.transpose(3, 2, 0, 1)), list(size))
        got = resample_patch_kernel(jnp.asarray(kernel), size)
        # float32 pseudo-inverse in timm (cond ~ 1e2): its own distance from the float64 one is 2e-5
        np.testing.assert_allclose(got, expected.numpy().transpose(2, 3, 1, 0), atol=5e-5)


def test_upsampled_patches_give_equal_embeddings():
    """The property the pseudo-inverse is for (FlexiViT eq. 4): embedding a resized patch = embedding the patch."""
    rng = np.random.default_rng(3)
    patch, kernel = rng.normal(size=(8, 8, 1)), rng.normal(size=(8, 8, 1, 4))
    matrix = resize_matrix(8, 12, "bicubic_antialias").astype(np.float64)
    larger = np.einsum("xi,yj,ijc->xyc", matrix, matrix, patch)
    resampled = resample_patch_kernel(jnp.asarray(kernel, jnp.float32), (12, 12))
    expected = np.einsum("xyc,xycd->d", patch, kernel)
    np.testing.assert_allclose(np.einsum("xyc,xycd->d", larger, np.asarray(resampled)), expected, atol=1e-4)


def test_sampled_positions_of_200_grids_equal_transformers():
    """Packed one after another, in merge order, as a Qwen3-VL encoder reads its table; and each grid resized whole."""
    from omnax.kernels.rope import packed_grid_positions
    from oracles import transformers  # noqa: F401  # before its modules
    from transformers.vision_utils import get_vision_interpolation_indices_and_weights

    rng = np.random.default_rng(0)
    table = rng.normal(size=(48, 48, 3)).astype(np.float32)
    grids = np.column_stack([rng.integers(1, 3, 200), 2 * rng.integers(1, 40, (200, 2))])
    grids[:3, 1:] = [(2, 2), (96, 2), (48, 48)]
    positions, _ = packed_grid_positions(grids, merge=2)
    sizes = np.repeat(grids[:, 1:], grids.prod(1), axis=0).astype(np.int32)
    got = sample_grid(jnp.asarray(table), positions[:, 1:], sizes)
    index, weights = get_vision_interpolation_indices_and_weights(
        torch.tensor(grids), 48, mode="bilinear", align_corners=True, spatial_merge_size=2
    )
    expected = (torch.tensor(table).reshape(-1, 3)[index] * weights[..., None]).sum(1)
    np.testing.assert_allclose(got, expected, atol=TOLERANCE)
    whole = resize_grid(jnp.asarray(table), (96, 2), "bilinear_align_corners")
    begin = grids[0].prod()
    chosen = positions[begin : begin + 192]
    # The two rules round a coordinate of up to 47 differently
    np.testing.assert_allclose(got[begin : begin + 192], whole[chosen[:, 1], chosen[:, 2]], atol=1e-4)


def test_sampled_table_has_the_gradient_of_its_weights():
    cells = jnp.array([[0, 0], [1, 2], [3, 1]], jnp.int32)
    sizes = jnp.array([[1, 1], [2, 4], [4, 3]], jnp.int32)
    table = jnp.asarray(np.random.default_rng(0).normal(size=(5, 5, 2)).astype(np.float32))
    gradient = jax.grad(lambda table: sample_grid(table, cells, sizes).sum())(table)
    np.testing.assert_allclose(gradient.sum((0, 1)), [3, 3], atol=1e-6)  # the weights of each cell sum to 1
    np.testing.assert_allclose(gradient[0, 0], 1, atol=1e-6)
    np.testing.assert_allclose(gradient[4, 2:4, 0], [1 / 3 + 1, 2 / 3], atol=1e-6)  # columns 2 2/3 and 2
