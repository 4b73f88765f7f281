"""`heatsink bench ...`: the command line of `heatsink.benchmarks`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from heatsink import console, flags

if TYPE_CHECKING:
    from heatsink.benchmarks.kernels_run import Run

app = typer.Typer(no_args_is_help=True, help="Measure on this machine.")

Device = Annotated[str, typer.Option(help="cuda or cpu; a GPU where there is one if not given")]
Ops = Annotated[list[str] | None, typer.Option("--op", help="an op; repeatable; all if not given")]
Cases = Annotated[list[str] | None, typer.Option("--case", help="a case of an op; repeatable")]
Rounds = Annotated[int, typer.Option(help="samples of each variant; 0: 50 on a GPU, 31 on a CPU")]
Seconds = Annotated[float | None, typer.Option(help="after which no case is begun")]
Compile = Annotated[bool, typer.Option(help="measure torch.compile too")]
Out = Annotated[Path, typer.Option("--out", "-o", help="where kernels.{json,md,png} go")]


@app.callback()
def _group() -> None:
    """Measure on this machine."""


@app.command()
def kernels(
    device: Device = "",
    op: Ops = None,
    case: Cases = None,
    rounds: Rounds = 0,
    seconds: Seconds = None,
    compile: Compile = True,
    out: Out = Path("out/bench"),
    quiet: flags.Quiet = False,
) -> None:
    """Every op against what a user would run otherwise; on a CPU, ratios only."""
    from heatsink.benchmarks import kernels_run

    wanted = kernels_run.Wanted(device, op or (), case or (), rounds, compile, seconds)
    with console.quiet_libraries(diffusers=False), console.bars(quiet) as progress:
        run = kernels_run.bench(wanted, progress=progress)
    paths = kernels_run.write(run, out)
    _print_table(run)
    for note in run.notes():
        console.note(note)
    for path in paths:
        print(path)


def _print_table(run: Run) -> None:
    from rich.table import Table

    from heatsink.benchmarks import report

    header, rows = report.filled(run.ordered())
    table = Table(title=f"{run.environment['device']}, {run.rounds} rounds")
    for place, column in enumerate(header):
        table.add_column(column, justify="left" if place < 2 else "right", overflow="fold")
    last = ""
    for name, *rest in rows:
        if last and name != last:
            table.add_section()
        table.add_row("" if name == last else name, *rest)
        last = name
    console.console().print(table)
