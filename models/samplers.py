"""Samplers of diffusion models: from noise to a sample in N calls of the model.

Every sampler here (DDPM, DDIM, PNDM, Euler, Euler ancestral, DPM-Solver++(2M), UniPC) moves by sums of arrays that it
has: the sample x, the model's output o, the prediction m made of both, earlier predictions, a remembered sample and new
noise z. Only the factors differ. So a sampler is a table of factors, worked out once in float64, and one loop runs them
all: `sample` traces the model once, however many steps there are, and another sampler of the same shape, prompt or seed
compiles nothing anew.

Formulas are those of diffusers 0.42.1 (schedulers/scheduling_*.py), whose trajectories they give (tests/parity).
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from ..kernels.diffusion import BETA_SCHEDULES, cumulative_alphas, make_betas, zero_terminal_snr
from .ranges import Count, Fraction, Positive, PositiveFraction, Whole

PREDICTIONS = ("epsilon", "sample", "v_prediction")
SPACINGS = ("leading", "linspace", "trailing")
_NEARLY_ZERO = np.float32(2**-24)  # of abar where samplers divide by it: float16's smallest number
_KARRAS_RHO = 7.0  # arXiv 2206.00364

Draw = Callable[[Array], Array]  # number of the step -> noise in the shape of the sample
Table = Array | np.ndarray
Row = dict[str, float]  # factors by name of what they multiply: see `_TERMS`
_TERMS = ("x", "o", "m", "m1", "m2", "m3", "m4", "last", "z")


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplerConfig:
    """A sampler with its noise schedule; defaults are those of Stable Diffusion where samplers have the field."""

    kind: str = "ddim"  # see SAMPLERS
    num_train_timesteps: Count = 1000
    beta_start: PositiveFraction = 0.00085
    beta_end: PositiveFraction = 0.012
    beta_schedule: str = "scaled_linear"
    betas: tuple[PositiveFraction, ...] | None = None  # instead of the three above
    zero_snr: bool = False  # rescaled to keep nothing of the picture in the last step
    prediction: str = "epsilon"
    spacing: str = "leading"  # of the time steps: arXiv 2305.08891, table 2
    steps_offset: Whole = 0
    alpha_to_one: bool = False  # DDIM, PNDM: behind the last step lies the picture itself, not x_0 of time step 0
    clip: Positive | None = None  # DDIM, DDPM: bound of the predicted pixels
    threshold: tuple[Positive, Positive] | None = None  # dynamic thresholding: quantile, largest bound
    fixed_large: bool = False  # DDPM: adds beta, not the posterior variance
    eta: Fraction = 0.0  # DDIM: share of DDPM's noise
    karras: bool = False  # sigmas of arXiv 2206.00364
    sigma_min: Positive | None = None  # ends of these
    sigma_max: Positive | None = None
    log_linear: bool = False  # Euler: sigmas in equal steps of their logarithm
    final_sigma_zero: bool = True
    order: Count = 2  # DPM-Solver++, UniPC: 1 or 2
    stochastic: bool = False  # DPM-Solver++: the SDE's form
    heun: bool = False  # DPM-Solver++: in place of the midpoint
    lower_order_final: bool = True
    euler_at_final: bool = False
    bh1: bool = False  # UniPC: B(h) = h in place of exp(h) - 1

    def __post_init__(self) -> None:
        chosen = {
            "kind": (self.kind, tuple(SAMPLERS)),
            "beta_schedule": (self.beta_schedule, BETA_SCHEDULES),
            "prediction": (self.prediction, PREDICTIONS),
            "spacing": (self.spacing, SPACINGS),
            "order": (self.order, (1, 2)),
        }
        for name, (value, known) in chosen.items():
            if value not in known:
                raise ValueError(f"{name} of a sampler is {value!r}, expected one of {known}")
        if self.zero_snr and self.prediction == "epsilon" and self.kind in ("ddim", "ddpm", "pndm"):
            raise ValueError(f"sampler {self.kind!r} cannot predict 'epsilon' from pure noise (zero_snr)")

    @property
    def alphas(self) -> np.ndarray:
        """abar [num_train_timesteps] float32, as training takes it."""
        c = self
        steps = (c.beta_schedule, c.beta_start, c.beta_end, c.num_train_timesteps)
        betas = make_betas(*steps) if c.betas is None else np.array(c.betas, np.float32)
        return cumulative_alphas(zero_terminal_snr(betas) if c.zero_snr else betas)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Schedule:
    """The factors of N steps; arrays, so that another schedule of the same shape runs the same program."""

    timesteps: Table  # [N] float32: what the model is told
    input_scale: Table  # [N]: the model sees the sample times this
    predict: Table  # [N 2]: m = p x + q o
    remember: Table  # [N K]: the remembered sample, in the terms that there are
    move: Table  # [N K+1]: the next sample, in these and noise
    begin: Table  # [2]: the first sample is begin[0] picture + begin[1] noise
    clip: Table  # []: bound of m; inf: none
    threshold: tuple[float, float] | None = dataclasses.field(metadata={"static": True})
    history: int = dataclasses.field(metadata={"static": True})  # earlier m that are used
    remembers: bool = dataclasses.field(metadata={"static": True})
    noisy: bool = dataclasses.field(metadata={"static": True})  # whether any step adds noise


def make_schedule(config: SamplerConfig, steps: int, start: int = 0) -> Schedule:
    """The schedule of `steps` steps, without the first `start` (image to image).

    ValueError for more steps than the model was trained with, and for a start behind the last of them.
    """
    if not 1 <= steps <= config.num_train_timesteps:
        raise ValueError(f"steps is {steps}, expected 1 to {config.num_train_timesteps}, which the model has")
    plan = SAMPLERS[config.kind](config, steps, start)
    if not plan.moves:
        raise ValueError(f"start is {start}, expected a step of the {steps} that the sampler takes")
    used = {term for row in (*plan.moves, *plan.remembered) for term, factor in row.items() if factor}
    history = max((int(term[1:]) for term in used if term[0] == "m" and len(term) > 1), default=0)
    remembers = "last" in used
    terms = ["x", "o", "m", *(f"m{i + 1}" for i in range(history)), *(["last"] if remembers else [])]

    def table(rows: Sequence[Row], names: Sequence[str]) -> np.ndarray:
        return np.array([[row.get(name, 0.0) for name in names] for row in rows], np.float32)

    remembered = plan.remembered or [{}] * len(plan.moves)
    return Schedule(
        timesteps=np.asarray(plan.timesteps, np.float32),
        input_scale=np.asarray(plan.input_scale, np.float32),
        predict=table(plan.predictions, ("x", "o")),
        remember=table(remembered, terms),
        move=table(plan.moves, [*terms, "z"]),
        begin=np.array(plan.begin, np.float32),
        clip=np.array(np.inf if config.clip is None else config.clip, np.float32),
        threshold=config.threshold,
        history=history,
        remembers=remembers,
        noisy="z" in used,
    )


def sample(
    schedule: Schedule,
    model: Callable[[Array, Array, Array], Array],
    noise: Float[Array, "B ..."],
    draw: Draw,
    picture: Float[Array, "B ..."] | None = None,
) -> Float[Array, "B ..."]:
    """Runs the loop; to be jitted with its model. The sample is float32 all along.

    `model(x, t, i)` predicts from the scaled sample, time step and number of the step; `draw(i)` gives new noise, which
    only noisy schedules ask for. With a `picture` the loop begins from it, with noise added.
    """
    x = schedule.begin[1] * noise.astype(jnp.float32)
    if picture is not None:
        x += schedule.begin[0] * picture
    zeros = jnp.zeros_like(x)
    past = (zeros,) * (schedule.history + schedule.remembers)

    def body(carry: tuple[Array, tuple[Array, ...]], row: tuple[Array, ...]) -> tuple[Any, None]:
        (x, past), (i, t, scale, predict, remember, move) = carry, row
        output = model(scale * x, t, i).astype(jnp.float32)
        prediction = _bounded(schedule, predict[0] * x + predict[1] * output)
        terms = (x, output, prediction, *past)
        fresh = draw(i) if schedule.noisy else zeros
        last = (_sum(remember, terms),) if schedule.remembers else ()
        earlier = (prediction, *past[: schedule.history - 1]) if schedule.history else ()
        return (_sum(move, (*terms, fresh)), (*earlier, *last)), None

    s = schedule
    rows: Any = (jnp.arange(len(s.timesteps)), s.timesteps, s.input_scale, s.predict, s.remember, s.move)
    (x, _), _ = jax.lax.scan(body, (x, past), rows)
    return x


def _sum(factors: Array, terms: Sequence[Array]) -> Array:
    total = factors[0] * terms[0]
    for i, term in enumerate(terms[1:], 1):
        total += factors[i] * term
    return total


def _bounded(schedule: Schedule, x: Array) -> Array:
    """A prediction within its bound: a fixed one, or Imagen's dynamic one (arXiv 2205.11487, section 2.3)."""
    if schedule.threshold is None:
        return jnp.clip(x, -schedule.clip, schedule.clip)
    quantile, largest = schedule.threshold
    axes = tuple(range(1, x.ndim))
    bound = jnp.clip(jnp.quantile(jnp.abs(x), quantile, axis=axes, keepdims=True), 1.0, largest)
    return jnp.clip(x, -bound, bound) / bound


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a sampler works out: rows of factors, in float64."""

    timesteps: Sequence[float]
    input_scale: Sequence[float]
    predictions: Sequence[Row]
    moves: Sequence[Row]
    begin: tuple[float, float]
    remembered: Sequence[Row] = ()


def spaced(config: SamplerConfig, steps: int, *, rounded: bool = True, extra: bool = False) -> np.ndarray:
    """Time steps, the noisiest first. `extra`: of steps + 1 points, without the last (DPM-Solver++, UniPC)."""
    total, points = config.num_train_timesteps, steps + extra
    if config.spacing == "linspace":
        # In float32 where steps may lie between those of training: the model is told these very numbers.
        found = np.linspace(0, total - 1, points, dtype=None if rounded else np.float32)[::-1]
        found = found.round() if rounded else found
    elif config.spacing == "leading":
        found = (np.arange(points) * (total // points))[::-1] + config.steps_offset
    else:
        return np.arange(total, 0, -total / steps).round() - 1
    if found[0] >= total:
        raise ValueError(f"steps {steps} with steps_offset {config.steps_offset} go past time step {total - 1}")
    return found[: len(found) - extra].astype(np.float64)


def predict_sample(prediction: str, signal: float, deviation: float) -> Row:
    """x_0 from sample and output, x_t being signal x_0 + deviation n."""
    if prediction == "sample":
        return {"o": 1.0}
    if prediction == "epsilon":
        return {"x": 1 / signal, "o": -deviation / signal}
    return {"x": signal, "o": -deviation}


def predict_noise(prediction: str, signal: float, deviation: float) -> Row:
    """n from sample and output."""
    if prediction == "sample":
        return {"x": 1 / deviation, "o": -signal / deviation}
    return {"o": 1.0} if prediction == "epsilon" else {"x": deviation, "o": signal}


def _add(*rows: tuple[float, Row]) -> Row:
    """The sum of rows, each times its factor."""
    total: Row = {}
    for factor, row in rows:
        for term, value in row.items():
            total[term] = total.get(term, 0.0) + factor * value
    return total


def _steps(
    config: SamplerConfig, timesteps: np.ndarray, start: int
) -> tuple[list[float], list[int], tuple[float, float]]:
    """abar of training, the time steps from `start` on, and what the first sample is made of."""
    alphas: list[float] = config.alphas.astype(np.float64).tolist()
    left: list[int] = timesteps[start:].astype(int).tolist()
    first = alphas[left[0]] if start and left else 0.0
    return alphas, left, (first**0.5, (1 - first) ** 0.5)


def ddim(config: SamplerConfig, steps: int, start: int) -> Plan:
    """arXiv 2010.02502, formulas 12 and 16; `clip` bounds x_0 and leaves the noise as predicted."""
    alphas, timesteps, begin = _steps(config, spaced(config, steps), start)
    predictions, moves = [], []
    for t in timesteps:
        earlier = t - config.num_train_timesteps // steps
        now, then = alphas[t], alphas[earlier] if earlier >= 0 else 1.0 if config.alpha_to_one else alphas[0]
        rates = config.prediction, now**0.5, (1 - now) ** 0.5
        added = config.eta * ((1 - then) / (1 - now) * (1 - now / then)) ** 0.5
        predictions.append(predict_sample(*rates))
        direction = (1 - then - added**2) ** 0.5
        moves.append(_add((then**0.5, {"m": 1.0}), (direction, predict_noise(*rates)), (added, {"z": 1.0})))
    return Plan(timesteps, [1.0] * len(timesteps), predictions, moves, begin)


def ddpm(config: SamplerConfig, steps: int, start: int) -> Plan:
    """arXiv 2006.11239, formula 7, over the time steps that are taken."""
    alphas, timesteps, begin = _steps(config, spaced(config, steps), start)
    predictions, moves = [], []
    for t, earlier in zip(timesteps, [*timesteps[1:], -1], strict=True):
        now, then = alphas[t], alphas[earlier] if earlier >= 0 else 1.0
        kept = now / then
        variance = 1 - kept if config.fixed_large else max((1 - then) / (1 - now) * (1 - kept), 1e-20)
        predictions.append(predict_sample(config.prediction, now**0.5, (1 - now) ** 0.5))
        moves.append(
            {
                "m": then**0.5 * (1 - kept) / (1 - now),
                "x": kept**0.5 * (1 - then) / (1 - now),
                "z": variance**0.5 if t > 0 else 0.0,
            }
        )
    return Plan(timesteps, [1.0] * len(timesteps), predictions, moves, begin)


# Adams-Bashforth by the number of outputs that there are (arXiv 2202.09778, formula 12).
_MULTISTEP = {1: (1.0,), 2: (3 / 2, -1 / 2), 3: (23 / 12, -16 / 12, 5 / 12), 4: (55 / 24, -59 / 24, 37 / 24, -9 / 24)}


def pndm(config: SamplerConfig, steps: int, start: int) -> Plan:
    """PLMS (arXiv 2202.09778 without Runge-Kutta steps): N + 1 calls, the second of which does the first step again."""
    once = spaced(config, steps)
    twice = np.concatenate([once[:1], once[1:2], once[1:]]) if steps > 1 else once
    alphas, timesteps, begin = _steps(config, twice, start)
    stride = config.num_train_timesteps // steps
    moves = []
    for number, t in enumerate(timesteps):
        # The second output averages with the first and is then forgotten: later terms pass over it.
        slots = ["m", *(f"m{i}" for i in range(1, number - 1)), *([f"m{number}"] if number > 1 else [])]
        weights = _MULTISTEP[min(len(slots), 4)] if number != 1 else (0.5, 0.5)
        taken, at = ("last", t + stride) if number == 1 else ("x", t)
        slots = ["m", "m1"] if number == 1 else slots
        output = dict(zip(slots, weights, strict=False))
        earlier = at - stride
        now, then = alphas[at], alphas[earlier] if earlier >= 0 else 1.0 if config.alpha_to_one else alphas[0]
        if config.prediction == "v_prediction":
            output = _add((now**0.5, output), ((1 - now) ** 0.5, {taken: 1.0}))
        divisor = now * (1 - then) ** 0.5 + (now * (1 - now) * then) ** 0.5
        moves.append(_add(((then / now) ** 0.5, {taken: 1.0}), ((now - then) / divisor, output)))
    n = len(timesteps)
    return Plan(timesteps, [1.0] * n, [{"o": 1.0}] * n, moves, begin, [{"x": 1.0}] * n)


def sigmas_of(config: SamplerConfig, timesteps: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Noise to signal at the time steps and behind the last of them [N + 1], and the time steps that belong to it."""
    alphas = config.alphas
    if config.zero_snr:
        alphas[-1] = _NEARLY_ZERO
    trained = np.sqrt((1 - alphas) / alphas)
    found = np.interp(timesteps, np.arange(len(trained)), trained)
    if config.log_linear and not config.karras:
        found = np.exp(np.linspace(np.log(trained[-1]), np.log(trained[0]), len(timesteps) + 1))
        return found.astype(np.float32).astype(np.float64), timesteps  # the last is behind the steps: no final one
    if config.karras:
        # Euler's run between the ends of its time steps, the others' between those of training.
        own = config.kind == "euler" and not config.log_linear
        ends = (found[0], found[-1]) if own else (trained[-1], trained[0])
        high, low = (
            (config.sigma_max or ends[0]) ** (1 / _KARRAS_RHO),
            (config.sigma_min or ends[1]) ** (1 / _KARRAS_RHO),
        )
        found = (high + np.linspace(0, 1, len(timesteps)) * (low - high)) ** _KARRAS_RHO
        timesteps = np.interp(np.log(found), np.log(trained), np.arange(len(trained)))
        timesteps = timesteps if config.kind == "euler" else timesteps.round()
    least = found[-1] if config.karras and config.kind == "unipc" else trained[0]
    final = 0.0 if config.final_sigma_zero else least
    return np.append(found, final).astype(np.float32).astype(np.float64), timesteps


