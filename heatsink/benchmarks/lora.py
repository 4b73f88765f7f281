"""All measurements of adapters in one run: swaps, mixed batches, a growing bank."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from heatsink.benchmarks.environment import environment
from heatsink.benchmarks.lora_batch import BatchRow, measure_growth, measure_mixed
from heatsink.benchmarks.lora_models import unet_config
from heatsink.benchmarks.lora_swap import SwapResult, SwapRow, measure

Progress = Callable[[str, int, int], None]
RANKS = (16, 64)


@dataclass(frozen=True)
class Settings:
    """What is measured.

    Attributes:
        swaps: models whose adapters are swapped.
        batch: the model of the mixed batches.
        side: of its latents.
        growth: the configuration of the growing bank; None is that of `batch`.
        slots: sizes of the bank.
        dtype: of the weights.
        device: where.
        rounds: timed rounds of each.
    """

    swaps: tuple[str, ...]
    batch: str
    side: int
    growth: dict[str, Any] | None
    slots: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    rounds: int


def defaults(device: torch.device, bundled: dict[str, Any] | None) -> Settings:
    """The issue's own on a GPU; on a CPU Stable Diffusion 1.5 with small latents.

    Args:
        device: where.
        bundled: a small UNet's configuration for the growing bank on a CPU, whose memory would not
            hold 256 adapters of a large one.
    """
    slots: tuple[int, ...] = (1, 4, 16, 64, 256)
    if device.type == "cuda":
        return Settings(
            ("sd15", "sdxl"), "sdxl", 128, None, slots, torch.bfloat16, device, rounds=15
        )
    slots = slots if bundled else (1, 4, 16)
    return Settings(("sd15",), "sd15", 16, bundled, slots, torch.float32, device, rounds=5)


@dataclass
class Results:
    """What was measured so far."""

    environment: dict[str, Any]
    settings: dict[str, Any]
    swaps: list[SwapResult] = field(default_factory=list)
    mixed: list[BatchRow] = field(default_factory=list)
    growth: list[BatchRow] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)


def run(
    settings: Settings,
    *,
    progress: Progress | None = None,
    keep: Callable[[Results], None] = lambda results: None,
) -> Results:
    """Measure everything; `keep` is called with the results as they grow."""
    told = {
        "batch": f"{settings.batch}, 8 rows of {settings.side}x{settings.side} latents",
        "dtype": str(settings.dtype).removeprefix("torch."),
        "rounds": settings.rounds,
    }
    results = Results(environment(), told)
    common: dict[str, Any] = {
        "dtype": settings.dtype,
        "device": settings.device,
        "rounds": settings.rounds,
        "progress": progress,
    }
    for kind in settings.swaps:
        results.swaps.append(measure(kind, **common))
        keep(results)
    config = unet_config(settings.batch)
    for rank in RANKS:
        results.mixed += measure_mixed(config, rank=rank, side=settings.side, **common)
        keep(results)
    small = settings.growth
    results.growth = measure_growth(
        small or config,
        slots=settings.slots,
        rank=RANKS[0],
        side=small["sample_size"] if small else settings.side,
        **common,
    )
    keep(results)
    return results


def markdown(results: Results) -> str:
    """The tables."""
    lines: list[str] = []
    for swap in results.swaps:
        lines += [
            f"Swap of an adapter of rank {swap.rank} on all {swap.weights} linears and "
            f"convolutions of the UNet ({swap.kind}, {swap.dtype}); the floor moves "
            f"{swap.floor_bytes / 1e9:.2f} GB.",
            "",
            "| system | time, ours = 1 | time | of the floor | error, last places |",
            "|---|---|---|---|---|",
            *(_swap_line(row) for row in swap.rows),
            "",
        ]
    for title, rows in (
        (
            f"A UNet step of {results.settings['batch']}, {results.settings['dtype']}.",
            results.mixed,
        ),
        ("Steps of 8 rows by the size of the bank.", results.growth),
    ):
        lines += [
            title,
            "",
            "| system | adapters | rank | time, base = 1 | time | error |",
            "|---|---|---|---|---|---|",
            *(_batch_line(row) for row in rows),
            "",
        ]
    return "\n".join(lines).rstrip()


def _swap_line(row: SwapRow) -> str:
    cells = (
        row.system,
        _spread(row.ratio),
        "" if row.seconds is None else f"{row.seconds.median * 1e3:.2f} ms",
        "" if row.of_floor is None else f"{row.of_floor:.0%}",
        "" if row.error is None else f"{row.error:.2f}",
    )
    return "| " + " | ".join(cells) + " |"


def _batch_line(row: BatchRow) -> str:
    cells = (
        row.system,
        str(row.adapters),
        str(row.rank),
        _spread(row.ratio),
        "" if row.seconds is None else f"{row.seconds.median * 1e3:.2f} ms",
        "" if row.error is None else f"{row.error:.1e}",
    )
    return "| " + " | ".join(cells) + " |"


def _spread(ratio: Any) -> str:
    return f"{ratio.median:.2f} ({ratio.fastest:.2f} to {ratio.slowest:.2f})"


def plot(results: Results, path: Path) -> None:
    """Draw swaps (left) and steps of mixed batches (right) as multiples of ours and of the base."""
    from matplotlib import ticker
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    swap = results.swaps[-1]
    for place, row in enumerate(reversed(swap.rows)):
        colour = "#d9480f" if row.system.startswith("heatsink") else "#9aa0a6"
        left.barh(place, row.ratio.median, color=colour)
        left.text(row.ratio.median, place, f" {row.ratio.median:.2f}", va="center", fontsize=8)
    left.set_yticks(range(len(swap.rows)), [row.system for row in reversed(swap.rows)], fontsize=8)
    left.set_xscale("log")
    left.xaxis.set_major_formatter(ticker.FormatStrFormatter("%g"))
    left.margins(x=0.15)
    left.set_title(f"swap on every weight of {swap.kind}, {swap.dtype}; ours = 1", fontsize=9)
    for system, colour in (("heatsink lora_rows", "#d9480f"), ("PEFT mixed batch", "#9aa0a6")):
        for rank, style in zip(RANKS, ("-", "--"), strict=True):
            rows = [r for r in results.mixed if r.system == system and r.rank == rank]
            right.plot(
                [r.adapters for r in rows],
                [r.ratio.median for r in rows],
                style,
                color=colour,
                marker="o",
                label=f"{system}, rank {rank}",
            )
    right.axhline(1, color="black", linewidth=1)
    right.set_xscale("log", base=2)
    right.xaxis.set_major_formatter(ticker.FormatStrFormatter("%g"))
    right.set_xlabel("different adapters among 8 rows")
    right.set_title(f"a step of {results.settings['batch']}; base = 1", fontsize=9)
    right.legend(fontsize=8)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)
