"""Evaluators: accuracy, nearest neighbours and a linear probe on features, over a split whose last batch is padded."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Int

from ...data import splits
from ...kernels.normalization import l2_normalize
from ...objectives.classification import guess, rank
from ..recipe import Evaluator
from ..rules import Tree
from ..state import TrainState
from .host import Batches, check_finite, check_labels, concatenated, over, replicated

Apply = Callable[[Tree, Tree, Array], Array]  # (params, variables, image [B, X, Y, C]) -> [B, D]
PROBE_RATES = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
# Of DINOv2's linear evaluation, for batches of 256 (dinov2:dinov2/eval/linear.py; the paper's B.3 has others).
HEAD_RATES = (1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 1e-1)

MAX_CONFUSION_CLASSES = 100


def accuracy(name: str, logits: Apply, batches: Batches, num_classes: int, top: tuple[int, ...] = ()) -> Evaluator:
    """Top-1 accuracy, cross-entropy, and the confusion matrix [true, predicted] of up to 100 classes.

    For each k of `top` also "top_k_accuracy": how often fewer than k other classes score as high as the right one. Ties
    count against the model; scores that are not finite, and labels that are no class, are errors.
    """

    @replicated
    def measure(params: Tree, variables: Tree, batch: dict[str, Array]) -> dict[str, Array]:
        z, label, mask = logits(params, variables, batch["image"]), batch["label"], batch["mask"]
        places = rank(z, label)
        losses = optax.softmax_cross_entropy_with_integer_labels(z.astype(jnp.float32), label)
        found = {
            "count": mask.sum(),
            "correct": (mask & (places == 0)).sum(),
            "loss": jnp.where(mask, losses, 0.0).sum(),
            "not_finite": (mask & ~jnp.isfinite(z).all(-1)).sum(),
            "no_class": (mask & ((label < 0) | (label >= num_classes))).sum(),
        }
        found |= {f"top_{k}_accuracy": (mask & (places < k)).sum() for k in top}
        if num_classes <= MAX_CONFUSION_CLASSES:
            found["confusion"] = jnp.zeros((num_classes, num_classes), jnp.int32).at[label, guess(z, label)].add(mask)
        return found

    def run(state: TrainState) -> dict[str, float | np.ndarray]:
        totals = functools.reduce(lambda a, b: jax.tree.map(np.add, a, b), over(measure, state, batches))
        if totals["not_finite"]:
            raise FloatingPointError(f"the scores of {totals['not_finite']} of {totals['count']} examples not finite")
        if totals["no_class"]:
            raise ValueError(f"{totals['no_class']} labels are none of the {num_classes} classes")
        count = max(int(totals["count"]), 1)
        results = {"accuracy": float(totals["correct"]) / count, "loss": float(totals["loss"]) / count}
        results |= {name: float(totals[name]) / count for name in totals if name.startswith("top_")}
        return results | ({"confusion": totals["confusion"]} if "confusion" in totals else {})

    return Evaluator(name, run)


def knn(name: str, features: Apply, train: Batches, test: Batches, num_classes: int, k: int = 20) -> Evaluator:
    """Accuracy of the weighted k-nearest-neighbour vote of `nearest_neighbours` on features."""

    def run(state: TrainState) -> dict[str, float | np.ndarray]:
        bank, bank_label = extract(features, state, train, num_classes)
        query, label = extract(features, state, test, num_classes)
        votes = nearest_neighbours(query, bank, bank_label, num_classes, min(k, len(bank)), own=label)
        return {"accuracy": float((rank(votes, label) == 0).mean())}

    return Evaluator(name, run)


def linear_probe(name: str, features: Apply, train: Batches, test: Batches, num_classes: int) -> Evaluator:
    """Accuracy of a linear classifier on frozen features; a tenth of the training split chooses its learning rate."""

    def run(state: TrainState) -> dict[str, float | np.ndarray]:
        x, y = extract(features, state, train, num_classes)
        test_x, test_y = extract(features, state, test, num_classes)
        rates = jnp.array(PROBE_RATES)
        held_out = jnp.asarray(splits.held_out(y))
        kernel, bias = fit_linear(x, y, ~held_out, num_classes, rates)
        best = head_accuracies(kernel, bias, x[held_out], y[held_out]).argmax()
        kernel, bias = fit_linear(x, y, jnp.ones_like(held_out), num_classes, rates)
        accuracy = head_accuracies(kernel[best][None], bias[best][None], test_x, test_y)[0]
        return {"accuracy": float(accuracy), "learning_rate": float(rates[best])}

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
        x, y = extract(features, state, train, num_classes)
        test_x, test_y = extract(features, state, test, num_classes)
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


def extract(
    features: Apply, state: TrainState, batches: Batches, num_classes: int
) -> tuple[Float[Array, "B D"], Int[Array, " B"]]:
    """Float32 features and labels of a whole split, without the padding, on every device.

    FloatingPointError for features that are not finite, ValueError for labels that are no class.
    """
    apply = replicated(
        lambda params, variables, batch: (features(params, variables, batch["image"]), batch["label"], batch["mask"])
    )
    x, label = concatenated(apply, state, batches)
    check_finite("features", x)
    check_labels(label, num_classes)
    return jnp.asarray(x, jnp.float32), jnp.asarray(label)


@functools.partial(jax.jit, static_argnames=("num_classes", "k", "block"))
def nearest_neighbours(
    query: Float[Array, "Q D"],
    bank: Float[Array, "B D"],
    label: Int[Array, " B"],
    num_classes: int,
    k: int,
    temperature: float = 0.07,
    block: int = 256,
    *,
    own: Int[Array, " Q"] | None = None,
) -> Float[Array, "Q V"]:
    """Votes of the k most cosine-similar bank rows, weighted by exp(similarity / temperature).

    Of rows that tie for the last places the first vote; given the queries' `own` classes, rows of other classes go
    before theirs. Queries run in blocks, so that no more than [block, B] similarities exist at once. Source: arXiv
    1805.01978, section 3.4; facebookresearch/dino eval_knn.py.
    """
    query, bank = l2_normalize(query, 1e-12), l2_normalize(bank, 1e-12)

    def vote(q: Float[Array, " D"], own: Int[Array, ""]) -> Float[Array, " V"]:
        everything = bank @ q
        similarity, index = jax.lax.top_k(everything, k)
        # Relative to the nearest, which exp cannot overflow: the ranking of the classes is the same.
        weight = jnp.exp((similarity - similarity[0]) / temperature)
        last = similarity == similarity[-1]
        strangers = ((everything == similarity[-1]) & (label != own)).sum()
        friends = last & (label[index] == own)
        place = jnp.cumsum(friends) + strangers > last.sum()  # no room beside the strangers that tie
        weight = jnp.where((own >= 0) & friends & place, 0.0, weight)
        return weight @ jax.nn.one_hot(label[index], num_classes)

    own = jnp.full(len(query), -1) if own is None else own
    return jax.lax.map(lambda row: vote(*row), (query, own), batch_size=block)


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
    """The share of rows that each classifier gets right; one whose training diverged gets none."""
    return jax.lax.map(lambda head: (rank(x @ head[0] + head[1], label) == 0).mean(), (kernel, bias))