def euler(config: SamplerConfig, steps: int, start: int) -> Plan:
    """x' = x + (x - x_0) / sigma (sigma' - sigma), x being x_0 + sigma n (arXiv 2206.00364)."""
    return _euler(config, steps, start, ancestral=False)


def euler_ancestral(config: SamplerConfig, steps: int, start: int) -> Plan:
    """Euler's step to below sigma', then noise up to it (crowsonkb/k-diffusion sample_euler_ancestral)."""
    return _euler(config, steps, start, ancestral=True)


def _euler(config: SamplerConfig, steps: int, start: int, *, ancestral: bool) -> Plan:
    sigmas, timesteps = (x.tolist() for x in sigmas_of(config, spaced(config, steps, rounded=False)))
    scales, predictions, moves = [], [], []
    for now, then in zip(sigmas[start:-1], sigmas[start + 1 :], strict=True):
        signal = (now**2 + 1) ** -0.5
        row = predict_sample(config.prediction, signal, now * signal)
        up = (then**2 * (now**2 - then**2)) ** 0.5 / now if ancestral else 0.0
        down = (then**2 - up**2) ** 0.5
        scales.append(signal)
        predictions.append({"x": signal * row.get("x", 0.0), "o": row["o"]})
        moves.append({"x": down / now, "m": 1 - down / now, "z": up})
    most = max(sigmas)
    begin = (1.0, sigmas[start] if start < len(sigmas) else 0.0)
    if not start:
        begin = (0.0, most if config.spacing != "leading" else (most**2 + 1) ** 0.5)
    return Plan(timesteps[start:], scales, predictions, moves, begin)


