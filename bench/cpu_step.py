"""A UNet step on the CPU: the native program against OpenVINO, and where its time goes.

    OMP_NUM_THREADS=1 python bench/cpu_step.py --config sd15 --dtype bf16

`--config` is `sd15` (its real configuration, random weights) or a diffusers folder. Both run one
precision, in turn: the native step (what depends on text and time alone was computed before), and
the whole in OpenVINO, which is left out where it can't be imported. With one
thread seconds are those of the process on the processor, so that other programs count less; with
more, the clock's. Then each is profiled by class of operator: ours call by call, OpenVINO by its
own counters (of wall time; it fuses across classes, so compare sums).
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import json
import os
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from cpu_products import ceilings  # type: ignore[import-not-found]  # beside this file
from torch import Tensor, fx

from heatsink import console
from heatsink.benchmarks.environment import processor
from heatsink.export.components import PASSES
from heatsink.export.onnx import to_onnx
from heatsink.kernels import _native
from heatsink.runtime import model as model_module
from heatsink.runtime.errors import HeatsinkError
from heatsink.runtime.graph.capture import capture
from heatsink.runtime.graph.components import input_shapes
from heatsink.runtime.graph.cost import NodeCosts
from heatsink.runtime.graph.graph import Graph
from heatsink.runtime.graph.passes import run_passes
from heatsink.runtime.graph.passes.edit import argument, operator, traced
from heatsink.runtime.graph.passes.pipeline import PASSES_NATIVE
from heatsink.runtime.graph.phases import split
from heatsink.runtime.model import Model
from heatsink.runtime.native.program import Program
from heatsink.runtime.text import Tokenizer

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
HINTS = {"fp32": "f32", "bf16": "bf16"}
# Of the largest value, between two that compute in this precision.
ALLOWED = {"fp32": 1e-3, "bf16": 0.2}
Seconds = dict[str, list[float]]


def random_sd15(dtype: torch.dtype) -> Graph:
    """Stable Diffusion 1.5's UNet with seeded weights, scaled by fan-in; norms at one."""
    from diffusers import UNet2DConditionModel

    path = Path(model_module.__file__).resolve().parent / "configs" / "sd1.json"
    config: Any = json.loads(path.read_text(encoding="utf-8"))["unet"]
    with torch.device("meta"):
        module = UNet2DConditionModel.from_config(config)
    generator = torch.Generator().manual_seed(15)
    weights = {}
    for name, value in module.state_dict().items():
        if value.ndim > 1:
            random = torch.randn(value.shape, generator=generator)
            weights[name] = random.mul_(value[0].numel() ** -0.5).bfloat16()
        else:
            fill = 1.0 if name.endswith("weight") else 0.0
            weights[name] = torch.full(value.shape, fill, dtype=torch.bfloat16)
    shapes = input_shapes("unet", module.config, height=64, width=64)
    return capture("unet", module, weights, example_shapes=shapes, dtype=dtype)


def of_folder(path: Path, dtype: torch.dtype) -> Graph:
    """A model's UNet at its own size."""
    model = Model.open(path)
    config = dict(model.config("unet"))
    side, length = config["sample_size"], Tokenizer(model.tokenizer_folder(0)).max_length
    shapes = input_shapes("unet", config, height=side, width=side, text_length=length)
    module, weights, buffers = model.module("unet"), model.weights("unet"), model.buffers("unet")
    return capture("unet", module, weights, buffers, example_shapes=shapes, dtype=dtype)


def opened(config: str, dtype: torch.dtype) -> Graph:
    """What `--config` names."""
    return random_sd15(dtype) if config == "sd15" else of_folder(Path(config), dtype)


def drawn(graph: Graph, rows: int) -> dict[str, Tensor]:
    """Seeded inputs."""
    generator = torch.Generator().manual_seed(1)
    given = {}
    for name, spec in graph.inputs.items():
        shape = [rows if size == "batch" else int(size) for size in spec.shape]
        given[name] = torch.randn(shape, generator=generator).to(spec.dtype)
    given["timestep"] = torch.linspace(1, 900, rows)
    return given


