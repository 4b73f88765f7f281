"""What a measurement of kernels looks like: JSON values, a table, a picture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from heatsink.benchmarks.ceilings import Ceilings
from heatsink.benchmarks.family import Cost, LeftOut
from heatsink.benchmarks.kernels import CaseResult, Row
from heatsink.kernels.timing import Spread

HEADER = ("case", "variant", "time, heatsink = 1", "error", "median", "rate", "of ceiling")
# Columns that are always shown.
_ALWAYS = 3


def as_dict(
    results: Sequence[CaseResult],
    *,
    environment: dict[str, Any],
    ceilings: Ceilings | None,
    rounds: int,
    left_out: Sequence[LeftOut],
    unreached: Sequence[str],
) -> dict[str, Any]:
    """Plain JSON values of a whole run."""
    return {
        "environment": environment,
        "rounds": rounds,
        "ceilings": asdict(ceilings) if ceilings else None,
        "cases": [asdict(result) for result in results],
        "left_out": [asdict(one) for one in left_out],
        "unreached": list(unreached),
    }


def rows(results: Sequence[CaseResult]) -> list[tuple[str, ...]]:
    """The table's rows under `HEADER`; columns that only a GPU fills are empty elsewhere."""
    return [
        (
            f"{result.op} {result.case}",
            row.name,
            f"{row.ratio.median:.2f} ({row.ratio.fastest:.2f} to {row.ratio.slowest:.2f})",
            "" if row.max_error is None else f"{row.max_error:.1e}",
            "" if row.seconds is None else _time(row.seconds),
            "" if row.seconds is None or result.cost is None else _rate(result.cost, row.seconds),
            "" if row.of_ceiling is None else f"{row.of_ceiling:.0%}",
        )
        for result in results
        for row in result.rows
    ]


def _time(seconds: Spread) -> str:
    return f"{seconds.median * 1e6:.1f} us"


def _rate(cost: Cost, seconds: Spread) -> str:
    if cost.flops:
        return f"{sum(cost.flops.values()) / seconds.median / 1e12:.0f} TFLOP/s"
    return f"{cost.bytes / seconds.median / 1e9:.0f} GB/s"


def notes(
    results: Sequence[CaseResult], left_out: Sequence[LeftOut], unreached: Sequence[str]
) -> list[str]:
    """What is not in the table, and why; equal reasons together."""
    lines = [f"{result.op} {result.case}: {result.error}" for result in results if result.error]
    reasons: dict[tuple[str, str], list[str]] = {}
    for result in results:
        for one in result.left_out:
            reasons.setdefault((one.name, one.reason), []).append(f"{result.op} {result.case}")
    lines += [
        f"{name} left out of {where[0]}"
        + (f" and {len(where) - 1} more" if len(where) > 1 else "")
        + f": {reason}"
        for (name, reason), where in reasons.items()
    ]
    lines += [f"{one.name} left out: {one.reason}" for one in left_out]
    return lines + [f"not reached, the time was up: {name}" for name in unreached]


def markdown(results: Sequence[CaseResult]) -> str:
    """The table in Markdown, without the columns that are empty everywhere."""
    header, body = filled(results)
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in body])


def filled(results: Sequence[CaseResult]) -> tuple[list[str], list[list[str]]]:
    """Header and rows without the columns that are empty everywhere."""
    body = rows(results)
    kept = [i for i in range(len(HEADER)) if i < _ALWAYS or any(row[i] for row in body)]
    return [HEADER[i] for i in kept], [[row[i] for i in kept] for row in body]


def plot(results: Sequence[CaseResult], path: Path, title: str) -> None:
    """Draw each variant's time as a multiple of the op's, with the range over the rounds."""
    from matplotlib import ticker
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    drawn = [result for result in results if len(result.rows) > 1]
    names = list(dict.fromkeys(row.name for result in drawn for row in result.rows[1:]))
    lines = sum(len(result.rows) for result in drawn)
    figure = Figure(figsize=(9, 1.4 + 0.22 * lines), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    place, ticks = 0.0, []
    for result in drawn:
        top = place
        for row in result.rows[1:]:
            _draw(axes, row, place, f"C{names.index(row.name) % 10}")
            place -= 1
        ticks.append(((top + place + 1) / 2, f"{result.op}\n{result.case}"))
        place -= 1
    axes.axvline(1, color="black", linewidth=1)
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(ticker.FormatStrFormatter("%g"))
    axes.xaxis.set_minor_locator(ticker.NullLocator())
    axes.margins(y=0.01)
    axes.set_yticks([at for at, _ in ticks], [name for _, name in ticks], fontsize=8)
    axes.set_xlabel("time as a multiple of heatsink's (median and range over the rounds)")
    axes.set_title(title, fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    for name in names:
        axes.plot([], [], "o", color=f"C{names.index(name) % 10}", label=name)
    figure.legend(loc="outside lower center", ncols=4, fontsize=8, frameon=False)
    figure.savefig(path, dpi=110)


def _draw(axes: Any, row: Row, place: float, colour: str) -> None:
    ratio = row.ratio
    spread = [[ratio.median - ratio.fastest], [ratio.slowest - ratio.median]]
    axes.errorbar(ratio.median, place, xerr=spread, fmt="o", color=colour, markersize=5, capsize=2)
    axes.annotate(
        f"{ratio.median:.2f}",
        (ratio.slowest, place),
        xytext=(5, 0),
        textcoords="offset points",
        va="center",
        fontsize=7,
    )
