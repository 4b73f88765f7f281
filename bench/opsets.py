"""Which opset and GroupNorm translation ONNX Runtime's CPU provider runs fastest.

    python bench/opsets.py --model models/emoji

Exports the UNet in every variant, runs them interleaved on one thread and prints the median over
the rounds of each variant's time divided by the first variant's in the same round.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from heatsink import console
from heatsink.export import exactness
from heatsink.export.manifest import TensorSpec
from heatsink.export.onnx import to_onnx
from heatsink.runtime.backends.onnxruntime import OnnxRuntimeSession
from heatsink.runtime.graph.capture import capture
from heatsink.runtime.graph.components import input_shapes
from heatsink.runtime.graph.passes import run_passes
from heatsink.runtime.graph.passes.pipeline import PASSES_ONNX
from heatsink.runtime.model import Model
from heatsink.runtime.text import Tokenizer

VARIANTS = [(18, False), (22, True), (22, False), (23, True), (23, False)]


def sessions(model: Model, folder: Path) -> tuple[list[Any], list[TensorSpec]]:
    """The UNet in every variant, opened on one thread, and its inputs."""
    config = dict(model.config("unet"))
    length = Tokenizer(model.tokenizer_folder(0)).max_length
    side = config["sample_size"]
    shapes = input_shapes("unet", config, height=side, width=side, text_length=length)
    captured = capture(
        "unet",
        model.module("unet"),
        model.weights("unet"),
        model.buffers("unet"),
        example_shapes=shapes,
    )
    graph = run_passes(captured, PASSES_ONNX)
    opened = []
    for opset, fused in VARIANTS:
        path = folder / f"{opset}-{fused}.onnx"
        to_onnx(graph, path, opset=opset, fused_group_norm=fused)
        opened.append(OnnxRuntimeSession("unet", path, threads=1))
    specs = [
        TensorSpec(name=n, dtype=str(s.dtype).removeprefix("torch."), shape=list(s.shape))
        for n, s in graph.inputs.items()
    ]
    return opened, specs


def measure(opened: list[Any], values: dict[str, Any], rounds: int) -> list[float]:
    """The median ratio of each variant to the first."""
    seconds: list[list[float]] = []
    for _ in range(rounds + 1):
        one = []
        for session in opened:
            begun = time.perf_counter()
            session.run(values)
            one.append(time.perf_counter() - begun)
        seconds.append(one)
    ratios = np.array(seconds[1:]) / np.array(seconds[1:])[:, :1]
    return [statistics.median(column) for column in ratios.T.tolist()]


def main(
    model: Annotated[Path, typer.Option(help="a diffusers folder")] = Path("models/emoji"),
    batches: Annotated[str, typer.Option(help="rows, comma-separated")] = "1,2,8,24",
    rounds: Annotated[int, typer.Option(help="of each variant at each batch")] = 20,
) -> None:
    """Measure and print a Markdown table."""
    sizes = [int(size) for size in batches.split(",")]
    with tempfile.TemporaryDirectory() as folder, console.quiet_libraries():
        opened, specs = sessions(Model.open(model), Path(folder))
        table = [
            measure(opened, exactness.probe(specs, size, exactness.PROBE_SEED), rounds)
            for size in sizes
        ]
    print("| opset | GroupNorm | " + " | ".join(f"batch {size}" for size in sizes) + " |")
    print("|---|---|" + "---|" * len(sizes))
    for place, (opset, fused) in enumerate(VARIANTS):
        name = "GroupNormalization" if fused else "InstanceNormalization"
        cells = " | ".join(f"{ratios[place]:.2f}" for ratios in table)
        print(f"| {opset} | {name} | {cells} |")


if __name__ == "__main__":
    typer.run(main)
