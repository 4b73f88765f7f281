"""The samplers: from a model's noise schedule to the coefficients of every step, in float64.

Each solver writes one step as `model_in = s*x`, `x0 = p*x + q*out`,
`x_next = A*x + B*x0 + C*x0_prev + D*noise`; docs/schedule.md derives them.

- Euler in the variance-exploding form: Karras et al., "Elucidating the Design Space of
  Diffusion-Based Generative Models" (arXiv 2206.00364).
- DPM-Solver++(2M): Lu et al. (arXiv 2211.01095), algorithm 2.
- DDIM: Song et al. (arXiv 2010.02502), equations 12 and 16.
- LCM: Luo et al., "Latent Consistency Models" (arXiv 2310.04378), multistep sampling.

`abar` is the signal's share of variance at a step, `sigma = sqrt((1 - abar) / abar)`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from heatsink.runtime.errors import InvalidRequest
from heatsink.runtime.request import Scheduler
from heatsink.runtime.schedule_config import Array, ScheduleConfig, signal_shares
from heatsink.runtime.timesteps import (
    LINEAR_BETAS,
    dpmpp_grid,
    euler_grid,
    refuse,
    spaced,
    unsupported,
)

COLUMNS = ("timestep", "s", "p", "q", "A", "B", "C", "D")
_LCM_BETAS = ("scaled_linear", 0.00085, 0.012)
# DPM-Solver++ drops to first order at the end of schedules shorter than this.
_FEW_STEPS = 15
# The standard deviation of the data that consistency models assume for their boundary condition.
_LCM_SIGMA_DATA = 0.5


@dataclass(frozen=True)
class Plan:
    """What a solver is asked for: the steps, the first one to run, and DDIM's eta."""

    config: ScheduleConfig
    steps: int
    start: int
    eta: float


@dataclass(frozen=True)
class Solution:
    """A solver's table and how a sample starts.

    Attributes:
        table: float64 `(N, 8)`, a row for each step that is run, columns as `COLUMNS`.
        init_sigma: What unit noise is multiplied by to start from noise alone.
        levels: float64 `(N, 2)`: `a` and `b` of `x = a*latents + b*noise` before each of them.
    """

    table: Array
    init_sigma: float
    levels: Array


def solve(name: Scheduler, plan: Plan) -> Solution:
    """The solution of one sampler.

    Raises:
        InvalidRequest: The sampler can't make that many steps with this model.
        ModelError: The configuration asks for something that coefficients can't express.
    """
    return _SOLVERS[name](plan)


def _euler(plan: Plan) -> Solution:
    grid = euler_grid(plan.config, plan.steps)
    sigma, sigma_next = grid.sigmas[plan.start : -1], grid.sigmas[plan.start + 1 :]
    norm = np.hypot(sigma, 1.0)
    p, q = {
        "epsilon": (np.ones_like(sigma), -sigma),
        "v_prediction": (1.0 / norm**2, -sigma / norm),
        "sample": (np.zeros_like(sigma), np.ones_like(sigma)),
    }[plan.config.prediction_type]
    # The slope (x - x0) / sigma, followed from sigma to sigma_next.
    ratio = sigma_next / sigma
    table = _table(grid.times[plan.start :], 1.0 / norm, p, q, ratio, 1.0 - ratio, 0.0, 0.0)
    top = float(grid.sigmas.max())
    # A leading grid stops short of pure noise, so diffusers starts with the image's variance too.
    init = float(np.hypot(top, 1.0)) if plan.config.timestep_spacing == "leading" else top
    return Solution(table, init, np.stack([np.ones_like(sigma), sigma], axis=1))


def _dpmpp_2m(plan: Plan) -> Solution:
    config = plan.config
    refuse(config, "thresholding")
    grid = dpmpp_grid(config, plan.steps)
    alpha = 1.0 / np.hypot(grid.sigmas, 1.0)
    noise = grid.sigmas * alpha
    # h = lambda_next - lambda with lambda = log(alpha / noise) = -log(sigma); infinite at sigma 0.
    h = -np.diff(np.log(grid.sigmas))
    first_order = -alpha[1:] * np.expm1(-h)
    # Second order adds `slope * (x0 - x0_prev)`.
    slope = np.zeros_like(h)
    end = len(h) - _ends_in_first_order(config, len(h))
    second = np.arange(plan.start + 1, end)
    weight = _slope_weight(config.solver_type, alpha[1:][second], h[second])
    slope[second] = weight * h[second] / h[second - 1]
    p, q = _data_prediction(config.prediction_type, alpha[:-1], noise[:-1])
    ratio = noise[1:] / noise[:-1]
    table = _table(grid.times, 1.0, p, q, ratio, first_order + slope, -slope, 0.0)
    start = plan.start
    if start >= len(table):
        raise InvalidRequest(
            f"strength: expected at least one step to run, got one that leaves out {start} of the "
            f"{len(table)} steps that this model's lambda_min_clipped allows"
        )
    return Solution(table[start:].copy(), 1.0, np.stack([alpha, noise], axis=1)[start:-1])


