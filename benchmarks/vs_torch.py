"""A published model beside its torch implementation: same weights, same input, same machine, taking turns.

    python -m omnax.benchmarks.vs_torch vit

For the forward pass and for a training step (forward, backward, AdamW) it prints seconds and GFLOP/s of every
implementation, and how many times as fast as each of the others omnax is: the median of the rounds, and their range.
What bounds the ratio stands beside it: plain matrix products of both libraries, timed in the same rounds, at the shape
of the model's largest layer; and the processor's time in the program and in the kernel, which supplies pages for what
is allocated anew. A further system is one more function in `SYSTEMS`.
"""

import argparse
import dataclasses
import importlib.util
import math
import resource
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .. import hub
from ..objectives.classification import softmax_cross_entropy
from ..train.optimizer import OptimizerConfig
from ..train.program import make_program
from ..train.recipe import Player, Recipe
from ..train.schedules import Schedule
from ..train.settings import UpdateConfig
from ..train.sharding import MeshConfig, make_mesh

ORACLES = Path(__file__).resolve().parents[1] / "tests" / "oracles.py"
LEARNING_RATE, WEIGHT_DECAY = 1e-4, 0.05

Run = Callable[[], Any]


@dataclasses.dataclass(frozen=True)
class Comparison:
    """One piece of work in every implementation, "omnax" first; what the runs return must agree."""

    name: str
    flops: float
    runs: dict[str, Run]


@dataclasses.dataclass(frozen=True)
class System:
    """What `vs_torch` measures for one model, and the matrix product that bounds it: [M, K] by [K, N]."""

    comparisons: list[Comparison]
    product: tuple[int, int, int]


def vit(batch: int) -> System:
    """ViT-B/16 at 224 pixels in float32 and transformers' ViTForImageClassification, eager and sdpa attention."""
    torch, transformers = oracles()
    image = np.random.default_rng(0).normal(size=(batch, 224, 224, 3)).astype(np.float32)
    label = np.random.default_rng(1).integers(0, 1000, batch)
    pixels, labels = torch.from_numpy(image.transpose(0, 3, 1, 2).copy()), torch.from_numpy(label)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        transformers.ViTForImageClassification(transformers.ViTConfig(num_labels=1000)).save_pretrained(folder)
        bundle = hub.load(folder)
        networks = {
            f"torch {name}": transformers.ViTForImageClassification.from_pretrained(folder, attn_implementation=name)
            for name in ("eager", "sdpa")
        }
    flops, config = batch * bundle.config.num_forward_flops(), bundle.config
    forward = {name: torch_forward(torch, network, pixels) for name, network in networks.items()}
    step = {name: torch_step(torch, network, pixels, labels) for name, network in networks.items()}
    tokens = batch * (config.grid[0] * config.grid[1] + 1)
    return System(
        [
            Comparison("forward", flops, {"omnax": classify(bundle, image)} | forward),
            Comparison("training step", 3 * flops, {"omnax": classification_step(bundle, image, label)} | step),
        ],
        product=(tokens, config.width, config.mlp_dim),
    )


SYSTEMS: dict[str, Callable[[int], System]] = {"vit": vit}


def classify(bundle: hub.Bundle, image: np.ndarray) -> Run:
    """The logits of a batch."""

    @jax.jit
    def logits(params, image):
        out: Any = bundle.model.apply({"params": params}, image)
        return out["logits"]

    pixels = jnp.asarray(image)
    return lambda: logits(bundle.params, pixels).block_until_ready()


def classification_step(bundle: hub.Bundle, image: np.ndarray, label: np.ndarray) -> Run:
    """The update of `train`, from the bundle's weights on; returns the loss before the step."""

    def loss(params, state, batch, rng):
        out: Any = bundle.model.apply({"params": params}, batch["image"], train=True, rngs={"dropout": rng})
        return softmax_cross_entropy(out["logits"], batch["label"])[0], ({}, {})

    return training_step(bundle.params, loss, {"image": jnp.asarray(image), "label": jnp.asarray(label, jnp.int32)})


def training_step(params: Any, loss: Any, batch: dict[str, jax.Array]) -> Run:
    """The update of `train` with AdamW on one batch; returns the loss before the step."""
    optimizer = OptimizerConfig(lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY, schedule=Schedule(kind="constant"))
    recipe = Recipe(
        init=lambda rng: (params, {}),
        players=(Player(loss, optimizer),),
        sharding=((".*", "-"),),
        batch={name: jax.ShapeDtypeStruct(array.shape, array.dtype) for name, array in batch.items()},
        data=lambda share: iter(()),  # type: ignore[arg-type, return-value]  # the batch is given below
    )
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    with jax.set_mesh(mesh):
        program = make_program(recipe, UpdateConfig(total_steps=1), mesh)
        state = program.init(jax.random.key(0))

    def run() -> Any:
        nonlocal state
        with jax.set_mesh(mesh):
            state, metrics = jax.block_until_ready(program.update(state, batch))
        return metrics["loss"]

    return run


