"""Schedules against diffusers' schedulers on the same noise.

The budget of a comparison counts float32 roundings, each of eps times the largest magnitude on the
way: some for every step, on either side, and those of diffusers' float32 tables.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from heatsink.runtime.schedule import (
    Schedule,
    ScheduleConfig,
    apply_start,
    apply_step,
    coefficients,
    make_schedule,
    scale_input,
    start_scales,
)

SD15 = {
    "_class_name": "PNDMScheduler",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "num_train_timesteps": 1000,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "trained_betas": None,
}
SDXL = {
    "_class_name": "EulerDiscreteScheduler",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "interpolation_type": "linear",
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
    "sample_max_value": 1.0,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "timestep_spacing": "leading",
    "trained_betas": None,
    "use_karras_sigmas": False,
}
NAMES = ("euler", "dpm++2m", "ddim", "lcm")
EPS = float(np.finfo(np.float32).eps)
SHAPE = (2, 4, 6, 5)
# A step rounds its input's scale, two terms of x0, their sum, and as much again for x_next.
STEP_ROUNDINGS = 8
# diffusers' share of signal is a float32 product over 1,000 training steps, whose roundings add up
# as a random walk of sqrt(1000) of them.
TABLE_ROUNDINGS = 32


@pytest.fixture
def rng(seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)


def network(sample: torch.Tensor, timestep: float) -> torch.Tensor:
    """A smooth stand-in for a UNet, by sample and by timestep, that enlarges no error."""
    return 0.5 * torch.sin(sample) + 0.3 * float(np.sin(0.003 * timestep)) - 0.1


def diffusers_scheduler(name: str, config: dict[str, Any]) -> Any:
    import diffusers

    kind = {
        "euler": diffusers.EulerDiscreteScheduler,
        "dpm++2m": diffusers.DPMSolverMultistepScheduler,
        "ddim": diffusers.DDIMScheduler,
        "lcm": diffusers.LCMScheduler,
    }[name]
    return kind.from_config(config)


def run_diffusers(
    scheduler: Any,
    steps: int,
    start: torch.Tensor,
    fresh: list[torch.Tensor],
    *,
    first: int = 0,
    latents: torch.Tensor | None = None,
    eta: float = 0.0,
) -> torch.Tensor:
    scheduler.set_timesteps(steps)
    times = scheduler.timesteps[first:]
    if latents is None:
        x: torch.Tensor = start * scheduler.init_noise_sigma
    else:
        if hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(first)
        x = scheduler.add_noise(latents, start, times[:1].repeat(len(latents)))
    for index, time in enumerate(times):
        out = network(scheduler.scale_model_input(x, time), float(time))
        extra = {"eta": eta, "variance_noise": fresh[index]} if eta else {}
        x = scheduler.step(out, time, x, **extra).prev_sample
    return x


def run_ours(
    schedule: Schedule,
    start: torch.Tensor,
    fresh: list[torch.Tensor],
    latents: torch.Tensor | None = None,
) -> tuple[torch.Tensor, float]:
    """The result, and the largest magnitude that any sum on the way to it had."""
    x = apply_start(start, latents, start_scales([schedule] * len(start)))
    x0 = torch.full_like(x, float("nan"))
    # At least 1, the scale of the shares of signal that every coefficient comes from.
    largest = max(1.0, top(x))
    for step in range(len(schedule)):
        coef = coefficients([(schedule, step)] * len(x))
        out = network(scale_input(x, coef), float(schedule.timesteps[step]))
        p, q = (abs(float(schedule.column(name)[step])) for name in "pq")
        largest = max(largest, p * top(x) + q * top(out))
        x, x0 = apply_step(x, out, x0, fresh[step], coef)
        largest = max(largest, top(x))
    return x, largest


def top(x: torch.Tensor) -> float:
    return float(x.abs().max())


def check(
    name: str,
    config: dict[str, Any],
    steps: int,
    rng: np.random.Generator,
    monkeypatch: pytest.MonkeyPatch,
    *,
    strength: float | None = None,
    eta: float = 0.0,
) -> None:
    """Run both on the same noise and compare timesteps and results."""
    parsed = ScheduleConfig.from_diffusers(config)
    schedule = make_schedule(name, steps, parsed, strength=strength, eta=eta)
    start, latents, *draws = (
        torch.from_numpy(rng.standard_normal(SHAPE, dtype=np.float32)) for _ in range(steps + 2)
    )
    if name == "lcm":
        import diffusers.schedulers.scheduling_lcm as module

        supply = iter(draws)
        monkeypatch.setattr(module, "randn_tensor", lambda *_, **__: next(supply))
    scheduler = diffusers_scheduler(name, config)
    image = None if strength is None else latents
    want = run_diffusers(
        scheduler, steps, start, draws, first=schedule.start, latents=image, eta=eta
    )
    times = scheduler.timesteps.double().numpy()[schedule.start :]
    # Fractional timesteps are the only ones that are rounded; see TABLE_ROUNDINGS.
    fractional = name == "euler" and config.get("use_karras_sigmas")
    atol = TABLE_ROUNDINGS * EPS * 1000 if fractional else 1000 * EPS
    np.testing.assert_allclose(schedule.timesteps, times, rtol=0, atol=atol)
    got, largest = run_ours(schedule, start, draws, image)
    table: float = TABLE_ROUNDINGS
    if name == "ddim" and config.get("prediction_type") == "sample":
        # Here x itself is multiplied by a ratio of noise shares 1 - abar, of which float32 keeps
        # little at the clean end: their relative rounding is that of abar over 1 - abar.
        table = 1 / (1 - float(scheduler.alphas_cumprod[int(times.min())]))
    budget = (table + STEP_ROUNDINGS * steps) * EPS * largest
    assert budget < 1e-3 * largest, "a budget that wide shows nothing"
    assert top(got - want) <= budget


@pytest.mark.parametrize("config", [SD15, SDXL], ids=["sd15", "sdxl"])
@pytest.mark.parametrize("steps", [1, 2, 4, 7, 20, 50])
@pytest.mark.parametrize("name", NAMES)
def test_equals_diffusers(
    name: str,
    steps: int,
    config: dict[str, Any],
    rng: np.random.Generator,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    check(name, config, steps, rng, monkeypatch)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("name", NAMES)
def test_equals_diffusers_in_every_spacing_and_prediction(
    name: str,
    spacing: str,
    prediction: str,
    rng: np.random.Generator,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = {**SDXL, "timestep_spacing": spacing, "prediction_type": prediction}
    for steps in (1, 7, 20):
        check(name, config, steps, rng, monkeypatch)


@pytest.mark.parametrize("strength", [0.3, 0.75, 1.0])
@pytest.mark.parametrize("name", NAMES)
def test_image_to_image_equals_diffusers(
    name: str, strength: float, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    for steps in (4, 20):
        check(name, SD15, steps, rng, monkeypatch, strength=strength)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("euler", {"use_karras_sigmas": True}),
        ("euler", {"use_karras_sigmas": True, "sigma_min": 0.05, "sigma_max": 12.0}),
        ("dpm++2m", {"use_karras_sigmas": True}),
        ("euler", {"final_sigmas_type": "sigma_min"}),
        ("dpm++2m", {"final_sigmas_type": "sigma_min"}),
        ("dpm++2m", {"final_sigmas_type": "sigma_min", "lower_order_final": False}),
        ("dpm++2m", {"final_sigmas_type": "sigma_min", "euler_at_final": True}),
        ("dpm++2m", {"solver_type": "heun"}),
        ("dpm++2m", {"solver_type": "bh2"}),
        ("dpm++2m", {"lambda_min_clipped": -2.0}),
        ("dpm++2m", {"beta_schedule": "squaredcos_cap_v2", "lambda_min_clipped": -5.1}),
        ("ddim", {"set_alpha_to_one": True}),
        ("euler", {"beta_schedule": "linear", "beta_start": 0.0001, "beta_end": 0.02}),
        ("ddim", {"beta_schedule": "squaredcos_cap_v2", "prediction_type": "v_prediction"}),
        ("lcm", {"trained_betas": np.linspace(1e-3, 2e-2, 1000).tolist()}),
        ("lcm", {"original_inference_steps": 100, "timestep_scaling": 8.0}),
        (
            "ddim",
            {
                "rescale_betas_zero_snr": True,
                "prediction_type": "v_prediction",
                "timestep_spacing": "trailing",
            },
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value),
)
def test_options_equal_diffusers(
    name: str, changes: dict[str, Any], rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    for steps in (5, 20):
        check(name, {**SDXL, **changes}, steps, rng, monkeypatch)


@pytest.mark.parametrize("eta", [0.5, 1.0])
def test_ddim_with_fresh_noise_equals_diffusers(
    eta: float, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    check("ddim", SDXL, 10, rng, monkeypatch, eta=eta)


def test_ddim_equals_diffusers_in_float64(rng: np.random.Generator) -> None:
    """Given a float64 table, diffusers' DDIM computes in float64: the formulas agree exactly."""
    schedule = make_schedule("ddim", 8, ScheduleConfig.from_diffusers(SDXL))
    scheduler = diffusers_scheduler("ddim", SDXL)
    betas = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    scheduler.alphas_cumprod = torch.from_numpy(np.cumprod(1 - betas))
    scheduler.final_alpha_cumprod = scheduler.alphas_cumprod[0]
    draws = [torch.from_numpy(rng.standard_normal(SHAPE)) for _ in range(8)]
    start = torch.from_numpy(rng.standard_normal(SHAPE))
    want = run_diffusers(scheduler, 8, start, draws)
    x, bound = start * schedule.init_sigma, top(start)
    for step, (time, s, p, q, a, b, _, d) in enumerate(schedule.table.tolist()):
        x0 = p * x + q * network(s * x, time)
        bound = max(bound, top(p * x) + top(x0))
        x = a * x + b * x0 + d * draws[step]
    assert top(x - want) <= 8 * STEP_ROUNDINGS * np.finfo(np.float64).eps * bound


def test_absent_keys_take_each_samplers_own_default() -> None:
    """As diffusers does when it makes one scheduler from another's configuration."""
    config = ScheduleConfig.from_diffusers({"clip_sample": False})
    for name in NAMES:
        scheduler = diffusers_scheduler(name, {"clip_sample": False})
        scheduler.set_timesteps(5)
        schedule = make_schedule(name, 5, config)
        np.testing.assert_array_equal(schedule.timesteps, scheduler.timesteps.double().numpy())
        noise_scale = float(scheduler.init_noise_sigma)
        assert schedule.init_sigma == pytest.approx(noise_scale, rel=1000 * EPS)


def test_keys_filled_in_by_diffusers_count_as_absent() -> None:
    import diffusers

    live = diffusers.PNDMScheduler.from_config(SD15).config
    assert live["timestep_spacing"] == "leading"
    parsed = ScheduleConfig.from_diffusers(live)
    assert parsed.timestep_spacing is None
    assert parsed == ScheduleConfig.from_diffusers(SD15)
