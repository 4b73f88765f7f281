"""What adapter ports cost in the native engine: a UNet step with and without, in one run.

    python bench/row_ports.py --config sd1 --latents 32 --rows 4

Random weights of a real configuration. Twin: the graph without ports. Ported: every linear and
convolution has a port, and none, half or all of the rows have one adapter, either of all modules or
of the attention's alone. Rows without adapters are compared with the twin's, bit by bit; then all
run in turn, and times are multiples of the twin's in the same round.
"""

from __future__ import annotations

import json
import statistics
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor, nn

import heatsink.runtime
from heatsink.runtime.components import meta_module
from heatsink.runtime.errors import HeatsinkError
from heatsink.runtime.graph.capture import capture
from heatsink.runtime.graph.components import input_shapes
from heatsink.runtime.graph.graph import Graph
from heatsink.runtime.graph.passes import run_passes
from heatsink.runtime.graph.passes.pipeline import PASSES_NATIVE
from heatsink.runtime.graph.passes.row_ports import ROOM, add_row_ports
from heatsink.runtime.native.program import Program
from heatsink.runtime.port_layout import PortLayout

CONFIGS = Path(heatsink.runtime.__file__).parent / "configs"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
SLOTS = 2


def native(config: dict[str, Any], latents: int, dtype: torch.dtype) -> tuple[Graph, PortLayout]:
    """The UNet's native graph, of weights that keep the size of what they multiply, and ports."""
    module = meta_module("unet", config)
    draw = torch.Generator().manual_seed(1)
    weights = {}
    for name, value in module.named_parameters():
        fan = max(1, value[0].numel()) if value.dim() > 1 else 1
        drawn = torch.randn(value.shape, generator=draw) / fan**0.5
        weights[name] = (drawn if value.dim() > 1 else 0.1 * drawn + 1.0).to(dtype)
    shapes = input_shapes("unet", config, height=latents, width=latents)
    captured = capture("unet", module, weights, example_shapes=shapes, dtype=dtype)
    ports = {
        name: tuple(each.weight.shape)
        for name, each in module.named_modules()
        if isinstance(each, nn.Linear | nn.Conv2d)
    }
    return run_passes(captured, PASSES_NATIVE), PortLayout.of("unet", SLOTS, 1, ports)


def bank(layout: PortLayout, rank: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """Slot 0 holds an adapter of all modules, slot 1 one of the attentions' linear layers."""
    draw = torch.Generator().manual_seed(2)
    found: dict[str, Tensor] = {}
    for name, shape in layout.shapes().items():
        found[name] = (torch.randn(shape, generator=draw) * 0.02).to(dtype)
    for name, (rows,) in layout.rank_shapes().items():
        ranks = torch.full((rows,), rank, dtype=torch.int32)
        for port, path in enumerate(layout.groups[int(name.split(".")[1])].members):
            if "attn" not in path:
                ranks[port * SLOTS + 1] = 0
        found[name] = ranks
    return found


def _inputs(graph: Graph, rows: int, latents: int) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(3)
    given = {}
    for name, spec in graph.inputs.items():
        shape = [rows if size == "batch" else int(size) for size in spec.shape]
        given[name] = torch.randn(shape, generator=draw).to(spec.dtype)
    given["timestep"] = torch.linspace(1, 900, rows)
    return given


def main(
    config: Annotated[str, typer.Option(help="sd1 or sdxl")] = "sd1",
    latents: Annotated[int, typer.Option(help="height and width of the latents")] = 32,
    rows: Annotated[int, typer.Option(help="of the batch")] = 4,
    rank: Annotated[int, typer.Option(help="of the adapters")] = 16,
    bank_rank: Annotated[int, typer.Option(help="of the bank")] = 64,
    dtype: Annotated[str, typer.Option(help="fp32 or bf16")] = "fp32",
    rounds: Annotated[int, typer.Option(help="of each")] = 7,
) -> None:
    """Measure and print a Markdown table."""
    values = json.loads((CONFIGS / f"{config}.json").read_text(encoding="utf-8"))["unet"]
    twin, ports = native(values, latents, DTYPES[dtype])
    layout = PortLayout("unet", SLOTS, bank_rank, ports.groups)
    ported = run_passes(twin, [add_row_ports(layout)])
    held = bank(layout, rank, DTYPES[dtype])
    weights = {name: weight.load() for name, weight in twin.weights.items()}
    given = _inputs(twin, rows, latents)
    plain, other = Program(twin, rows, weights), Program(ported, rows, weights, held=held)
    wanted = plain.run(given)["out"].clone()
    slots, scales = torch.full((rows, ROOM), -1), torch.ones(rows, ROOM)
    steps: dict[str, Any] = {"twin": lambda: plain.run(given)}
    for slot, which in ((0, "of all modules"), (1, "of the attentions")):
        for count, many in ((0, "no row"), (rows // 2, "half of the rows"), (rows, "all rows")):
            own = slots.clone()
            # The other rows lie between them.
            own[torch.arange(0, rows, rows // count)[:count] if count else [], 0] = slot
            adapters = {"adapter_slots": own, "adapter_scales": scales}
            found = other.run({**given, **adapters})["out"]
            same = [found[row].equal(wanted[row]) for row in range(rows)]
            if same != (own[:, 0] < 0).tolist() or not found.isfinite().all():
                raise HeatsinkError(f"{many}: the rows {same} have the twin's bits")
            if count or not slot:
                name = f"ported, {many}" + (f", an adapter {which}" if count else "")
                steps[name] = lambda own=adapters: other.run({**given, **own})
    _measure(steps, rounds)
    sizes = f"{plain.memory.peak / 1e6:.1f} and {other.memory.peak / 1e6:.1f} MB of arena"
    print(f"\n{plain.launches} and {other.launches} calls, {sizes}")


def _measure(steps: dict[str, Any], rounds: int) -> None:
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds + 1):
        for name, run in steps.items():
            begun = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - begun)
    print("| step | time, twin = 1 (fastest to slowest round) |\n|---|---|")
    for name, own in seconds.items():
        ratios = [a / b for a, b in zip(own[1:], seconds["twin"][1:], strict=True)]
        print(
            f"| {name} | {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f}) |"
        )


if __name__ == "__main__":
    typer.run(main)
