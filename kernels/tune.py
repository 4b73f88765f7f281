"""Finds configurations offline: every one worth trying, checked against the default, then timed.

A configuration decides in which order sums are taken, so it is chosen for a key of per-row
dimensions and an architecture, never for a batch: cases of one key are weighed together, by the
geometric mean of their times against the default's. `heatsink kernels tune` runs it; what it finds
is data for `configs/<device>.json` (`tuning_file` makes it), which `_config.lookup` reads.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from heatsink.kernels._config import Config, Key, Target, lookup, target_of
from heatsink.kernels._launch import Launch, run
from heatsink.kernels._op import Case, Inputs, Op
from heatsink.kernels.errors import DeviceLost, MissingConfig, MissingDevice
from heatsink.kernels.timing import Spread, Timed, interleaved
from heatsink.kernels.tuning_gate import check, check_device, failures, one_line, tensors

# Median seconds of running each list of launches, timed in turn over so many rounds.
Timer = Callable[[Sequence[Sequence[Launch]], int], list[float]]

QUICK_ROUNDS = 10
FINAL_ROUNDS = 50
FINALISTS = 4
# Configurations that are compiled ahead together.
CHUNK = 32
# A configuration must beat the default by this, or the default stays: less is noise.
MARGIN = 0.02


@dataclass(frozen=True)
class Group:
    """What one choice is made for.

    Attributes:
        op: the op.
        key: per-row dimensions, as `op.key` gives them.
        cases: the op's cases that have this key.
        default: the configuration that is looked up now.
        others: the configurations to try against it.
    """

    op: Op
    key: Key
    cases: tuple[Case, ...]
    default: Config
    others: tuple[Config, ...]


@dataclass
class Choice:
    """What was found for a group.

    Attributes:
        op: its name.
        key: the group's key.
        config: the fastest configuration; the default where none is faster by the margin.
        default: the default.
        seconds: of `config`, by case.
        default_seconds: of `default`, by case, from the same rounds.
        tried: configurations that were run, the default among them.
        skipped: configurations that could not be used, each with the reason.
        complete: whether every configuration was tried before the time was up.
        error: why nothing was measured: the default configuration's own failure; else empty.
    """

    op: str
    key: Key
    config: Config
    default: Config
    seconds: dict[str, float] = field(default_factory=dict)
    default_seconds: dict[str, float] = field(default_factory=dict)
    tried: int = 1
    skipped: list[dict[str, Any]] = field(default_factory=list)
    complete: bool = True
    error: str = ""


def groups(ops: Iterable[Op], target: Target) -> tuple[list[Group], list[str]]:
    """Every choice that there is to make on a target, and what is left out, with the reason."""
    found: list[Group] = []
    left_out: list[str] = []
    for op in ops:
        if all(min(kernel.archs) > target.arch for kernel in op.kernels):
            left_out.append(f"{op.name}: no kernel for sm_{target.arch}")
            continue
        by_key: dict[tuple[tuple[str, int | str], ...], list[Case]] = {}
        for case in (case for case in op.cases if case.timed):
            key = op.key(**case.make(torch.device("meta")))
            by_key.setdefault(tuple(sorted(key.items())), []).append(case)
        for items, cases in by_key.items():
            try:
                found.append(_group(op, dict(items), tuple(cases), target))
            except MissingConfig as error:
                left_out.append(str(error))
    return found, left_out


def _group(op: Op, key: Key, cases: tuple[Case, ...], target: Target) -> Group:
    default = lookup(op.name, key, target)
    others = [config for config in op.space(key, target.arch) if config != default]
    return Group(op, key, cases, default, tuple(others))


def device_timer(device: torch.device, deadline: float | None = None) -> Timer:
    """A timer of launches on a device.

    Raises:
        MissingDevice: if it is no CUDA device: elsewhere kernels run in an interpreter.
    """
    if device.type != "cuda":
        raise MissingDevice(f"tuning: expected a CUDA device, got {device}")

    def measure(candidates: Sequence[Sequence[Launch]], rounds: int) -> list[float]:
        timed = [Timed(lambda launches=launches: run(launches)) for launches in candidates]  # type: ignore[misc]
        return [Spread.of(s).median for s in interleaved(timed, rounds, device, deadline)]

    return measure


def tune(
    found: Sequence[Group],
    device: torch.device,
    timer: Timer,
    *,
    deadline: float,
    prepare: Callable[[Sequence[Launch]], None] = lambda launches: None,
    chosen: Callable[[Choice], None] = lambda choice: None,
    progress: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> list[Choice]:
    """Choose a configuration for every group that the time allows.

    Each group may spend a part of the time that is left when its turn comes: parts are as the
    square roots of how many configurations the groups try, between equal and proportional.

    Args:
        found: from `groups`.
        device: where inputs are made and kernels run.
        timer: times launches.
        deadline: a reading of `time.monotonic`.
        prepare: called with launches, without memory, that will be tried soon.
        chosen: called with each choice as it is made.
        progress: called with (what, done, total).

    Returns:
        The choices, in the order of `found`; those that the time did not reach are missing.

    Raises:
        DeviceLost: if a kernel's failure took the device with it; nothing can be tried after it.
    """
    choices = []
    weights = [math.sqrt(1 + len(group.others)) for group in found]
    for place, group in enumerate(found):
        progress("tuning", place, len(found))
        left = deadline - time.monotonic()
        if left <= 0:
            break
        until = time.monotonic() + left * weights[place] / sum(weights[place:])
        choice = _tune_group(group, device, timer, prepare, until)
        choices.append(choice)
        chosen(choice)
    progress("tuning", len(found), len(found))
    return choices


@dataclass
class _Case:
    """A case under way: its inputs, and the default's outputs."""

    name: str
    inputs: Inputs
    expected: list[Tensor]


