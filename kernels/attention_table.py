"""Which back end `attention` takes for which call, on platforms that are not here: read from what is lowered for them.

`python -m omnax.kernels.attention` prints the table. JAX asks the installed cuDNN and the GPU for their versions while
it traces; here both are answered for the GPU of the column.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple, cast
from unittest import mock

import jax
import jax.numpy as jnp
from jax._src.cudnn import fused_attention_stablehlo
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, use_abstract_mesh

from . import attention_platform
from .attention import attention
from .attention_platform import Platform

PLATFORMS = {
    "cpu": Platform("cpu", "cpu"),
    "gpu, A100": Platform("gpu", "NVIDIA A100", (8, 0)),
    "gpu, H100": Platform("gpu", "NVIDIA H100", (9, 0)),
    "tpu, v5e": Platform("tpu", "TPU v5 lite"),
}


class Row(NamedTuple):
    """A call: its sizes, bfloat16 unless said, and the arrays or words that limit what a query sees."""

    name: str
    length: int
    head_dim: int = 64
    keys: int | None = None
    heads: int = 4
    key_heads: int = 4
    training: bool = True
    dtype: Any = jnp.bfloat16
    words: Mapping[str, Any] = MappingProxyType({})
    arrays: Mapping[str, Callable[[int, int, int], Any]] = MappingProxyType({})


def _ids(batch, length, keys):
    return jax.ShapeDtypeStruct((batch, length), jnp.int32)


def _lengths(batch, length, keys):
    return jax.ShapeDtypeStruct((batch,), jnp.int32)


def _mask(batch, length, keys):
    return jax.ShapeDtypeStruct((batch, 1, length, keys), jnp.bool_)


CAUSAL = {"causal": True}
ROWS = (
    Row("ViT/16 at 224 pixels, float32", 197, dtype=jnp.float32),
    Row("ViT/16 at 224 pixels", 197),
    Row("ViT/16 at 224 pixels, inference", 197, training=False),
    Row("ViT/14 at 224 pixels, heads of 88 (g)", 257, 88),
    Row("ViT/16 at 384 pixels", 577),
    Row("ViT/14 at 518 pixels", 1370),
    Row("CLIP's text tower, causal", 77, words=CAUSAL),
    Row("text with padding behind", 77, arrays={"key_lengths": _lengths}),
    Row("odd length with a mask", 77, arrays={"mask": _mask}),
    Row("odd length with a mask, inference", 77, training=False, arrays={"mask": _mask}),
    Row("frames packed, Qwen2.5-VL, heads of 80", 4096, 80, arrays={"segment_ids": _ids}),
    Row("windows of patches, Qwen2.5-VL", 64, 80, arrays={"key_lengths": _lengths}),
    Row("language model, causal, grouped", 4096, 128, key_heads=1, words=CAUSAL),
    Row("documents packed, causal, grouped", 4096, 128, key_heads=1, words=CAUSAL, arrays={"segment_ids": _ids}),
    Row("sliding window of 1024", 4096, 128, words=CAUSAL | {"window": 1024}),
    Row("heads of 256, causal", 4096, 256, words=CAUSAL),
    Row("long video, 32760 tokens", 32760, 128),
    Row("one new token after a prompt, grouped", 1, 128, 4096, key_heads=1, training=False,
        words=CAUSAL, arrays={"query_offset": _lengths}),
    Row("eight new tokens after a prompt", 8, 128, 4096, key_heads=1, training=False,
        words=CAUSAL, arrays={"query_offset": _lengths}),
)  # fmt: skip


def backend(row: Row, on: Platform) -> str:
    """The kernel in the program that is lowered for a platform: xla, cudnn (with a mask), rows or splash."""
    text = lowered(row, on)
    if "__cudnn$fmha" in text:
        return "cudnn, mask" if "fmhaScaleBias" in text else "cudnn"
    if "tpu_custom_call" not in text:
        return "xla"
    return "rows" if "attention_rows" in text else "splash"


def lowered(row: Row, on: Platform) -> str:
    """StableHLO of a call, in training with its gradients, for a platform."""
    batch, keys = 2, row.keys or row.length
    shapes = (batch, row.length, row.heads, row.head_dim), (batch, keys, row.key_heads, row.head_dim)
    query, key = (jax.ShapeDtypeStruct(shape, row.dtype) for shape in shapes)
    arrays = {name: make(batch, row.length, keys) for name, make in row.arrays.items()}

    def total(query, key, value, arrays):
        return attention(query, key, value, **row.words, **arrays).astype(jnp.float32).sum()

    function = jax.value_and_grad(total, (0, 1, 2)) if row.training else total
    with _pretend(on):
        traced = jax.jit(function).trace(query, key, key, arrays)
        return traced.lower(lowering_platforms=("cuda" if on.name == "gpu" else on.name,)).as_text()


@contextlib.contextmanager
def _pretend(on: Platform) -> Iterator[None]:
    """Traces for a platform; `attention` must not remember what it chose for another."""
    device = AbstractDevice(device_kind=on.device_kind, num_cores=1, platform=on.name)
    mesh = AbstractMesh((1,), ("data",), axis_types=(AxisType.Auto,), abstract_device=device)
    versions = mock.Mock(cudnn_get_version=lambda: 91000)
    answers = {"cuda_versions": versions, "check_compute_capability": functools.partial(_at_least, on)}
    cast(Any, attention).clear_cache()
    with (
        mock.patch.multiple(fused_attention_stablehlo, **answers),
        mock.patch.object(attention_platform, "cuda_capability", lambda: on.capability),
        use_abstract_mesh(mesh),
    ):
        yield
    cast(Any, attention).clear_cache()


def _at_least(on: Platform, capability: str) -> bool:
    return on.capability is not None and on.capability >= tuple(map(int, capability.split(".")))


def main() -> None:
    """Prints the table."""
    print(f"| {'training unless said, bfloat16':42s} | " + " | ".join(f"{name:11s}" for name in PLATFORMS) + " |")
    print("|---" * (1 + len(PLATFORMS)) + "|")
    for row in ROWS:
        cells = (f"{backend(row, on):11s}" for on in PLATFORMS.values())
        print(f"| {row.name:42s} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
