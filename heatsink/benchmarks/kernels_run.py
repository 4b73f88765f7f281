"""A whole run of the kernels' benchmark: chosen, measured, written as it goes."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from heatsink.benchmarks import report
from heatsink.benchmarks.ceilings import Ceilings
from heatsink.benchmarks.ceilings import measure as measure_ceilings
from heatsink.benchmarks.environment import environment
from heatsink.benchmarks.kernels import CaseResult, Plan, make_plan, measure
from heatsink.kernels.errors import MissingDevice
from heatsink.runtime.errors import InvalidRequest
from heatsink.runtime.files import make_folder, write_whole
from heatsink.tuning import select

ROUNDS = {"cuda": 50, "cpu": 31}
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Wanted:
    """What to measure.

    Attributes:
        device: `cuda`, `cpu`, or empty for a GPU where there is one.
        ops: by name; all where none is given.
        cases: by name; those of the device where none is given.
        rounds: samples of each variant; 0 for the device's own number.
        compile: whether `torch.compile` is among the variants.
        seconds: after which no case is begun; None for no limit.
    """

    device: str = ""
    ops: Sequence[str] = ()
    cases: Sequence[str] = ()
    rounds: int = 0
    compile: bool = True
    seconds: float | None = None


@dataclass
class Run:
    """What was measured."""

    device: torch.device
    environment: dict[str, Any]
    rounds: int
    plan: Plan
    ceilings: Ceilings | None
    results: list[CaseResult]

    def unreached(self) -> list[str]:
        """The cases that the time did not reach."""
        rest = self.plan.by_turns()[len(self.results) :]
        return [f"{op.name} {case.name}" for op, _, case in rest]

    def ordered(self) -> list[CaseResult]:
        """The results op by op."""
        return self.plan.in_order(self.results)

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return report.as_dict(
            self.ordered(),
            environment=self.environment,
            ceilings=self.ceilings,
            rounds=self.rounds,
            left_out=self.plan.left_out,
            unreached=self.unreached(),
        )

    def notes(self) -> list[str]:
        """What a reader of the table must know: what is not in it and why, and a busy machine."""
        lines = report.notes(self.ordered(), self.plan.left_out, self.unreached())
        load, processors = self.environment["load"], self.environment["processors"]
        if self.device.type == "cpu" and load > processors:
            lines.append(f"the machine was busy: a load of {load:g} on {processors} processors")
        return lines


def pick_device(name: str) -> torch.device:
    """The device to measure on.

    Raises:
        MissingDevice: a GPU was asked for and there is none.
        InvalidRequest: another name.
    """
    if name not in ("", "cuda", "cpu"):
        raise InvalidRequest(f"--device: expected cuda or cpu, got {name!r}")
    available = torch.cuda.is_available()
    if name == "cuda" and not available:
        raise MissingDevice("--device cuda: expected a CUDA device, found none")
    return torch.device(name or ("cuda" if available else "cpu"))


def choose(wanted: Wanted, device: torch.device) -> Plan:
    """The cases that were asked for.

    Raises:
        InvalidRequest: an op or a case that is not there, or rounds or seconds out of range.
    """
    if wanted.rounds < 0:
        raise InvalidRequest(f"--rounds: expected 1 or more, got {wanted.rounds}")
    if wanted.seconds is not None and not wanted.seconds > 0:
        raise InvalidRequest(f"--seconds: expected more than 0, got {wanted.seconds:g}")
    plan = make_plan(select(wanted.ops), device, wanted.cases)
    missing = set(wanted.cases) - {case.name for _, _, case in plan.cases}
    if missing:
        raise InvalidRequest(f"--case: no chosen op has a case {sorted(missing)[0]!r}")
    return plan


def bench(
    wanted: Wanted,
    measured: Callable[[Run], None] = lambda run: None,
    progress: Progress = lambda what, done, total: None,
) -> Run:
    """Measure.

    Args:
        wanted: what.
        measured: called with the run so far after every case.
        progress: called with (what, done, total).

    Raises:
        MissingDevice, InvalidRequest: from `pick_device` and `choose`.
        DeviceLost: a failure took the device with it; `measured` has seen what came before.
    """
    device = pick_device(wanted.device)
    plan = choose(wanted, device)
    rounds = wanted.rounds or ROUNDS[device.type]
    deadline = None if wanted.seconds is None else time.monotonic() + wanted.seconds
    with torch.inference_mode():
        ceilings = measure_ceilings(device) if device.type == "cuda" else None
        run = Run(device, environment(), rounds, plan, ceilings, [])
        if device.type == "cpu":
            run.environment = {**run.environment, "device": "cpu"}

        def take(result: CaseResult) -> None:
            run.results.append(result)
            measured(run)

        measure(
            plan,
            device,
            rounds=rounds,
            ceilings=ceilings,
            compile=wanted.compile,
            deadline=deadline,
            measured=take,
            progress=progress,
        )
    return run


def write(run: Run, out: Path) -> list[Path]:
    """Write `kernels.json`, `kernels.md` and, where Matplotlib is there, `kernels.png`."""
    make_folder(out)
    text = json.dumps(run.as_dict(), indent=2) + "\n"
    table = (
        report.markdown(run.ordered()) + "\n\n" + "\n".join(f"- {n}" for n in run.notes()) + "\n"
    )
    paths = [out / "kernels.json", out / "kernels.md"]
    for path, content in zip(paths, (text, table), strict=True):
        write_whole(path, lambda file, content=content: file.write(content.encode()))  # type: ignore[misc]
    return paths + picture(run, out / "kernels.png")


def picture(run: Run, path: Path) -> list[Path]:
    """Draw a run where Matplotlib is there; what was written."""
    if not any(len(result.rows) > 1 for result in run.results):
        return []
    where = run.environment["device"]
    if where == "cpu":
        where = f"{run.environment['processor']}, threads: {run.environment['threads']}"
    try:
        report.plot(run.ordered(), path, f"{where}, {run.rounds} rounds")
    except ImportError:
        return []
    return [path]
