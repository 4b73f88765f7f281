"""The denoising loop: rows of different requests, each at its own step of its own schedule."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from heatsink.kernels.guided_step import guided_step
from heatsink.runtime import noise
from heatsink.runtime.backends.session import Array
from heatsink.runtime.errors import NumericError
from heatsink.runtime.schedule import (
    Schedule,
    apply_start,
    coefficients,
    scale_input,
    start_scales,
)

RunRows = Callable[[dict[str, Array]], Array]
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Keep:
    """What a mask keeps of a picture: after every step, the picture with as much noise is put back.

    Attributes:
        mask: bool `(1, h, w)`, true where the image is painted anew.
        latents: float32 `(C, h, w)`, the encoded picture.
        noise: float32 `(C, h, w)`, unit normal: that of the start.
    """

    mask: Tensor
    latents: Tensor
    noise: Tensor


@dataclass
class Job:
    """One request on its way.

    Attributes:
        name: how messages call it.
        seed: of its noise.
        guidance: scale of its guidance; used where it has two rows.
        schedule: its steps.
        conditions: the UNet's inputs besides sample and timestep, one mapping a row: the negative
            prompt's first where there are two.
        latents: float32 `(C, h, w)`; the result once `done`.
        x0: float32 `(C, h, w)`, the prediction of the step before.
        step: the next step to run.
        keep: what a mask keeps.
    """

    name: str
    seed: int
    guidance: float
    schedule: Schedule
    conditions: list[dict[str, Array]]
    latents: Tensor
    x0: Tensor
    step: int = 0
    keep: Keep | None = None

    @property
    def done(self) -> bool:
        """Whether all steps have been run."""
        return self.step >= len(self.schedule)

    @property
    def timesteps(self) -> Array:
        """What the UNet is told at each of the remaining steps, float32 `(steps,)`."""
        return self.schedule.timesteps[self.step :].astype(np.float32)

    @property
    def rows_left(self) -> int:
        """Rows of the UNet that the remaining steps take."""
        return (len(self.schedule) - self.step) * len(self.conditions)

    def advance(self, latents: Tensor, x0: Tensor) -> None:
        """Take what a step gave, except where the mask keeps the picture."""
        self.step += 1
        self.x0 = x0
        self.latents = latents
        if self.keep is not None:
            kept = self.schedule.noised(self.keep.latents, self.keep.noise, self.step)
            self.latents = torch.where(self.keep.mask, latents, kept)


def new_job(
    name: str,
    seed: int,
    guidance: float,
    schedule: Schedule,
    conditions: list[dict[str, Array]],
    shape: tuple[int, int, int],
    image: Tensor | None,
    mask: Tensor | None = None,
    *,
    blend: bool = True,
) -> Job:
    """A job before its first step: scaled noise, or noise over the encoded `image`.

    With a `mask`, bool `(1, h, w)`, a schedule of all steps starts from noise alone, as in
    diffusers: nothing of the picture is to show where it is painted anew. Elsewhere the picture is
    put back at every step, unless `blend` is false: an inpainting model keeps it by itself.
    """
    fresh = noise.normal(seed, noise.INITIAL, 0, shape)
    if mask is not None and schedule.start == 0:
        start = torch.tensor(schedule.init_sigma, dtype=torch.float32) * fresh
    else:
        over = None if image is None else image[None]
        start = apply_start(fresh[None], over, start_scales([schedule]))[0]
    keep = Keep(mask, image, fresh) if mask is not None and image is not None and blend else None
    return Job(name, seed, guidance, schedule, conditions, start, torch.zeros(shape), keep=keep)


def denoise(jobs: Sequence[Job], run_rows: RunRows, progress: Progress | None = None) -> None:
    """Run all jobs to their end; every step batches the rows of all that are not done.

    Args:
        jobs: changed in place.
        run_rows: the UNet: named arrays of rows in, the output's rows out; a row's bits must not
            depend on the others.
        progress: called with the row-steps done and those in all.

    Raises:
        NumericError: the UNet gave a non-finite value; names the request and the step.
    """
    total = sum(job.rows_left for job in jobs)
    done = 0
    while active := [job for job in jobs if not job.done]:
        done += _step(active, run_rows)
        if progress:
            progress(done, total)


def _step(active: list[Job], run_rows: RunRows) -> int:
    """One step of every active job; returns the number of rows that were run."""
    table = coefficients([(job.schedule, job.step) for job in active])
    latents = torch.stack([job.latents for job in active])
    owner = np.repeat(np.arange(len(active)), [len(job.conditions) for job in active])
    conditions = [condition for job in active for condition in job.conditions]
    inputs: dict[str, Array] = {
        "sample": scale_input(latents, table).numpy()[owner],
        "timestep": table[:, 0].numpy()[owner],
    }
    for name in conditions[0]:
        inputs[name] = np.stack([condition[name] for condition in conditions])
    out = torch.from_numpy(run_rows(inputs))
    counts = torch.tensor([len(job.conditions) for job in active], dtype=torch.int32)
    last = torch.cumsum(counts, 0, dtype=torch.int32) - 1
    first = last - counts + 1
    _check_finite(active, out, first.tolist(), last.tolist())
    following, x0 = guided_step(
        latents,
        out,
        torch.stack([job.x0 for job in active]),
        table,
        torch.tensor([job.guidance for job in active], dtype=torch.float32),
        first,
        last,
        noise.seed_keys([job.seed for job in active]),
        torch.tensor([job.step for job in active]),
    )
    for place, job in enumerate(active):
        job.advance(following[place], x0[place])
    return len(conditions)


def _check_finite(active: list[Job], out: Tensor, first: list[int], last: list[int]) -> None:
    """Raise NumericError, with the job and its step, if a row of the UNet is not finite."""
    finite = torch.isfinite(out).flatten(1).all(1)
    for job, start, end in zip(active, first, last, strict=True):
        if not bool(finite[start : end + 1].all()):
            raise NumericError(f"{job.name}: unet gave a non-finite value at step {job.step}")
