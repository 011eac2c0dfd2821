"""The same update under `jit` with shardings and under `pmap`, on 1, 2, 4, … devices.

    python -m omnax.benchmarks.scaling --devices 1,2,4,8 --per-device 16

The batch grows with the devices (weak scaling): a step should take as long on all as on one. Virtual CPU devices
share the cores of the machine, so there the time per step grows with their number, and only the two ways of running
compare. The losses of both are printed side by side: they run the same numbers.
"""

import argparse
import dataclasses
import os
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np


def main() -> None:
    parser = argparse.ArgumentParser(
        "python -m omnax.benchmarks.scaling", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--config", default="configs/vit.py", help="config file, with its argument")
    parser.add_argument("--devices", default="1,2,4,8", help="numbers of devices; on CPUs they are virtual")
    parser.add_argument("--per-device", type=int, default=16, help="examples per device and step")
    parser.add_argument("--steps", type=int, default=10, help="timed steps, after one that compiles")
    flags = parser.parse_args()
    counts = [int(count) for count in flags.devices.split(",")]
    # Before JAX looks: it makes its devices once.
    virtual = f" --xla_force_host_platform_device_count={max(counts)}"
    os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + virtual
    print(f"{'devices':>8} {'way':>5} {'ms per step':>12} {'examples/s/device':>18} {'last loss':>12}")
    for count in counts:
        for way in ("jit", "pmap"):
            seconds, loss = measure(flags.config, way, count, flags.per_device, flags.steps)
            rate = flags.per_device / seconds
            print(f"{count:>8} {way:>5} {1e3 * seconds:>12.1f} {rate:>18.1f} {loss:>12.6f}", flush=True)


def measure(config_spec: str, way: str, count: int, per_device: int, steps: int) -> tuple[float, float]:
    """Median seconds of a step and the last loss, on `count` devices."""
    import jax

    from ..train.main import make_recipe

    config, recipe = make_recipe(config_spec, {"batch_size": str(count * per_device), "log_every": "1"})
    devices = jax.devices()[:count]
    if len(devices) < count:
        raise ValueError(f"{count} devices asked for, there are {len(devices)} of {devices[0].device_kind}")
    step, state, batch = (_jitted if way == "jit" else _pmapped)(config, recipe, devices)
    times, loss = [], float("nan")
    for _ in range(steps + 1):
        begin = time.perf_counter()
        state, metrics = step(state, batch)
        loss = float(np.ravel(metrics["loss"])[0])
        times.append(time.perf_counter() - begin)
    return float(np.median(times[1:])), loss


def _batch(recipe: Any) -> dict[str, np.ndarray]:
    """One random batch of the recipe's shapes; class labels 0 and 1."""
    rng = np.random.default_rng(0)
    return {
        name: rng.integers(0, 2, leaf.shape, leaf.dtype)
        if np.issubdtype(leaf.dtype, np.integer)
        else rng.normal(size=leaf.shape).astype(leaf.dtype)
        for name, leaf in recipe.batch.items()
    }


def _jitted(config: Any, recipe: Any, devices: Sequence[Any]) -> tuple[Callable[..., Any], Any, Any]:
    import jax

    from ..train.program import make_program
    from ..train.sharding import make_mesh

    mesh = make_mesh(config.mesh, devices)
    program = make_program(recipe, config, mesh)
    with jax.set_mesh(mesh):
        state = program.init(jax.random.key(config.seed))

    def step(state: Any, batch: Any) -> Any:
        with jax.set_mesh(mesh):
            return program.update(state, batch)

    return step, state, jax.device_put(_batch(recipe), {k: leaf.sharding for k, leaf in program.batch.items()})


def _pmapped(config: Any, recipe: Any, devices: Sequence[Any]) -> tuple[Callable[..., Any], Any, Any]:
    """The state copied to every device, the batch split, gradients averaged before the optimiser sees them."""
    import jax

    from ..train.optimizer import Optimizer, make_optimizer
    from ..train.program import make_init
    from ..train.update import make_update

    params, _ = jax.eval_shape(recipe.init, jax.random.key(0))

    def averaged(optimizer: Optimizer) -> Optimizer:
        def update(grads: Any, *rest: Any) -> Any:
            return optimizer.update(jax.lax.pmean(grads, "data"), *rest)

        return dataclasses.replace(optimizer, update=update)

    optimizers = [make_optimizer(player.optimizer, params, config.total_steps) for player in recipe.players]
    state = make_init(recipe, optimizers, averaged=config.ema is not None)(jax.random.key(config.seed))
    update = make_update(recipe, [averaged(optimizer) for optimizer in optimizers], config)

    def step(state: Any, batch: Any) -> Any:
        state, metrics = update(state, batch)
        return state, jax.lax.pmean(metrics, "data")

    stacked = jax.tree.map(lambda leaf: np.stack([np.asarray(leaf)] * len(devices)), state)
    split = {k: leaf.reshape(len(devices), -1, *leaf.shape[1:]) for k, leaf in _batch(recipe).items()}
    return jax.pmap(step, axis_name="data", devices=devices, donate_argnums=0), stacked, split


if __name__ == "__main__":
    main()
