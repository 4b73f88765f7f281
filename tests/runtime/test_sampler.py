"""The denoising loop: a row's bits don't depend on the jobs beside it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch

from heatsink.runtime import noise
from heatsink.runtime.backends.session import Array
from heatsink.runtime.errors import NumericError
from heatsink.runtime.sampler import Job, denoise, new_job
from heatsink.runtime.schedule import ScheduleConfig, make_schedule

CONFIG = ScheduleConfig.from_diffusers(
    {
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "clip_sample": False,
        "set_alpha_to_one": False,
        "steps_offset": 1,
    }
)
# Ragged: whole vectors of a processor don't divide it.
SHAPE = (4, 3, 5)


class Network:
    """A row-exact stand-in for a UNet that uses all of its inputs."""

    def __init__(self) -> None:
        self.calls: list[dict[str, Array]] = []

    def __call__(self, inputs: Mapping[str, Array]) -> Array:
        self.calls.append(dict(inputs))
        rows = [
            np.tanh(sample) * np.float32(0.7)
            + states.mean(dtype=np.float32) / (time + np.float32(1))
            for sample, time, states in zip(
                inputs["sample"], inputs["timestep"], inputs["encoder_hidden_states"], strict=True
            )
        ]
        return np.stack(rows).astype(np.float32)


def job(
    seed: int,
    scheduler: str = "dpm++2m",
    steps: int = 5,
    guidance: float = 3.0,
    strength: float | None = None,
) -> Job:
    """A job of its own conditions; with a strength, from an image."""
    rng = np.random.default_rng(seed)
    rows: list[dict[str, Array]] = [
        {"encoder_hidden_states": rng.standard_normal((2, 3)).astype(np.float32)}
        for _ in range(2 if guidance > 1 else 1)
    ]
    image = None if strength is None else torch.from_numpy(rng.standard_normal(SHAPE)).float()
    schedule = make_schedule(scheduler, steps, CONFIG, strength=strength)
    return new_job(f"job {seed}", seed, guidance, schedule, rows, SHAPE, image)


def some_jobs() -> list[Job]:
    return [
        job(1),
        job(2, "lcm", 4, 1.0),
        job(3, "euler", 7, 7.5),
        job(4, "ddim", 6, 1.0, strength=0.5),
        job(5, "lcm", 8, 2.0, strength=0.7),
        job(6, "dpm++2m", 2, 4.0),
    ]


def alone(index: int) -> torch.Tensor:
    one = some_jobs()[index]
    denoise([one], Network())
    return one.latents


@pytest.mark.parametrize("order", [[0, 1, 2, 3, 4, 5], [5, 4, 3, 2, 1, 0], [2, 0], [3, 4, 1]])
def test_every_job_gives_the_bits_it_gives_alone(order: list[int]) -> None:
    jobs = some_jobs()
    chosen = [jobs[index] for index in order]
    denoise(chosen, Network())
    for index, one in zip(order, chosen, strict=True):
        assert one.done
        assert one.latents.numpy().tobytes() == alone(index).numpy().tobytes()


def test_a_job_may_join_one_that_is_under_way() -> None:
    first, second = some_jobs()[:2]
    network = Network()
    from heatsink.runtime import sampler

    sampler._step([first], network)
    denoise([first, second], network)
    assert first.latents.numpy().tobytes() == alone(0).numpy().tobytes()
    assert second.latents.numpy().tobytes() == alone(1).numpy().tobytes()


def test_rows_are_negative_first_each_at_its_own_timestep() -> None:
    jobs, network = some_jobs()[:3], Network()
    denoise(jobs, network)
    first = network.calls[0]
    times = [jobs[0], jobs[0], jobs[1], jobs[2], jobs[2]]
    np.testing.assert_array_equal(
        first["timestep"], [np.float32(each.schedule.timesteps[0]) for each in times]
    )
    assert first["timestep"].dtype == np.float32
    states = [row["encoder_hidden_states"] for each in jobs for row in each.conditions]
    np.testing.assert_array_equal(first["encoder_hidden_states"], np.stack(states))
    # Both rows of a job see the same sample.
    np.testing.assert_array_equal(first["sample"][0], first["sample"][1])
    # 5, 4 and 7 steps: the batch shrinks as jobs end.
    sizes = [len(call["timestep"]) for call in network.calls]
    assert sizes == [5, 5, 5, 5, 4, 2, 2]


@pytest.mark.parametrize("guidance", [1.0, 2.5])
def test_one_euler_step_by_hand(guidance: float) -> None:
    one, network = job(11, "euler", 1, guidance), Network()
    start = one.latents.double().numpy()
    denoise([one], network)
    timestep, s, p, q, a, b, _, _ = one.schedule.table[0]
    outs = []
    for row in one.conditions:
        shift = row["encoder_hidden_states"].astype(np.float64).mean() / (timestep + 1)
        outs.append(np.tanh(s * start) * 0.7 + shift)
    out = outs[0] if guidance == 1 else outs[0] + guidance * (outs[1] - outs[0])
    expected = a * start + b * (p * start + q * out)
    # A dozen float32 operations, each rounding at most the largest magnitude on the way.
    largest = max(abs(p * start).max(), abs(q * out).max(), abs(start).max())
    budget = 12 * float(np.finfo(np.float32).eps) * largest
    assert abs(one.latents.double().numpy() - expected).max() <= budget


def test_a_job_starts_from_its_own_noise() -> None:
    one = job(21, "ddim")
    fresh = noise.normal(21, noise.INITIAL, 0, SHAPE)
    assert torch.equal(one.latents, fresh * one.schedule.init_sigma)
    assert not one.done
    assert one.rows_left == 10


def test_progress_counts_rows() -> None:
    seen: list[tuple[int, int]] = []
    denoise(some_jobs()[:2], Network(), lambda done, total: seen.append((done, total)))
    assert seen == [(3, 14), (6, 14), (9, 14), (12, 14), (14, 14)]


@pytest.mark.parametrize(("row", "culprit"), [(0, "job 1"), (1, "job 1"), (2, "job 2")])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_non_finite_row_names_its_job_and_step(row: int, culprit: str, value: float) -> None:
    network = Network()

    def broken(inputs: Mapping[str, Array]) -> Array:
        out: Any = network(inputs)
        if len(network.calls) == 3:
            out[row, 1, 2, 0] = value
        return np.asarray(out)

    with pytest.raises(NumericError, match=f"{culprit}: unet gave a non-finite value at step 2"):
        denoise(some_jobs()[:2], broken)
