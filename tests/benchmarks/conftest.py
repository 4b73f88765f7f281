"""Races between an op and what a user would run otherwise, in one process on one machine.

What is measured is the time that the one thread computes, so that it says something on a machine
that does other things too; caches and clock are shared all the same. With --benchmark-disable, as
in `make test`, each contender runs once and only the answers are checked.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytest
import torch

Contender = Callable[[], Any]
Race = Callable[[str, Contender, Mapping[str, Contender]], None]

ROUNDS = 15
# About what a contender runs for in one round.
ROUND_SECONDS = 0.004


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """One thread and no gradients: what differs then is the arithmetic."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.inference_mode():
        yield
    torch.set_num_threads(threads)


@pytest.fixture
def race(benchmark: Any, capsys: pytest.CaptureFixture[str]) -> Race:
    """`race(group, ours, others)`: interleaved medians, of which the ratio is printed."""

    def run(group: str, ours: Contender, others: Mapping[str, Contender]) -> None:
        benchmark.group = group
        if not benchmark.disabled:
            medians = interleaved({"ours": ours, **others})
            best = min(others, key=lambda name: medians[name])
            ratio = medians[best] / medians["ours"]
            benchmark.extra_info.update(medians, best=best, ratio=ratio)
            with capsys.disabled():
                print(
                    f"\n{group}: {medians['ours'] * 1e6:.1f} us, "
                    f"{best} {medians[best] * 1e6:.1f} us, ratio {ratio:.2f}",
                    end="",
                )
        benchmark(ours)

    return run


def interleaved(contenders: Mapping[str, Contender]) -> dict[str, float]:
    """Each contender's median seconds, all of them measured in turn in every round."""
    counts = {name: calls_in_a_round(contender) for name, contender in contenders.items()}
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(ROUNDS):
        for name, contender in contenders.items():
            begin = time.thread_time()
            for _ in range(counts[name]):
                contender()
            seconds[name].append((time.thread_time() - begin) / counts[name])
    return {name: statistics.median(found) for name, found in seconds.items()}


def calls_in_a_round(contender: Contender) -> int:
    """How many calls take about `ROUND_SECONDS`."""
    contender()
    begin = time.thread_time()
    contender()
    return max(1, round(ROUND_SECONDS / max(time.thread_time() - begin, 1e-7)))