Race = list[tuple[float, dict[str, float]]]


# Of a configuration: its time against the default's, itself, and both's seconds by case.
Outcome = tuple[float, Config, dict[str, float], dict[str, float]]


def _tune_group(
    group: Group,
    device: torch.device,
    timer: Timer,
    prepare: Callable[[Sequence[Launch]], None],
    until: float,
) -> Choice:
    choice = Choice(group.op.name, group.key, group.default, group.default)
    try:
        cases = [_open_case(group, case, device) for case in group.cases]
    except failures() as error:
        check_device(device, f"{group.op.name} {dict(group.key)} with {group.default}")
        choice.error = f"the default configuration: {one_line(error)}"
        return choice
    trial = _Trial(group, device, timer, cases, choice)
    scored: list[tuple[float, Config]] = []
    others = distinct(group)
    for place, config in enumerate(others):
        if place % CHUNK == 0:
            prepare(list(_launches(group, others[place : place + CHUNK])))
        if time.monotonic() >= until:
            choice.complete = False
            break
        choice.tried += 1
        race = trial.alone(config, QUICK_ROUNDS)
        if race is not None:
            scored.append((race[1][0], config))
    scored.sort(key=lambda pair: pair[0])
    trial.settle([config for _, config in scored[:FINALISTS]])
    return choice


@dataclass
class _Trial:
    """A group under way, and what is found for it."""

    group: Group
    device: torch.device
    timer: Timer
    cases: Sequence[_Case]
    choice: Choice

    def alone(self, config: Config, rounds: int) -> Race | None:
        """Race one configuration against the default; where it fails, its reason is noted."""
        try:
            return _race(self.group, [config], self.cases, self.timer, rounds)
        except failures() as error:
            self.choice.skipped.append({"config": config, "reason": one_line(error)})
            self._check_device([config])
            return None

    def settle(self, finalists: Sequence[Config]) -> None:
        """Choose between the finalists and the default, by many rounds."""
        choice = self.choice
        try:
            outcomes = self._finals(finalists)
        except DeviceLost:
            raise
        except failures() as error:
            choice.error = f"the default configuration: {one_line(error)}"
            return
        score, config, seconds, default_seconds = min(outcomes, key=lambda outcome: outcome[0])
        choice.default_seconds = default_seconds
        won = score <= 1 - MARGIN
        choice.config = config if won else self.group.default
        choice.seconds = seconds if won else default_seconds

    def _finals(self, finalists: Sequence[Config]) -> list[Outcome]:
        """The finalists' outcomes, the default's own among them unless they race alone."""
        try:
            race = _race(self.group, finalists, self.cases, self.timer, FINAL_ROUNDS)
        except failures():
            self._check_device([self.group.default, *finalists])
            if not finalists:
                raise
            # It is not known which of them failed: each races alone, so that it takes none along.
            races = [(config, self.alone(config, FINAL_ROUNDS)) for config in finalists]
            outcomes = [(r[1][0], config, r[1][1], r[0][1]) for config, r in races if r]
            return outcomes or self._finals([])
        entrants = [self.group.default, *finalists]
        default_seconds = race[0][1]
        return [
            (score, config, seconds, default_seconds)
            for config, (score, seconds) in zip(entrants, race, strict=True)
        ]

    def _check_device(self, configs: Sequence[Config]) -> None:
        """Make sure that the device still answers after one of `configs` failed."""
        tried = " or ".join(map(str, configs))
        check_device(self.device, f"{self.group.op.name} {dict(self.group.key)} with {tried}")