@dataclasses.dataclass(frozen=True)
class _Levels:
    """Signal, deviation and half the logarithm of the signal-to-noise ratio, for each of the sigmas."""

    signal: np.ndarray
    deviation: np.ndarray
    log_snr: np.ndarray


def _levels(sigmas: np.ndarray) -> _Levels:
    signal = (sigmas**2 + 1) ** -0.5
    with np.errstate(divide="ignore"):  # the last sigma may be 0
        return _Levels(signal, sigmas * signal, -np.log(sigmas))


def _multistep(
    config: SamplerConfig, steps: int, start: int, moves: Callable[[_Levels], tuple[list[Row], list[Row]]]
) -> Plan:
    """A sampler over levels of noise that predicts x_0; `moves` gives the moves and remembered samples of its steps."""
    sigmas, timesteps = sigmas_of(config, spaced(config, steps, extra=True))
    levels = _levels(sigmas)
    rates: list[tuple[float, float]] = list(zip(levels.signal, levels.deviation, strict=True))[start:-1]
    moved, remembered = moves(levels)
    begin = rates[0] if start and rates else (0.0, 1.0)
    predictions = [predict_sample(config.prediction, *pair) for pair in rates]
    return Plan(timesteps.tolist()[start:], [1.0] * len(rates), predictions, moved, begin, remembered)


