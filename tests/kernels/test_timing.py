"""Timing: samples in turn, within their scopes, and no round after the deadline."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator

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


class Device:
    """Stands for a device: notes what is asked of it, and its events are a millisecond apart."""

    L2_cache_size = 1

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.asked: list[object] = []
        self.now = 0.0
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: self)
        monkeypatch.setattr(torch.cuda, "synchronize", lambda device: self.asked.append("all"))
        monkeypatch.setattr(torch.cuda, "_sleep", self.asked.append)
        monkeypatch.setattr(torch.cuda, "Event", lambda enable_timing: self)

    def record(self) -> None:
        self.asked.append("event")

    def synchronize(self) -> None:
        self.asked.append("wait")

    def elapsed_time(self, other: object) -> float:
        return 1.0

    def call(self, *host: float) -> Callable[[], None]:
        """Something that takes the host so many seconds, in turn; the last from then on."""
        times = list(host)

        def run() -> None:
            self.asked.append("call")
            self.now += times.pop(0) if len(times) > 1 else times[0]

        return run


def test_the_device_waits_for_twice_what_the_host_takes_for_that_call(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    device = Device(monkeypatch)
    sample = timing._Cuda(CPU, clock=lambda: device.now)
    # The first call of each compiles, for seconds: that is not what the host takes.
    calls = [device.call(5.0, seconds) for seconds in (0.003, 0.0001, 0.0, 1.0)]
    for call in calls:
        sample.warm(call)
    assert device.asked == ["call", "all", "call", "all"] * 4
    for call, milliseconds in zip(calls, (6.0, 0.5, 0.5, 20.0), strict=True):
        device.asked.clear()
        assert sample.take(call) == 0.001
        cycles, *rest = device.asked
        assert cycles == round(milliseconds * 3e6)
        assert rest == ["event", "call", "event", "wait"]


def test_the_longest_that_a_shared_call_took_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    device = Device(monkeypatch)
    sample = timing._Cuda(CPU, clock=lambda: device.now)
    call = device.call(0.0, 0.004, 0.0, 0.001)
    # In two scopes, each warmed up.
    sample.warm(call)
    sample.warm(call)
    device.asked.clear()
    sample.take(call)
    assert device.asked[0] == round(8.0 * 3e6)


@pytest.mark.gpu
def test_the_hosts_time_is_not_the_devices() -> None:
    device = torch.device("cuda")
    x = torch.ones(1024, device=device)

    def slow() -> None:
        time.sleep(0.003)
        x.add_(1)

    (samples,) = timing.interleaved([Timed(slow)], 5, device)
    assert 0 < min(samples) < 0.001


@pytest.mark.gpu
def test_a_gpus_time_is_its_own() -> None:
    device = torch.device("cuda")
    x = torch.ones(1 << 26, device=device)

    few, many = Timed(lambda: x[:1024].add_(1)), Timed(lambda: x.add_(1))
    quick, slow = timing.interleaved([few, many], 5, device)
    # A quarter of a gigabyte, read and written, against four kilobytes.
    assert min(slow) > max(quick) > 0