def distinct(group: Group) -> list[Config]:
    """The group's other configurations, without those that launch what an earlier one does.

    Those that differ from the default in the fewest parameters come first: a limit on time then
    leaves the default's neighbourhood searched, not a corner of the space.
    """
    seen = {_signature(group, group.default)}
    kept = []
    for config in group.others:
        signature = _signature(group, config)
        # What can't be planned is kept: trying it gives the reason.
        if signature is None or signature not in seen:
            kept.append(config)
        seen.add(signature)
    return sorted(kept, key=lambda config: _distance(config, group.default))


def _distance(config: Config, default: Config) -> int:
    """In how many parameters two configurations differ."""
    return len({name for name, _ in config.items() ^ default.items()})


def _signature(group: Group, config: Config) -> tuple[object, ...] | None:
    """What a configuration launches for the group's cases; None where it can't be planned."""
    launches = list(_launches(group, [config]))
    return tuple((one.key(), one.grid) for one in launches) or None


def _launches(group: Group, configs: Sequence[Config]) -> Iterator[Launch]:
    """What configurations launch, on the meta device; those that can't be planned are left out."""
    for case in group.cases:
        inputs = case.make(torch.device("meta"))
        for config in configs:
            with contextlib.suppress(*failures()):
                yield from group.op.plan(config, **inputs)[1]


def _open_case(group: Group, case: Case, device: torch.device) -> _Case:
    inputs = case.make(device)
    outputs, launches = group.op.plan(group.default, **inputs)
    run(launches)
    return _Case(case.name, inputs, [out.clone() for out in tensors(outputs)])


def _race(
    group: Group, configs: Sequence[Config], cases: Sequence[_Case], timer: Timer, rounds: int
) -> Race:
    """Time the default and `configs`, in turn, on every case.

    Returns:
        For the default and then each of `configs`: the geometric mean of its times against the
        default's, and its seconds by case.

    Raises:
        WrongResult: if an output is not what the default gives.
    """
    entrants = [group.default, *configs]
    seconds: list[dict[str, float]] = [{} for _ in entrants]
    for opened in cases:
        plans = []
        for config in entrants:
            outputs, launches = group.op.plan(config, **opened.inputs)
            run(launches)
            check(group.op, group.key, tensors(outputs), opened.expected)
            plans.append(launches)
        for place, value in enumerate(timer(plans, rounds)):
            seconds[place][opened.name] = value
    return [(_geometric_mean(mine, seconds[0]), mine) for mine in seconds]


def _geometric_mean(mine: dict[str, float], theirs: dict[str, float]) -> float:
    logs = [math.log(mine[name] / theirs[name]) for name in mine]
    return math.exp(sum(logs) / len(logs))


def cuda_target() -> tuple[torch.device, Target]:
    """The current CUDA device and what kernels are chosen for there.

    Raises:
        MissingDevice: if there is none.
    """
    if not torch.cuda.is_available():
        raise MissingDevice("expected a CUDA device, found none: nothing can be timed here")
    device = torch.device("cuda", torch.cuda.current_device())
    return device, target_of(device)
