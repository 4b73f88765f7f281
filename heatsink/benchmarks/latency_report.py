"""The latency benchmark's tables, notes and picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from heatsink.benchmarks.latency_check import EQUAL
from heatsink.benchmarks.latency_process import Cost
from heatsink.benchmarks.latency_results import LeftOut, Results, Row, Table
from heatsink.kernels.timing import Spread

TITLES = {
    "unet": "A step of the UNet",
    "vae": "The VAE's decoding",
    "image": "Whole generations",
}
Cells = list[list[str]]
# Beside the first and the last count of a panel, as a factor.
_MARGIN = 1.2


def table_cells(table: Table) -> tuple[list[str], Cells]:
    """Header and rows, without the columns that are empty everywhere."""
    bases = list(dict.fromkeys(row.base for row in table.rows))
    base = bases[0] if len(bases) == 1 else "the first of each group"
    header = [
        f"{table.unit}s", "system", "includes", f"time, {base} = 1", "median", "range",
        f"s/{table.unit}", f"J/{table.unit}", "error", "PSNR",
    ]  # fmt: skip
    rows = sorted(table.rows, key=lambda row: row.count)
    return _filled(header, [_cells(row) for row in rows])


def _cells(row: Row) -> list[str]:
    seconds, quality = row.samples.seconds, row.quality
    return [
        str(row.count),
        row.system,
        row.includes,
        "" if row.ratio is None else _ratio(row.ratio),
        _time(seconds.median),
        f"{_time(seconds.fastest)} to {_time(seconds.slowest)}",
        _time(row.per_unit),
        "" if row.joules is None else f"{row.joules:.3g}",
        "" if quality.error is None else f"{quality.error:.1e}",
        "" if quality.psnr is None else _psnr(quality.psnr),
    ]


def cost_cells(costs: Sequence[Cost]) -> tuple[list[str], Cells]:
    """Header and rows of the fresh processes of one precision."""
    header = ["system", "cold", "imports", "open", "first", "warm", "peak memory"]
    rows = [
        [
            cost.system,
            *map(_time, (cost.cold, cost.imports, cost.opening, cost.first, cost.warm)),
            "" if cost.memory is None else f"{cost.memory / 2**20:.0f} MiB",
        ]
        for cost in costs
    ]
    return _filled(header, rows)


def _filled(header: list[str], rows: Cells) -> tuple[list[str], Cells]:
    kept = [i for i in range(len(header)) if any(row[i] for row in rows)]
    return [header[i] for i in kept], [[row[i] for i in kept] for row in rows]


def _ratio(ratio: Spread) -> str:
    return f"{ratio.median:.2f} ({ratio.fastest:.2f} to {ratio.slowest:.2f})"


def _time(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1e3:.1f} ms"


def _psnr(decibels: float) -> str:
    return "equal" if decibels >= EQUAL else f"{decibels:.1f} dB"


def titled(results: Results) -> list[tuple[str, list[str], Cells]]:
    """Every table with its title: levels by precision, then fresh processes by precision."""
    model = f"{results.settings['model']}, {results.settings['size']}"
    found = [
        (
            f"{TITLES[table.level]}, {table.precision}: {model}",
            *table_cells(table),
        )
        for table in results.tables
        if table.rows
    ]
    for precision in dict.fromkeys(cost.precision for cost in results.costs):
        costs = [cost for cost in results.costs if cost.precision == precision]
        what = f"{costs[0].count} {'row(s)' if costs[0].level == 'unet' else 'image'}"
        title = f"A fresh process, {precision}: {model}, {costs[0].level}, {what}"
        found.append((title, *cost_cells(costs)))
    return found


def markdown(results: Results) -> str:
    """All tables, and what is not in them."""
    lines = [setup_line(results), ""]
    for title, header, rows in titled(results):
        lines += [f"**{title}**", "", f"| {' | '.join(header)} |", "|" + "---|" * len(header)]
        lines += [f"| {' | '.join(row)} |" for row in rows]
        lines.append("")
    lines += [f"- {note}" for note in notes(results)]
    return "\n".join(lines).rstrip()


def setup_line(results: Results) -> str:
    """On what, in a sentence or two."""
    settings, machine = results.settings, results.environment
    cpu = settings["device"] == "cpu"
    where = f"{machine['processor']}, {settings['threads']} threads" if cpu else machine["device"]
    layouts = " and ".join(f"{each} in {name}" for name, each in settings["layout"].items())
    return (
        f"{where}; load before the run {machine['load']}. Generations: {settings['steps']} steps, "
        f"guidance {settings['guidance']:g}. PyTorch's modules are {layouts}, the "
        f"faster here. Energy: {settings['energy']}."
    )


def notes(results: Results) -> list[str]:
    """Who has no time, and why; the precisions of one reason together."""
    reasons: dict[tuple[str, str], list[str]] = {}
    for one in results.left_out:
        reasons.setdefault((one.system, one.reason), []).append(one.precision)
    lines = [
        f"{name} left out, {' and '.join(precisions)}: {reason}"
        for (name, reason), precisions in reasons.items()
    ]
    lines += [f"{_place(one)}: no time: {one.reason}" for one in results.refused]
    return lines + [f"not reached, the time was up: {what}" for what in results.unreached]


def _place(one: LeftOut) -> str:
    return f"{one.system}, {one.precision}, {one.level} at {one.count}"


def plot(results: Results, path: Path) -> None:
    """Draw time a row or image by count: a panel for each table, with the range of the rounds."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    tables = [table for table in results.tables if table.rows]
    if not tables:
        return
    levels = list(dict.fromkeys(table.level for table in tables))
    precisions = list(dict.fromkeys(table.precision for table in tables))
    size = (4.6 * len(precisions) + 0.6, 2.9 * len(levels) + 0.9)
    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    # One scale for all precisions of a level, so that panels side by side can be compared.
    grid = figure.subplots(len(levels), len(precisions), squeeze=False, sharey="row")
    styles = _styles(results)
    for axes in grid.flat:
        axes.set_visible(False)
    for table in tables:
        axes = grid[levels.index(table.level)][precisions.index(table.precision)]
        _panel(axes, table, styles)
    for name, style in styles.items():
        grid[0][0].plot([], [], label=", ".join(part for part in name if part != "whole"), **style)
    figure.legend(loc="outside lower center", ncols=3, fontsize=8, frameon=False)
    figure.suptitle(f"{results.settings['model']}, {results.settings['size']}", fontsize=10)
    figure.savefig(path, dpi=110)


