"""How a training step scales over 1, 2, 4, … devices: `jax.jit` with shardings beside `jax.pmap`, the same update.

    python -m omnax.benchmarks.scaling --config configs/vit.py
    python -m omnax.benchmarks.scaling --config configs/vit.py:size=b16,data=i1k --per-device 64

Weak scaling: every device has `--per-device` examples. jit takes one global batch over the mesh axis `data` and lets
the compiler place the collectives; pmap runs the update once per device, with the mean gradient over the devices in the
backward pass. Both start alike and see the same examples, so that their losses agree after all steps too (unless the
recipe draws random numbers: for the batch in one, on each device in the other). A CPU is split into virtual devices
that share its cores: there the table shows what the partitioning costs, not a gain.
"""

import argparse
import dataclasses
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ..train.compile import find_collectives, virtual_devices
from ..train.main import add_common_arguments, make_recipe, parse_overrides, report_errors
from ..train.optimizer import make_optimizer
from ..train.program import make_init, make_program
from ..train.recipe import Batch, Loss, Player, Recipe
from ..train.settings import UpdateConfig
from ..train.sharding import MeshConfig, make_mesh
from ..train.update import make_update

AXIS = "devices"

Step = Callable[[], float]


def jit_step(recipe: Recipe, config: UpdateConfig, devices: list[Any], batch: Batch) -> tuple[Step, str]:
    """One step of the sharded program, returning its loss; and the compiled module."""
    mesh = make_mesh(MeshConfig(), devices)
    with jax.set_mesh(mesh):
        program = make_program(recipe, config, mesh)
        state = program.init(jax.random.key(0))
        batch = {name: jax.device_put(array, program.batch[name].sharding) for name, array in batch.items()}
        compiled = program.update.lower(state, batch).compile()

    def step() -> float:
        nonlocal state
        state, metrics = compiled(state, batch)
        return float(metrics["loss"])

    return step, compiled.as_text()


def pmap_step(recipe: Recipe, config: UpdateConfig, devices: list[Any], batch: Batch) -> tuple[Step, str]:
    """The same with one copy of the state per device."""
    players = tuple(dataclasses.replace(player, loss=mean_over_devices(player)) for player in recipe.players)
    recipe = dataclasses.replace(recipe, players=players)
    params, _ = jax.eval_shape(recipe.init, jax.random.key(0))
    optimizers = [make_optimizer(player.optimizer, params, config.total_steps) for player in players]
    init = make_init(recipe, optimizers, averaged=config.ema is not None)
    state = jax.tree.map(lambda x: np.stack([x] * len(devices)), jax.jit(init)(jax.random.key(0)))
    batch = {name: np.stack(np.split(array, len(devices))) for name, array in batch.items()}
    update = jax.pmap(make_update(recipe, optimizers, config), AXIS, devices=devices, donate_argnums=0)
    compiled = update.lower(state, batch).compile()

    def step() -> float:
        nonlocal state
        state, metrics = compiled(state, batch)
        return float(metrics["loss"][0])

    return step, compiled.as_text()


def mean_over_devices(player: Player) -> Loss:
    """The player's loss of one device's examples, whose value, terms and gradients are means over the devices."""

    @jax.custom_vjp
    def shared(params: Any) -> Any:
        return params

    shared.defvjp(lambda params: (params, None), lambda _, gradients: (lax.pmean(gradients, AXIS),))

    def loss(params: Any, state: Any, batch: Batch, rng: jax.Array) -> Any:
        total, (terms, variables) = player.loss(shared(params), state, batch, rng)
        total += lax.stop_gradient(lax.pmean(total, AXIS) - total)
        return total, lax.pmean((terms, variables), AXIS)

    return loss


def examples(recipe: Recipe) -> Batch:
    """A batch of the recipe's shapes: normal numbers, and integers that are a class of any data set."""
    rng = np.random.default_rng(0)

    def draw(array: jax.ShapeDtypeStruct) -> np.ndarray:
        integer = jnp.issubdtype(array.dtype, jnp.integer)
        values = rng.integers(0, 2, array.shape) if integer else rng.normal(size=array.shape)
        return values.astype(array.dtype)

    return {name: draw(array) for name, array in recipe.batch.items()}


def measure(step: Step, steps: int) -> tuple[float, float]:
    """Median seconds of a step after a first one, and the last loss."""
    loss, seconds = step(), []
    for _ in range(steps):
        begin = time.perf_counter()
        loss = step()
        seconds.append(time.perf_counter() - begin)
    return float(np.median(seconds)), loss


def scale(spec: str, overrides: dict[str, str], devices: list[Any], per_device: int, steps: int) -> None:
    """Prints the table."""
    print(f"{spec}, {per_device} examples per device, {devices[0].device_kind}\n")
    print("devices  how    seconds/step  examples/s  efficiency  loss        collectives")
    first: dict[str, float] = {}
    count = 1
    while count <= len(devices):
        config, recipe = make_recipe(spec, overrides | {"batch_size": str(count * per_device)})
        batch = examples(recipe)
        for name, make in (("jit", jit_step), ("pmap", pmap_step)):
            step, module = make(recipe, config, devices[:count], batch)
            seconds, loss = measure(step, steps)
            rate = count * per_device / seconds
            efficiency = rate / count / first.setdefault(name, rate)
            collectives = {kind: found.count for kind, found in find_collectives(module).items()}
            print(
                f"{count:7d}  {name:5s}  {seconds:12.4f}  {rate:10.1f}  {efficiency:10.0%}  {loss:.8f}  {collectives}"
            )
        count *= 2


def main() -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        "python -m omnax.benchmarks.scaling", epilog="Settings: --config.key.key=value", allow_abbrev=False
    )
    add_common_arguments(parser)
    parser.add_argument("--per-device", type=int, default=16, help="examples")
    parser.add_argument("--devices", type=int, default=8, help="at most; virtual ones on a CPU")
    parser.add_argument("--steps", type=int, default=10)
    flags, rest = parser.parse_known_args()

    def run() -> None:
        jax.config.update("jax_num_cpu_devices", flags.devices)
        devices = virtual_devices(flags.devices) if jax.default_backend() == "cpu" else jax.devices()[: flags.devices]
        scale(flags.config, parse_overrides(rest), devices, flags.per_device, flags.steps)

    return report_errors(run, flags.debug)


if __name__ == "__main__":
    sys.exit(main())
