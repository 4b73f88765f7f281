"""What every schedule keeps to: validity, independence of rows, refusals."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from heatsink.runtime.errors import InvalidRequest, ModelError
from heatsink.runtime.schedule import (
    COLUMNS,
    ScheduleConfig,
    apply_guidance,
    apply_start,
    apply_step,
    coefficients,
    make_schedule,
    start_scales,
)

SDXL = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
    "timestep_spacing": "leading",
}
NAMES = ("euler", "dpm++2m", "ddim", "lcm")
EPS = float(np.finfo(np.float32).eps)


@pytest.fixture
def rng(seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)


def top(x: torch.Tensor) -> float:
    return float(x.abs().max())


@settings(deadline=None, max_examples=150)
@given(
    name=st.sampled_from(NAMES),
    steps=st.integers(1, 50),
    spacing=st.sampled_from(["leading", "trailing", "linspace"]),
    prediction=st.sampled_from(["epsilon", "v_prediction", "sample"]),
    karras=st.booleans(),
    strength=st.none() | st.floats(0.02, 1.0),
)
def test_schedules_are_finite_and_fall(
    name: str, steps: int, spacing: str, prediction: str, karras: bool, strength: float | None
) -> None:
    config = ScheduleConfig.from_diffusers(
        {
            **SDXL,
            "timestep_spacing": spacing,
            "prediction_type": prediction,
            "use_karras_sigmas": karras,
        }
    )
    if strength is not None and int(steps * strength) == 0:
        with pytest.raises(InvalidRequest, match="strength: expected at least one of"):
            make_schedule(name, steps, config, strength=strength)
        return
    schedule = make_schedule(name, steps, config, strength=strength)
    assert len(schedule) == steps - schedule.start
    assert len(schedule) == (steps if strength is None else int(steps * strength))
    assert np.isfinite(schedule.table).all()
    drops = -np.diff(schedule.timesteps)
    assert (drops >= 0).all() if karras else (drops > 0).all()
    assert schedule.init_sigma > 0
    assert schedule.noise_scale > 0
    assert (schedule.column("s") > 0).all()
    assert schedule.column("C")[0] == 0
    # A clean sample whose network is right stays put: x = x0 is a fixed point as noise vanishes.
    ends = schedule.table[-1]
    if name in ("euler", "dpm++2m"):
        assert ends[COLUMNS.index("A")] == 0
        assert ends[COLUMNS.index("B")] == 1


@pytest.mark.parametrize("steps", [61, 103, 998])
def test_trailing_never_visits_a_step_below_the_first(steps: int) -> None:
    """The stride's rounding gives diffusers one timestep of -1 too many here; ours stops at 0."""
    config = ScheduleConfig.from_diffusers({**SDXL, "timestep_spacing": "trailing"})
    for name in ("euler", "ddim"):
        times = make_schedule(name, steps, config).timesteps
        assert len(times) == steps
        assert times.min() >= 0


def test_rows_do_not_see_their_neighbours(rng: np.random.Generator) -> None:
    config = ScheduleConfig.from_diffusers(SDXL)
    rows = [
        (make_schedule("euler", 20, config), 3),
        (make_schedule("dpm++2m", 8, config), 4),
        (make_schedule("lcm", 4, config), 1),
        (make_schedule("ddim", 30, config, strength=0.5), 0),
    ]
    x, out, x0_prev, noise = (
        torch.from_numpy(rng.standard_normal((4, 4, 7, 9), dtype=np.float32)) for _ in range(4)
    )
    together = apply_step(x, out, x0_prev, noise, coefficients(rows))
    for i, (schedule, step) in enumerate(rows):
        coef = coefficients([(schedule, step)])[0]
        alone = apply_step(
            x[i],
            out[i],
            x0_prev[i] if schedule.needs_history(step) else None,
            noise[i] if schedule.needs_noise(step) else None,
            coef,
        )
        for one, many in zip(alone, together, strict=True):
            assert torch.equal(one.view(torch.int32), many[i].view(torch.int32))
    assert [s.needs_history(i) for s, i in rows] == [False, True, False, False]
    assert [s.needs_noise(i) for s, i in rows] == [False, False, True, False]


def test_unused_history_and_noise_may_hold_anything(rng: np.random.Generator) -> None:
    schedule = make_schedule("euler", 4, ScheduleConfig.from_diffusers(SDXL))
    x = torch.from_numpy(rng.standard_normal((1, 4, 3, 3), dtype=np.float32))
    junk = torch.full_like(x, float("nan"))
    x_next, _ = apply_step(x, x, junk, junk, coefficients([(schedule, 0)]))
    plain, _ = apply_step(x, x, None, None, coefficients([(schedule, 0)]))
    assert torch.equal(x_next, plain)


