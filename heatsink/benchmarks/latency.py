"""Latency of whole systems in one run, interleaved, on the same requests at equal precision.

Three levels: a step of the UNet by rows (two rows are one image with guidance), the VAE's decoding,
and a whole generation: text, steps with guidance, VAE. A table holds one level in one precision.
Before a system is timed its results are compared (`latency_check`); a wrong one gets no time.
"""

from __future__ import annotations

import contextlib
import gc
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from heatsink.benchmarks import latency_engines as engines
from heatsink.benchmarks import latency_process, latency_systems
from heatsink.benchmarks import latency_tensorrt as tensorrt
from heatsink.benchmarks.check import refusals
from heatsink.benchmarks.energy import Meter, NoMeter, meter
from heatsink.benchmarks.environment import environment
from heatsink.benchmarks.latency_check import Check, Quality
from heatsink.benchmarks.latency_results import LeftOut, Results, Row, Samples, Table
from heatsink.benchmarks.latency_systems import WHOLE, Runner, System, best_layout, synchronised
from heatsink.benchmarks.latency_work import Artefacts, Level, Workload
from heatsink.kernels.timing import Spread
from heatsink.kernels.tuning_gate import one_line
from heatsink.runtime.errors import HeatsinkError

Make = Callable[[Artefacts, str], System]
Progress = Callable[[str, int, int], None]
SYSTEMS: dict[str, Make] = {
    engines.STRICT: engines.Heatsink,
    engines.FAST: engines.HeatsinkFast,
    latency_systems.EAGER: latency_systems.Eager,
    latency_systems.COMPILE: latency_systems.Compiled,
    engines.ONNXRUNTIME: engines.OnnxRuntime,
    engines.OPENVINO: engines.OpenVino,
    latency_systems.XFORMERS: latency_systems.Xformers,
    tensorrt.NAME: tensorrt.TensorRt,
}
ROUNDS: dict[Level, int] = {"unet": 21, "vae": 11, "image": 5}
# Threads of a library spin for a while after its work; on a CPU the next one would share its cores.
_SETTLE = 0.02
_METERED_SECONDS = 1.0


@dataclass(frozen=True)
class Wanted:
    """What is measured.

    Attributes:
        precisions: tables of each.
        counts: rows of the UNet, images of the other levels; a level that is missing is left out.
        systems: names of `SYSTEMS`; the first that is there is what ratios refer to.
        rounds: timed rounds; 0 is `ROUNDS`.
        together: all systems in memory at a time, and in every round; else each by itself beside
            the first.
        cold: whether fresh processes are measured.
        seconds: after which nothing more is begun.
    """

    precisions: tuple[str, ...]
    counts: Mapping[Level, tuple[int, ...]]
    systems: tuple[str, ...] = tuple(SYSTEMS)
    rounds: int = 0
    together: bool = True
    cold: bool = True
    seconds: float | None = None


@dataclass
class _Entry:
    system: str
    runner: Runner
    quality: Quality
    samples: list[float] = field(default_factory=list)
    joules: float | None = None


