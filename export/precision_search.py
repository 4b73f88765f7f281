"""Which modules of a component must stay high so that its pictures stay what float32 draws.

1. The pictures are drawn in float32, and with all of the component low.
2. Every module with weights is rated by what it alone costs: the component's own inputs from the
   middle of those drawings are run in float32 but for that module, and the squared error of the
   outputs is its rate.
3. The modules of the highest rates stay high: 1, 2, 4, ... until the worst picture reaches the
   target, then as few as suffice, by bisection. The same seeds and machine give the same list.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from heatsink.export.painter import Painter, Setting, Subjects, psnr, summary
from heatsink.export.precision_rating import candidates, probes, rates
from heatsink.runtime.backends.session import Array
from heatsink.runtime.errors import InvalidRequest
from heatsink.runtime.graph.passes.pipeline import HALVES
from heatsink.runtime.model import Model

Report = Callable[[str, int, int], None]
TARGETS = {"bf16": 30.0, "fp16": 30.0}
"""Decibels of the worst picture; fp8 has no default."""


@dataclass(frozen=True)
class Found:
    """What a search found; JSON values only, so that a manifest can hold it.

    Attributes:
        component: whose modules.
        precision: of the rest: `bf16`, `fp16` or `fp8`.
        high: the modules that stay high.
        modules: how many there are to choose from.
        target: decibels that the worst picture had to reach.
        before: decibels, worst and mean, with all low.
        after: with `high`.
        subjects: prompts, seeds, steps, guidance and scheduler.
    """

    component: str
    precision: str
    high: tuple[str, ...]
    modules: int
    target: float
    before: Mapping[str, float]
    after: Mapping[str, float]
    subjects: Subjects

    def as_dict(self) -> dict[str, Any]:
        """As JSON values."""
        values = asdict(self)
        values["high"] = list(self.high)
        for name in ("prompts", "seeds"):
            values["subjects"][name] = list(values["subjects"][name])
        return values


def search(
    model: str | Path | Model,
    precision: str,
    subjects: Subjects,
    *,
    component: str = "unet",
    target: float | None = None,
    device: torch.device | str = "cpu",
    progress: Report | None = None,
) -> Found:
    """Find a short list of modules that stay high.

    Args:
        model: a diffusers folder, or an opened model.
        precision: `bf16` or `fp16`, beside float32; or `fp8`, beside bf16.
        subjects: what is drawn to judge.
        component: whose modules; all other components are float32.
        target: PSNR in dB that the worst picture must reach, against float32; `TARGETS` by default.
        device: where it is drawn.
        progress: called with (what is being done, done, total).

    Raises:
        InvalidRequest: another precision, no target, no such component, or a target that even all
            of the modules don't reach.
    """
    if target is None and precision not in TARGETS:
        raise InvalidRequest(f"target: expected decibels for the precision {precision!r}, got none")
    if precision not in (*HALVES, "fp8"):
        raise InvalidRequest(f"precision: expected one of {[*HALVES, 'fp8']}, got {precision!r}")
    wanted = TARGETS[precision] if target is None else target
    opened = model if isinstance(model, Model) else Model.open(model)
    painter = Painter(opened, subjects, device)
    return _Search(painter, component, precision, wanted, progress or _silent).run()


class _Search:
    def __init__(
        self, painter: Painter, component: str, precision: str, target: float, report: Report
    ) -> None:
        self._painter, self._component, self._precision = painter, component, precision
        self._target, self._report = target, report
        self._ranked: list[str] = []
        self._scores: dict[int, list[float]] = {}

    def run(self) -> Found:
        graph = self._painter.graph(self._component)
        calls: list[Mapping[str, Array]] = []
        self._report("drawing in fp32", 0, 1)
        self._reference = self._painter.draw(watch={self._component: calls.append})
        high = 0
        if self._worst(0) < self._target:
            rated = rates(graph, self._precision, probes(calls), self._report)
            # By name where equal, so that the order is one.
            self._ranked = sorted(rated, key=lambda name: (-rated[name], name))
            high = self._fewest()
        return Found(
            component=self._component,
            precision=self._precision,
            high=tuple(self._ranked[:high]),
            modules=len(candidates(graph, self._precision)),
            target=self._target,
            before=summary(self._scores[0]),
            after=summary(self._scores[high]),
            subjects=self._painter.subjects,
        )

    def _fewest(self) -> int:
        most = len(self._ranked)
        low, high = 0, 1
        while self._worst(min(high, most)) < self._target:
            if high >= most:
                raise InvalidRequest(
                    f"target: {self._target:g} dB are not reached with all modules of "
                    f"{self._component} high either, which give {self._worst(most):.1f}"
                )
            low, high = high, 2 * high
        high = min(high, most)
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if self._worst(middle) >= self._target else (middle, high)
        return high

    def _worst(self, count: int) -> float:
        """The PSNR of the worst picture with the first `count` modules high."""
        if count not in self._scores:
            self._report(f"drawing with {count} modules high", len(self._scores), 0)
            setting = Setting(self._precision, tuple(self._ranked[:count]))
            pictures = self._painter.draw({self._component: setting})
            self._scores[count] = psnr(pictures, self._reference)
        return min(self._scores[count])


def _silent(what: str, done: int, total: int) -> None:
    pass
