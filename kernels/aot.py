"""Ahead of time: which kernels the ops' real uses need, compiled for any architecture, no GPU.

`jobs` lists what is to be compiled, from the ops' cases on the meta device; `compile_jobs` compiles
it in processes of their own.
"""

from __future__ import annotations

import json
import os
import queue
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from heatsink.kernels import _compile
from heatsink.kernels._compile import Binary, Job
from heatsink.kernels._config import Config, Target, lookup, targets
from heatsink.kernels._launch import ARCHS, Launch
from heatsink.kernels._op import Case, Op
from heatsink.kernels.errors import KernelError

Progress = Callable[[str, int, int], None]

_CONSTANTS = (bool, int, float, str, type(None))


@dataclass(frozen=True)
class Use:
    """Where a kernel is needed: `op/case/kernel`, numbered where the case needs it in several forms."""

    op: str
    case: str
    kernel: str
    arch: int
    number: int = 1
    searched: bool = False

    def __str__(self) -> str:
        number = f"#{self.number}" if self.number > 1 else ""
        return f"{self.op}/{self.case}/{self.kernel}{number}"


@dataclass(frozen=True)
class Failure:
    """A job that gave no binary, and why."""

    reason: str


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
) -> dict[str, tuple[Job, list[Use]]]:
    """What the ops' cases need, each binary once.

    Args:
        ops: the ops.
        archs: the architectures; an op is left out where none of its kernels is written for one.
        cases: which of an op's cases.
        space: also the configurations that the tuner would try, for the smoke cases.

    Returns:
        By architecture and launch key: the job, and where its binary is used.

    Raises:
        MissingConfig: if a case has no configuration.
    """
    found: dict[str, tuple[Job, list[Use]]] = {}
    for op in ops:
        for arch in archs:
            if not any(arch in kernel.archs for kernel in op.kernels):
                continue
            for case in cases(op):
                numbers: dict[str, int] = {}
                launches = {launch.key(): launch for launch in launches_of(op, case, arch)}
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
            reached = {job.kernel for job, _ in jobs([op], [arch]).values()}
            missing += [f"{op.name}: {name} on sm_{arch}" for name in sorted(wanted - reached)]
    return missing


def compile_jobs(
    jobs: Sequence[Job], folder: Path, *, workers: int = 2, progress: Progress | None = None
) -> list[Binary | Failure]:
    """Compile jobs in processes of their own.

    Args:
        jobs: what to compile.
        folder: where the cubins go; it exists.
        workers: processes at a time.
        progress: called with a description, the number done and the number in all.

    Returns:
        For each job its binary, or why there is none.
    """
    waiting: queue.SimpleQueue[int] = queue.SimpleQueue()
    for index in range(len(jobs)):
        waiting.put(index)
    results: list[Binary | Failure] = [Failure("not compiled")] * len(jobs)
    done = iter(range(1, len(jobs) + 1))
    lock = threading.Lock()

    def work() -> None:
        with _Worker(folder) as worker:
            while True:
                try:
                    index = waiting.get_nowait()
                except queue.Empty:
                    return
                results[index] = worker.compile(jobs[index])
                with lock:
                    if progress:
                        progress("compiling", next(done), len(jobs))

    threads = [threading.Thread(target=work, daemon=True) for _ in range(min(workers, len(jobs)))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


class _Worker:
    """A compiling process; one that dies is replaced, and its job is the failure."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._errors = tempfile.TemporaryFile()
        self._process: subprocess.Popen[str] | None = None

    def __enter__(self) -> _Worker:
        return self

    def __exit__(self, *exception: object) -> None:
        self._stop()
        self._errors.close()

    def _start(self) -> subprocess.Popen[str]:
        environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
        return subprocess.Popen(
            [sys.executable, "-m", _compile.__name__, str(self._folder)],
            env={**environment, **_compile.ENVIRONMENT},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
        )

    def _stop(self) -> int:
        if self._process is None:
            return 0
        process, self._process = self._process, None
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.close()
        code = process.wait()
        process.stdout.close()
        return code

    def compile(self, job: Job) -> Binary | Failure:
        """Have one job done."""
        process = self._process = self._process or self._start()
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.write(json.dumps(asdict(job)) + "\n")
            process.stdin.flush()
            line = process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            code = self._stop()
            self._errors.seek(0)
            told = self._errors.read().decode(errors="replace").strip().splitlines()[-1:]
            return Failure(f"the compiling process ended with {code}: {' '.join(told)}")
        answer = json.loads(line)
        if "error" in answer:
            return Failure(f"{answer['error']}: {answer['text'].strip()}")
        fields = answer["binary"]
        return Binary(**{**fields, "scratch": tuple(fields["scratch"])})
