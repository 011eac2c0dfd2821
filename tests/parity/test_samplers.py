"""Whole trajectories of samplers beside diffusers', on a model that is a formula."""

import dataclasses
import inspect
import json

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from omnax.hub.keys import HARMLESS, equal
from omnax.hub.samplers import SECTIONS, read_sampler, write_sampler
from omnax.kernels.diffusion import guide
from omnax.models.samplers import SamplerConfig, make_schedule, sample
from oracles import torch

TOLERANCE = 1e-5  # of the largest value on the way: samples in the form x_0 + sigma n begin at 15
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # diffusers
SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
V = {"prediction_type": "v_prediction"}
ZERO_SNR = V | {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
# With a last sigma of 0 diffusers' bh1 multiplies infinity by 0.
BH1 = {"solver_type": "bh1", "prediction_type": "sample", "final_sigmas_type": "sigma_min"}
RANDOM = np.random.default_rng(0)
NOISE = RANDOM.normal(size=(1, 4, 3, 4)).astype(np.float32)
PICTURE = RANDOM.normal(size=(1, 4, 3, 4)).astype(np.float32)
FRESH = RANDOM.normal(size=(51, 1, 4, 3, 4)).astype(np.float32)

CASES = {
    "ddim": ("DDIM", {"clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1}),
    "ddim v": ("DDIM", V | {"clip_sample": False, "set_alpha_to_one": True, "timestep_spacing": "linspace"}),
    "ddim sample": ("DDIM", {"prediction_type": "sample", "clip_sample": False, "timestep_spacing": "trailing"}),
    "ddim zero snr": (
        "DDIM",
        V | {"clip_sample": False, "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"},
    ),
    "ddim clip": ("DDIM", {"clip_sample": True, "clip_sample_range": 0.7}),
    "ddim threshold": ("DDIM", {"thresholding": True, "dynamic_thresholding_ratio": 0.8, "sample_max_value": 1.6}),
    "ddpm": ("DDPM", {"clip_sample": False, "steps_offset": 1}),
    "ddpm v": ("DDPM", V | {"clip_sample": True, "timestep_spacing": "trailing", "variance_type": "fixed_large"}),
    "ddpm sample": ("DDPM", {"prediction_type": "sample", "clip_sample": False, "variance_type": "fixed_small_log"}),
    "pndm": ("PNDM", {"skip_prk_steps": True, "set_alpha_to_one": False, "steps_offset": 1}),
    "pndm v": ("PNDM", V | {"skip_prk_steps": True, "set_alpha_to_one": True, "timestep_spacing": "trailing"}),
    "euler": ("EulerDiscrete", {"timestep_spacing": "leading", "steps_offset": 1}),
    "euler v": ("EulerDiscrete", V),
    "euler sample": ("EulerDiscrete", {"prediction_type": "sample", "timestep_spacing": "trailing"}),
    "euler karras": ("EulerDiscrete", {"use_karras_sigmas": True, "final_sigmas_type": "sigma_min"}),
    "euler karras ends": ("EulerDiscrete", {"use_karras_sigmas": True, "sigma_min": 0.1, "sigma_max": 9.0}),
    "euler log": ("EulerDiscrete", {"interpolation_type": "log_linear"}),
    "euler zero snr": ("EulerDiscrete", ZERO_SNR),
    "ancestral": ("EulerAncestralDiscrete", {"timestep_spacing": "leading", "steps_offset": 1}),
    "ancestral v": ("EulerAncestralDiscrete", V | {"timestep_spacing": "trailing"}),
    "dpm": ("DPMSolverMultistep", {}),
    "dpm v": ("DPMSolverMultistep", V | {"timestep_spacing": "leading", "steps_offset": 1}),
    "dpm sample": ("DPMSolverMultistep", {"prediction_type": "sample", "timestep_spacing": "trailing"}),
    "dpm karras": ("DPMSolverMultistep", {"use_karras_sigmas": True}),
    "dpm heun": ("DPMSolverMultistep", {"solver_type": "heun", "lower_order_final": False}),
    "dpm first": ("DPMSolverMultistep", {"solver_order": 1, "final_sigmas_type": "sigma_min"}),
    "dpm end": ("DPMSolverMultistep", {"final_sigmas_type": "sigma_min", "euler_at_final": True}),
    "dpm second end": ("DPMSolverMultistep", {"final_sigmas_type": "sigma_min", "lower_order_final": False}),
    "dpm sde": ("DPMSolverMultistep", {"algorithm_type": "sde-dpmsolver++", "use_karras_sigmas": True}),
    "dpm sde heun": ("DPMSolverMultistep", V | {"algorithm_type": "sde-dpmsolver++", "solver_type": "heun"}),
    "dpm threshold": ("DPMSolverMultistep", {"thresholding": True, "sample_max_value": 2.0}),
    "unipc": ("UniPCMultistep", {}),
    "unipc v": ("UniPCMultistep", V | {"timestep_spacing": "leading", "steps_offset": 1}),
    "unipc bh1": ("UniPCMultistep", BH1),
    "unipc first": ("UniPCMultistep", {"solver_order": 1, "use_karras_sigmas": True}),
    "unipc zero snr": ("UniPCMultistep", ZERO_SNR),
    "ddim linear": ("DDIM", {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02, "clip_sample": False}),
    "ddim cosine": ("DDIM", {"beta_schedule": "squaredcos_cap_v2", "clip_sample": False}),
}


def formula(x, t, library):
    """An output that depends on sample and time, and not linearly."""
    return 0.3 * x + 0.2 * library.sin(3 * x + t / 300)


def theirs(cls, settings, steps, start, monkeypatch):
    """diffusers' samples, one a step."""
    scheduler = getattr(diffusers, f"{cls}Scheduler")(**SD | settings)
    scheduler.set_timesteps(steps)
    fresh = iter(FRESH)
    module = __import__(type(scheduler).__module__, fromlist=["_"])
    if hasattr(module, "randn_tensor"):
        monkeypatch.setattr(module, "randn_tensor", lambda *_, **__: torch.from_numpy(next(fresh)))
    timesteps = scheduler.timesteps[start:]
    noise, picture = torch.from_numpy(NOISE), torch.from_numpy(PICTURE)
    if start:
        if hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(start)
        x = scheduler.add_noise(picture, noise, timesteps[:1])
    else:
        x = noise * scheduler.init_noise_sigma
    found = [x.numpy()]
    for t in timesteps:
        output = formula(scheduler.scale_model_input(x, t), t, torch)
        options = {"eta": 0.0} if cls == "DDIM" else {}
        x = scheduler.step(output, t, x, **options).prev_sample
        found.append(x.numpy())
    return scheduler, np.stack(found)


SEEN = []


@jax.jit
def run(schedule, noise, fresh, picture):
    def model(x, t, i):
        jax.debug.callback(lambda i, x: SEEN.append((int(i), np.asarray(x))), i, x, ordered=True)
        return formula(x, t, jnp)

    return sample(schedule, model, noise, lambda i: fresh[i], picture)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(("steps", "start"), [(50, 0), (10, 4)])
def test_trajectory(name, steps, start, monkeypatch):
    """Also what the model sees on the way, which is the sample of every step."""
    cls, settings = CASES[name]
    scheduler, expected = theirs(cls, settings, steps, start, monkeypatch)
    config = read_sampler(json.loads(scheduler.to_json_string()))
    assert read_sampler(write_sampler(config)) == config
    schedule = make_schedule(config, steps, start)
    SEEN.clear()
    found = np.asarray(run(schedule, NOISE, FRESH, PICTURE if start else None))
    jax.effects_barrier()
    np.testing.assert_allclose(schedule.timesteps, scheduler.timesteps[start:].numpy(), atol=1e-3)
    assert [i for i, _ in SEEN] == list(range(len(schedule.timesteps)))
    allowed = TOLERANCE * max(1, np.abs(expected).max())
    np.testing.assert_allclose(found, expected[-1], rtol=0, atol=allowed)
    for (_, x), factor, other in zip(SEEN, schedule.input_scale, expected, strict=False):
        np.testing.assert_allclose(x, factor * other, rtol=0, atol=allowed)


# Ten steps of a linear model from linspace(-1, 1, 8) times the first deviation, written down when the spec was checked.
GOLDEN = {
    "ddim": (-3.95311, -2.833789, -1.714467, -0.595144),
    "pndm": (-3.651124, -2.616326, -1.581526, -0.546727),
    "euler": (-3.920089, -2.810117, -1.700145, -0.590173),
    "dpm": (-5.472992, -3.925077, -2.377163, -0.829248),
    "unipc": (-5.409678, -3.87951, -2.349342, -0.819174),
}


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_values(name):
    cls, settings = CASES[name]
    config = read_sampler({"_class_name": f"{cls}Scheduler"} | SD | settings)

    def model(x, t, i):
        return 0.3 * x + 0.01 * t / 1000

    found = sample(make_schedule(config, 10), model, jnp.linspace(-1, 1, 8), lambda i: jnp.zeros(8))
    np.testing.assert_allclose(found[:4], GOLDEN[name], rtol=0, atol=2e-5)  # six digits of 5.47 were written down


@pytest.mark.parametrize("name", SECTIONS)
def test_every_key_of_the_class_has_a_fate(name):
    keys = SECTIONS[name].keys
    for key, parameter in inspect.signature(getattr(diffusers, name).__init__).parameters.items():
        if key == "self":
            continue
        entry = keys[key]
        assert (entry.fate, entry.reason) != (HARMLESS, "ignored") or key in ("flow_shift", "time_shift_type"), key
        assert entry.fate == HARMLESS or equal(entry.default, parameter.default), (key, entry.default)
        if entry.fate != HARMLESS:
            with pytest.raises(ValueError, match=rf"scheduler_config.json: '{key}' is nan, expected"):
                SECTIONS[name].read({key: float("nan")}, "scheduler_config.json")


def test_refusals_are_named():
    for document, message in [
        ({"_class_name": "LCMScheduler"}, "'_class_name' is 'LCMScheduler'"),
        ({"_class_name": 3}, "'_class_name' is 3"),
        ({"_class_name": "PNDMScheduler"}, "'skip_prk_steps' is false"),
        ({"_class_name": "DDIMScheduler", "eta_min": 1}, "'eta_min' is unknown"),
        ({"_class_name": "DDIMScheduler", "rescale_betas_zero_snr": True}, "'epsilon' from pure noise"),
        ({"_class_name": "DPMSolverMultistepScheduler", "solver_order": 3}, "'solver_order' is 3"),
        ({"_class_name": "UniPCMultistepScheduler", "use_flow_sigmas": True}, "'use_flow_sigmas' is True"),
    ]:
        with pytest.raises(ValueError, match=message):
            read_sampler(document)
    with pytest.raises(ValueError, match="steps is 1001, expected 1 to 1000"):
        make_schedule(SamplerConfig(), 1001)
    with pytest.raises(ValueError, match="past time step 999"):
        make_schedule(SamplerConfig(steps_offset=1), 1000)
    with pytest.raises(ValueError, match="start is 20"):
        make_schedule(SamplerConfig(), 20, 20)
    with pytest.raises(ValueError, match=r"cannot say eta=0\.5"):
        write_sampler(SamplerConfig(eta=0.5))


def test_another_sampler_keeps_what_the_file_says():
    """As diffusers' from_config: keys of the file are carried over, defaults of its class are not."""
    document = {"_class_name": "PNDMScheduler", "steps_offset": 1, "skip_prk_steps": True} | SD | V
    config = read_sampler(document, "dpm_solver")
    theirs = diffusers.DPMSolverMultistepScheduler.from_config(document)
    assert (config.spacing, config.steps_offset, config.prediction) == ("linspace", 1, "v_prediction")
    assert config == read_sampler(json.loads(theirs.to_json_string()))


def test_eta_is_the_share_of_ddpm_noise(monkeypatch):
    settings = CASES["ddim"][1]
    scheduler = diffusers.DDIMScheduler(**SD | settings)
    scheduler.set_timesteps(10)
    x = torch.from_numpy(NOISE)
    for i, t in enumerate(scheduler.timesteps):
        fresh = torch.from_numpy(FRESH[i])
        x = scheduler.step(formula(x, t, torch), t, x, eta=0.7, variance_noise=fresh).prev_sample
    config = dataclasses.replace(read_sampler(json.loads(scheduler.to_json_string())), eta=0.7)
    np.testing.assert_allclose(run(make_schedule(config, 10), NOISE, FRESH, None), x, rtol=0, atol=2 * TOLERANCE)


def test_one_program_runs_every_schedule_of_a_shape():
    """Another seed, number of training steps or way to space them compiles nothing anew; memory does not grow."""

    def model(x, t, i):
        return formula(x, t, jnp)

    program = jax.jit(lambda schedule, noise: sample(schedule, model, noise, lambda i: noise))
    for config in (SamplerConfig(), SamplerConfig(spacing="trailing"), SamplerConfig(prediction="v_prediction")):
        program(make_schedule(config, 10), NOISE)
    assert program._cache_size() == 1
    sizes = [
        program.lower(make_schedule(SamplerConfig(kind="unipc"), n), NOISE).compile().memory_analysis()
        for n in (10, 50)
    ]
    assert sizes[0].temp_size_in_bytes == sizes[1].temp_size_in_bytes


def test_guidance():
    from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg  # after the oracles

    guided = NOISE + 5 * (PICTURE - NOISE)
    expected = rescale_noise_cfg(torch.from_numpy(guided), torch.from_numpy(PICTURE), 0.7)
    found = guide(jnp.asarray(NOISE), jnp.asarray(PICTURE), 5.0, 0.7)
    np.testing.assert_allclose(found, expected, rtol=0, atol=TOLERANCE)