class Native:
    """The native program: what runs once, and the step."""

    def __init__(self, graph: Graph, rows: int, given: Mapping[str, Tensor]) -> None:
        made: dict[str, Tensor] = dict(given)
        weights = {name: weight.load() for name, weight in graph.weights.items()}
        for part in split(graph).graphs.values():
            self.program = Program(part, rows, {name: weights[name] for name in part.weights})
            self.costs = NodeCosts(part, rows)
            result = self.program.run({name: made[name] for name in part.inputs})
            made |= {name: value.clone() for name, value in result.items()}
        if self.program.unplanned:
            raise HeatsinkError(f"operators without a kernel: {self.program.unplanned}")
        self.out = made["out"].float()

    def profile(self, rounds: int, clock: Callable[[], float]) -> dict[str, tuple[float, int]]:
        """Seconds and FLOPs of a step by class of operator."""
        found: defaultdict[str, tuple[float, int]] = defaultdict(lambda: (0.0, 0))
        for node, seconds in self.program.profile(rounds, clock):
            name = class_of(node, self.costs)
            before = found[name]
            found[name] = before[0] + seconds, before[1] + self.costs.of(node).flops
        return dict(found)


def class_of(node: fx.Node, costs: NodeCosts) -> str:
    """What a row of the table is about."""
    name = operator(node).removeprefix("heatsink.").removeprefix("aten.")
    if name == "conv2d":
        weight = traced(argument(node, "weight"))
        assert weight is not None
        size, out = weight.shape[2], costs.shape(node)
        return f"conv {size}x{size}, {out[2]}x{out[3]}"
    if name == "linear":
        gated = " geglu" if argument(node, "activation") == "geglu" else ""
        rows = costs.shape(node)[:-1]
        return f"linear{gated}, {torch.Size(rows[1:]).numel()} tokens"
    if name == "attention":
        tokens = [costs.shape(source) for source in node.all_input_nodes[:2]]
        queries, keys = (shape[1] for shape in tokens)
        return f"attention {queries}x{keys}, d {costs.shape(node)[3]}"
    return name


class OpenVino:
    """The plain graph, as this package exports it, compiled for one batch size."""

    def __init__(self, path: Path, given: Mapping[str, Tensor], dtype: str, threads: int) -> None:
        core = importlib.import_module("openvino").Core()
        model = core.read_model(str(path))
        model.reshape({name: list(value.shape) for name, value in given.items()})
        hints = {
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_PRECISION_HINT": HINTS[dtype],
            "INFERENCE_NUM_THREADS": threads,
            "PERF_COUNT": True,
        }
        self._request = core.compile_model(model, "CPU", hints).create_infer_request()
        self._given = {name: value.float().numpy() for name, value in given.items()}

    def run(self) -> Tensor:
        """The whole UNet."""
        self._request.infer(self._given)
        return torch.from_numpy(self._request.get_output_tensor(0).data.copy())

    def profile(self) -> dict[str, float]:
        """Seconds of the last run by kind of node."""
        found: defaultdict[str, float] = defaultdict(float)
        for info in self._request.profiling_info:
            found[f"{info.node_type} ({info.exec_type})"] += info.real_time.total_seconds()
        return dict(found)


def race(
    steps: Mapping[str, Callable[[], Any]], rounds: int, clock: Callable[[], float]
) -> Seconds:
    """Seconds of every step, all in turn."""
    seconds: Seconds = {name: [] for name in steps}
    for _ in range(rounds):
        for name, run in steps.items():
            begun = clock()
            run()
            seconds[name].append(clock() - begun)
    return seconds


