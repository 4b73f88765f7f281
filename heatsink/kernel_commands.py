"""The command line's `heatsink kernels`: what the kernels are, checked and compiled with no GPU."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from heatsink import console
from heatsink.flags import Quiet
from heatsink.runtime.errors import HeatsinkError, InvalidRequest
from heatsink.runtime.files import make_folder

if TYPE_CHECKING:
    from heatsink.kernels._compile import Binary, Job
    from heatsink.kernels._op import Case, Op
    from heatsink.kernels.aot import Use
    from heatsink.kernels.check import Report

app = typer.Typer(
    no_args_is_help=True, help="List, check and compile the kernels; no GPU is needed."
)

ALL = "sm_80,sm_89,sm_90,sm_100,sm_120"

Archs = Annotated[str, typer.Option("--arch", help="architectures, such as sm_90 or sm_80,sm_90")]
Ops = Annotated[list[str] | None, typer.Option("--op", help="only this op; may be repeated")]
Cases = Annotated[list[str] | None, typer.Option("--case", help="only this case; repeatable")]
CacheOut = Annotated[Path, typer.Option("--out", "-o", help="the folder to write")]
Workers = Annotated[int, typer.Option(help="compiling processes at a time")]
Every = Annotated[bool, typer.Option("--all/--smoke", help="all cases, or one for each kernel")]
Space = Annotated[bool, typer.Option("--space", help="also all that the tuner would try")]
Write = Annotated[bool, typer.Option("--write", help="bring the committed table up to date")]
Record = Annotated[
    Path | None, typer.Option(help="a file of what was compiled before, to pass over it")
]


def _archs(text: str) -> list[int]:
    from heatsink.kernels.aot import parse_arch

    try:
        return sorted({parse_arch(part.strip()) for part in text.split(",")})
    except ValueError as error:
        raise InvalidRequest(f"--arch: {error}") from None


def chosen_ops(names: Sequence[str] | None) -> list[Op]:
    """The ops of these names; all of them if none is given."""
    from heatsink.kernels.catalog import ops

    known = ops()
    for name in names or ():
        if name not in known:
            raise InvalidRequest(f"--op: expected one of {', '.join(known)}, got {name!r}")
    return [known[name] for name in dict.fromkeys(names or known)]


def _cases(ops: Sequence[Op], names: Sequence[str] | None) -> Callable[[Op], tuple[Case, ...]]:
    known = {case.name for op in ops for case in op.cases}
    for name in names or ():
        if name not in known:
            listed = ", ".join(sorted(known))
            raise InvalidRequest(f"--case: expected one of {listed}, got {name!r}")
    return lambda op: tuple(case for case in op.cases if not names or case.name in names)


@app.command("list")
def show(arch: Archs = ALL, op: Ops = None) -> None:
    """Print the ops, their cases, and the kernels that each case launches."""
    from rich.console import Console
    from rich.table import Table

    from heatsink.kernels import aot

    ops = chosen_ops(op)
    found = aot.jobs(ops, _archs(arch), lambda op: op.cases)
    table = Table(title=f"{len(ops)} ops, {len(found)} binaries")
    for column in ("op", "case", "kernel", "architectures"):
        table.add_column(column, overflow="fold")
    rows: dict[tuple[str, str, str], list[int]] = {}
    for _, uses in found.values():
        for use in uses:
            rows.setdefault((use.op, use.case, str(use).split("/")[-1]), []).append(use.arch)
    for names, archs in rows.items():
        table.add_row(*names, " ".join(f"sm_{arch}" for arch in sorted(archs)))
    Console().print(table)


@app.command()
def check(
    arch: Archs = ALL,
    op: Ops = None,
    every: Every = False,
    space: Space = False,
    write: Write = False,
    record: Record = None,
    workers: Workers = 2,
    quiet: Quiet = False,
) -> None:
    """Compile the kernels and judge their registers, spills and shared memory."""
    from heatsink.kernels import aot
    from heatsink.kernels.check import check as check_ops

    with console.bars(quiet) as progress:
        report = check_ops(
            chosen_ops(op),
            _archs(arch),
            (lambda op: op.cases) if every else aot.smoke_cases,
            space=space,
            record=record,
            workers=workers,
            progress=progress,
        )
    if not quiet:
        _print(report)
    if write:
        report.table.write()
        console.note("the table was brought up to date; a spill needs a reason there")
    elif not report.compared:
        console.note("the table is of another version of Triton: only hard limits were checked")
    told = f"{len(report.verdicts)} binaries, {report.compiled} of them compiled now"
    if report.problems and not write:
        lines = "\n  ".join(report.problems)
        raise HeatsinkError(f"{told}; {len(report.problems)} problems:\n  {lines}")
    console.console().print(told)


def _print(report: Report) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title="What the kernels use")
    table.add_column("used by", overflow="fold")
    for column in ("sm", "registers", "spilled", "shared"):
        table.add_column(column, justify="right")
    for verdict in report.verdicts:
        row, uses = verdict.row, [use for use in verdict.uses if not use.searched]
        if not uses and not verdict.problems:
            continue
        numbers = (row.registers, row.spill_bytes, row.shared_bytes) if row else ("failed", "", "")
        style = "red" if verdict.problems else None
        text = "\n".join(str(use) for use in uses or verdict.uses[:1])
        table.add_row(text, str(verdict.job.arch), *map(str, numbers), style=style)
    Console().print(table)


@app.command("compile")
def compile_kernels(
    arch: Archs,
    out: CacheOut,
    op: Ops = None,
    case: Cases = None,
    workers: Workers = 2,
    quiet: Quiet = False,
) -> None:
    """Write a folder from which a machine runs the kernels without compiling them."""
    import heatsink
    from heatsink.kernels import aot
    from heatsink.kernels._cache import COMMAND, write_cache
    from heatsink.kernels._compile import triton_version

    triton_version()
    ops, archs = chosen_ops(op), _archs(arch)
    found = aot.jobs(ops, archs, _cases(ops, case))
    if not found:
        raise InvalidRequest(f"--arch: none of these kernels is written for {arch}")
    names = ",".join(f"sm_{number}" for number in archs)
    command = f"{COMMAND} --arch {names} -o {shlex.quote(str(out))}"
    command += "".join(f" --op {name}" for name in op or ())
    command += "".join(f" --case {shlex.quote(name)}" for name in case or ())
    make_folder(out.parent)
    with console.bars(quiet) as progress:

        def make(folder: Path) -> list[tuple[Job, Binary]]:
            return _compiled(found, folder, workers, progress)

        count = write_cache(out, make, command, heatsink.__version__)
    print(f"{out}  {count} binaries for {names}")


def _compiled(
    found: dict[str, tuple[Job, list[Use]]],
    folder: Path,
    workers: int,
    progress: Callable[[str, int, int], None],
) -> list[tuple[Job, Binary]]:
    from heatsink.kernels._workers import Failure, compile_jobs

    jobs = [job for job, _ in found.values()]
    results = compile_jobs(jobs, folder, workers=workers, progress=progress)
    made, failed = [], []
    for (job, uses), result in zip(found.values(), results, strict=True):
        if isinstance(result, Failure):
            failed.append(f"{uses[0]} on sm_{job.arch}: {result.reason}")
        else:
            made.append((job, result))
    if failed:
        raise HeatsinkError(f"{len(failed)} of {len(jobs)} failed:\n  " + "\n  ".join(failed))
    return made
