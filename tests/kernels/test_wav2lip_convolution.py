"""Convolutions in torch's conventions: values against NumPy loops, every gradient against torch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from omnax.kernels import convolution, strips, winograd
from oracles import torch
from references import convolution as reference

# (batch, image, kernel size, stride, padding): even and odd remainders, unequal axes, the 5 x 5 kernel with padding 1,
# maps of one pixel, strides beyond the kernel
CONVS = [
    (4, (7, 6), (3, 3), (1, 1), (1, 1)),
    (1, (1, 1), (3, 3), (1, 1), (1, 1)),
    (4, (9, 8), (3, 3), (3, 2), (1, 1)),
    (1, (7, 5), (3, 3), (3, 1), (1, 1)),
    (4, (6, 10), (5, 5), (1, 2), (1, 1)),
    (2, (5, 4), (1, 1), (2, 3), (0, 0)),
]
# (batch, image, stride, padding, output padding) of 3 x 3 kernels
DECONVS = [
    (4, (1, 1), (1, 1), (0, 0), (0, 0)),
    (1, (5, 4), (1, 1), (1, 1), (0, 0)),
    (4, (3, 4), (2, 2), (1, 1), (1, 1)),
    (4, (4, 3), (2, 3), (1, 0), (0, 2)),
    (1, (5, 4), (3, 1), (2, 2), (1, 0)),
]


def normal(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def torch_gradients(function, x, kernel, gradient, **options):
    """Gradients of sum(function * gradient) in this repository's layouts."""
    x, kernel = (torch.tensor(a, requires_grad=True) for a in (x.transpose(0, 3, 1, 2), kernel.transpose(3, 2, 0, 1)))
    with torch.enable_grad():
        function(x, kernel, **options).backward(torch.tensor(gradient.transpose(0, 3, 1, 2)))
    return x.grad.numpy().transpose(0, 2, 3, 1), kernel.grad.numpy().transpose(2, 3, 1, 0)


def force_forms_for_cpus(monkeypatch):
    """Winograd's wherever it serves, otherwise strips, several of them."""
    monkeypatch.setattr(convolution, "_IMAGE_BYTES", 0)
    monkeypatch.setattr(convolution, "_STRIP_BYTES", 1 << 10)
    monkeypatch.setattr(winograd, "_STRIP_BYTES", 1 << 12)
    for name in ("_MIN_PRODUCTS", "_MIN_CHANNELS", "_MIN_PIXELS"):
        monkeypatch.setattr(winograd, name, 0)


@pytest.fixture(params=["xla", "cpu"])
def form(request, monkeypatch):
    """Forces each way of computing, whatever the size."""
    if request.param == "cpu":
        force_forms_for_cpus(monkeypatch)
    else:
        monkeypatch.setattr(convolution, "_IMAGE_BYTES", 1 << 30)


@pytest.mark.parametrize("batch,image,size,stride,padding", CONVS)
def test_conv2d_and_gradients(batch, image, size, stride, padding, form):
    x, kernel = normal(0, batch, *image, 3), normal(1, *size, 3, 5)
    out, pullback = jax.vjp(lambda x, k: convolution.conv2d(x, k, stride, padding), jnp.array(x), jnp.array(kernel))
    np.testing.assert_allclose(out, reference.conv2d(x, kernel, stride, padding), atol=1e-5)
    gradient = normal(2, *out.shape)
    expected = torch_gradients(torch.nn.functional.conv2d, x, kernel, gradient, stride=stride, padding=padding)
    for got, want in zip(pullback(jnp.array(gradient)), expected, strict=True):
        np.testing.assert_allclose(got, want, atol=3e-5)  # sums of up to 168 products of normals


@pytest.mark.parametrize("batch,image,stride,padding,output_padding", DECONVS)
def test_conv2d_transpose_and_gradients(batch, image, stride, padding, output_padding, form):
    x, kernel = normal(0, batch, *image, 6), normal(1, 3, 3, 5, 6)
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


def test_bfloat16_keeps_its_dtype_and_values(monkeypatch):
    force_forms_for_cpus(monkeypatch)
    x, kernel = (jnp.array(normal(*shape), jnp.bfloat16) for shape in ((0, 2, 6, 6, 4), (1, 3, 3, 4, 4)))

    def both(x, kernel):
        return convolution.conv2d_transpose(
            convolution.conv2d(x, kernel, (1, 1), (1, 1)), kernel, (2, 2), (1, 1), (1, 1)
        )

    out, pullback = jax.vjp(both, x, kernel)
    wide, wide_pullback = jax.vjp(both, x.astype(jnp.float32), kernel.astype(jnp.float32))
    pairs = zip((out, *pullback(out)), (wide, *wide_pullback(wide)), strict=True)
    for got, want in pairs:
        assert got.dtype == jnp.bfloat16
        np.testing.assert_allclose(got.astype(np.float32), want, atol=0.03 * np.abs(want).max())  # 8 bits, sums of sums


@pytest.mark.parametrize("platform,devices", [("cpu", 1), ("cpu", 8), ("tpu", 1), ("cuda", 1)])
def test_other_platforms_keep_the_convolutions_of_xla(platform, devices):
    """At sizes where a CPU takes every other form: Winograd's, strips. On a mesh of CPUs nothing loops."""
    shapes = ((8, 24, 24, 256), (3, 3, 256, 256), (3, 3, 128, 256))

    def loss(x, kernel, transposed):
        y = convolution.conv2d(x, kernel, (1, 1), (1, 1))
        return convolution.conv2d_transpose(y, transposed, (2, 2), (1, 1), (1, 1)).sum()

    with jax.set_mesh(jax.make_mesh((devices,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))):
        traced = jax.jit(jax.grad(loss, (0, 1, 2))).trace(*(jax.ShapeDtypeStruct(s, jnp.float32) for s in shapes))
    text = traced.lower(lowering_platforms=(platform,)).as_text()
    # Values and gradients of the inputs and kernels of two layers, but for the last value, which only its sum's needs.
    plain = text.count("stablehlo.convolution"), "stablehlo.while" in text, "stablehlo.dot_general" in text
    forms_for_cpus = (1, True, True) if devices == 1 else (3, False, True)  # both kernels' gradients in one strip
    assert plain == (forms_for_cpus if platform == "cpu" else (5, False, False))


def test_strips_stay_within_the_budget_and_divide_the_image():
    assert strips.strip_shape(batch=10, rows=96, row_bytes=96 * 9 * 64 * 4, limit=1 << 21) == (1, 8)  # 9.4 rows fit
    assert strips.strip_shape(batch=10, rows=6, row_bytes=6 * 9 * 64 * 4, limit=1 << 21) == (10, 6)
    assert strips.strip_shape(batch=7, rows=5, row_bytes=1 << 30, limit=1 << 21) == (1, 1)