def _styles(results: Results) -> dict[tuple[str, str], dict[str, Any]]:
    """Of each system and what it includes: ours in orange, the others in colours of their own."""
    keys = dict.fromkeys((row.system, row.includes) for t in results.tables for row in t.rows)
    ours = {"heatsink strict": "#d9480f", "heatsink fast": "#f59f00"}
    others = [name for name in dict.fromkeys(name for name, _ in keys) if name not in ours]
    palette = ("#495057", "#1c7ed6", "#2f9e44", "#7048e8", "#0c8599", "#a61e4d")
    colours = ours | {name: palette[i % len(palette)] for i, name in enumerate(others)}
    return {
        (name, includes): {
            "color": colours[name],
            "linestyle": "-" if includes == "whole" else "--",
            "marker": "o" if includes == "whole" else "^",
            "markersize": 4,
            "linewidth": 1.5,
        }
        for name, includes in keys
    }


def _panel(axes: Any, table: Table, styles: dict[tuple[str, str], dict[str, Any]]) -> None:
    from matplotlib import ticker

    axes.set_visible(True)
    for key in dict.fromkeys((row.system, row.includes) for row in table.rows):
        rows = [row for row in table.rows if (row.system, row.includes) == key]
        rows.sort(key=lambda row: row.count)
        middle = [row.per_unit for row in rows]
        spreads = [row.samples.seconds for row in rows]
        low = [(s.median - s.fastest) / r.count for s, r in zip(spreads, rows, strict=True)]
        high = [(s.slowest - s.median) / r.count for s, r in zip(spreads, rows, strict=True)]
        counts = [row.count for row in rows]
        axes.errorbar(counts, middle, yerr=[low, high], capsize=2, elinewidth=0.8, **styles[key])
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.xaxis.set_major_formatter(ticker.FormatStrFormatter("%g"))
    axes.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(ticker.FuncFormatter(lambda seconds, _: _tick(seconds)))
    axes.yaxis.set_minor_locator(ticker.NullLocator())
    shown = sorted({row.count for row in table.rows})
    axes.set_xticks(shown)
    # Of a single count Matplotlib would make limits that leave it out.
    axes.set_xlim(shown[0] / _MARGIN, shown[-1] * _MARGIN)
    axes.set_xlabel(f"{table.unit}s at a time", fontsize=8)
    axes.set_ylabel(f"time for each {table.unit}", fontsize=8)
    axes.tick_params(labelsize=8)
    axes.set_title(f"{TITLES[table.level]}, {table.precision}", fontsize=9)
    axes.grid(axis="y", color="#e9ecef", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)


def _tick(seconds: float) -> str:
    return f"{seconds:g} s" if seconds >= 1 else f"{seconds * 1e3:g} ms"
