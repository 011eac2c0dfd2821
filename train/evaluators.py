"""Evaluators: accuracy, nearest neighbours and a linear probe on features, over a split whose last batch is padded."""

import functools
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Int

from ..data.prefetch import to_devices
from ..kernels.normalization import l2_normalize
from .recipe import Evaluator
from .rules import Tree
from .sharding import batch_sharding
from .state import TrainState

Batches = Callable[[], Iterable[dict[str, np.ndarray]]]  # this process's rows of every batch: image, label, mask
Apply = Callable[[Tree, Tree, Array], Array]  # (params, variables, image [B, X, Y, C]) -> [B, D]
PROBE_RATES = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1)

MAX_CONFUSION_CLASSES = 100


def accuracy(name: str, logits: Apply, batches: Batches, num_classes: int) -> Evaluator:
    """Top-1 accuracy, cross-entropy, and the confusion matrix [true, predicted] of up to 100 classes."""

    @jax.jit
    def measure(totals: dict[str, Array], params: Tree, variables: Tree, batch: dict[str, Array]) -> dict[str, Array]:
        z, label, mask = logits(params, variables, batch["image"]), batch["label"], batch["mask"]
        guess = z.argmax(-1)
        losses = optax.softmax_cross_entropy_with_integer_labels(z.astype(jnp.float32), label)
        new = {
            "count": mask.sum(),
            "correct": (mask & (guess == label)).sum(),
            "loss": jnp.where(mask, losses, 0.0).sum(),
        }
        if num_classes <= MAX_CONFUSION_CLASSES:
            new["confusion"] = jnp.zeros((num_classes, num_classes), jnp.int32).at[label, guess].add(mask)
        return jax.tree.map(jnp.add, totals, new) if totals else new

    def run(state: TrainState) -> dict[str, float | np.ndarray]:
        params, totals = state.averaged_params, {}
        for batch in batches():
            totals = measure(totals, params, state.variables, _put(batch))
        totals = jax.device_get(totals)
        count = max(int(totals["count"]), 1)
        results = {"accuracy": float(totals["correct"]) / count, "loss": float(totals["loss"]) / count}
        return results | ({"confusion": totals["confusion"]} if "confusion" in totals else {})

    return Evaluator(name, run)


def knn(name: str, features: Apply, train: Batches, test: Batches, num_classes: int, k: int = 20) -> Evaluator:
    """Accuracy of the weighted k-nearest-neighbour vote of `nearest_neighbours` on features."""

    def run(state: TrainState) -> dict[str, float | np.ndarray]:
        bank, bank_label = extract(features, state, train)
        query, label = extract(features, state, test)
        votes = nearest_neighbours(query, bank, bank_label, num_classes, min(k, len(bank)))
        return {"accuracy": float((votes.argmax(-1) == label).mean())}

    return Evaluator(name, run)


def linear_probe(name: str, features: Apply, train: Batches, test: Batches, num_classes: int) -> Evaluator:
    """Accuracy of a linear classifier on frozen features; a tenth of the training split chooses its learning rate."""

    def run(state: TrainState) -> dict[str, float | np.ndarray]:
        x, y = extract(features, state, train)
        test_x, test_y = extract(features, state, test)
        rates = jnp.array(PROBE_RATES)
        held_out = jnp.arange(len(x)) % 10 == 0
        kernel, bias = fit_linear(x, y, ~held_out, num_classes, rates)
        right = jnp.einsum("bd,rdv->rbv", x, kernel) + bias[:, None]
        best = ((right.argmax(-1) == y) & held_out).sum(-1).argmax()
        kernel, bias = fit_linear(x, y, jnp.ones_like(held_out), num_classes, rates)
        guess = (test_x @ kernel[best] + bias[best]).argmax(-1)
        return {"accuracy": float((guess == test_y).mean()), "learning_rate": float(rates[best])}

    return Evaluator(name, run)


def extract(features: Apply, state: TrainState, batches: Batches) -> tuple[Float[Array, "B D"], Int[Array, " B"]]:
    """Float32 features and labels of a whole split, without the padding, on every device."""
    apply = jax.jit(
        lambda params, variables, batch: (features(params, variables, batch["image"]), batch["label"], batch["mask"]),
        out_shardings=jax.sharding.PartitionSpec(),
    )
    parts = [apply(state.averaged_params, state.variables, _put(batch)) for batch in batches()]
    x, label, mask = (np.concatenate(column) for column in zip(*jax.device_get(parts), strict=True))
    return jnp.asarray(x[mask], jnp.float32), jnp.asarray(label[mask])


def _put(batch: dict[str, np.ndarray]) -> dict[str, Array]:
    return to_devices(batch, batch_sharding(jax.sharding.get_mesh()))


@functools.partial(jax.jit, static_argnames=("num_classes", "k", "block"))
def nearest_neighbours(
    query: Float[Array, "Q D"],
    bank: Float[Array, "B D"],
    label: Int[Array, " B"],
    num_classes: int,
    k: int,
    temperature: float = 0.07,
    block: int = 256,
) -> Float[Array, "Q V"]:
    """Votes of the k most cosine-similar bank rows, weighted by exp(similarity / temperature).

    Queries run in blocks, so that no more than [block, B] similarities exist at once. Source: arXiv 1805.01978,
    section 3.4; facebookresearch/dino eval_knn.py.
    """
    query, bank = l2_normalize(query, 1e-12), l2_normalize(bank, 1e-12)

    def vote(q: Float[Array, "Q D"]) -> Float[Array, "Q V"]:
        similarity, index = jax.lax.top_k(q @ bank.T, k)
        # Relative to the nearest, which exp cannot overflow: the ranking of the classes is the same.
        weight = jnp.exp((similarity - similarity[:, :1]) / temperature)
        return jnp.einsum("qk,qkv->qv", weight, jax.nn.one_hot(label[index], num_classes))

    return jax.lax.map(lambda q: vote(q[None])[0], query, batch_size=block)


@functools.partial(jax.jit, static_argnames=("num_classes", "steps"))
def fit_linear(
    x: Float[Array, "B D"],
    label: Int[Array, " B"],
    mask: Bool[Array, " B"],
    num_classes: int,
    rates: Float[Array, " R"],
    steps: int = 500,
) -> tuple[Float[Array, "R D V"], Float[Array, "R V"]]:
    """Linear classifiers of standardised features, one for each learning rate, trained side by side in one program.

    Full-batch Adam with a cosine schedule on the examples under `mask`. Returns kernels and biases on raw features.
    """
    weight = mask / mask.sum()
    mean = weight @ x
    deviation = jnp.sqrt(weight @ jnp.square(x - mean)) + 1e-6
    standard = (x - mean) / deviation

    def fit(rate: Float[Array, ""]) -> tuple[Array, Array]:
        optimizer = optax.adam(optax.cosine_decay_schedule(rate, steps))

        def loss(params: tuple[Array, Array]) -> Array:
            logits = standard @ params[0] + params[1]
            return weight @ optax.softmax_cross_entropy_with_integer_labels(logits, label)

        def step(carry: Any, _: None) -> tuple[Any, None]:
            params, opt_state = carry
            updates, opt_state = optimizer.update(jax.grad(loss)(params), opt_state)
            return (optax.apply_updates(params, updates), opt_state), None

        params = (jnp.zeros((x.shape[-1], num_classes)), jnp.zeros(num_classes))
        return jax.lax.scan(step, (params, optimizer.init(params)), None, steps)[0][0]

    kernel, bias = jax.vmap(fit)(rates)
    kernel = kernel / deviation[:, None]
    return kernel, bias - mean @ kernel
