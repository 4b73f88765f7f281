"""The command line's `heatsink graph`: what a component is made of, before and after passes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from heatsink import console, flags
from heatsink.runtime.errors import InvalidRequest

if TYPE_CHECKING:
    from heatsink.runtime.graph.cost import Cost
    from heatsink.runtime.graph.graph import Graph

app = typer.Typer(no_args_is_help=True, help="Look into a model's graphs; no weight is read.")

Name = Annotated[str, typer.Argument(help="text_encoder, text_encoder_2, unet, vae_decoder, ...")]
Diff = Annotated[
    str, typer.Option(help="a pass of the native engine, or all: compare before and after it")
]
Size = Annotated[str, typer.Option(help="HEIGHTxWIDTH in pixels; the model's own if not given")]
Rows = Annotated[int, typer.Option(help="samples of the batch")]
Phases = Annotated[
    bool, typer.Option("--phases", help="what leaves the denoising loop, and what stays in it")
]
Json = Annotated[bool, typer.Option("--json", help="print JSON instead of a table")]

Costs = dict[str, "Cost"]


@app.callback()
def graph() -> None:
    """Look into a model's graphs; no weight is read."""


@app.command()
def show(
    model: flags.Model,
    component: Name,
    diff: Diff = "",
    size: Size = "",
    rows: Rows = 1,
    phases: Phases = False,
    as_json: Json = False,
) -> None:
    """Print a component's operators with their nodes, FLOPs and bytes, as the passes leave them."""
    from heatsink.runtime.graph.cost import costs
    from heatsink.runtime.graph.passes.pipeline import NATIVE

    if rows < 1:
        raise InvalidRequest(f"--rows: expected at least 1, got {rows}")
    if diff not in {"", "all", *NATIVE}:
        raise InvalidRequest(f"--diff: expected all or one of {', '.join(NATIVE)}, got {diff!r}")
    if diff and phases:
        raise InvalidRequest("--phases: shows the native engine's graph; leave --diff out")
    if phases:
        _show_phases(model, component, size, rows, as_json)
        return
    with console.quiet_libraries():
        before, after = _graphs(_captured(model, component, size), diff)
        tables = [costs(each, rows) for each in (before, after) if each is not None]
    title = f"{component} · {rows} row{'s' if rows > 1 else ''}"
    if as_json:
        print(json.dumps(_document(title, component, rows, diff, tables), indent=2))
    else:
        _print(title if not diff else f"{title} · before and after {diff}", tables)


_WHEN = {
    "request": "once a request",
    "schedule": "once a schedule",
    "both": "once a request and step, before the loop",
    "step": "every step",
}


def _show_phases(model: Path, component: str, size: str, rows: int, as_json: bool) -> None:
    from heatsink.runtime.graph.cost import costs, launches, total
    from heatsink.runtime.graph.phases import split

    with console.quiet_libraries():
        _, graph = _graphs(_captured(model, component, size), "")
        parts = {
            str(phase): (launches(part), total(costs(part, rows)))
            for phase, part in split(graph).graphs.items()
        }
    title = f"{component} · {rows} row{'s' if rows > 1 else ''} · phases"
    if as_json:
        found = {
            name: {"launches": count, "nodes": c.nodes, "flops": c.flops, "bytes": c.bytes}
            for name, (count, c) in parts.items()
        }
        print(json.dumps({"component": component, "rows": rows, "phases": found}, indent=2))
    else:
        _print_phases(title, parts)


def _print_phases(title: str, parts: dict[str, tuple[int, Cost]]) -> None:
    from rich.console import Console
    from rich.table import Table

    every = sum(cost.flops for _, cost in parts.values()) or 1
    table = Table(title=title)
    for name in ("phase", "computed"):
        table.add_column(name)
    for name in ("nodes", "launches", "GFLOP", "share", "MB"):
        table.add_column(name, justify="right")
    for name, (count, cost) in parts.items():
        numbers = [_number(cost, column) for column in ("nodes", "GFLOP", "MB")]
        share = f"{100 * cost.flops / every:.1f}%"
        cells = [numbers[0], str(count), numbers[1], share, numbers[2]]
        table.add_row(name, _WHEN[name], *cells)
    Console().print(table)