def dpm_solver(config: SamplerConfig, steps: int, start: int) -> Plan:
    """DPM-Solver++(2M) (arXiv 2211.01095, algorithm 2), its SDE form, and first order."""

    def move(levels: _Levels, i: int) -> Row:
        signal, deviation, snr = levels.signal, levels.deviation, levels.log_snr
        last, few = i == steps - 1, config.lower_order_final and steps < 15
        h = snr[i + 1] - snr[i]
        power = 2.0 if config.stochastic else 1.0
        share = -signal[i + 1] * np.expm1(-power * h)
        x = deviation[i + 1] / deviation[i] * (np.exp(-h) if config.stochastic else 1.0)
        z = deviation[i + 1] * (-np.expm1(-2 * h)) ** 0.5 if config.stochastic else 0.0
        first = {"x": x, "m": share, "z": z}
        if config.order == 1 or i == start or (last and (config.euler_at_final or few or config.final_sigma_zero)):
            return first
        slope = h / (snr[i] - snr[i - 1])
        by_slope = signal[i + 1] * (np.expm1(-power * h) / (power * h) + 1) if config.heun else 0.5 * share
        return _add((1.0, first), (by_slope * slope, {"m": 1.0, "m1": -1.0}))

    def moves(levels: _Levels) -> tuple[list[Row], list[Row]]:
        return [move(levels, i) for i in range(start, steps)], []

    return _multistep(config, steps, start, moves)


