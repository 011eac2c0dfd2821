"""Evaluators: accuracy, nearest neighbours and a linear probe on features, over a split whose last batch is padded."""

import functools
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Int

from ...data import splits
from ...data.prefetch import to_devices
from ...kernels.normalization import l2_normalize
from ..recipe import Evaluator
from ..rules import Tree
from ..sharding import batch_sharding
from ..state import TrainState

Batches = Callable[[], Iterable[dict[str, np.ndarray]]]  # this process's rows of every batch: image, label, mask
Apply = Callable[[Tree, Tree, Array], Array]  # (params, variables, image [B, X, Y, C]) -> [B, D]
PROBE_RATES = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
# Of DINOv2's linear evaluation, for batches of 256 (dinov2:dinov2/eval/linear.py; the paper's B.3 has others).
HEAD_RATES = (1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 1e-1)

MAX_CONFUSION_CLASSES = 100


def accuracy(name: str, logits: Apply, batches: Batches, num_classes: int, top: tuple[int, ...] = ()) -> Evaluator:
    """Top-1 accuracy, cross-entropy, and the confusion matrix [true, predicted] of up to 100 classes.

    For each k of `top` also "top_k_accuracy": how often fewer than k classes score higher than the right one.
    """

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
        rank = (z > jnp.take_along_axis(z, label[:, None], axis=-1)).sum(-1)
        new |= {f"top_{k}_accuracy": (mask & (rank < k)).sum() for k in top}
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
        results |= {name: float(totals[name]) / count for name in totals if name.startswith("top_")}
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
        held_out = jnp.asarray(splits.held_out(y))
        kernel, bias = fit_linear(x, y, ~held_out, num_classes, rates)
        right = jnp.einsum("bd,rdv->rbv", x, kernel) + bias[:, None]
        best = ((right.argmax(-1) == y) & held_out).sum(-1).argmax()
        kernel, bias = fit_linear(x, y, jnp.ones_like(held_out), num_classes, rates)
        guess = (test_x @ kernel[best] + bias[best]).argmax(-1)
        return {"accuracy": float((guess == test_y).mean()), "learning_rate": float(rates[best])}

    return Evaluator(name, run)


def linear_heads(
    name: str,
    features: Apply,
    train: Batches,
    test: Batches,
    num_classes: int,
    blocks: int,
    *,
    steps: int = 12_500,
    batch_size: int = 1024,
) -> Evaluator:
    """The linear evaluation of DINOv2: 52 heads, of which each sees other inputs or learns at another rate.

    The inputs are the class tokens of the last or of the last `blocks` blocks (published: 4), with and without the mean
    patch of the last; the rates are `HEAD_RATES`. `features` gives [B, (blocks + 1) · D]: class tokens, the last
    block's at the end, then the mean patch. "accuracy" is that of the head which is best on a tenth of the training
    split that none has seen; "best_accuracy" that of the head best on the test split itself, which is what the
    published numbers are.
    """

    def run(state: TrainState) -> dict[str, float | np.ndarray]:
        x, y = extract(features, state, train)
        test_x, test_y = extract(features, state, test)
        grid = [(used, pool, rate) for used in sorted({1, blocks}) for pool in (False, True) for rate in HEAD_RATES]
        inputs = np.stack([head_inputs(used, blocks, pool, x.shape[1]) for used, pool, _ in grid])
        rates = jnp.array([rate for _, _, rate in grid]) * batch_size / 256
        held_out = splits.held_out(y)
        heads = fit_linear_heads(
            x[~held_out],
            y[~held_out],
            inputs,
            rates,
            num_classes,
            jax.random.key(0),
            steps=steps,
            batch_size=batch_size,
        )
        chosen = int(head_accuracies(*heads, x[held_out], y[held_out]).argmax())
        accuracies = head_accuracies(*heads, test_x, test_y)
        used, pool, rate = grid[chosen]
        return {
            "accuracy": float(accuracies[chosen]),
            "best_accuracy": float(accuracies.max()),
            "blocks": float(used),
            "mean_patch": float(pool),
            "learning_rate": rate,
        }

    return Evaluator(name, run)


def head_inputs(used: int, blocks: int, mean_patch: bool, size: int) -> Bool[np.ndarray, " D"]:
    """Which of the features a head sees: the last `used` of `blocks` class tokens, and the mean patch behind them."""
    parts = np.array([i >= blocks - used for i in range(blocks)] + [mean_patch])
    return parts.repeat(size // len(parts))


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


@functools.partial(jax.jit, static_argnames=("num_classes", "steps", "batch_size"))
def fit_linear_heads(
    x: Float[Array, "B D"],
    label: Int[Array, " B"],
    inputs: Bool[Array, "R D"],
    rates: Float[Array, " R"],
    num_classes: int,
    rng: Array,
    *,
    steps: int,
    batch_size: int,
) -> tuple[Float[Array, "R D V"], Float[Array, "R V"]]:
    """Linear classifiers, each of its `inputs` and at its rate, trained side by side in one program.

    SGD with momentum 0.9 and a cosine to 0 on the same shuffled batches (dinov2:dinov2/eval/linear.py, on features that
    stay). Returns kernels, 0 where a head does not see, and biases.
    """
    order_rng, head_rng = jax.random.split(rng)
    epochs = jax.random.split(order_rng, -(-steps * batch_size // len(x)))
    order = jax.vmap(lambda key: jax.random.permutation(key, len(x)))(epochs).reshape(-1)
    rows = order[: steps * batch_size].reshape(steps, batch_size)

    def loss(params: tuple[Array, Array], rows: Array) -> Array:
        logits = x[rows] @ params[0] + params[1]
        return optax.softmax_cross_entropy_with_integer_labels(logits, label[rows]).mean()

    def fit(inputs: Array, rate: Array, key: Array) -> tuple[Array, Array]:
        optimizer = optax.sgd(optax.cosine_decay_schedule(rate, steps), momentum=0.9)

        def step(carry: Any, rows: Array) -> tuple[Any, None]:
            params, opt_state = carry
            kernel, bias = jax.grad(loss)(params, rows)
            updates, opt_state = optimizer.update((kernel * inputs[:, None], bias), opt_state)
            return (optax.apply_updates(params, updates), opt_state), None

        kernel = 0.01 * jax.random.normal(key, (x.shape[1], num_classes)) * inputs[:, None]
        params = (kernel, jnp.zeros(num_classes))
        return jax.lax.scan(step, (params, optimizer.init(params)), rows)[0][0]

    return jax.vmap(fit)(inputs, rates, jax.random.split(head_rng, len(rates)))


@jax.jit
def head_accuracies(
    kernel: Float[Array, "R D V"], bias: Float[Array, "R V"], x: Float[Array, "B D"], label: Int[Array, " B"]
) -> Float[Array, " R"]:
    """The share of rows that each classifier gets right."""
    return jax.lax.map(lambda head: ((x @ head[0] + head[1]).argmax(-1) == label).mean(), (kernel, bias))
