"""The GPU suite's stages, in order, and what each does in its process.

A later part of the package adds its stage to `STAGES`: a `Stage` whose command may be anything
that writes JSON to `context.part`, or a `Worker` here.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from heatsink.benchmarks import gpu_tests
from heatsink.benchmarks.suite import Context, Stage
from heatsink.runtime.files import write_whole


@dataclass(frozen=True)
class Worker:
    """What a stage's process does.

    Attributes:
        run: does it, and calls what it is given with its result as it grows.
        listing: lines that say what it would do; needs no GPU.
    """

    run: Callable[[Context, Callable[[Any], None]], None]
    listing: Callable[[Path], list[str]]


def _tune(context: Context, keep: Callable[[Any], None]) -> None:
    from heatsink.kernels.tune import Choice, cuda_target
    from heatsink.tuning import choice_lines, default_path, tune_here

    path = default_path(cuda_target()[1])
    lines: list[str] = []

    def chosen(choice: Choice) -> None:
        lines.extend(choice_lines(choice))
        keep({"lines": lines, "complete": False})
        # The look-up reads it from the package; a copy leaves the machine with the results.
        (context.folder / "tuned.json").write_bytes(path.read_bytes())

    summary = tune_here((), context.seconds, chosen=chosen)
    keep({**summary.as_dict(), "complete": not summary.unreached})


def _list_tuning(root: Path) -> list[str]:
    from heatsink.kernels import tune
    from heatsink.kernels._config import Target
    from heatsink.kernels._launch import ARCHS
    from heatsink.kernels.catalog import ops

    lines = []
    for arch in ARCHS:
        found, left_out = tune.groups(ops().values(), Target("", arch))
        count = sum(len(group.others) + 1 for group in found)
        lines.append(f"sm_{arch}: {count} configurations of {len(found)} keys")
        lines += [f"sm_{arch}: left out: {reason}" for reason in left_out]
    return lines


def _bench(context: Context, keep: Callable[[Any], None]) -> None:
    from heatsink.benchmarks import kernels_run

    wanted = kernels_run.Wanted(device="cuda", seconds=context.seconds)
    run = kernels_run.bench(wanted, measured=lambda run: keep(run.as_dict()))
    keep(run.as_dict())
    kernels_run.picture(run, context.folder / "kernels.png")


def _list_bench(root: Path) -> list[str]:
    import torch

    from heatsink.benchmarks.kernels import make_plan
    from heatsink.kernels.catalog import ops

    plan = make_plan(ops().values(), torch.device("cuda"))
    lines = [f"{op.name} {case.name}" for op, _, case in plan.cases]
    return lines + [f"{one.name} left out: {one.reason}" for one in plan.left_out]


def _lora(context: Context, keep: Callable[[Any], None]) -> None:
    import torch

    from heatsink.benchmarks import lora

    settings = lora.defaults(torch.device("cuda"), None)
    results = lora.run(settings, keep=lambda results: keep(results.as_dict()))
    (context.folder / "lora.md").write_text(lora.markdown(results) + "\n", encoding="utf-8")
    lora.plot(results, context.folder / "lora.png")


def _list_lora(root: Path) -> list[str]:
    import torch

    from heatsink.benchmarks import lora

    settings = lora.defaults(torch.device("cuda"), None)
    swaps = [f"swap of every weight of {kind}, {settings.dtype}" for kind in settings.swaps]
    mixed = [f"{settings.batch}: 8 rows, 1 to 8 adapters of rank {rank}" for rank in lora.RANKS]
    return [*swaps, *mixed, f"banks of {', '.join(map(str, settings.slots))} slots"]


def _latency_runs(seconds: float | None = None) -> dict[str, Any]:
    from heatsink.benchmarks.latency_run import Asked

    return {
        config: Asked(config=config, device="cuda", rows=(1, 2, 4, 8, 16), seconds=seconds)
        for config in ("sd15", "sdxl")
    }


def _latency(context: Context, keep: Callable[[Any], None]) -> None:
    from heatsink.benchmarks import latency_run

    found: dict[str, Any] = {}
    ends = time.monotonic() + context.seconds
    configs = list(_latency_runs())
    for place, config in enumerate(configs):
        # What the first leaves of its part, the second has.
        seconds = (ends - time.monotonic()) / (len(configs) - place)
        results = latency_run.bench(
            _latency_runs(seconds)[config],
            keep=lambda results, config=config: keep({**found, config: results.as_dict()}),  # type: ignore[misc] # mypy sees no types in a default
        )
        found[config] = results.as_dict()
        keep(found)
        latency_run.write(results, context.folder, f"latency-{config}")


def _list_latency(root: Path) -> list[str]:
    from heatsink.benchmarks.latency import SYSTEMS

    lines = []
    for config, asked in _latency_runs().items():
        wanted = asked.wanted()
        counts = ", ".join(f"{level} {list(each)}" for level, each in wanted.counts.items())
        lines.append(f"{config}, {' and '.join(wanted.precisions)}: {counts}")
    return [*lines, f"systems: {', '.join(SYSTEMS)}"]


WORKERS = {
    "tests": Worker(gpu_tests.run, gpu_tests.listing),
    "tuning": Worker(_tune, _list_tuning),
    "kernels": Worker(_bench, _list_bench),
    "lora": Worker(_lora, _list_lora),
    "latency": Worker(_latency, _list_latency),
}


def worker_command(name: str) -> Callable[[Context], list[str]]:
    """The command of a stage that is a worker here."""

    def command(context: Context) -> list[str]:
        places = [str(path) for path in (context.root, context.folder, context.part)]
        return [*_program(name), *places, f"{context.seconds}"]

    return command


def list_command(name: str, root: Path) -> list[str]:
    """The command that lists what a worker would do."""
    return [*_program(name), "--list", str(root)]


def _program(name: str) -> list[str]:
    return [sys.executable, "-m", "heatsink.benchmarks.stages", name]


STAGES = (
    Stage("tests", "tests marked gpu", 1.0, worker_command("tests"), ("pytest", "numpy")),
    Stage("tuning", "configurations of every kernel", 2.0, worker_command("tuning"), ("triton",)),
    Stage("kernels", "every op against what else there is", 2.0, worker_command("kernels")),
    Stage(
        "lora",
        "swaps and mixed batches of adapters",
        1.0,
        worker_command("lora"),
        ("triton", "diffusers", "peft"),
    ),
    Stage(
        "latency",
        "whole systems on SD1.5 and SDXL at equal precision",
        3.0,
        worker_command("latency"),
        ("diffusers", "triton"),
    ),
)


def main(arguments: list[str]) -> None:
    """Run a worker in this process, or list what it would do."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", choices=sorted(WORKERS))
    parser.add_argument("--list", action="store_true")
    parser.add_argument("root", type=Path)
    parser.add_argument("folder", type=Path, nargs="?")
    parser.add_argument("part", type=Path, nargs="?")
    parser.add_argument("seconds", type=float, nargs="?")
    given = parser.parse_args(arguments)
    worker = WORKERS[given.name]
    if given.list:
        print("\n".join(worker.listing(given.root)))
        return

    def keep(result: Any) -> None:
        text = json.dumps(result)
        write_whole(given.part, lambda file: file.write(text.encode()))

    worker.run(Context(given.root, given.folder, given.part, given.seconds), keep)


if __name__ == "__main__":
    main(sys.argv[1:])
