"""The tests marked `gpu`, run in this process and recorded as they end."""

from __future__ import annotations

import contextlib
import io
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from heatsink.benchmarks.suite import Context

_MARK = "mark.gpu"
_MESSAGE = 600


def files(root: Path) -> list[Path]:
    """The test files that mark a test `gpu`: others may want libraries that are not here."""
    found = sorted((root / "tests").rglob("test_*.py"))
    return [path for path in found if _MARK in path.read_text("utf-8")]


class Recorder:
    """A plugin of pytest that keeps each test's end, and gives up when the time is over."""

    def __init__(self, keep: Callable[[Any], None], seconds: float) -> None:
        self._keep = keep
        self._deadline = time.monotonic() + seconds
        self.passed = 0
        self.failed: dict[str, str] = {}
        self.skipped: dict[str, str] = {}
        self.errors: dict[str, str] = {}

    def result(self, complete: bool = False) -> dict[str, Any]:
        """What is known so far."""
        return {
            "passed": self.passed,
            "failed": self.failed,
            "skipped": self.skipped,
            "errors": self.errors,
            "complete": complete,
        }

    def pytest_runtest_logreport(self, report: Any) -> None:
        """After each phase of each test."""
        if report.failed:
            self.failed[report.nodeid] = report.longreprtext[-_MESSAGE:]
        elif report.skipped:
            self.skipped[report.nodeid] = str(report.longrepr)[-_MESSAGE:]
        elif report.when == "call":
            self.passed += 1
        self._keep(self.result())

    def pytest_collectreport(self, report: Any) -> None:
        """After each file was read."""
        if report.failed:
            self.errors[report.nodeid] = report.longreprtext[-_MESSAGE:]

    def pytest_runtest_setup(self, item: Any) -> None:
        """Before each test."""
        if time.monotonic() >= self._deadline:
            item.session.shouldstop = "the time was up"


class _Names:
    """A plugin of pytest that keeps the names of the chosen tests."""

    def __init__(self) -> None:
        self.found: list[str] = []

    def pytest_collection_finish(self, session: Any) -> None:
        """After every file was read."""
        self.found = [item.nodeid for item in session.items]


def _arguments(root: Path) -> list[str]:
    chosen = [str(path) for path in files(root)]
    options = ["-q", "-m", "gpu", "-p", "no:cacheprovider", "--continue-on-collection-errors"]
    return [*options, "--rootdir", str(root), *chosen]


def run(context: Context, keep: Callable[[Any], None]) -> None:
    """Run them; ends this process with pytest's code unless all passed."""
    import pytest

    recorder = Recorder(keep, context.seconds)
    code = pytest.main(_arguments(context.root), plugins=[recorder])
    keep(recorder.result(complete=code == pytest.ExitCode.OK))
    if code != pytest.ExitCode.OK:
        sys.exit(int(code))


def listing(root: Path) -> list[str]:
    """Each test by name where pytest is there, else the files."""
    try:
        import pytest
    except ImportError:
        return [path.relative_to(root).as_posix() for path in files(root)]
    names = _Names()
    with contextlib.redirect_stdout(io.StringIO()):
        pytest.main([*_arguments(root), "--collect-only"], plugins=[names])
    return names.found
