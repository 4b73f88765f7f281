"""`heatsink kernels tune`: the command line of `heatsink.tuning`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from heatsink import console, flags

if TYPE_CHECKING:
    from heatsink.kernels.tune import Choice

Ops = Annotated[
    list[str] | None, typer.Option("--op", help="an op to tune; repeatable; all if not given")
]
Seconds = Annotated[float, typer.Option(help="how long it may take")]
ConfigOut = Annotated[
    Path | None,
    typer.Option("--out", "-o", help="the file; kernels/configs/<device>.json if not given"),
]


def tune(
    op: Ops = None, seconds: Seconds = 600.0, out: ConfigOut = None, quiet: flags.Quiet = False
) -> None:
    """Measure every configuration worth trying on this machine's GPU and write the best down."""
    from heatsink.tuning import choice_lines, tune_here

    def say(choice: Choice) -> None:
        if not quiet:
            console.console().print("\n".join(choice_lines(choice)), markup=False)

    with console.bars(quiet) as progress:
        summary = tune_here(op or (), seconds, out, chosen=say, progress=progress)
    for line in summary.notes():
        console.note(line)
    print(summary.path)
