"""Compiled FLOPs of window attention beside dense attention, 1k to 64k tokens (nothing is run, only compiled).

    python -m omnax.benchmarks.window_flops

The numbers are XLA's own count for the compiled program (forward pass, one head of 80 channels), with the windows of
Qwen2.5-VL, 8 x 8 patches: on one grid, the same shifted by 4, and ragged on packed images whose sizes are not multiples
of the window (so its windows, cut at the edges, have empty slots).
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp

from ..kernels.attention import attention
from ..kernels.window_attention import ragged_window_attention, ragged_windows, window_attention

WINDOW, CHANNELS = (8, 8), 80
PACK = ((1, 20, 20), (1, 12, 28), (1, 16, 18))  # (time, height, width) of images that are 1,024 patches together


def flops(function: Callable, *tokens: int) -> float:
    """FLOPs of the compiled function of query, key and value with the given token axes."""
    x = jax.ShapeDtypeStruct((1, *tokens, 1, CHANNELS), jnp.float32)
    analysis = jax.jit(function).lower(x, x, x).compile().cost_analysis()
    assert analysis is not None
    return analysis["flops"]


def row(tokens: int) -> dict[str, float]:
    """FLOPs of each kind of attention over this many tokens, a multiple of 1,024."""
    height = 2 ** ((tokens.bit_length() - 1) // 2)
    windows = ragged_windows(PACK * (tokens // 1024), WINDOW)
    regular = partial(window_attention, window=WINDOW, backend="xla")
    return {
        "window": flops(regular, height, tokens // height),
        "shifted": flops(partial(regular, shift=(4, 4)), height, tokens // height),
        "ragged": flops(lambda *qkv: ragged_window_attention(*qkv, windows, backend="xla"), tokens),
        "dense": flops(partial(attention, backend="xla"), tokens),
    }


def main() -> None:
    """Prints GFLOP and the growth over the row before."""
    columns = ("window", "shifted", "ragged", "dense")
    print(f"{'tokens':>7}" + "".join(f"{name + ' GFLOP':>16} {'growth':>6}" for name in columns) + "   dense / window")
    before: dict[str, float] = {}
    for tokens in (1024 * 2**power for power in range(7)):
        now = row(tokens)
        cells = (f"{now[name] / 1e9:16.4f} {now[name] / before[name] if before else 1:6.3f}" for name in columns)
        print(f"{tokens:>7}{''.join(cells)} {now['dense'] / now['window']:16.1f}", flush=True)
        before = now


if __name__ == "__main__":
    main()
