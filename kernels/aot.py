"""Ahead of time: which kernels the ops' real uses need on an architecture.

Everything here is a list made from the ops' cases on the meta device; `_workers` compiles it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from heatsink.kernels._compile import Job
from heatsink.kernels._config import Config, lookup, targets
from heatsink.kernels._launch import ARCHS, Launch
from heatsink.kernels._op import Case, Op
from heatsink.kernels.errors import KernelError, MissingConfig

_CONSTANTS = (bool, int, float, str, type(None))


@dataclass(frozen=True)
class Use:
    """Where a kernel is needed, and which of the forms in which a case needs it.

    Attributes:
        searched: whether only the tuner would launch it so.
    """

    op: str
    case: str
    kernel: str
    arch: int
    number: int = 1
    searched: bool = False

    def __str__(self) -> str:
        number = f"#{self.number}" if self.number > 1 else ""
        return f"{self.op}/{self.case}/{self.kernel}{number}"


def parse_arch(text: str) -> int:
    """`sm_90` -> 90.

    Raises:
        ValueError: if it is none of the architectures that kernels are written for.
    """
    names = {f"sm_{arch}": arch for arch in ARCHS}
    if text not in names:
        raise ValueError(f"arch: expected one of {', '.join(names)}, got {text!r}")
    return names[text]


def smoke_cases(op: Op) -> tuple[Case, ...]:
    """The cases that together reach every kernel of an op."""
    return tuple(c for c in op.cases if c is op.cases[0] or c.name in op.smoke)


def job_of(launch: Launch, arch: int) -> Job:
    """What is compiled for a launch.

    Raises:
        KernelError: if a constant is no plain value.
    """
    kernel = launch.kernel
    for name, value in launch.constants.items():
        if type(value) not in _CONSTANTS:
            raise KernelError(f"{kernel.name}: {name}: expected a plain constant, got {value!r}")
    return Job(
        kernel=kernel.name,
        module=kernel.module,
        key=launch.key(),
        signature=launch.signature(),
        constants=dict(launch.constants),
        warps=launch.warps,
        stages=launch.stages,
        fusion=kernel.fusion,
        plain=kernel.plain,
        arch=arch,
    )


def launches_of(op: Op, case: Case, arch: int) -> list[Launch]:
    """A case's launches on an architecture, under every configuration known for its devices."""
    inputs = case.make(torch.device("meta"))
    key = op.key(**inputs)
    configs: list[Config] = []
    for target in targets(arch):
        config = lookup(op.name, key, target)
        if config not in configs:
            configs.append(config)
    return [launch for config in configs for launch in _planned(op, inputs, config, arch)]


def _planned(op: Op, inputs: dict[str, Any], config: Config, arch: int) -> list[Launch]:
    _, launches = op.plan(config, **inputs)
    return [launch for launch in launches if 0 not in launch.grid and arch in launch.kernel.archs]


def _searched(op: Op, arch: int) -> Iterator[tuple[Case, Launch]]:
    for case in smoke_cases(op):
        inputs = case.make(torch.device("meta"))
        for config in op.space(op.key(**inputs), arch):
            yield from ((case, launch) for launch in _planned(op, inputs, config, arch))


def jobs(
    ops: Iterable[Op],
    archs: Sequence[int],
    cases: Callable[[Op], Sequence[Case]] = smoke_cases,
    *,
    space: bool = False,
    missing: list[str] | None = None,
) -> dict[str, tuple[Job, list[Use]]]:
    """What the ops' cases need, each binary once.

    Args:
        ops: the ops.
        archs: the architectures; an op is left out where none of its kernels is written for one.
        cases: which of an op's cases.
        space: also the configurations that the tuner would try, for the smoke cases.
        missing: takes what has no configuration, instead of an error.

    Returns:
        By architecture and launch key: the job, and where its binary is used.

    Raises:
        MissingConfig: if a case has no configuration and `missing` is not given.
    """
    found: dict[str, tuple[Job, list[Use]]] = {}
    for op in ops:
        for arch in archs:
            if not any(arch in kernel.archs for kernel in op.kernels):
                continue
            for case in cases(op):
                numbers: dict[str, int] = {}
                try:
                    planned = launches_of(op, case, arch)
                except MissingConfig as error:
                    if missing is None:
                        raise
                    missing.append(f"{op.name}/{case.name} sm_{arch}: {error}")
                    continue
                launches = {launch.key(): launch for launch in planned}
                for launch in launches.values():
                    name = launch.kernel.name
                    numbers[name] = numbers.get(name, 0) + 1
                    use = Use(op.name, case.name, name, arch, numbers[name])
                    _add(found, launch, use)
            for case, launch in _searched(op, arch) if space else ():
                use = Use(op.name, case.name, launch.kernel.name, arch, searched=True)
                _add(found, launch, use)
    return found


def _add(found: dict[str, tuple[Job, list[Use]]], launch: Launch, use: Use) -> None:
    name = f"sm_{use.arch} {launch.key()}"
    if name not in found:
        found[name] = job_of(launch, use.arch), []
    found[name][1].append(use)


def unreached(ops: Iterable[Op], archs: Sequence[int]) -> list[str]:
    """The kernels that no smoke case reaches on an architecture that they declare."""
    missing = []
    for op in ops:
        for arch in archs:
            wanted = {kernel.name for kernel in op.kernels if arch in kernel.archs}
            reached = {job.kernel for job, _ in jobs([op], [arch], missing=[]).values()}
            missing += [f"{op.name}: {name} on sm_{arch}" for name in sorted(wanted - reached)]
    return missing