def openvino_of(graph: Graph, given: Mapping[str, Tensor], dtype: str, threads: int) -> Any:
    """OpenVINO's, or None where it is not there."""
    if importlib.util.find_spec("openvino") is None:
        print("OpenVINO is left out: it can't be imported")
        return None
    with tempfile.TemporaryDirectory() as folder, console.quiet_libraries():
        path = Path(folder) / "unet.onnx"
        to_onnx(run_passes(graph, PASSES), path)
        return OpenVino(path, given, dtype, threads)


def check(out: Tensor, wanted: Tensor, dtype: str) -> None:
    """Refuse results that differ by more than the precision's roundings."""
    error = float((wanted - out).abs().max() / wanted.abs().max())
    if not error <= ALLOWED[dtype]:
        raise HeatsinkError(f"{error:.1e} of the largest value away from OpenVINO")
    print(f"largest difference from OpenVINO: {error:.1e} of the largest value")


def report(seconds: Seconds, base: str) -> None:
    """A Markdown table of times as multiples of one's in the same round."""
    print(f"\n| system | time, {base} = 1 (fastest to slowest round) |\n|---|---|")
    for name, own in seconds.items():
        ratios = [a / b for a, b in zip(own, seconds[base], strict=True)]
        middle = statistics.median(ratios)
        print(f"| {name} | {middle:.3f} ({min(ratios):.3f} to {max(ratios):.3f}) |")


def report_classes(found: Mapping[str, tuple[float, int]], ceiling: float) -> None:
    """A Markdown table of a profile."""
    whole = sum(seconds for seconds, _ in found.values())
    print("\n| class | part of the step | GFLOP/s | of the units' rate |\n|---|---|---|---|")
    for name, (seconds, flops) in sorted(found.items(), key=lambda item: -item[1][0]):
        rate = flops / seconds / 1e9
        shown = f"{rate:.0f} | {100 * rate / ceiling:.0f}%" if flops else " | "
        print(f"| {name} | {100 * seconds / whole:.1f}% | {shown} |")


def report_nodes(kinds: Mapping[str, float]) -> None:
    """OpenVINO's counters, the dearest kinds."""
    whole = sum(kinds.values())
    print("\n| OpenVINO's nodes | part of its run |\n|---|---|")
    for name, spent in sorted(kinds.items(), key=lambda item: -item[1])[:8]:
        print(f"| {name} | {100 * spent / whole:.1f}% |")


def arguments() -> argparse.Namespace:
    """Of the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", default="sd15", help="sd15, or a diffusers folder")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rows", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--no-openvino", action="store_true")
    return parser.parse_args()


def main() -> None:
    """Measure and print."""
    options = arguments()
    threads, dtype = options.threads, DTYPES[options.dtype]
    torch.set_num_threads(threads)
    clock = time.process_time if threads == 1 else time.perf_counter
    graph = opened(options.config, dtype)
    given = drawn(graph, options.rows)
    own = {name: value.to(graph.inputs[name].dtype) for name, value in given.items()}
    native = Native(run_passes(graph, PASSES_NATIVE), options.rows, own)
    steps: dict[str, Callable[[], Any]] = {"native, step": native.program.replay}
    other = None
    if not options.no_openvino:
        plain = graph if dtype == torch.float32 else opened(options.config, torch.float32)
        other = openvino_of(plain, given, options.dtype, threads)
        del plain
    del graph
    gc.collect()
    ceiling = ceilings(threads, time.thread_time if threads == 1 else time.perf_counter)
    print(f"{processor()}, {_native.instruction_set()}, {threads} threads, {options.dtype}")
    print(f"the units' GFLOP/s: {ceiling[options.dtype]:.0f}; load {os.getloadavg()[0]:.1f}")
    if other is not None:
        check(native.out, other.run(), options.dtype)
        steps["OpenVINO, whole"] = other.run
    native.program.replay()
    report(race(steps, options.rounds, clock), list(steps)[-1])
    report_classes(native.profile(options.rounds, clock), ceiling[options.dtype])
    if other is not None:
        report_nodes(other.profile())


if __name__ == "__main__":
    main()