def _ends_in_first_order(config: ScheduleConfig, steps: int) -> bool:
    short = config.lower_order_final and steps < _FEW_STEPS
    return config.euler_at_final or short or config.final_sigmas_type == "zero"


def _slope_weight(solver_type: str, alpha_next: Array, h: Array) -> Array:
    if solver_type == "heun":
        return alpha_next * (np.expm1(-h) / h + 1.0)
    # Solver types of other multistep families (logrho, bh1, bh2) mean midpoint, as in diffusers.
    if solver_type in ("midpoint", "logrho", "bh1", "bh2"):
        return -0.5 * alpha_next * np.expm1(-h)
    raise unsupported("solver_type", "midpoint or heun", solver_type)


def _ddim(plan: Plan) -> Solution:
    config, train = plan.config, plan.config.num_train_timesteps
    refuse(config, "thresholding")
    # diffusers' DDIM clips unless told otherwise, and a clip is no linear step.
    if config.clip_sample is None or config.clip_sample:
        came = "true" if config.clip_sample else "nothing, which DDIM takes as true"
        raise unsupported("clip_sample", "false", came)
    shares = signal_shares(config, LINEAR_BETAS)
    spacing = config.timestep_spacing or "leading"
    times = spaced(spacing, train, plan.steps, config.steps_offset).round()[plan.start :]
    abar = _at(shares, times)
    # The step's end is one stride on, which is not always the next timestep of the grid.
    before = times.astype(np.int64) - train // plan.steps
    end = 1.0 if config.set_alpha_to_one else float(shares[0])
    abar_next = np.where(before >= 0, shares[np.maximum(before, 0)], end)
    alpha, noise = np.sqrt(abar), np.sqrt(1.0 - abar)
    variance = (1.0 - abar_next) / (1.0 - abar) * (1.0 - abar / abar_next)
    deviation = plan.eta * np.sqrt(np.maximum(variance, 0.0))
    # epsilon = (x - alpha*x0) / noise for every kind of prediction, so x and x0 say it all.
    pull = np.sqrt(np.maximum(1.0 - abar_next - deviation**2, 0.0)) / noise
    p, q = _data_prediction(config.prediction_type, alpha, noise)
    table = _table(times, 1.0, p, q, pull, np.sqrt(abar_next) - pull * alpha, 0.0, deviation)
    return Solution(table, 1.0, np.stack([alpha, noise], axis=1))


def _lcm(plan: Plan) -> Solution:
    config = plan.config
    refuse(config, "thresholding", "clip_sample")
    origin = config.original_inference_steps
    if plan.steps > origin or origin > config.num_train_timesteps:
        raise InvalidRequest(
            f"steps: expected at most {origin} for lcm (original_inference_steps, within "
            f"{config.num_train_timesteps} training steps), got {plan.steps}"
        )
    shares = signal_shares(config, _LCM_BETAS)
    learned = np.arange(origin, 0, -1) * (config.num_train_timesteps // origin) - 1
    picked = np.floor(np.linspace(0, origin, plan.steps, endpoint=False)).astype(np.int64)
    times = learned[picked][plan.start :].astype(np.float64)
    abar = _at(shares, times)
    # The last step keeps the clean sample: all signal, no noise.
    abar_next = np.append(abar[1:], 1.0)
    alpha, noise = np.sqrt(abar), np.sqrt(1.0 - abar)
    scaled = times * config.timestep_scaling
    skip = _LCM_SIGMA_DATA**2 / (scaled**2 + _LCM_SIGMA_DATA**2)
    out = scaled / np.hypot(scaled, _LCM_SIGMA_DATA)
    # x0 is the consistency function, boundary condition included.
    p, q = _data_prediction(config.prediction_type, alpha, noise)
    p, q = skip + out * p, out * q
    table = _table(times, 1.0, p, q, 0.0, np.sqrt(abar_next), 0.0, np.sqrt(1.0 - abar_next))
    return Solution(table, 1.0, np.stack([alpha, noise], axis=1))


def _data_prediction(kind: str, alpha: Array, noise: Array) -> tuple[Array, Array]:
    """`p, q` of `x0 = p*x + q*out` where `x = alpha*x0 + noise*epsilon`, alpha^2 + noise^2 = 1."""
    if kind == "v_prediction":
        return alpha, -noise
    if kind == "sample":
        return np.zeros_like(alpha), np.ones_like(alpha)
    return 1.0 / alpha, -noise / alpha


def _table(times: Array, *columns: Array | float) -> Array:
    table = np.empty((len(times), len(COLUMNS)))
    for index, column in enumerate((times, *columns)):
        table[:, index] = column
    return table


def _at(shares: Array, times: Array) -> Array:
    if times.max() >= len(shares):
        raise InvalidRequest(
            f"steps: expected timesteps below the model's {len(shares)}, got {times.max():.0f}; "
            "ask for fewer steps"
        )
    return shares[times.astype(np.int64)]


_SOLVERS: dict[Scheduler, Callable[[Plan], Solution]] = {
    Scheduler.EULER: _euler,
    Scheduler.DPMPP_2M: _dpmpp_2m,
    Scheduler.DDIM: _ddim,
    Scheduler.LCM: _lcm,
}
