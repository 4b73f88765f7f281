"""The GPU suite as a program: what `bench/gpu_suite.py` runs once the package can be imported."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from heatsink.benchmarks.environment import folder_name
from heatsink.benchmarks.stages import STAGES, WORKERS, list_command
from heatsink.benchmarks.suite import Stage, interruptible, run_stages, shares
from heatsink.runtime.errors import HeatsinkError
from heatsink.runtime.files import make_folder, write_whole

_IN_EVERY_FILE = ("device", "capability", "driver", "versions")


def probe(root: Path) -> dict[str, Any] | str:
    """The machine's report, from a process of its own; or why there is none, in a line."""
    code = "import json; from heatsink.benchmarks.environment import environment as e"
    command = [sys.executable, "-c", f"{code}; print(json.dumps(e()))"]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        return f"expected PyTorch, got: {lines[-1]}"
    report: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return report


def run(
    *,
    root: Path,
    out: Path,
    seconds: float,
    only: Sequence[str] = (),
    dry_run: bool = False,
    wheels_left_out: Sequence[str] = (),
    stages: Sequence[Stage] = STAGES,
) -> int:
    """Run the suite, or print what it would do.

    Args:
        root: the checkout.
        out: results go to a folder in it that is named after the device.
        seconds: for all of it.
        only: names of stages; all where none is given.
        dry_run: run no stage, need no GPU.
        wheels_left_out: the wheels that were found unusable, and why.
        stages: in order.

    Returns:
        2 for a caller's mistake, 1 if a stage failed or was stopped, else 0.
    """
    unknown = sorted(set(only) - {stage.name for stage in stages})
    if unknown:
        names = ", ".join(stage.name for stage in stages)
        return _refuse(f"--only: expected one of {names}, got {unknown[0]!r}")
    if not seconds > 0:
        return _refuse(f"--seconds: expected more than 0, got {seconds:g}")
    chosen = [stage for stage in stages if not only or stage.name in only]
    report = probe(root)
    if isinstance(report, str):
        return _refuse(report)
    report["wheels_left_out"] = list(wheels_left_out)
    if dry_run:
        _print_plan(chosen, seconds, report, root)
        return 0
    if report["device"] == "cpu":
        return _refuse("expected a CUDA device, found none (--dry-run needs none)")
    try:
        return _run(chosen, seconds, root, out, report)
    except HeatsinkError as error:
        print(f"gpu_suite: {type(error).__name__}: {error}", file=sys.stderr)
        return error.exit_code


def _run(
    chosen: Sequence[Stage], seconds: float, root: Path, out: Path, report: dict[str, Any]
) -> int:
    interruptible()
    folder = out / folder_name(report["device"])
    make_folder(folder)
    text = json.dumps(report, indent=2) + "\n"
    write_whole(folder / "environment.json", lambda file: file.write(text.encode()))
    for line in _left_out(report):
        print(line, flush=True)
    outcomes = run_stages(
        chosen,
        seconds=seconds,
        root=root,
        folder=folder,
        environment={name: report[name] for name in _IN_EVERY_FILE},
        missing=report["left_out"],
        say=lambda line: print(line, flush=True),
    )
    print(folder)
    return int(any(outcome.state in ("failed", "stopped") for outcome in outcomes))


def _refuse(message: str) -> int:
    print(f"gpu_suite: {message}", file=sys.stderr)
    return 2


def _left_out(report: dict[str, Any]) -> list[str]:
    lines = [f"left out: {name}: {reason}" for name, reason in report["left_out"].items()]
    return lines + [f"left out: {wheel}" for wheel in report["wheels_left_out"]]


def _print_plan(
    chosen: Sequence[Stage], seconds: float, report: dict[str, Any], root: Path
) -> None:
    print(f"device: {report['device']}, driver {report['driver']}")
    for line in _left_out(report):
        print(line)
    for stage, share in zip(chosen, shares(chosen, seconds), strict=True):
        absent = [name for name in stage.needs if name in report["left_out"]]
        fate = f"left out, for want of {absent[0]}" if absent else f"up to {share:.0f} s"
        print(f"{stage.name}: {stage.what}: {fate}", flush=True)
        if stage.name in WORKERS and not absent:
            _print_listing(stage.name, root)


def _print_listing(name: str, root: Path) -> None:
    command = list_command(name, root)
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    text = done.stdout if done.returncode == 0 else done.stderr
    for line in text.strip().splitlines():
        print(f"  {line}")
