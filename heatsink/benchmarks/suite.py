"""Runs stages one after another within a time limit, each in a process of its own.

A stage's result is written as soon as it is there, and what there is of it while it runs. A stage
that overruns its share of the time is stopped and its file says so; one that crashes leaves the
others alone. Needs nothing but Python itself.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType
from typing import Any

from heatsink.runtime.files import make_folder, write_whole

# Of its share; the rest is for what a stage does after its last measurement.
_OWN_LIMIT = 0.85
_GRACE_SECONDS = 5.0
_TAIL = 4000
_POLL_SECONDS = 0.2


@dataclass(frozen=True)
class Context:
    """What a stage's command is made from.

    Attributes:
        root: the checkout.
        folder: where results go; a stage may write further files there.
        part: where the stage writes its result, as JSON, whole each time it grows.
        seconds: after which it should begin nothing more.
    """

    root: Path
    folder: Path
    part: Path
    seconds: float


@dataclass(frozen=True)
class Stage:
    """One part of the suite; its result is `<name>.json`.

    Attributes:
        name: letters, digits, `_` and `-`.
        what: for people, a line.
        weight: its share of the time, against the other stages'.
        command: the program and its arguments.
        needs: modules without which it is left out.
    """

    name: str
    what: str
    weight: float
    command: Callable[[Context], list[str]]
    needs: tuple[str, ...] = ()


@dataclass(frozen=True)
class Outcome:
    """How a stage ended.

    Attributes:
        stage: its name.
        state: `done`, `failed`, `stopped` or `left out`.
        reason: why, where it is not done.
        seconds: that it took.
    """

    stage: str
    state: str
    reason: str
    seconds: float


class Record:
    """A stage's file: `write` replaces it, whole."""

    def __init__(self, path: Path, stage: Stage, limit: float, environment: Mapping[str, Any]):
        self._path = path
        self._head = {
            "stage": stage.name,
            "what": stage.what,
            "started": datetime.now(UTC).isoformat(timespec="seconds"),
            "limit_s": round(limit, 1),
            "environment": dict(environment),
        }

    def write(
        self, state: str, reason: str = "", seconds: float = 0.0, part: Any = None, tail: str = ""
    ) -> None:
        """Write how far the stage is."""
        document = {
            **self._head,
            "state": state,
            "reason": reason,
            "seconds": round(seconds, 1),
            "result": part,
            "output_tail": tail,
        }
        text = json.dumps(document, indent=2) + "\n"
        write_whole(self._path, lambda file: file.write(text.encode()))


def shares(stages: Sequence[Stage], seconds: float) -> list[float]:
    """How long each stage may take if each before it took its whole share."""
    total = sum(stage.weight for stage in stages)
    return [seconds * stage.weight / total for stage in stages]


def run_stages(
    stages: Sequence[Stage],
    *,
    seconds: float,
    root: Path,
    folder: Path,
    environment: Mapping[str, Any],
    missing: Mapping[str, str],
    say: Callable[[str], None] = lambda line: None,
) -> list[Outcome]:
    """Run stages in order; what one leaves of its time the later ones share.

    Args:
        stages: in order.
        seconds: for all of them.
        root: the checkout.
        folder: where results go; made where it is missing.
        environment: of the machine; stands in every file.
        missing: modules that can't be imported, and why.
        say: told how each stage ended.
    """
    make_folder(folder)
    deadline = time.monotonic() + seconds
    outcomes = []
    for place, stage in enumerate(stages):
        limit = shares(stages[place:], max(0.0, deadline - time.monotonic()))[0]
        record = Record(folder / f"{stage.name}.json", stage, limit, environment)
        absent = [name for name in stage.needs if name in missing]
        if absent or not limit:
            why = f"{absent[0]}: {missing[absent[0]]}" if absent else "no time was left"
            record.write("left out", why)
            outcome = Outcome(stage.name, "left out", why, 0.0)
        else:
            outcome = _Run(stage, limit, root, folder, record).outcome()
        why = f": {outcome.reason}" if outcome.reason else ""
        say(f"{stage.name}: {outcome.state} after {outcome.seconds:.0f} s{why}")
        outcomes.append(outcome)
    return outcomes


class _Run:
    """One stage under way."""

    def __init__(
        self, stage: Stage, limit: float, root: Path, folder: Path, record: Record
    ) -> None:
        self._stage = stage
        self._limit = limit
        self._root = root
        self._folder = folder
        self._record = record
        self._begun = time.monotonic()

    def outcome(self) -> Outcome:
        """Run it to its end."""
        with tempfile.TemporaryDirectory(prefix="heatsink-stage-") as work:
            part, log = Path(work) / "part.json", Path(work) / "log"
            seconds = self._limit * _OWN_LIMIT
            command = self._stage.command(Context(self._root, self._folder, part, seconds))
            self._record.write("running")
            try:
                with log.open("wb") as output, _started(command, self._root, output) as process:
                    code = self._watch(process, part)
            except OSError as error:
                return self._end("failed", str(error), part, log)
            except BaseException:
                self._end("stopped", "the suite was interrupted", part, log)
                raise
            if code is None:
                return self._end("stopped", f"its share of {self._limit:.0f} s was up", part, log)
            if code:
                return self._end("failed", f"exit code {code}", part, log)
            return self._end("done", "", part, log)

    def _end(self, state: str, reason: str, part: Path, log: Path) -> Outcome:
        seconds = time.monotonic() - self._begun
        tail = log.read_text("utf-8", errors="replace")[-_TAIL:]
        self._record.write(state, reason, seconds, _read(part), tail)
        return Outcome(self._stage.name, state, reason, seconds)

    def _watch(self, process: subprocess.Popen[bytes], part: Path) -> int | None:
        """The exit code, or None where the time is up; the record follows the part meanwhile."""
        seen = 0
        while time.monotonic() < self._begun + self._limit:
            with contextlib.suppress(subprocess.TimeoutExpired):
                return process.wait(_POLL_SECONDS)
            if part.exists() and part.stat().st_mtime_ns != seen:
                seen = part.stat().st_mtime_ns
                seconds = time.monotonic() - self._begun
                self._record.write("running", seconds=seconds, part=_read(part))
        return None


@contextlib.contextmanager
def _started(command: list[str], root: Path, output: Any) -> Iterator[subprocess.Popen[bytes]]:
    """A process with a group of its own, which is ended as a whole at the latest on leaving."""
    process = subprocess.Popen(
        command,
        cwd=root,
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        for number in (signal.SIGTERM, signal.SIGKILL):
            # The group outlives its first process where that left others behind.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(_GRACE_SECONDS)


def _read(part: Path) -> Any:
    try:
        return json.loads(part.read_text("utf-8"))
    except (OSError, ValueError):
        return None


def interruptible() -> None:
    """Make a termination an exception, so that a stage under way is ended and its file written."""

    def terminated(signum: int, frame: FrameType | None) -> None:
        sys.exit(128 + signum)

    signal.signal(signal.SIGTERM, terminated)
