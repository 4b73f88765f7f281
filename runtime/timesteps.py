"""Which noise levels a sampler visits: timesteps and sigmas, as diffusers' schedulers choose them.

`sigma = sqrt((1 - abar) / abar)` where `abar` is the signal's share of variance. Spacings: table 2
of Lin et al. (arXiv 2305.08891); Karras' sigmas: equation 5 of Karras et al. (arXiv 2206.00364).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from heatsink.runtime.errors import ModelError
from heatsink.runtime.schedule_config import Array, ScheduleConfig, signal_shares

LINEAR_BETAS = ("linear", 0.0001, 0.02)
_KARRAS_RHO = 7.0
# With zero terminal SNR the last share of signal is zero and its sigma infinite; solvers that work
# in sigma take this share instead, as diffusers does.
_TINY_SIGNAL = 2.0**-24
# Keeps a sigma that lies on a training step from falling below it by a rounding error.
_FLOOR_GUARD = 1e-6


@dataclass(frozen=True)
class Grid:
    """The noise levels of all steps.

    Attributes:
        times: float64 `(N,)`, what the network is told.
        sigmas: float64 `(N + 1,)`, before each step and after the last.
    """

    times: Array
    sigmas: Array


def spaced(spacing: str, train: int, count: int, offset: int) -> Array:
    """`count` timesteps out of `train`, falling, float64; `linspace` unrounded."""
    if spacing == "linspace":
        return np.linspace(0, train - 1, count)[::-1]
    if spacing == "leading":
        return (np.arange(count) * (train // count))[::-1].astype(np.float64) + offset
    # Rounding of the stride can yield one point too many, below the first training step: cut off.
    return np.arange(train, 0, -train / count)[:count].round() - 1.0


def euler_grid(config: ScheduleConfig, steps: int) -> Grid:
    """The grid of diffusers' EulerDiscreteScheduler.

    Raises:
        ModelError: The configuration has an option that is not supported.
    """
    refuse(config, "use_exponential_sigmas", "use_beta_sigmas")
    if config.interpolation_type != "linear":
        raise unsupported("interpolation_type", "linear", config.interpolation_type)
    sigmas = _training_sigmas(config)
    spacing = config.timestep_spacing or "linspace"
    times = spaced(spacing, config.num_train_timesteps, steps, config.steps_offset)
    # The network is told float32, so the noise level is that of the float32 timestep.
    times = times.astype(np.float32).astype(np.float64)
    chosen = np.interp(times, np.arange(len(sigmas)), sigmas)
    if config.use_karras_sigmas:
        first = config.sigma_max or chosen[0]
        chosen = _karras(first, config.sigma_min or chosen[-1], steps)
        times = _times_of(chosen, sigmas)
    if config.timestep_type == "continuous" and config.prediction_type == "v_prediction":
        times = 0.25 * np.log(chosen)
    return Grid(times, np.append(chosen, _final_sigma(config, sigmas)))


def dpmpp_grid(config: ScheduleConfig, steps: int) -> Grid:
    """The grid of diffusers' DPMSolverMultistepScheduler.

    Raises:
        ModelError: The configuration has an option that is not supported.
    """
    refuse(config, "use_exponential_sigmas", "use_beta_sigmas", "use_lu_lambdas", "use_flow_sigmas")
    sigmas = _training_sigmas(config)
    # lambda = -log(sigma) falls with the timestep; those under the clip are never visited.
    visited = int(np.count_nonzero(-np.log(sigmas) >= config.lambda_min_clipped))
    spacing = config.timestep_spacing or "linspace"
    if spacing == "trailing":
        stride = config.num_train_timesteps / steps
        times = np.arange(visited, 0, -stride)[:steps].round() - 1.0
    else:
        # One point more than steps, of which the last (the cleanest) is the end and not a step.
        times = spaced(spacing, visited, steps + 1, config.steps_offset)[:-1].round()
    chosen = np.interp(times, np.arange(len(sigmas)), sigmas)
    if config.use_karras_sigmas:
        chosen = _karras(config.sigma_max or sigmas[-1], config.sigma_min or sigmas[0], steps)
        times = _times_of(chosen, sigmas)
        # The network was trained on whole timesteps; diffusers cuts these for the cosine schedule.
        cosine = config.beta_schedule == "squaredcos_cap_v2"
        times = np.floor(times + _FLOOR_GUARD) if cosine else times.round()
    return Grid(times, np.append(chosen, _final_sigma(config, sigmas)))


def refuse(config: ScheduleConfig, *switches: str) -> None:
    """Raise `ModelError` if one of the configuration's switches is on."""
    for switch in switches:
        if getattr(config, switch):
            raise unsupported(switch, "false", "true")


def unsupported(key: str, expected: str, came: str) -> ModelError:
    """The error for a configuration's option that a sampler can't follow."""
    return ModelError(f"scheduler configuration: {key}: expected {expected}, got {came}")


def _training_sigmas(config: ScheduleConfig) -> Array:
    shares = signal_shares(config, LINEAR_BETAS)
    if config.rescale_betas_zero_snr:
        shares = np.append(shares[:-1], _TINY_SIGNAL)
    sigmas: Array = np.sqrt((1.0 - shares) / shares)
    return sigmas


def _final_sigma(config: ScheduleConfig, sigmas: Array) -> float:
    return float(sigmas[0]) if config.final_sigmas_type == "sigma_min" else 0.0


def _karras(first: float, last: float, steps: int) -> Array:
    ramp = np.linspace(0.0, 1.0, steps)
    top, bottom = first ** (1 / _KARRAS_RHO), last ** (1 / _KARRAS_RHO)
    sigmas: Array = (top + ramp * (bottom - top)) ** _KARRAS_RHO
    return sigmas


def _times_of(chosen: Array, sigmas: Array) -> Array:
    """The fractional training steps of sigmas: interpolated in log sigma, held at both ends."""
    times: Array = np.interp(np.log(chosen), np.log(sigmas), np.arange(len(sigmas)))
    return times
