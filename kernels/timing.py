"""Times calls on a device: interleaved, caches cold on a GPU, the host's own time left out there.

On CUDA each sample is one call between two events, after a write that evicts the L2 cache and a
wait on the device during which the host queues the call: what is timed is the device's work. The
wait is twice as long as the host took for that call before, between half a millisecond and 20: a
host that takes longer than that is timed too, and so is one that waits for the device itself. On
the CPU a sample is as many calls as fill a millisecond, divided by their number: long for the
clock, and short enough that most samples fall between two interruptions of a busy machine.
"""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch

MIB = 1 << 20
# How long the device waits while the host queues a call, against what that took before.
_HEAD_START = 2
_SHORTEST_WAIT, _LONGEST_WAIT = 0.0005, 0.02
# A wait is given in cycles. No device's clock is faster, so none waits for less than that.
_CYCLES_PER_SECOND = 3e9
_SAMPLE_SECONDS = 0.001
_MAX_CALLS = 10_000


@dataclass(frozen=True)
class Timed:
    """Something to time.

    Attributes:
        call: runs it once, queued on the device's current stream.
        scope: entered outside what is timed; chooses a library's implementation, for example.
    """

    call: Callable[[], Any]
    scope: Callable[[], AbstractContextManager[Any]] = contextlib.nullcontext


@dataclass(frozen=True)
class Spread:
    """The median of samples, and their range."""

    median: float
    fastest: float
    slowest: float

    @classmethod
    def of(cls, samples: Sequence[float]) -> Spread:
        """Of at least one sample."""
        return cls(statistics.median(samples), min(samples), max(samples))


def interleaved(
    timed: Sequence[Timed], rounds: int, device: torch.device, deadline: float | None = None
) -> list[list[float]]:
    """Seconds of one call of each, once a round, all in every round.

    Args:
        timed: what is timed; each is called twice untimed first.
        rounds: samples of each.
        device: where they run.
        deadline: a reading of `time.monotonic` after which no round is begun, but for the first.

    Returns:
        For each of `timed` its samples, one a round.
    """
    if not timed:
        return []
    sample = _Cuda(device) if device.type == "cuda" else _Cpu()
    for one in timed:
        with one.scope():
            sample.warm(one.call)
    samples: list[list[float]] = [[] for _ in timed]
    for done in range(rounds):
        if done and deadline is not None and time.monotonic() >= deadline:
            break
        for place, one in enumerate(timed):
            with one.scope():
                samples[place].append(sample.take(one.call))
    return samples


class _Cpu:
    def __init__(self) -> None:
        self._calls: dict[Callable[[], Any], int] = {}

    def warm(self, call: Callable[[], Any]) -> None:
        call()
        begun = time.perf_counter()
        call()
        seconds = max(time.perf_counter() - begun, 1e-9)
        self._calls[call] = min(_MAX_CALLS, max(1, round(_SAMPLE_SECONDS / seconds)))

    def take(self, call: Callable[[], Any]) -> float:
        count = self._calls[call]
        begun = time.perf_counter()
        for _ in range(count):
            call()
        return (time.perf_counter() - begun) / count


class _Cuda:
    def __init__(
        self, device: torch.device, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self._device = device
        self._clock = clock
        self._host: dict[Callable[[], Any], float] = {}
        size = torch.cuda.get_device_properties(device).L2_cache_size
        self._evict = torch.empty(max(4 * size, 64 * MIB), dtype=torch.uint8, device=device)

    def warm(self, call: Callable[[], Any]) -> None:
        call()
        # With nothing queued, so that the host need not wait for a place in the queue.
        torch.cuda.synchronize(self._device)
        begun = self._clock()
        call()
        self._host[call] = max(self._clock() - begun, self._host.get(call, 0.0))
        torch.cuda.synchronize(self._device)

    def take(self, call: Callable[[], Any]) -> float:
        begun, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        wait = min(_LONGEST_WAIT, max(_SHORTEST_WAIT, _HEAD_START * self._host[call]))
        self._evict.zero_()
        # PyTorch's own tests wait this way; there is no public name for it.
        torch.cuda._sleep(round(wait * _CYCLES_PER_SECOND))
        begun.record()
        call()
        ended.record()
        ended.synchronize()
        return float(begun.elapsed_time(ended)) / 1e3
