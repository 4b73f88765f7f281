"""What a call of a native program costs besides its work, in several ways of making it.

    PYTHONSAFEPATH=1 python bench/call_overhead.py [--calls 300] [--rounds 200]

Each program makes the same tiny calls, 4 rows of 8 numbers or 8 numbers. The programs take turns; a
figure is the median over rounds of a program's time, divided by its calls, with the least and the
most. What the calls compute is part of it: here next to nothing.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch

from heatsink.kernels import _native, load
from heatsink.kernels.recorder import Recorder
from heatsink.runtime.native.calls import Calls


def _through_ops(op: Any, args: tuple[Any, ...], names: Mapping[str, Any]) -> Callable[[], Any]:
    return lambda: op(*args, **names)


def programs(calls: int) -> dict[str, Callable[[], Any]]:
    """Every way by name: a function that makes all calls."""
    load()
    x, out = torch.randn(4, 8), torch.empty(4, 8)
    both = torch.randn(8), torch.randn(8)
    result = torch.empty(8)
    aten, ours = torch.ops.aten, torch.ops.heatsink
    norm: Any = ours.layer_norm_out.default
    given = (x, None, None, 1e-5, None, None, out)

    def each(step: Callable[[], Any]) -> Callable[[], None]:
        steps = [step] * calls

        def run() -> None:
            for step in steps:
                step()

        return run

    ways: dict[str, Callable[[], Any]] = {
        "aten.add.out, a lambda and names": each(_through_ops(aten.add.out, both, {"out": result})),
        "aten.add.out, bound": each(partial(aten.add.out, *both, out=result)),
        "torch.add, bound": each(partial(torch.add, *both, out=result)),
        "layer_norm_out, a lambda and names": each(
            _through_ops(norm, given[:-1], {"out": given[-1]})
        ),
        "layer_norm_out, bound": each(partial(norm, *given)),
        "layer_norm_out, bound past OpOverload": each(partial(norm._op, *given)),
    }
    if _native.available():
        recorder = Recorder()
        for _ in range(calls):
            assert recorder.record(partial(norm, *given), "layer_norm_out")
        ways["layer_norm_out, replayed one by one"] = each(recorder.replayer(0, 1))
        ways["layer_norm_out, replayed"] = recorder.replayer(0, calls)
    mixed = Calls(torch.device("cpu"))
    for place in range(calls):
        # About what the passes leave: one call in thirty is none of this package's.
        step = partial(norm, *given) if place % 30 else partial(torch.add, *both, out=result)
        mixed.add(step, "a call")
    ways["a program of both, as it is run"] = mixed.run
    return ways


def measure(calls: int, rounds: int) -> dict[str, tuple[float, float, float]]:
    """Microseconds a call: median, least, most."""
    ways = programs(calls)
    times: dict[str, list[float]] = {name: [] for name in ways}
    with torch.inference_mode():
        for _ in range(rounds):
            for name, run in ways.items():
                begin = time.perf_counter()
                run()
                times[name].append((time.perf_counter() - begin) / calls * 1e6)
    return {n: (statistics.median(t), min(t), max(t)) for n, t in times.items()}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--calls", type=int, default=300)
    parser.add_argument("--rounds", type=int, default=200)
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    print(f"PyTorch {torch.__version__}, CPU ops: {_native.describe()}; us a call")
    for name, (median, least, most) in measure(chosen.calls, chosen.rounds).items():
        print(f"{name:42} {median:7.3f}   {least:.3f} to {most:.3f}")


if __name__ == "__main__":
    main()
