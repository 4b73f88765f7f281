"""Timing: samples in turn, within their scopes, and no round after the deadline."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

import pytest
import torch

from heatsink.kernels import timing
from heatsink.kernels.timing import Spread, Timed

CPU = torch.device("cpu")


def test_samples_are_taken_in_turn() -> None:
    order: list[str] = []

    def sleep() -> None:
        time.sleep(0.01)
        order.append("a")

    def hurry() -> None:
        order.append("b")

    timed = [Timed(sleep), Timed(hurry)]
    slow, quick = timing.interleaved(timed, 3, CPU)
    assert len(slow) == len(quick) == 3
    assert min(slow) >= 0.01 > max(quick)
    timed_part = "".join(order).lstrip("a").lstrip("b")
    assert [part for part in timed_part.split("b") if part] == ["a"] * 3


def test_scopes_are_entered_around_samples() -> None:
    state: list[str] = []
    seen: list[bool] = []

    @contextlib.contextmanager
    def scope() -> Iterator[None]:
        state.append("in")
        yield
        state.pop()

    timing.interleaved([Timed(lambda: seen.append(state == ["in"]), scope)], 2, CPU)
    assert all(seen)
    assert len(seen) > 4


def test_the_first_round_is_taken_however_late() -> None:
    (samples,) = timing.interleaved([Timed(lambda: None)], 5, CPU, deadline=time.monotonic() - 1)
    assert len(samples) == 1


def test_a_spread_is_of_the_samples() -> None:
    assert Spread.of([3.0, 1.0, 10.0]) == Spread(median=3.0, fastest=1.0, slowest=10.0)


def test_nothing_to_time_is_no_samples() -> None:
    assert timing.interleaved([], 3, CPU) == []


@pytest.mark.gpu
def test_a_gpus_time_is_its_own() -> None:
    device = torch.device("cuda")
    x = torch.ones(1 << 26, device=device)

    few, many = Timed(lambda: x[:1024].add_(1)), Timed(lambda: x.add_(1))
    quick, slow = timing.interleaved([few, many], 5, device)
    # A quarter of a gigabyte, read and written, against four kilobytes.
    assert min(slow) > max(quick) > 0
