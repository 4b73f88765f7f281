"""Device-seconds per image of an engine against diffusers eager, in one run.

python bench/images.py --engine out/engines/emoji --model models/emoji -o out/bench
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import torch
import typer

import heatsink
from heatsink import console, demo
from heatsink.comparison import compare


def main(
    engine: Annotated[Path, typer.Option(help="an engine of the model")] = Path(
        "out/engines/emoji"
    ),
    model: Annotated[Path, typer.Option(help="the diffusers folder")] = Path("models/emoji"),
    out: Annotated[
        Path, typer.Option("--out", "-o", help="where table, JSON and picture go")
    ] = Path("out/bench"),
    batches: Annotated[
        str, typer.Option(help="images at once, comma-separated, 12 at most")
    ] = "1,4,12",
    steps: Annotated[int, typer.Option(help="of DPM-Solver++(2M)")] = 20,
    guidance: Annotated[float, typer.Option(help="scale of guidance")] = 4.0,
    rounds: Annotated[int, typer.Option(help="timed runs of each")] = 7,
) -> None:
    """Measure, print the table, write `images.{md,json,png}`."""
    with console.quiet_libraries(), console.bars() as progress:
        found = compare(
            heatsink.load(engine, threads=torch.get_num_threads()),
            model,
            demo.PROMPTS,
            steps=steps,
            guidance=guidance,
            batches=[int(n) for n in batches.split(",")],
            rounds=rounds,
            progress=progress,
        )
    out.mkdir(parents=True, exist_ok=True)
    text = demo.table(found)
    (out / "images.md").write_text(text + "\n", encoding="utf-8")
    (out / "images.json").write_text(json.dumps(found.as_dict(), indent=2) + "\n", encoding="utf-8")
    demo.plot(found, out / "images.png")
    print(text)


if __name__ == "__main__":
    typer.run(main)
