"""Tunes kernels on this machine's GPU and keeps the configuration file up to date as it goes."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from heatsink.runtime.errors import CallerError, InvalidRequest
from heatsink.runtime.files import make_folder, write_whole

if TYPE_CHECKING:
    from heatsink.kernels._config import Target
    from heatsink.kernels._op import Op
    from heatsink.kernels.tune import Choice, Group


def select(names: Sequence[str]) -> list[Op]:
    """The ops of the catalog by name; all where none is named.

    Raises:
        InvalidRequest: if there is no such op.
    """
    from heatsink.kernels.catalog import ops

    known = ops()
    unknown = [name for name in names if name not in known]
    if unknown:
        raise InvalidRequest(f"--op: expected one of {', '.join(known)}, got {unknown[0]!r}")
    return [known[name] for name in names or known]


def read_document(path: Path) -> dict[str, Any] | None:
    """A configuration file as `tuning_file.merge` made it; None where there is none.

    Raises:
        CallerError: if it is something else.
    """
    try:
        document = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise CallerError(f"{path} can't be read as a configuration file: {error}") from None
    try:
        whole = isinstance(document["source"]["runs"], dict) and isinstance(document["ops"], dict)
    except (TypeError, KeyError):
        whole = False
    if not whole:
        raise CallerError(f"{path}: expected what an earlier tuning wrote, got something else")
    return dict(document)


def write_document(path: Path, document: Mapping[str, Any]) -> None:
    """Write JSON, whole or not at all."""
    text = json.dumps(document, indent=2) + "\n"
    write_whole(path, lambda file: file.write(text.encode()))


def default_path(target: Target) -> Path:
    """Where the look-up reads the configurations of a device."""
    from heatsink.kernels._config import FOLDER

    return FOLDER / f"{target.device}.json"


def tune_here(
    names: Sequence[str],
    seconds: float,
    out: Path | None = None,
    chosen: Callable[[Choice], None] = lambda choice: None,
    progress: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> Summary:
    """Tune on the current CUDA device; the file is rewritten, whole, after every choice.

    Args:
        names: of ops; all where none is given.
        seconds: how long it may take; the last race of a group may end a little later.
        out: the file; by default where the look-up reads it.
        chosen: called with each choice.
        progress: called with (what, done, total).

    Raises:
        MissingDevice: without a CUDA device.
        InvalidRequest: an op that is not there, or no time.
        CallerError: the file can't be read or written.
        DeviceLost: a kernel's failure took the device with it; what was chosen before is written.
    """
    from heatsink.kernels import tune
    from heatsink.kernels.precompile import precompile

    if not seconds > 0:
        raise InvalidRequest(f"--seconds: expected more than 0, got {seconds:g}")
    ops = select(names)
    device, target = tune.cuda_target()
    path = out or default_path(target)
    make_folder(path.parent)
    keep = Keeper(path, target)
    found, left_out = tune.groups(ops, target)

    def take(choice: Choice) -> None:
        keep.add(choice)
        chosen(choice)

    choices = tune.tune(
        found,
        device,
        tune.device_timer(device),
        deadline=time.monotonic() + seconds,
        prepare=precompile,
        chosen=take,
        progress=progress,
    )
    return Summary(path, choices, found[len(choices) :], left_out)


class Keeper:
    """Adds choices to a configuration file, one at a time.

    Raises:
        CallerError: if the file is there and is no such file.
    """

    def __init__(self, path: Path, target: Target) -> None:
        from heatsink.benchmarks import environment

        self._path = path
        self._document = read_document(path)
        self._arch = target.arch
        self._device = environment.device_name()
        self._when = datetime.now(UTC).isoformat(timespec="seconds")
        self._versions = {"driver": environment.driver(), **environment.versions()}

    def add(self, choice: Choice) -> None:
        """Write the file with one more choice."""
        from heatsink.kernels.tuning_file import merge

        self._document = merge(
            self._document,
            [choice],
            arch=self._arch,
            device=self._device,
            when=self._when,
            versions=self._versions,
        )
        write_document(self._path, self._document)


@dataclass(frozen=True)
class Summary:
    """What a tuning did.

    Attributes:
        path: the file.
        choices: what was chosen.
        unreached: the groups that the time did not reach.
        left_out: what there is no choice for, with the reason.
    """

    path: Path
    choices: list[Choice]
    unreached: list[Group]
    left_out: list[str]

    def notes(self) -> list[str]:
        """For people: what was not tuned, and why."""
        lines = [
            f"not reached, the time was up: {group.op.name} {dict(group.key)}"
            for group in self.unreached
        ]
        return lines + [f"left out: {reason}" for reason in self.left_out]

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "choices": [asdict(choice) for choice in self.choices],
            "unreached": [{"op": g.op.name, "key": dict(g.key)} for g in self.unreached],
            "left_out": self.left_out,
        }


def choice_lines(choice: Choice) -> list[str]:
    """A choice for people, and why configurations were skipped, equal reasons together."""
    head = f"{choice.op} {dict(choice.key)}"
    if choice.error:
        return [f"{head}: not tuned, {choice.error}"]
    times = ", ".join(
        f"{case} {choice.default_seconds[case] * 1e6:.1f} -> {seconds * 1e6:.1f} us"
        for case, seconds in choice.seconds.items()
    )
    kept = "default kept" if choice.config == choice.default else str(choice.config)
    rest = "" if choice.complete else "; not all were tried, the time was up"
    lines = [f"{head}: {kept}, of {choice.tried} tried; {times}{rest}"]
    reasons: dict[str, int] = {}
    for skipped in choice.skipped:
        reasons[skipped["reason"]] = reasons.get(skipped["reason"], 0) + 1
    return lines + [f"  skipped {count}: {reason}" for reason, count in reasons.items()]