class Bench:
    """One run.

    Args:
        workload: on what.
        wanted: what.
        progress: called with (what, done, total).
        keep: called with the results as they grow.
    """

    def __init__(
        self,
        workload: Workload,
        wanted: Wanted,
        *,
        progress: Progress = lambda what, done, total: None,
        keep: Callable[[Results], None] = lambda results: None,
    ) -> None:
        self._wanted, self._progress, self._keep = wanted, progress, keep
        self._ends = None if wanted.seconds is None else time.monotonic() + wanted.seconds
        self._meter: Meter | NoMeter = meter(workload.device)
        torch.set_num_threads(workload.threads)
        self._artefacts = Artefacts(workload)
        self._check = Check(self._artefacts, wanted.counts)
        self.results = Results(environment(), {})
        self._layouts: dict[str, str] = {}
        self._done = 0

    def run(self) -> Results:
        """Measure everything that the time allows."""
        with _plain_float32():
            seconds = {each: self._choose_layout(each) for each in self._wanted.precisions}
            self.results.settings.update(self._settings(seconds))
            for precision in self._wanted.precisions:
                for names in self._groups():
                    self._group(precision, names)
                    self._keep(self.results)
        if self._wanted.cold:
            self._measure_processes()
        self._keep(self.results)
        return self.results

    def _choose_layout(self, precision: str) -> dict[str, float]:
        """The eager modules' faster layout on this machine, which all of PyTorch's systems get."""
        what = f"choosing the layout of eager, {precision}"
        self._progress(what, 0, 1)
        rows = min(2, self._artefacts.workload.rows)
        seconds = best_layout(self._artefacts, precision, rows)
        gc.collect()
        self._progress(what, 1, 1)
        self._layouts[precision] = min(seconds, key=lambda layout: seconds[layout])
        return seconds

    def _laid(self, precision: str) -> Workload:
        """The workload in the layout of a precision."""
        return replace(self._artefacts.workload, layout=self._layouts[precision])

    def _settings(self, seconds: dict[str, dict[str, float]]) -> dict[str, Any]:
        workload, height_width = self._artefacts.workload, self._artefacts.size
        return {
            "model": Path(workload.model).name,
            "size": f"{height_width[0]}x{height_width[1]}",
            "device": workload.device,
            "threads": workload.threads,
            "steps": workload.steps,
            "guidance": workload.guidance,
            "layout": dict(self._layouts),
            "layout_seconds": seconds,
            "rounds": self._wanted.rounds or dict(ROUNDS),
            "together": self._wanted.together,
            "energy": self._meter.name,
        }

    def _groups(self) -> list[tuple[str, ...]]:
        """What is in memory at a time."""
        first, *others = self._wanted.systems
        if self._wanted.together or not others:
            return [self._wanted.systems]
        return [(first, other) for other in others]

    def _group(self, precision: str, names: Sequence[str]) -> None:
        # The modules of references are PyTorch's too.
        self._artefacts.workload = self._laid(precision)
        systems = self._made(precision, names)
        for level, counts in self._wanted.counts.items():
            table = self.results.table(level, precision)
            for count in counts:
                what = f"{level}, {precision}"
                self._progress(what, counts.index(count), len(counts))
                if self._late():
                    self.results.unreached.append(f"{what}, {count}: {', '.join(systems)}")
                    continue
                self._measure(table, count, systems)
                self._keep(self.results)
                self._progress(what, counts.index(count) + 1, len(counts))
        systems.clear()
        gc.collect()

    def _made(self, precision: str, names: Sequence[str]) -> dict[str, System]:
        systems: dict[str, System] = {}
        for place, name in enumerate(names):
            self._progress(f"opening, {precision}", place, len(names))
            try:
                systems[name] = SYSTEMS[name](self._artefacts, precision)
            except _failures() as error:
                self.results.leave_out(LeftOut(name, precision, _reason(error)))
        self._progress(f"opening, {precision}", len(names), len(names))
        return systems

    def _measure(self, table: Table, count: int, systems: Mapping[str, System]) -> None:
        """Check and time one count of a table."""
        entries = list(self._entries(table, count, systems))
        if not entries:
            return
        turns = self._rounds(table.level)
        for turn in range(-1, turns):
            if turn > 0 and self._late():
                break
            # Turn 0 was checked; no later one asks for what an earlier one did.
            request = self._artefacts.request(table.level, count, turn + 2)
            # Shuffled, so that nobody is always behind the same, whose threads still spin.
            for entry in random.Random(turn).sample(entries, len(entries)):
                seconds = self._timed(entry.runner, request)
                if turn >= 0:
                    entry.samples.append(seconds)
        for entry in entries:
            entry.joules = self._metered(entry, table.level, count)
        self._add(table, count, entries)

    def _rounds(self, level: Level) -> int:
        return self._wanted.rounds or ROUNDS[level]

    def _entries(self, table: Table, count: int, systems: Mapping[str, System]) -> Iterator[_Entry]:
        """What is right, by system; the others are refused."""
        request = self._artefacts.request(table.level, count, 0)
        what = f"{table.level}, {table.precision}"
        for place, (name, system) in enumerate(systems.items()):
            self._progress(f"checking, {what}", place, len(systems))
            if place and self._late():
                self.results.unreached.append(f"{what}, {count}: {name}")
                continue
            try:
                for runner in system.runners(table.level, count):
                    runner.load(request)
                    result = runner.result(runner.run())
                    quality = self._check(table.level, table.precision, result)
                    yield _Entry(name, runner, quality)
            except _failures() as error:
                reason = _reason(error)
                self.results.refuse(LeftOut(name, table.precision, reason, table.level, count))
        self._progress(f"checking, {what}", len(systems), len(systems))

    def _timed(self, runner: Runner, request: Any) -> float:
        runner.load(request)
        device = self._artefacts.workload.device
        if device == "cpu":
            time.sleep(_SETTLE)
        with synchronised(device) as seconds:
            runner.run()
        return seconds()

    def _metered(self, entry: _Entry, level: Level, count: int) -> float | None:
        """Joules of one row or image."""
        if isinstance(self._meter, NoMeter):
            return None
        calls, begun = 0, time.monotonic()
        with synchronised(self._artefacts.workload.device):
            start: Any = self._meter.start()
            while time.monotonic() - begun < _METERED_SECONDS:
                # What is loaded stays good for a step alone; others keep nothing of a request.
                if entry.runner.includes == WHOLE:
                    entry.runner.load(self._artefacts.request(level, count, 1000 + calls))
                entry.runner.run()
                calls += 1
                if self._artefacts.workload.device == "cuda":
                    torch.cuda.synchronize()
            joules = self._meter.joules(start)
        return joules / (calls * count)

    def _add(self, table: Table, count: int, entries: Sequence[_Entry]) -> None:
        # One by itself beside the first has nothing to be compared with where that is missing.
        wanted = [
            e for e in entries if self._wanted.together or e.system == self._wanted.systems[0]
        ]
        base = next((entry for entry in wanted if entry.runner.includes == WHOLE), None)
        for entry in entries:
            ratio = None
            if base is not None:
                pairs = zip(entry.samples, base.samples, strict=True)
                ratio = Spread.of([mine / theirs for mine, theirs in pairs])
            samples = Samples.of(entry.samples)
            table.add(
                Row(
                    system=entry.system,
                    precision=table.precision,
                    count=count,
                    includes=entry.runner.includes,
                    base=base.system if base else "",
                    ratio=ratio,
                    samples=samples,
                    per_unit=samples.seconds.median / count,
                    joules=entry.joules,
                    quality=entry.quality,
                )
            )

    def _measure_processes(self) -> None:
        """Every system that was timed, in a process of its own, for one image."""
        level: Level = (
            "image" if "image" in self._wanted.counts else next(iter(self._wanted.counts))
        )
        count = min(2, self._artefacts.workload.rows) if level == "unet" else 1
        jobs = [
            (table.precision, name)
            for table in self.results.tables
            if table.level == level
            for name in dict.fromkeys(row.system for row in table.rows)
        ]
        for place, (precision, name) in enumerate(jobs):
            self._progress("fresh processes", place, len(jobs))
            left = 600.0 if self._ends is None else self._ends - time.monotonic()
            if left <= 0:
                self.results.unreached.append(f"fresh process, {precision}: {name}")
                continue
            try:
                self.results.costs.append(
                    latency_process.measure(
                        self._laid(precision), name, precision, level, count, left
                    )
                )
            except HeatsinkError as error:
                self.results.refuse(LeftOut(name, precision, f"cold: {error}", level, count))
            self._keep(self.results)
        self._progress("fresh processes", len(jobs), len(jobs))

    def _late(self) -> bool:
        return self._ends is not None and time.monotonic() >= self._ends


def _failures() -> tuple[type[BaseException], ...]:
    """What a system may say no with, a library's ways among them."""
    return (HeatsinkError, *refusals())


def _reason(error: BaseException) -> str:
    """A refusal of ours as it is, a library's with its kind."""
    return " ".join(str(error).split()) if isinstance(error, HeatsinkError) else one_line(error)


@contextlib.contextmanager
def _plain_float32() -> Iterator[None]:
    """Let no library round float32 to TF32: precisions would not be equal."""
    cudnn, matmul = torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()
    torch.backends.cudnn.allow_tf32 = False
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = cudnn
        torch.set_float32_matmul_precision(matmul)
