"""The calls of a program, in order: those of this package's ops in C++, others in Python.

What a call costs besides its work is measured by `bench/call_overhead.py`.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable

import torch

from heatsink.kernels import _native
from heatsink.kernels.recorder import Recorder
from heatsink.runtime.native.outs import Step, is_ours


class Calls:
    """Steps that are added once and run again and again.

    Attributes:
        count: how many were added.
    """

    def __init__(self, device: torch.device) -> None:
        can = device.type == "cpu" and _native.available()
        self._recorder = Recorder() if can else None
        self.count = 0
        # A run of recorded calls is one step, whose errors say themselves where they come from.
        self._steps: list[tuple[Step, str | None]] = []
        self._begin = 0
        # The same, each on its own.
        self._single: list[Step] = []

    @property
    def recorded(self) -> int:
        """How many calls run without Python."""
        return 0 if self._recorder is None else self._recorder.calls

    def add(self, step: Step, label: str) -> None:
        """Append a step; `label` is what an error calls it."""
        self.count += 1
        recorder = self._recorder
        if recorder is None or not is_ours(step) or not recorder.record(step, label):
            self._steps.append((step, label))
            self._single.append(step)
            self._begin = self.recorded
            return
        self._single.append(recorder.replayer(recorder.calls - 1, recorder.calls))
        if self._steps and self._steps[-1][1] is None:
            self._steps.pop()
        self._steps.append((recorder.replayer(self._begin, recorder.calls), None))

    def run(self) -> None:
        """Run all of them.

        Raises:
            RuntimeError: what a step raised, behind its label.
        """
        label: str | None = None
        try:
            for step, label in self._steps:  # noqa: B007 - the handler names the step
                step()
        except Exception as error:
            if label is None:
                raise
            raise RuntimeError(f"{label}: {error}") from error

    def profile(self, rounds: int, clock: Callable[[], float]) -> list[float]:
        """The median seconds of each step, by the given clock, as all run in order."""
        seconds: list[list[float]] = [[] for _ in self._single]
        for _ in range(rounds):
            for step, own in zip(self._single, seconds, strict=True):
                begun = clock()
                step()
                own.append(clock() - begun)
        return [statistics.median(own) for own in seconds]
