"""Convolutions in torch's conventions: values against NumPy loops, every gradient against torch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from omnax.kernels import convolution
from oracles import torch
from references import convolution as reference

# (image, kernel size, stride, padding): even and odd remainders, unequal axes, the expert's 5 x 5 with padding 1
CONVS = [
    ((7, 6), (3, 3), (1, 1), (1, 1)),
    ((9, 8), (3, 3), (3, 2), (1, 1)),
    ((6, 10), (5, 5), (1, 2), (1, 1)),
]
# (image, stride, padding, output padding) of 3 x 3 kernels
DECONVS = [((1, 1), (1, 1), (0, 0), (0, 0)), ((3, 4), (2, 2), (1, 1), (1, 1)), ((4, 3), (2, 3), (1, 0), (0, 2))]


def normal(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def torch_gradients(function, x, kernel, gradient, **options):
    """Gradients of sum(function * gradient) in this repository's layouts."""
    x, kernel = (torch.tensor(a, requires_grad=True) for a in (x.transpose(0, 3, 1, 2), kernel.transpose(3, 2, 0, 1)))
    with torch.enable_grad():
        function(x, kernel, **options).backward(torch.tensor(gradient.transpose(0, 3, 1, 2)))
    return x.grad.numpy().transpose(0, 2, 3, 1), kernel.grad.numpy().transpose(2, 3, 1, 0)


@pytest.fixture(params=["xla", "strips"])
def strips(request, monkeypatch):
    """Forces each way of computing the kernel gradient, whatever the size."""
    monkeypatch.setattr(convolution, "_IMAGE_BYTES", 1 << 30 if request.param == "xla" else 0)
    monkeypatch.setattr(convolution, "_STRIP_BYTES", 1 << 10)


@pytest.mark.parametrize("image,size,stride,padding", CONVS)
def test_conv2d_and_gradients(image, size, stride, padding, strips):
    x, kernel = normal(0, 4, *image, 3), normal(1, *size, 3, 5)
    out, pullback = jax.vjp(lambda x, k: convolution.conv2d(x, k, stride, padding), jnp.array(x), jnp.array(kernel))
    np.testing.assert_allclose(out, reference.conv2d(x, kernel, stride, padding), atol=1e-5)
    gradient = normal(2, *out.shape)
    expected = torch_gradients(torch.nn.functional.conv2d, x, kernel, gradient, stride=stride, padding=padding)
    for got, want in zip(pullback(jnp.array(gradient)), expected, strict=True):
        np.testing.assert_allclose(got, want, atol=3e-5)  # sums of up to 168 products of normals


@pytest.mark.parametrize("image,stride,padding,output_padding", DECONVS)
def test_conv2d_transpose_and_gradients(image, stride, padding, output_padding, strips):
    x, kernel = normal(0, 4, *image, 6), normal(1, 3, 3, 5, 6)
    options = (stride, padding, output_padding)
    out, pullback = jax.vjp(lambda x, k: convolution.conv2d_transpose(x, k, *options), jnp.array(x), jnp.array(kernel))
    np.testing.assert_allclose(out, reference.conv2d_transpose(x, kernel, *options), atol=1e-5)
    gradient = normal(2, *out.shape)
    expected = torch_gradients(
        torch.nn.functional.conv_transpose2d, x, kernel, gradient,
        stride=stride, padding=padding, output_padding=output_padding,
    )  # fmt: skip
    for got, want in zip(pullback(jnp.array(gradient)), expected, strict=True):
        np.testing.assert_allclose(got, want, atol=3e-5)


def test_strips_stay_within_the_budget_and_divide_the_image():
    assert convolution._strip_shape(batch=10, rows=96, row_bytes=96 * 9 * 64 * 4) == (1, 8)  # 9.4 rows fit
    assert convolution._strip_shape(batch=10, rows=6, row_bytes=6 * 9 * 64 * 4) == (10, 6)
    assert convolution._strip_shape(batch=7, rows=5, row_bytes=1 << 30) == (1, 1)