def _captured(path: Path, component: str, size: str) -> Graph:
    from heatsink.export.plan import check_size, default_size, vae_factor
    from heatsink.runtime.graph.capture import capture
    from heatsink.runtime.graph.components import input_shapes
    from heatsink.runtime.model import Model
    from heatsink.runtime.text import Tokenizer

    model = Model.open(path)
    if component not in model.components:
        known = ", ".join(model.components)
        raise InvalidRequest(f"COMPONENT: expected one of {known}, got {component!r}")
    height, width = flags.parse_size(size) or default_size(model)
    check_size(model, (height, width))
    factor = 1 if component == "vae_encoder" else vae_factor(model)
    folder = model.tokenizer_folder(int(component == "text_encoder_2"))
    shapes = input_shapes(
        component,
        model.config(component),
        height=height // factor,
        width=width // factor,
        text_length=Tokenizer(folder).max_length,
    )
    text = component.startswith("text_encoder")
    return capture(
        component,
        model.module(component),
        model.weights(component),
        model.buffers(component),
        example_shapes=shapes,
        text_layer="penultimate" if text and model.kind == "sdxl" else None,
    )


def _graphs(captured: Graph, diff: str) -> tuple[Graph | None, Graph]:
    """Before and after the pass `diff`; the native engine's alone if it is empty."""
    from heatsink.runtime.graph.passes import run_passes
    from heatsink.runtime.graph.passes.pipeline import NATIVE, PASSES_NATIVE

    if diff in {"", "all"}:
        return captured if diff else None, run_passes(captured, PASSES_NATIVE)
    names = list(NATIVE)
    before = run_passes(captured, [NATIVE[name] for name in names[: names.index(diff)]])
    return before, run_passes(before, [NATIVE[diff]])


def _document(
    title: str, component: str, rows: int, diff: str, tables: list[Costs]
) -> dict[str, Any]:
    from heatsink.runtime.graph.cost import total

    def numbers(cost: Cost) -> dict[str, int]:
        return {"nodes": cost.nodes, "flops": cost.flops, "bytes": cost.bytes}

    def table(of: Costs) -> dict[str, Any]:
        operators = {name: numbers(cost) for name, cost in of.items()}
        return {"operators": operators, "total": numbers(total(of))}

    names = ("before", "after") if diff else ("graph",)
    found = {name: table(of) for name, of in zip(names, tables, strict=True)}
    return {"component": component, "rows": rows, "pass": diff or None, **found}


def _print(title: str, tables: list[Costs]) -> None:
    from rich.console import Console
    from rich.table import Table

    from heatsink.runtime.graph.cost import Cost, total

    table = Table(title=title, show_footer=True)
    sums = [total(each) for each in tables]
    table.add_column("operator", "total")
    for name in ("nodes", "GFLOP", "MB"):
        table.add_column(name, _cell([_number(each, name) for each in sums]), justify="right")
    # What a pass made or took stands beside what stayed.
    names = list(dict.fromkeys(name for each in reversed(tables) for name in each))
    for operator in names:
        found = [each.get(operator, Cost()) for each in tables]
        cells = [_cell([_number(c, n) for c in found]) for n in ("nodes", "GFLOP", "MB")]
        table.add_row(operator, *cells)
    Console().print(table)


def _number(cost: Cost, column: str) -> str:
    if column == "nodes":
        return str(cost.nodes)
    return f"{cost.flops / 1e9:.3f}" if column == "GFLOP" else f"{cost.bytes / 1e6:.2f}"


def _cell(values: list[str]) -> str:
    first, last = values[0], values[-1]
    return last if first == last else f"{first} -> {last}"
