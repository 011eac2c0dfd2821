"""Compiled FLOPs of the Qwen2.5-VL vision encoder over patches, 256 to 16,384 (nothing is run, only compiled).

    python -m omnax.benchmarks.qwen_vl_flops

XLA's own count of one encoder block of the released width, its windowed form beside full attention, for square images
packed to the bucket. Both rows share the linear layers; what grows faster than the patches is attention.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp

from ..kernels.window_attention import RaggedWindows
from ..models.qwen_vl.vision import VisionConfig, VisionEncoder, VisionInput


def flops(config: VisionConfig, patches: int) -> float:
    """FLOPs of the compiled encoder on one row of so many patches, in the buckets that training makes of them."""
    windows = max(4 * patches // config.window**2, 4)
    index = jax.ShapeDtypeStruct((1, patches), jnp.int32)
    vision = VisionInput(
        patches=jax.ShapeDtypeStruct((1, patches, config.patch_dim), jnp.float32),  # type: ignore[arg-type]
        coordinates=jax.ShapeDtypeStruct((1, patches, 2), jnp.int32),  # type: ignore[arg-type]
        frame_ids=index,  # type: ignore[arg-type]
        windows=RaggedWindows(jax.ShapeDtypeStruct((1, windows, config.window**2), jnp.int32), index),  # type: ignore[arg-type]
    )
    encoder = VisionEncoder(config)
    params = jax.eval_shape(encoder.init, jax.random.key(0), vision)
    analysis = jax.jit(encoder.apply).lower(params, vision).compile().cost_analysis()
    assert analysis is not None
    return analysis["flops"]


def main() -> None:
    """Prints GFLOP of a windowed and a full block, and the growth over the row before."""
    windowed = VisionConfig(depth=1, full_blocks=())
    full = dataclasses.replace(windowed, full_blocks=(0,))
    print(f"{'patches':>8} {'windowed':>12} {'growth':>7} {'full':>12} {'growth':>7}")
    before = (math.nan, math.nan)
    for patches in (256 * 4**power for power in range(4)):
        now = flops(windowed, patches), flops(full, patches)
        growth = [a / b for a, b in zip(now, before, strict=True)]
        print(f"{patches:>8} {now[0] / 1e9:12.2f} {growth[0]:7.3f} {now[1] / 1e9:12.2f} {growth[1]:7.3f}", flush=True)
        before = now


if __name__ == "__main__":
    main()
