"""Schedules: a sampler's steps as rows of coefficients, and the arithmetic that applies them.

One step of any sampler, for a row with sample `x`, network output `out` and the x0 before:

    model_in = s*x
    x0       = p*x + q*out
    x_next   = A*x + B*x0 + C*x0_prev + D*noise

So a batch holds rows of different samplers, step counts and positions, and no step looks at
another row. docs/schedule.md derives the coefficients.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch

from heatsink.runtime.errors import InvalidRequest
from heatsink.runtime.request import Scheduler
from heatsink.runtime.schedule_config import Array, ScheduleConfig
from heatsink.runtime.solvers import COLUMNS, Plan, solve

__all__ = [
    "COLUMNS",
    "Schedule",
    "ScheduleConfig",
    "apply_guidance",
    "apply_start",
    "apply_step",
    "coefficients",
    "make_schedule",
    "scale_input",
    "start_scales",
]


@dataclass(frozen=True, eq=False)
class Schedule:
    """The steps that one sampler runs, in order; made by `make_schedule`.

    Attributes:
        name: The sampler.
        table: float64 `(N, 8)`, read-only; columns `COLUMNS`: timestep, s, p, q, A, B, C, D.
        init_sigma: The scale of unit noise that a sample starts from without an image.
        image_scale: `a` of the start `x = a*latents + b*noise`; 0 without an image.
        noise_scale: `b` of it; `init_sigma` without an image.
        levels: float64 `(N, 2)`, read-only: `a` and `b` of what latents with noise are before each
            step; before the first, the two above if there is an image.
        start: How many of the requested steps `strength` leaves out.
    """

    name: Scheduler
    table: Array
    init_sigma: float
    image_scale: float
    noise_scale: float
    levels: Array
    start: int = 0

    def __len__(self) -> int:
        """How many steps are run."""
        return len(self.table)

    @property
    def timesteps(self) -> Array:
        """float64 `(N,)`: what the network is told at each step."""
        return self.column("timestep")

    def column(self, name: str) -> Array:
        """One column of the table by its name, float64 `(N,)`."""
        return self.table[:, COLUMNS.index(name)]

    def start_from(self, latents: torch.Tensor | None, noise: torch.Tensor) -> torch.Tensor:
        """Where one sample starts, float32, of the shape of `noise`; as `apply_start`."""
        return apply_start(noise, latents, start_scales([self])[0])

    def noised(self, latents: torch.Tensor, noise: torch.Tensor, step: int) -> torch.Tensor:
        """What `latents` are before a step, float32: `a*latents + b*noise`.

        After the last step (`step` is the schedule's length) they are themselves.
        """
        if step == len(self):
            return latents
        a, b = (torch.tensor(value, dtype=torch.float32) for value in self.levels[step])
        return a * latents + b * noise

    def needs_noise(self, step: int) -> bool:
        """Whether the step adds fresh noise."""
        return bool(self.column("D")[step] != 0.0)

    def needs_history(self, step: int) -> bool:
        """Whether the step uses the x0 of the step before."""
        return bool(self.column("C")[step] != 0.0)


def make_schedule(
    name: str | Scheduler,
    steps: int,
    config: ScheduleConfig,
    *,
    strength: float | None = None,
    eta: float = 0.0,
) -> Schedule:
    """The schedule of a request, equal to diffusers' scheduler of that name and configuration.

    Args:
        name: The sampler, or an alias of it.
        steps: The requested steps, at least 1.
        config: The model's configuration.
        strength: With an image, the share of the steps that is run, above 0 and up to 1; the
            start index and the scales follow diffusers' image-to-image pipelines.
        eta: DDIM's share of fresh noise, 0 (none) to 1 (as much as DDPM).

    Returns:
        The schedule, shared between equal calls.

    Raises:
        InvalidRequest: An argument is out of range, or the sampler can't make that many steps.
        ModelError: The configuration has an option that coefficients can't express.
    """
    try:
        sampler = Scheduler.from_name(name)
    except ValueError as error:
        raise InvalidRequest(f"scheduler: {error}") from None
    if not 1 <= steps <= config.num_train_timesteps:
        raise InvalidRequest(
            f"steps: expected 1 to {config.num_train_timesteps}, the model's training steps, "
            f"got {steps}"
        )
    if strength is not None and not 0.0 < strength <= 1.0:
        raise InvalidRequest(f"strength: expected a number above 0 and up to 1, got {strength}")
    if not 0.0 <= eta <= 1.0 or (eta and sampler is not Scheduler.DDIM):
        raise InvalidRequest(f"eta: expected 0 to 1 with ddim and 0 with others, got {eta}")
    return _schedule(sampler, steps, config, strength, eta)


@lru_cache(maxsize=256)
def _schedule(
    name: Scheduler, steps: int, config: ScheduleConfig, strength: float | None, eta: float
) -> Schedule:
    start = 0 if strength is None else steps - min(int(steps * strength), steps)
    if start == steps:
        raise InvalidRequest(
            f"strength: expected at least one of {steps} steps to run, got {strength}, "
            f"which is {steps * (strength or 0.0):.3g} steps"
        )
    with np.errstate(divide="ignore", invalid="ignore"):
        solution = solve(name, Plan(config, steps, start, eta))
    if not np.isfinite(solution.table).all():
        raise InvalidRequest(
            f"steps: expected a number for which {name} has finite coefficients with this model "
            f"({config.num_train_timesteps} training steps, {config.prediction_type}), got {steps}"
        )
    solution.table.setflags(write=False)
    solution.levels.setflags(write=False)
    image_scale, noise_scale = map(float, solution.levels[0])
    if strength is None:
        image_scale, noise_scale = 0.0, solution.init_sigma
    return Schedule(
        name, solution.table, solution.init_sigma, image_scale, noise_scale, solution.levels, start
    )


def coefficients(
    rows: Sequence[tuple[Schedule, int]], device: torch.device | str = "cpu"
) -> torch.Tensor:
    """The coefficients of a batch, each row at a step of its own schedule.

    Args:
        rows: For each row its schedule and the step, counted from the first that is run.
        device: Where the result goes.

    Returns:
        float32 `(R, 8)`, columns `COLUMNS`.

    Raises:
        IndexError: A step is outside of its schedule.
    """
    table = np.empty((len(rows), len(COLUMNS)), dtype=np.float32)
    for row, (schedule, step) in enumerate(rows):
        if not 0 <= step < len(schedule):
            raise IndexError(f"rows[{row}]: expected step 0 to {len(schedule) - 1}, got {step}")
        table[row] = schedule.table[step]
    return torch.from_numpy(table).to(device)


def start_scales(schedules: Sequence[Schedule], device: torch.device | str = "cpu") -> torch.Tensor:
    """float32 `(R, 2)`: `image_scale` and `noise_scale` of each row's schedule."""
    scales = np.array([(s.image_scale, s.noise_scale) for s in schedules], dtype=np.float32)
    return torch.from_numpy(scales.reshape(-1, 2)).to(device)


def apply_start(
    noise: torch.Tensor, latents: torch.Tensor | None, scales: torch.Tensor
) -> torch.Tensor:
    """Where each row's sample starts: `a*latents + b*noise`, or `b*noise` where a is 0.

    Args:
        noise: float32 `(R, ...)`, unit normal; one row alone may come without the axis R.
        latents: float32 like `noise`, in the scaled domain; None if no row has an image.
        scales: float32 `(R, 2)` of `start_scales`, or `(2,)`.

    Returns:
        float32 `(R, ...)`.
    """
    a, b = _columns(scales, noise)
    start = b * noise
    return start if latents is None else torch.where(a != 0, a * latents + start, start)


def scale_input(x: torch.Tensor, coef: torch.Tensor) -> torch.Tensor:
    """What the network sees: `s*x`, float32 `(R, ...)`, with `coef` `(R, 8)`."""
    return _columns(coef, x)[COLUMNS.index("s")] * x


def apply_guidance(
    uncond: torch.Tensor, cond: torch.Tensor, scale: torch.Tensor | float
) -> torch.Tensor:
    """Classifier-free guidance: `uncond + scale*(cond - uncond)` (Ho and Salimans, 2207.12598).

    Args:
        uncond: `(R, ...)`, the output for the negative prompt.
        cond: `(R, ...)`, the output for the prompt.
        scale: float32 `(R,)`, or one number for all rows.

    Returns:
        float32 `(R, ...)`.
    """
    uncond, cond = uncond.float(), cond.float()
    if isinstance(scale, torch.Tensor) and scale.ndim:
        scale = scale.reshape(-1, *(1,) * (cond.ndim - 1))
    return uncond + scale * (cond - uncond)


def apply_step(
    x: torch.Tensor,
    out: torch.Tensor,
    x0_prev: torch.Tensor | None,
    noise: torch.Tensor | None,
    coef: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """One step of every row, in float32.

    Each product and sum is an operation of its own, in the order written, and a term whose
    coefficient is 0 is left out rather than multiplied: so a row's bits are the same whether or
    not its neighbours bring history or noise, and unused memory may hold anything. One row alone
    may come without the axis R, in `x` and in `coef`.

    Args:
        x: float32 `(R, ...)`.
        out: `(R, ...)`, the network's output after guidance, any float dtype.
        x0_prev: float32 `(R, ...)`, the x0 of the step before; None if no row needs it.
        noise: float32 `(R, ...)`, unit normal; None if no row needs it.
        coef: float32 `(R, 8)` of `coefficients`.

    Returns:
        `(x_next, x0)`, float32 `(R, ...)` each.
    """
    _, _, p, q, a, b, c, d = _columns(coef, x)
    x0 = p * x + q * out.float()
    x_next = a * x + b * x0
    if x0_prev is not None:
        x_next = torch.where(c != 0, x_next + c * x0_prev, x_next)
    if noise is not None:
        x_next = torch.where(d != 0, x_next + d * noise, x_next)
    return x_next, x0


def _columns(table: torch.Tensor, like: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The columns of `(R, K)` or `(K,)`, each shaped to broadcast over `like`."""
    rows = table.ndim - 1
    return table.reshape(*table.shape, *(1,) * (like.ndim - rows)).unbind(rows)