def unipc(config: SamplerConfig, steps: int, start: int) -> Plan:
    """UniPC (arXiv 2302.04867): each output first corrects the step that led to it, then predicts the next."""

    def phis(h: float) -> tuple[float, float, float, float]:
        """e^-h - 1, B(h) and the two right-hand sides."""
        hh = -h
        first = np.expm1(hh)
        scale = hh if config.bh1 else first
        if np.isinf(h):  # the last step, of order 1, which has no use for the others
            return first, scale, 0.0, 0.0
        second = first / hh - 1
        return first, scale, second / scale, 2 * (second / hh - 0.5) / scale

    def predictor(levels: _Levels, i: int, order: int, x: Row) -> Row:
        """From the (corrected) sample at i, with m its prediction and m1 the one before."""
        snr, ratio = levels.log_snr, levels.deviation[i + 1] / levels.deviation[i]
        h = snr[i + 1] - snr[i]
        first, scale, _, _ = phis(h)
        moved = _add((ratio, x), (-levels.signal[i + 1] * first, {"m": 1.0}))
        if order == 1:
            return moved
        slope = h / (snr[i - 1] - snr[i])
        return _add((1.0, moved), (-levels.signal[i + 1] * scale * 0.5 * slope, {"m1": 1.0, "m": -1.0}))

    def corrector(levels: _Levels, i: int, order: int) -> Row:
        """The sample at i once more, from the remembered one at i - 1: m is the new prediction, m1 and m2 the older."""
        snr, ratio = levels.log_snr, levels.deviation[i] / levels.deviation[i - 1]
        h = snr[i] - snr[i - 1]
        first, scale, right, right2 = phis(h)
        moved = _add((ratio, {"last": 1.0}), (-levels.signal[i] * first, {"m1": 1.0}))
        at = -levels.signal[i] * scale
        if order == 1:
            return _add((1.0, moved), (at * 0.5, {"m": 1.0, "m1": -1.0}))
        r = (snr[i - 2] - snr[i - 1]) / h
        older, newer = np.linalg.solve([[1.0, 1.0], [r, 1.0]], [right, right2])
        return _add((1.0, moved), (at * older / r, {"m2": 1.0, "m1": -1.0}), (at * newer, {"m": 1.0, "m1": -1.0}))

    def moves(levels: _Levels) -> tuple[list[Row], list[Row]]:
        moved: list[Row] = []
        remembered: list[Row] = []
        order = 1
        for i in range(start, steps):
            x: Row = {"x": 1.0} if i == start else corrector(levels, i, order)
            order = min(config.order, steps - i, i - start + 1)
            moved.append(predictor(levels, i, order, x))
            remembered.append(x)
        return moved, remembered

    return _multistep(config, steps, start, moves)


SAMPLERS: Mapping[str, Callable[[SamplerConfig, int, int], Plan]] = {
    "ddim": ddim,
    "ddpm": ddpm,
    "pndm": pndm,
    "euler": euler,
    "euler_ancestral": euler_ancestral,
    "dpm_solver": dpm_solver,
    "unipc": unipc,
}
