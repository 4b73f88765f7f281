"""Adapters: swaps of a whole UNet's, batches that mix them, a bank that grows; in one run.

python bench/lora.py -o out/bench
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Annotated

import torch
import typer

from heatsink import console
from heatsink.benchmarks import lora


def main(
    out: Annotated[
        Path, typer.Option("--out", "-o", help="where table, JSON and picture go")
    ] = Path("out/bench"),
    model: Annotated[
        Path, typer.Option(help="a diffusers folder: its UNet carries the growing bank on a CPU")
    ] = Path("models/emoji"),
    device: Annotated[str, typer.Option(help="cpu or cuda; by default what is there")] = "",
    rounds: Annotated[int, typer.Option(help="timed rounds of each; 0: the default")] = 0,
) -> None:
    """Measure, print the tables, write `lora.{md,json,png}`."""
    where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    config = json.loads((model / "unet" / "config.json").read_text(encoding="utf-8"))
    settings = lora.defaults(where, config)
    if rounds:
        settings = dataclasses.replace(settings, rounds=rounds)
    out.mkdir(parents=True, exist_ok=True)

    def keep(results: lora.Results) -> None:
        text = json.dumps(results.as_dict(), indent=2) + "\n"
        (out / "lora.json").write_text(text, encoding="utf-8")

    with console.quiet_libraries(), console.bars() as progress:
        results = lora.run(settings, progress=progress, keep=keep)
    text = lora.markdown(results)
    (out / "lora.md").write_text(text + "\n", encoding="utf-8")
    lora.plot(results, out / "lora.png")
    print(text)


if __name__ == "__main__":
    typer.run(main)
