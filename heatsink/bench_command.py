"""`heatsink bench ...`: the command line of `heatsink.benchmarks`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from heatsink import console, flags
from heatsink.runtime.errors import InvalidRequest

if TYPE_CHECKING:
    from heatsink.benchmarks.kernels_run import Run
    from heatsink.benchmarks.latency_results import Results

app = typer.Typer(no_args_is_help=True, help="Measure on this machine.")

Device = Annotated[str, typer.Option(help="cuda or cpu; a GPU where there is one if not given")]
Ops = Annotated[list[str] | None, typer.Option("--op", help="an op; repeatable; all if not given")]
Cases = Annotated[list[str] | None, typer.Option("--case", help="a case of an op; repeatable")]
Rounds = Annotated[int, typer.Option(help="samples of each variant; 0: 50 on a GPU, 31 on a CPU")]
Seconds = Annotated[float | None, typer.Option(help="after which no case is begun")]
Compile = Annotated[bool, typer.Option(help="measure torch.compile too")]
Out = Annotated[Path, typer.Option("--out", "-o", help="where kernels.{json,md,png} go")]

Model = Annotated[Path, typer.Option(help="a diffusers folder")]
Config = Annotated[str, typer.Option(help="sd15 or sdxl with random weights, instead of a folder")]
Precision = Annotated[
    list[str] | None,
    typer.Option(help="fp32 or bf16; repeatable. On a CPU both, on a GPU bf16 if not given"),
]
Level = Annotated[
    list[str] | None,
    typer.Option(help="unet (a step), vae (decoding) or image (a generation); repeatable"),
]
System = Annotated[
    list[str] | None, typer.Option(help="by its name in the tables; repeatable; all if not given")
]
Rows = Annotated[str, typer.Option(help="of the UNet, comma-separated; 1,2,4,8,16 if not given")]
Images = Annotated[str, typer.Option(help="at a time, comma-separated; 1,2,4,8 if not given")]
LevelRounds = Annotated[int, typer.Option(help="timed rounds; 0: by the level, 3 with --config")]
Steps = Annotated[int, typer.Option(help="of a generation")]
Guidance = Annotated[float, typer.Option(help="scale of classifier-free guidance")]
Threads = Annotated[int, typer.Option(help="of every system on a CPU; 0: PyTorch's own number")]
Cold = Annotated[bool, typer.Option(help="measure fresh processes too")]
BenchSeconds = Annotated[float | None, typer.Option(help="after which nothing more is begun")]
Work = Annotated[
    Path | None, typer.Option(help="where engines and models go and stay; a temporary folder")
]
LatencyOut = Annotated[Path, typer.Option("--out", "-o", help="where latency.{json,md,png} go")]


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


@app.command()
def latency(
    model: Model = Path("models/emoji"),
    config: Config = "",
    device: Device = "",
    precision: Precision = None,
    level: Level = None,
    system: System = None,
    rows: Rows = "",
    images: Images = "",
    rounds: LevelRounds = 0,
    steps: Steps = 20,
    guidance: Guidance = 4.0,
    threads: Threads = 0,
    cold: Cold = True,
    seconds: BenchSeconds = None,
    work: Work = None,
    out: LatencyOut = Path("out/bench"),
    quiet: flags.Quiet = False,
) -> None:
    """Whole systems at equal precision: a UNet step, VAE decoding, generations; one run."""
    from heatsink.benchmarks import latency_run

    asked = latency_run.Asked(
        model=model,
        config=config,
        device=device,
        precisions=precision or (),
        levels=level or (),
        systems=system or (),
        rows=_numbers("--rows", rows),
        images=_numbers("--images", images),
        rounds=rounds,
        steps=steps,
        guidance=guidance,
        threads=threads,
        cold=cold,
        seconds=seconds,
        work=work,
    )
    with console.quiet_libraries(diffusers=False), console.bars(quiet) as progress:
        results = latency_run.bench(
            asked, progress=progress, keep=lambda results: latency_run.keep(results, out)
        )
    paths = latency_run.write(results, out)
    _print_latency(results)
    for path in paths:
        print(path)


def _numbers(flag: str, text: str) -> list[int]:
    parts = [part.strip() for part in text.split(",")] if text else []
    if not all(part.isascii() and part.isdecimal() for part in parts):
        raise InvalidRequest(f"{flag}: expected numbers, such as 1,2,4, got {text!r}")
    return [int(part) for part in parts]


def _print_latency(results: Results) -> None:
    from rich.table import Table

    from heatsink.benchmarks import latency_report

    for title, header, rows in latency_report.titled(results):
        table = Table(title=title)
        for place, column in enumerate(header):
            table.add_column(column, justify="left" if place < 3 else "right", overflow="fold")
        for row in rows:
            table.add_row(*row)
        console.console().print(table)
    for note in latency_report.notes(results):
        console.note(note)


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