def torch_forward(torch: Any, network: Any, pixels: Any) -> Run:
    """The same in torch."""

    def run() -> Any:
        network.eval()
        with torch.inference_mode():
            return network(pixels).logits

    return run


def torch_step(torch: Any, network: Any, pixels: Any, labels: Any) -> Run:
    """The same in torch."""
    optimizer = torch.optim.AdamW(network.parameters(), LEARNING_RATE, weight_decay=WEIGHT_DECAY)

    def run() -> Any:
        network.train()
        optimizer.zero_grad()
        with torch.enable_grad():
            loss = network(pixels, labels=labels).loss
            loss.backward()
        optimizer.step()
        return loss.detach()

    return run


def oracles() -> tuple[Any, Any]:
    """torch and transformers as the tests import them, from their file: tests are no package."""
    spec = importlib.util.spec_from_file_location("oracles", ORACLES)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.torch, module.transformers


def measure_turns(runs: dict[str, Run], rounds: int) -> dict[str, np.ndarray]:
    """Of every run in every round: seconds, processor seconds in the program and in the kernel, pages supplied."""

    def clocks() -> np.ndarray:
        usage = resource.getrusage(resource.RUSAGE_SELF)
        return np.array([time.perf_counter(), usage.ru_utime, usage.ru_stime, usage.ru_minflt])

    spent = {name: np.empty((rounds, 4)) for name in runs}
    for number in range(rounds):
        for name, run in runs.items():
            begin = clocks()
            run()
            spent[name][number] = clocks() - begin
    return spent


def take_turns(runs: dict[str, Run], rounds: int) -> dict[str, np.ndarray]:
    """Seconds of every run in every round."""
    return {name: spent[:, 0] for name, spent in measure_turns(runs, rounds).items()}


def products(shape: tuple[int, int, int], repeats: int = 10) -> dict[str, Run]:
    """`repeats` matrix products in float32 in both libraries."""
    torch, _ = oracles()
    rows, inner, columns = shape
    rng = np.random.default_rng(0)
    left, right = (rng.normal(size=s).astype(np.float32) for s in ((rows, inner), (inner, columns)))
    tensors, arrays = (torch.from_numpy(left), torch.from_numpy(right)), (jnp.asarray(left), jnp.asarray(right))
    multiply = jax.jit(jnp.matmul)
    return {
        "omnax": lambda: [multiply(*arrays).block_until_ready() for _ in range(repeats)],
        "torch": lambda: [torch.matmul(*tensors) for _ in range(repeats)],
    }


def show(seconds: np.ndarray, flops: float) -> str:
    """Median, and the range of the rounds."""
    middle, low, high = (flops / 1e9 / t for t in (np.median(seconds), seconds.max(), seconds.min()))
    return f"{np.median(seconds):6.3f} s, {middle:4.0f} GFLOP/s (from {low:.0f} to {high:.0f})"


def ratio(ours: np.ndarray, theirs: np.ndarray) -> str:
    """How many times as fast we are, round by round."""
    ratios = theirs / ours
    return f"{np.median(ratios):.2f} times the speed (from {ratios.min():.2f} to {ratios.max():.2f})"


def compare(comparison: Comparison, shape: tuple[int, int, int], rounds: int) -> None:
    """Times and prints one comparison; the first runs compile and do not count, but what they return is compared."""
    print(f"\n{comparison.name}, {comparison.flops / 1e9:.0f} GFLOP, {rounds} rounds")
    results = {name: np.asarray(run()) for name, run in comparison.runs.items()}
    bounds = {f"products, {name}": run for name, run in products(shape).items()}
    for run in bounds.values():
        run()
    spent = measure_turns(comparison.runs | bounds, rounds)
    seconds = {name: turns[:, 0] for name, turns in spent.items()}
    for name in comparison.runs:
        _, program, kernel, pages = np.median(spent[name], axis=0)
        print(f"  {name:16s} {show(seconds[name], comparison.flops)}; on all cores {program:.2f} s", end="")
        print(f" in the program and {kernel:.2f} s in the kernel, {pages:,.0f} pages")
    product_flops = 10 * 2 * math.prod(shape)
    for name in bounds:
        print(f"  {name:16s} {show(seconds[name], product_flops)}")
    for name in list(comparison.runs)[1:]:
        difference = np.abs(results["omnax"] - results[name]).max()
        print(f"  omnax against {name}: {ratio(seconds['omnax'], seconds[name])}; results differ by {difference:.1e}")
    print(f"  products, omnax against torch: {ratio(*(seconds[name] for name in bounds))}")
    share = comparison.flops / product_flops * np.median(seconds["products, omnax"] / seconds["omnax"])
    print(f"  of omnax's time, the FLOPs at the rate of the products: {share:.0%}")


def main() -> None:
    """Prints the comparisons of one system."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("system", choices=sorted(SYSTEMS))
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    system = SYSTEMS[arguments.system](arguments.batch)
    rows, inner, columns = system.product
    print(f"{arguments.system}, batch {arguments.batch}; products of [{rows}, {inner}] x [{inner}, {columns}]")
    for comparison in system.comparisons:
        compare(comparison, system.product, arguments.rounds)


if __name__ == "__main__":
    main()
