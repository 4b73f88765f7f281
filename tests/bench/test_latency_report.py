"""The latency benchmark's picture, the layout its baselines get, and the order of its rounds."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib.figure import Figure

from heatsink.benchmarks import latency_report, latency_systems
from heatsink.benchmarks.latency import Bench, _Entry
from heatsink.benchmarks.latency_check import Quality
from heatsink.benchmarks.latency_results import Row, Table
from heatsink.benchmarks.latency_systems import LAYOUTS, Eager, Runner, time_layouts
from heatsink.benchmarks.latency_work import Artefacts, Workload
from heatsink.kernels.timing import Spread


class Panel:
    """What a panel reads of a table."""

    level, precision, unit = "unet", "fp32", "row"

    def __init__(self, counts: Sequence[int]) -> None:
        self.rows = [self._row(count) for count in counts]

    @staticmethod
    def _row(count: int) -> Row:
        class Samples:
            seconds = Spread(0.5, 0.4, 0.7)

        values: dict[str, Any] = {"base": "", "ratio": None, "joules": None, "quality": None}
        samples: Any = Samples
        return Row("a", "fp32", count, "whole", samples=samples, per_unit=0.5 / count, **values)


@pytest.mark.parametrize("counts", [(2,), (1,), (1, 2, 16)])
def test_every_count_lies_inside_every_panel(counts: tuple[int, ...]) -> None:
    figure = Figure(layout="constrained")
    panels = figure.subplots(1, 2, sharey="row")
    for axes in panels:
        table: Any = Panel(counts)
        latency_report._panel(axes, table, {("a", "whole"): {}})
    figure.draw_without_rendering()
    for axes in panels:
        low, high = axes.get_xlim()
        assert low < min(counts) <= max(counts) < high
        assert list(axes.get_xticks()) == list(counts)


class Slower:
    """A module that takes a second in one layout, two in the other, and ten while all is slow."""

    def __init__(self, artefacts: Any, precision: str) -> None:
        self.layout, self.calls = "contiguous", 0

    def set_layout(self, layout: str) -> None:
        self.layout = layout

    def runners(self, level: str, count: int) -> list[Runner]:
        return [Runner(lambda request: None, self._run, torch.as_tensor)]

    def _run(self) -> None:
        self.calls += 1
        busy = 10.0 if self.calls in self.slow else 0.0
        Clock.now += busy + (1.0 if self.layout == "channels_last" else 2.0)

    slow: range = range(0)


class Clock:
    now = 0.0


@pytest.mark.parametrize("slow", [range(1, 7), range(4, 10), range(10, 20)])
def test_a_busy_while_does_not_choose_the_layout(
    slow: range, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(latency_systems, "Eager", Slower)
    monkeypatch.setattr(Slower, "slow", slow)
    monkeypatch.setattr(time, "perf_counter", lambda: Clock.now)

    class Stub:
        class workload:
            device = "cpu"

        @staticmethod
        def request(level: str, count: int, turn: int) -> None: ...

    artefacts: Any = Stub
    seconds = time_layouts(artefacts, "fp32", "vae", 2)
    assert seconds == {"contiguous": 2.0, "channels_last": 1.0}
    assert seconds.keys() == LAYOUTS.keys()


def test_each_network_gets_its_own_layout_in_each_precision(tiny_sd1: Path, tmp_path: Path) -> None:
    layouts = {"unet, bf16": "channels_last", "vae_decoder, fp32": "channels_last"}
    workload = Workload(str(tiny_sd1), str(tmp_path), "cpu", 1, 2, layouts=layouts)
    for precision in ("fp32", "bf16"):
        pipe = Eager(Artefacts(workload), precision).pipeline()
        for component, module in (("unet", pipe.unet), ("vae_decoder", pipe.vae)):
            weight = next(p for p in module.parameters() if p.dim() == 4 and p.shape[-1] == 3)
            wanted = f"{component}, {precision}" in layouts
            assert weight.is_contiguous(memory_format=torch.channels_last) == wanted
            assert weight.is_contiguous() != wanted


def test_layouts_are_named_once_where_they_are_the_same() -> None:
    same = {"unet, fp32": "contiguous", "vae_decoder, fp32": "contiguous"}
    assert latency_report._layouts(same) == "contiguous"
    mixed = {
        "unet, fp32": "contiguous",
        "unet, bf16": "channels_last",
        "vae_decoder, bf16": "channels_last",
    }
    expected = "contiguous (unet, fp32); channels_last (unet, bf16 and vae_decoder, bf16)"
    assert latency_report._layouts(mixed) == expected


def test_nobody_is_always_behind_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    runner = Runner(lambda request: None, lambda: None, torch.as_tensor)
    entries = [_Entry(name, runner, Quality()) for name in "abcd"]
    order: list[int] = []

    def timed(self: Bench, own: Runner, request: int) -> float:
        order.append(request)
        return float(len(order))

    class Stub:
        @staticmethod
        def request(level: str, count: int, turn: int) -> int:
            return turn

    bench = Bench.__new__(Bench)
    for name, value in {
        "_artefacts": Stub,
        "_entries": lambda *given: iter(entries),
        "_rounds": lambda level: 40,
        "_late": lambda: False,
        "_metered": lambda *given: None,
        "_add": lambda *given: None,
    }.items():
        setattr(bench, name, value)
    monkeypatch.setattr(Bench, "_timed", timed)
    bench._measure(Table("unet", "fp32"), 1, {})
    # Every entry once a round, the untimed one first; all of a round answer the same.
    assert order == [turn for turn in range(1, 42) for _ in entries]
    assert [len(entry.samples) for entry in entries] == [40] * 4
    placed = sorted((at, entry.system) for entry in entries for at in entry.samples)
    names = [name for _, name in placed]
    behind = Counter(pairwise(names))
    for system in "abcd":
        followed = [behind[other, system] for other in "abcd" if other != system]
        assert min(followed) > 0
        assert max(followed) < 30