def test_start_with_and_without_an_image(rng: np.random.Generator) -> None:
    config = ScheduleConfig.from_diffusers(SDXL)
    text, image = make_schedule("euler", 4, config), make_schedule("euler", 4, config, strength=0.5)
    noise, latents = (
        torch.from_numpy(rng.standard_normal((2, 4, 3, 3), dtype=np.float32)) for _ in range(2)
    )
    start = apply_start(noise, latents, start_scales([text, image]))
    assert torch.equal(start[0], np.float32(text.init_sigma).item() * noise[0])
    assert torch.equal(start[1], image.start_from(latents[1], noise[1]))
    assert torch.equal(start[0], text.start_from(None, noise[0]))


def test_guidance_is_per_row(rng: np.random.Generator) -> None:
    uncond, cond = (
        torch.from_numpy(rng.standard_normal((3, 4, 5, 5), dtype=np.float32)) for _ in range(2)
    )
    scales = torch.tensor([1.5, 7.5, 4.0])
    guided = apply_guidance(uncond, cond, scales)
    for row, scale in enumerate(scales.tolist()):
        assert torch.equal(guided[row], apply_guidance(uncond[row], cond[row], scale))
    exact = uncond.double() + scales.double().reshape(3, 1, 1, 1) * (cond - uncond).double()
    assert top(guided.double() - exact) <= 4 * EPS * 7.5 * (top(cond) + top(uncond))


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("ddim", {"clip_sample": True}, "clip_sample: expected false, got true"),
        ("ddim", {"clip_sample": None}, "clip_sample: expected false, got nothing"),
        ("lcm", {"clip_sample": True}, "clip_sample: expected false"),
        ("dpm++2m", {"thresholding": True}, "thresholding: expected false"),
        ("dpm++2m", {"use_lu_lambdas": True}, "use_lu_lambdas: expected false"),
        ("dpm++2m", {"solver_type": "odd"}, "solver_type: expected midpoint or heun, got odd"),
        ("euler", {"use_exponential_sigmas": True}, "use_exponential_sigmas: expected false"),
        ("euler", {"interpolation_type": "log_linear"}, "interpolation_type: expected linear"),
        ("euler", {"trained_betas": [0.1, 0.2]}, "trained_betas: expected 1000 numbers"),
        ("euler", {"beta_schedule": "sigmoid"}, "beta_schedule: .*sigmoid"),
        ("euler", {"prediction_type": "flow_prediction"}, "flow matching"),
        ("euler", {"_class_name": "FlowMatchEulerDiscreteScheduler"}, "flow matching"),
    ],
)
def test_what_coefficients_cannot_express_is_refused(
    name: str, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ModelError, match=message):
        make_schedule(name, 4, ScheduleConfig.from_diffusers({**SDXL, **changes}))


@pytest.mark.parametrize(
    ("name", "steps", "options", "message"),
    [
        ("heun", 4, {}, "scheduler: expected one of euler"),
        ("euler", 0, {}, "steps: expected 1 to 1000"),
        ("euler", 1001, {}, "steps: expected 1 to 1000"),
        ("dpm++2m", 1000, {}, "steps: expected a number for which dpm"),
        ("ddim", 1000, {}, "steps: expected timesteps below the model's 1000, got 1000"),
        ("lcm", 51, {}, "steps: expected at most 50 for lcm"),
        ("euler", 4, {"strength": 0.2}, "strength: expected at least one of 4 steps"),
        ("euler", 4, {"strength": 1.5}, "strength: expected a number above 0"),
        ("euler", 4, {"eta": 0.5}, "eta: expected 0 to 1 with ddim"),
        ("ddim", 4, {"eta": -0.1}, "eta: expected 0 to 1 with ddim"),
    ],
)
def test_requests_that_no_schedule_can_serve_are_refused(
    name: str, steps: int, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(InvalidRequest, match=message):
        make_schedule(name, steps, ScheduleConfig.from_diffusers(SDXL), **options)


def test_tables_are_shared_and_read_only() -> None:
    config = ScheduleConfig.from_diffusers(SDXL)
    schedule = make_schedule("DPM++ 2M", 4, config)
    assert schedule is make_schedule("dpmpp_2m", 4, config)
    with pytest.raises(ValueError, match="read-only"):
        schedule.table[0, 0] = 1.0
    with pytest.raises(IndexError, match=r"rows\[1\]: expected step 0 to 3, got 4"):
        coefficients([(schedule, 0), (schedule, 4)])
