"""A UNet step as a native program beside ONNX Runtime and diffusers eager, in one run.

    python bench/native.py --model models/emoji --batches 2,8,24

Native: the passes of `runtime/graph/passes/pipeline.py` and this package's CPU ops on one planned
arena; the step alone, with what depends on text and time computed before (`step`), and the whole
(`whole`). ONNX Runtime: the file that `heatsink build` writes, float32. Diffusers in its faster
layout. Each is compared with float64 first; then all run in turn, in another order every round and
with a pause before each, and times are multiples of ONNX Runtime's in the same round. That computes
in float32, so the rows in bf16 are no comparison at equal precision.
"""

from __future__ import annotations

import random
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

from heatsink import console
from heatsink.export.onnx import to_onnx
from heatsink.runtime.backends.onnxruntime import OnnxRuntimeSession
from heatsink.runtime.errors import HeatsinkError
from heatsink.runtime.graph.capture import capture
from heatsink.runtime.graph.components import input_shapes
from heatsink.runtime.graph.graph import Graph
from heatsink.runtime.graph.passes import run_passes
from heatsink.runtime.graph.passes.pipeline import PASSES_NATIVE, PASSES_ONNX
from heatsink.runtime.graph.phases import Phase, split
from heatsink.runtime.model import Model
from heatsink.runtime.native.program import Program
from heatsink.runtime.text import Tokenizer

Step = Callable[[], Any]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# Of the largest value: sums of another order in fp32, eight bits of mantissa through a network.
# Threads of a library spin for a while after its work, and would share the cores with the next.
SETTLE = 0.02
ALLOWED = {"fp32": 1e-4, "bf16": 0.15}


def captured(model: Model, dtype: torch.dtype) -> Graph:
    """The UNet's graph at the model's own size."""
    config = dict(model.config("unet"))
    side, length = config["sample_size"], Tokenizer(model.tokenizer_folder(0)).max_length
    shapes = input_shapes("unet", config, height=side, width=side, text_length=length)
    module, weights = model.module("unet"), model.weights("unet")
    buffers = model.buffers("unet")
    return capture("unet", module, weights, buffers, example_shapes=shapes, dtype=dtype)


def drawn(graph: Graph, rows: int) -> dict[str, Tensor]:
    """Seeded inputs."""
    generator = torch.Generator().manual_seed(1)
    given = {}
    for name, spec in graph.inputs.items():
        shape = [rows if size == "batch" else int(size) for size in spec.shape]
        given[name] = torch.randn(shape, generator=generator).to(spec.dtype)
    given["timestep"] = torch.linspace(1, 900, rows)
    return given


def native(graph: Graph, rows: int, given: dict[str, Tensor]) -> tuple[Step, Step, Tensor]:
    """Replays of the step and of the whole, and the whole's result."""
    whole = _program(graph, rows)
    out = whole.run(given)["out"].clone()
    phases = split(graph)
    made: dict[str, Tensor] = dict(given)
    for phase, part in phases.graphs.items():
        program = _program(part, rows)
        result = program.run({name: made[name] for name in part.inputs})
        made |= {name: value.clone() for name, value in result.items()}
        if phase == Phase.STEP and not torch.equal(made["out"], out):
            raise HeatsinkError("the phases give other bits than the whole")
    sample = {"sample": given["sample"]}
    return (lambda: program.run(sample)), (lambda: whole.run(sample)), out


def _program(graph: Graph, rows: int) -> Program:
    weights = {name: weight.load() for name, weight in graph.weights.items()}
    program = Program(graph, rows, weights)
    if program.unplanned:
        raise HeatsinkError(f"operators without a kernel: {program.unplanned}")
    return program


def eager(model: Model, layout: torch.memory_format, given: dict[str, Tensor]) -> Step:
    """The library's own module."""
    module: Any = model.load_module("unet", torch.float32).eval()
    module = module.to(memory_format=layout)

    def run() -> Tensor:
        with torch.inference_mode():
            out: Tensor = module(*given.values(), return_dict=False)[0]
        return out

    return run


def check(name: str, dtype: str, out: Tensor, wanted: Tensor) -> None:
    """Refuse a result that is not the network's."""
    error = float((out.double() - wanted).abs().max() / wanted.abs().max())
    if not error <= ALLOWED[dtype]:
        raise HeatsinkError(f"{name}: {error:.1e} of the largest value away from float64")


def main(
    model: Annotated[Path, typer.Option(help="a diffusers folder")] = Path("models/emoji"),
    batches: Annotated[str, typer.Option(help="rows, comma-separated")] = "2,8,24",
    rounds: Annotated[int, typer.Option(help="of each at each batch")] = 21,
) -> None:
    """Measure and print a Markdown table."""
    opened = Model.open(model)
    graphs = {name: captured(opened, dtype) for name, dtype in DTYPES.items()}
    passed = {name: run_passes(graph, PASSES_NATIVE) for name, graph in graphs.items()}
    print("| rows | system | time, ONNX Runtime = 1 (fastest to slowest round) |\n|---|---|---|")
    with tempfile.TemporaryDirectory() as folder, console.quiet_libraries():
        path = Path(folder) / "unet.onnx"
        to_onnx(run_passes(graphs["fp32"], PASSES_ONNX), path)
        session = OnnxRuntimeSession("unet", path, threads=torch.get_num_threads())
        for rows in map(int, batches.split(",")):
            _measure(opened, graphs["fp32"], passed, session, rows, rounds)


def _measure(
    model: Model,
    plain: Graph,
    passed: dict[str, Graph],
    session: OnnxRuntimeSession,
    rows: int,
    rounds: int,
) -> None:
    given = drawn(plain, rows)
    wanted = plain.run(given, dtype=torch.float64)["out"]
    arrays = {name: value.numpy() for name, value in given.items()}
    steps: dict[str, Step] = {"ONNX Runtime fp32": lambda: session.run(arrays)["out"]}
    check("ONNX Runtime", "fp32", torch.from_numpy(session.run(arrays)["out"]), wanted)
    layouts = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
    for layout, memory in layouts.items():
        steps[f"diffusers eager fp32, {layout}"] = eager(model, memory, given)
    for dtype, graph in passed.items():
        own = {n: v.to(graph.inputs[n].dtype) for n, v in given.items()}
        step, whole, out = native(graph, rows, own)
        check(f"native {dtype}", dtype, out, wanted)
        steps[f"native {dtype}, step"], steps[f"native {dtype}, whole"] = step, whole
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(rounds + 2):
        for name, run in random.Random(turn).sample(list(steps.items()), len(steps)):
            time.sleep(SETTLE)
            begun = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - begun)
    base = seconds["ONNX Runtime fp32"][2:]
    for name, own_seconds in seconds.items():
        ratios = [a / b for a, b in zip(own_seconds[2:], base, strict=True)]
        middle = statistics.median(ratios)
        print(f"| {rows} | {name} | {middle:.2f} ({min(ratios):.2f} to {max(ratios):.2f}) |")


if __name__ == "__main__":
    typer.run(main)
