"""Compiles the kernels for every architecture and judges what they use; no GPU is needed.

What was compiled before is not compiled again where a record is kept: it is known by a digest of
the kernel's sources, its launch, architecture and Triton's version.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from heatsink.kernels import aot
from heatsink.kernels._compile import Binary, Job, binary_from, triton_version
from heatsink.kernels._op import Case, Op
from heatsink.kernels._resources import Row, Table, over_limits, used
from heatsink.kernels._sources import digest_of
from heatsink.kernels._workers import Failure, Progress, compile_jobs

_PART = 64


@dataclass(frozen=True)
class Verdict:
    """One binary: where it is used, what it uses, and what is wrong with it."""

    uses: tuple[aot.Use, ...]
    job: Job
    row: Row | None
    problems: tuple[str, ...]


@dataclass(frozen=True)
class Report:
    """What a check found.

    Attributes:
        verdicts: one for each binary.
        problems: all that is wrong, each naming op, case, kernel and architecture.
        compiled: how many binaries were compiled now; the others were in the record.
        table: the table that they were judged by, brought up to date.
        compared: whether the table is of the Triton version that compiled.
    """

    verdicts: tuple[Verdict, ...]
    problems: tuple[str, ...]
    compiled: int
    table: Table
    compared: bool


def name_of(use: aot.Use) -> str:
    """A use as the table names it."""
    return f"{use} sm_{use.arch}"


def identity(job: Job, triton: str) -> str:
    """A digest of all that decides a job's binary."""
    sources = digest_of(job.kernel, job.module, job.fusion)
    return hashlib.sha256(f"{triton} {sources} sm_{job.arch} {job.key}".encode()).hexdigest()


def check(
    ops: Sequence[Op],
    archs: Sequence[int],
    cases: Callable[[Op], Sequence[Case]] = aot.smoke_cases,
    *,
    space: bool = False,
    record: Path | None = None,
    table: Table | None = None,
    workers: int = 2,
    progress: Progress | None = None,
) -> Report:
    """Compile what the ops' cases need, and judge it.

    Args:
        ops: the ops.
        archs: the architectures.
        cases: which of an op's cases.
        space: also the configurations that the tuner would try: those must compile and can spill.
        record: a file of what was compiled before, read and written.
        table: what to judge by; the committed one if not given.
        workers: compiling processes at a time.
        progress: called with a description, the number done and the number in all.

    Raises:
        MissingTriton: if Triton is not installed.
    """
    table = Table.read() if table is None else table
    triton = triton_version()
    missing: list[str] = []
    found = list(aot.jobs(ops, archs, cases, space=space, missing=missing).values())
    results, compiled = _binaries([job for job, _ in found], triton, record, workers, progress)
    verdicts = [
        _judge(job, tuple(uses), result, table, table.triton == triton)
        for (job, uses), result in zip(found, results, strict=True)
    ]
    problems = [
        f"{', '.join(map(name_of, verdict.uses))}: {problem}"
        for verdict in verdicts
        for problem in verdict.problems
    ]
    problems += missing
    problems += [f"{text}: no smoke case reaches it" for text in aot.unreached(ops, archs)]
    rows = {
        name_of(use): verdict.row
        for verdict in verdicts
        for use in verdict.uses
        if verdict.row is not None and not use.searched
    }
    updated = table.updated(triton, rows, known=uses_of_all(ops, archs, table))
    return Report(tuple(verdicts), tuple(problems), compiled, updated, table.triton == triton)


def uses_of_all(ops: Iterable[Op], archs: Sequence[int], table: Table) -> set[str]:
    """The names of all rows there are to be: those of other ops and architectures as they are."""
    ops = list(ops)
    names = {op.name for op in ops}
    others = {
        name
        for name in table.rows
        if name.split("/")[0] not in names or int(name.rpartition("sm_")[2]) not in archs
    }
    mine = aot.jobs(ops, archs, lambda op: op.cases, missing=[])
    return others | {name_of(use) for _, uses in mine.values() for use in uses}


def _judge(
    job: Job, uses: tuple[aot.Use, ...], result: Binary | Failure, table: Table, compare: bool
) -> Verdict:
    if isinstance(result, Failure):
        return Verdict(uses, job, None, (result.reason,))
    row = used(result, job.arch)
    problems = over_limits(result, job.arch)
    judge = table.problems if compare else table.spills
    for use in uses:
        if not use.searched:
            problems += judge(name_of(use), row)
    return Verdict(uses, job, row, tuple(dict.fromkeys(problems)))


def _binaries(
    jobs: Sequence[Job],
    triton: str,
    record: Path | None,
    workers: int,
    progress: Progress | None,
) -> tuple[list[Binary | Failure], int]:
    """A binary for each job, from the record or compiled, and how many were compiled."""
    names = [identity(job, triton) for job in jobs]
    known: dict[str, Binary | Failure] = {**_read(record)}
    missing = [(name, job) for name, job in zip(names, jobs, strict=True) if name not in known]
    for start in range(0, len(missing), _PART):

        def shown(what: str, done: int, total: int, start: int = start) -> None:
            if progress:
                progress(what, start + done, len(missing))

        part = missing[start : start + _PART]
        with tempfile.TemporaryDirectory(prefix="heatsink-") as folder:
            results = compile_jobs([job for _, job in part], Path(folder), workers, shown)
        known |= zip((name for name, _ in part), results, strict=True)
        # Part by part, so that what is broken off goes on from there.
        if record is not None:
            _write(record, known)
    return [known[name] for name in names], len(missing)


def _read(record: Path | None) -> dict[str, Binary]:
    if record is None or not record.is_file():
        return {}
    found = json.loads(record.read_text("utf-8"))
    return {name: binary_from(fields) for name, fields in found.items()}


def _write(record: Path, results: dict[str, Binary | Failure]) -> None:
    record.parent.mkdir(parents=True, exist_ok=True)
    temporary = record.with_suffix(".partial")
    good = {name: asdict(found) for name, found in results.items() if isinstance(found, Binary)}
    temporary.write_text(json.dumps(good, indent=0), "utf-8")
    temporary.replace(record)
