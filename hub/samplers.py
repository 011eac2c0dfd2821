"""scheduler_config.json of diffusers, to samplers and back: every key used, harmless or refused (keys.py)."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from ..models.samplers import PREDICTIONS, SPACINGS, SamplerConfig
from .files.tensors import nearest
from .keys import USED, Key, Section, brief, harmless, only, used

FILE = "scheduler_config.json"
_CLASS = "_class_name"

_NOISE = {
    "num_train_timesteps": used("count", 1000),
    "beta_start": used("positive", 0.0001),
    "beta_end": used("positive", 0.02),
    "beta_schedule": used("text", "linear", choices=("linear", "scaled_linear", "squaredcos_cap_v2")),
    "trained_betas": used("numbers", None),
}
_STEPS = {"steps_offset": used("whole", 0)}
_ZERO_SNR = {"rescale_betas_zero_snr": used("flag", False)}


def _prediction(*but: str) -> Key:
    return used("text", "epsilon", choices=[name for name in PREDICTIONS if name not in but])


def _spacing(default: str) -> Key:
    return used("text", default, choices=SPACINGS)


_CLIP = {
    "clip_sample": used("flag", True),
    "clip_sample_range": used("positive", 1.0),
    "thresholding": used("flag", False),
    "dynamic_thresholding_ratio": used("positive", 0.995),
    "sample_max_value": used("positive", 1.0),
}
_SIGMAS = {
    "use_karras_sigmas": used("flag", False),
    "use_exponential_sigmas": only(False, None),
    "use_beta_sigmas": only(False, None),
    "final_sigmas_type": used("text", "zero", choices=("zero", "sigma_min")),
}
_ENDS = {"sigma_min": used("positive", None), "sigma_max": used("positive", None)}
_FLOW = {
    "use_flow_sigmas": only(False),
    "flow_shift": harmless("ignored"),  # without flow sigmas, as are the next two
    "use_dynamic_shifting": only(False),
    "time_shift_type": harmless("ignored"),
}
# DPM-Solver takes the last three for its first, UniPC the first three for its last.
_SOLVERS = (
    "midpoint",
    "heun",
    "logrho",
    "bh1",
    "bh2",
)  # DPM-Solver takes the last three as its first, UniPC the others
_MULTISTEP = {
    "solver_order": used("count", 2, choices=(1, 2)),
    "prediction_type": _prediction(),
    "timestep_spacing": _spacing("linspace"),
    **{key: value for key, value in _CLIP.items() if not key.startswith("clip")},
}

# What each class reads; a key that only others read is one that this class passes over.
_READ: dict[str, dict[str, Key]] = {
    "DDIMScheduler": {
        **(_NOISE | _STEPS | _ZERO_SNR | _CLIP),
        "prediction_type": _prediction(),
        "timestep_spacing": _spacing("leading"),
        "set_alpha_to_one": used("flag", True),
    },
    "DDPMScheduler": {
        **(_NOISE | _STEPS | _ZERO_SNR | _CLIP),
        "prediction_type": _prediction(),
        "timestep_spacing": _spacing("leading"),
        "variance_type": used("text", "fixed_small", choices=("fixed_small", "fixed_small_log", "fixed_large")),
    },
    "PNDMScheduler": {
        **(_NOISE | _STEPS),
        "prediction_type": _prediction("sample"),
        "timestep_spacing": _spacing("leading"),
        "set_alpha_to_one": used("flag", False),
        "skip_prk_steps": Key("refused", default=False, choices=(True,)),  # Runge-Kutta steps: 3 calls each
    },
    "EulerDiscreteScheduler": {
        **(_NOISE | _STEPS | _ZERO_SNR | _SIGMAS | _ENDS),
        "prediction_type": _prediction(),
        "timestep_spacing": _spacing("linspace"),
        "interpolation_type": used("text", "linear", choices=("linear", "log_linear")),
        "timestep_type": only("discrete"),
    },
    "EulerAncestralDiscreteScheduler": {
        **(_NOISE | _STEPS | _ZERO_SNR),
        "prediction_type": _prediction("sample"),
        "timestep_spacing": _spacing("linspace"),
    },
    "DPMSolverMultistepScheduler": {
        **(_NOISE | _STEPS | _ZERO_SNR | _SIGMAS | _FLOW | _MULTISTEP),
        "algorithm_type": used("text", "dpmsolver++", choices=("dpmsolver++", "sde-dpmsolver++")),
        "solver_type": used("text", "midpoint", choices=_SOLVERS),
        "lower_order_final": used("flag", True),
        "euler_at_final": used("flag", False),
        "use_lu_lambdas": only(False, None),
        "lambda_min_clipped": only(-math.inf),
        "variance_type": only(None),
    },
    "UniPCMultistepScheduler": {
        **(_NOISE | _STEPS | _ZERO_SNR | _SIGMAS | _ENDS | _FLOW | _MULTISTEP),
        "solver_type": used("text", "bh2", choices=_SOLVERS),
        "predict_x0": only(True),
        "lower_order_final": only(True),  # without, the last step divides by its infinite length
        "disable_corrector": only([]),
        "solver_p": only(None),
        "shift_terminal": only(None),
    },
}
_KINDS = {
    "DDIMScheduler": "ddim",
    "DDPMScheduler": "ddpm",
    "PNDMScheduler": "pndm",
    "EulerDiscreteScheduler": "euler",
    "EulerAncestralDiscreteScheduler": "euler_ancestral",
    "DPMSolverMultistepScheduler": "dpm_solver",
    "UniPCMultistepScheduler": "unipc",
}
_ALL = {key for keys in _READ.values() for key in keys}
SECTIONS = {
    name: Section(
        {_CLASS: harmless("bookkeeping"), "_diffusers_version": harmless("bookkeeping")}
        | {key: harmless("ignored") for key in sorted(_ALL - keys.keys())}
        | keys
    )
    for name, keys in _READ.items()
}


def read_sampler(document: Mapping[str, Any], kind: str = "", where: str = FILE) -> SamplerConfig:
    """The sampler of a scheduler_config.json; with `kind` another one, on the keys of the file that it reads.

    ValueError for a class that is none of `SECTIONS`, for keys as `Section.read` has it, and for Runge-Kutta steps.
    """
    name = document.get(_CLASS)
    if name not in SECTIONS:
        hint = nearest(name[:60], SECTIONS) if isinstance(name, str) else ""
        raise ValueError(f"{where}: {_CLASS!r} is {brief(name)}{hint}, expected one of {list(SECTIONS)}")
    values = SECTIONS[name].read(document, where)
    if name == "PNDMScheduler" and not kind and not document.get("skip_prk_steps", False):
        raise ValueError(f"{where}: 'skip_prk_steps' is false, expected true")
    if kind and kind != _KINDS[name]:
        name = next(name for name, known in _KINDS.items() if known == kind)
        values = SECTIONS[name].read({key: value for key, value in document.items() if key in _READ[name]}, where)
    try:
        return _sampler(_KINDS[name], values)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def _sampler(kind: str, v: Mapping[str, Any]) -> SamplerConfig:
    threshold = (v["dynamic_thresholding_ratio"], v["sample_max_value"]) if v.get("thresholding") else None
    unipc, given = kind == "unipc", v.get
    betas = v["trained_betas"]
    return SamplerConfig(
        kind=kind,
        num_train_timesteps=v["num_train_timesteps"] if betas is None else len(betas),
        beta_start=v["beta_start"],
        beta_end=v["beta_end"],
        beta_schedule=v["beta_schedule"],
        betas=None if betas is None else tuple(betas),
        zero_snr=given("rescale_betas_zero_snr", False),
        prediction=v["prediction_type"],
        spacing=v["timestep_spacing"],
        steps_offset=v["steps_offset"],
        alpha_to_one=given("set_alpha_to_one", False),
        clip=v["clip_sample_range"] if given("clip_sample") and threshold is None else None,
        threshold=threshold,
        fixed_large=given("variance_type") == "fixed_large",
        karras=bool(given("use_karras_sigmas")),
        sigma_min=given("sigma_min"),
        sigma_max=given("sigma_max"),
        log_linear=given("interpolation_type") == "log_linear",
        final_sigma_zero=given("final_sigmas_type", "zero") == "zero",
        order=given("solver_order", 2),
        stochastic=given("algorithm_type") == "sde-dpmsolver++",
        heun=not unipc and given("solver_type") == "heun",
        bh1=unipc and v["solver_type"] == "bh1",
        lower_order_final=given("lower_order_final", True),
        euler_at_final=given("euler_at_final", False),
    )


def write_sampler(config: SamplerConfig) -> dict[str, Any]:
    """The document that reads as `config`; ValueError for `eta`, which the callers of diffusers give."""
    c = config
    name = next(name for name, kind in _KINDS.items() if kind == c.kind)
    ratio, largest = c.threshold or (0.995, 1.0)
    said = {
        "num_train_timesteps": c.num_train_timesteps,
        "beta_start": c.beta_start,
        "beta_end": c.beta_end,
        "beta_schedule": c.beta_schedule,
        "trained_betas": None if c.betas is None else list(c.betas),
        "rescale_betas_zero_snr": c.zero_snr,
        "prediction_type": c.prediction,
        "timestep_spacing": c.spacing,
        "steps_offset": c.steps_offset,
        "set_alpha_to_one": c.alpha_to_one,
        "clip_sample": c.clip is not None,
        "clip_sample_range": 1.0 if c.clip is None else c.clip,
        "thresholding": c.threshold is not None,
        "dynamic_thresholding_ratio": ratio,
        "sample_max_value": largest,
        "variance_type": "fixed_large" if c.fixed_large else "fixed_small",
        "use_karras_sigmas": c.karras,
        "sigma_min": c.sigma_min,
        "sigma_max": c.sigma_max,
        "interpolation_type": "log_linear" if c.log_linear else "linear",
        "final_sigmas_type": "zero" if c.final_sigma_zero else "sigma_min",
        "solver_order": c.order,
        "algorithm_type": "sde-dpmsolver++" if c.stochastic else "dpmsolver++",
        "solver_type": ("bh1" if c.bh1 else "bh2") if c.kind == "unipc" else "heun" if c.heun else "midpoint",
        "lower_order_final": c.lower_order_final,
        "euler_at_final": c.euler_at_final,
    }
    keys = SECTIONS[name].keys
    document = {_CLASS: name} | {key: value for key, value in said.items() if keys[key].fate == USED}
    if c.kind == "pndm":
        document["skip_prk_steps"] = True
    back = read_sampler(document)
    if back != c:
        lost = [f.name for f in dataclasses.fields(c) if getattr(back, f.name) != getattr(c, f.name)]
        raise ValueError(
            f"{name} cannot say {lost[0]}={brief(getattr(c, lost[0]))}, expected {getattr(back, lost[0])!r}"
        )
    return document
