"""`python -m omnax.benchmarks.vs_wav2lip`: the generator's inference and training step beside torch's, interleaved.

Both run the published width on random weights in float32: inference on a batch of faces, and a whole training step
(L1 loss, batch statistics, Adam). Rounds alternate between the two, so that a busy machine is as unkind to both; the
best round of each counts. The torch network is the restatement that the parity tests use (tests/references/wav2lip.py).
"""

import argparse
import functools
import importlib.util
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch

from ..hub.families.wav2lip import abstract, split
from ..models.wav2lip import Generator, Wav2LipConfig, initial_values, num_forward_flops

REFERENCE = Path(__file__).resolve().parents[1] / "tests" / "references" / "wav2lip.py"


def torch_network() -> Any:
    """The torch restatement, loaded from its file: tests are no package."""
    spec = importlib.util.spec_from_file_location("wav2lip_in_torch", REFERENCE)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.Wav2Lip()


def inference(mel: np.ndarray, face: np.ndarray) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """(ours, torch's) forward pass in evaluation."""
    variables = initial()
    apply = jax.jit(Generator().apply)
    inputs = jnp.array(mel), jnp.array(face)
    network, tensors = torch_network().eval(), [to_torch(mel), to_torch(face)]

    def theirs() -> None:
        with torch.inference_mode():
            network(*tensors)

    return lambda: jax.block_until_ready(apply(variables, *inputs)), theirs


def training(mel: np.ndarray, face: np.ndarray) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """(ours, torch's) step: forward, L1 to a target, backward, Adam."""
    optimizer, model = optax.adam(1e-4), Generator()
    variables = initial()
    state = [variables["params"], variables["batch_stats"], optimizer.init(variables["params"])]
    inputs, target = (jnp.array(mel), jnp.array(face)), jnp.array(face[..., 3:])

    @functools.partial(jax.jit, donate_argnums=(0, 1, 2))  # torch's Adam works in place too
    def step(params: Any, statistics: Any, slots: Any) -> Any:
        def loss(params: Any) -> Any:
            variables = {"params": params, "batch_stats": statistics}
            generated, new = model.apply(variables, *inputs, train=True, mutable=["batch_stats"])
            return jnp.abs(generated - target).mean(), new["batch_stats"]

        gradients, statistics_ = jax.grad(loss, has_aux=True)(params)
        updates, slots = optimizer.update(gradients, slots)
        return optax.apply_updates(params, updates), statistics_, slots

    def ours() -> None:
        state[:] = jax.block_until_ready(step(*state))

    network, tensors, wanted = torch_network().train(), [to_torch(mel), to_torch(face)], to_torch(face[..., 3:])
    adam = torch.optim.Adam(network.parameters(), 1e-4)

    def theirs() -> None:
        adam.zero_grad()
        (network(*tensors) - wanted).abs().mean().backward()
        adam.step()

    return ours, theirs


def initial() -> dict[str, Any]:
    """Random variables of the published generator."""
    params, statistics = split(initial_values(jax.random.key(0), abstract("generator", Wav2LipConfig())))
    return {"params": params, "batch_stats": statistics}


def to_torch(array: np.ndarray) -> torch.Tensor:
    """[B, X, Y, C] -> [B, C, X, Y]."""
    return torch.from_numpy(np.ascontiguousarray(array.transpose(0, 3, 1, 2)))


def best_seconds(functions: tuple[Callable[[], Any], ...], rounds: int) -> list[float]:
    """The shortest run of each, in alternating rounds after one that does not count."""
    times: list[list[float]] = [[] for _ in functions]
    for number in range(rounds + 1):
        for function, seconds in zip(functions, times, strict=True):
            begin = time.perf_counter()
            function()
            if number:
                seconds.append(time.perf_counter() - begin)
    return [min(seconds) for seconds in times]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--batch", type=int, default=8, help="faces")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    rng = np.random.default_rng(0)
    mel = rng.uniform(-4, 4, (arguments.batch, 80, 16, 1)).astype(np.float32)
    face = rng.random((arguments.batch, 96, 96, 6), dtype=np.float32)
    flops = arguments.batch * num_forward_flops("generator", Wav2LipConfig())
    for name, make, factor in (("inference", inference, 1), ("training step", training, 3)):
        ours, theirs = best_seconds(make(mel, face), arguments.rounds)
        for who, seconds in (("omnax", ours), ("torch", theirs)):
            rate, gflops = arguments.batch / seconds, factor * flops / seconds / 1e9
            print(f"{name:14s} {who}: {seconds:.3f} s, {rate:.1f} faces/s, {gflops:.0f} GFLOP/s")
        print(f"{name:14s} omnax / torch: {theirs / ours:.2f} times the speed")


if __name__ == "__main__":
    main()
