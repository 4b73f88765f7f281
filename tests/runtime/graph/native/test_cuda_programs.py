"""Programs on a CUDA device: the graph's results, one CUDA graph a replay, and no allocation."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from heatsink.runtime.errors import CaptureFailed
from heatsink.runtime.graph.graph import Graph
from heatsink.runtime.graph.passes import run_passes
from heatsink.runtime.graph.passes.pipeline import PASSES_NATIVE
from heatsink.runtime.native.component import NativeComponent
from heatsink.runtime.native.cuda_graph import Graphs
from heatsink.runtime.native.phased import PhasedComponent
from heatsink.runtime.native.program import Program
from heatsink.runtime.native.workspace import Workspace, Workspaces

pytestmark = pytest.mark.gpu
NAMES = ["unet", "unet of SDXL", "vae_decoder"]
DEVICE = "cuda:0"


@pytest.fixture(autouse=True)
def whole_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """Products of float32 in float32."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)


@pytest.fixture(params=NAMES)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def graph(name: str, graphs: Callable[[str], Graph]) -> Graph:
    return run_passes(graphs(name), PASSES_NATIVE)


def _program(graph: Graph, rows: int) -> Program:
    weights = {name: weight.load().to(DEVICE) for name, weight in graph.weights.items()}
    return Program(graph, rows, weights, device=torch.device(DEVICE))


def _on_device(given: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.to(DEVICE) for name, value in given.items()}


def _copies(found: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in found.items()}


def test_results_are_the_graphs_within_float32s_error(
    name: str, graph: Graph, cases: dict[str, Any]
) -> None:
    given = cases[name].inputs(3, seed=1)
    exact = graph.run(given, dtype=torch.float64)
    plain = graph.run(given)
    for make in (NativeComponent, PhasedComponent):
        found = make(graph, device=DEVICE).run(given)
        for output, reference in exact.items():
            error, own = ((v[output].cpu() - reference).abs().max() for v in (found, plain))
            limit = own + torch.finfo(torch.float32).eps * reference.abs().max()
            assert error <= 2 * limit


def test_a_captured_replay_has_the_bits_of_the_calls(
    name: str, graph: Graph, cases: dict[str, Any]
) -> None:
    program, seeds = _program(graph, 2), range(3)
    draws = [_on_device(cases[name].inputs(2, seed=seed)) for seed in seeds]
    wanted = [_copies(program.run(given)) for given in draws]
    program.capture(Graphs(torch.device(DEVICE)))
    for given, values in zip(draws, wanted, strict=True):
        found = program.run(given)
        assert all(torch.equal(found[output], value) for output, value in values.items())


def test_a_replay_allocates_nothing(name: str, graph: Graph, cases: dict[str, Any]) -> None:
    program = _program(graph, 2)
    given = _on_device(cases[name].inputs(2, seed=1))

    def count() -> int:
        return int(torch.cuda.memory_stats(DEVICE)["allocation.all.allocated"])

    def allocations(call: Callable[[], Any]) -> int:
        before = count()
        call()
        torch.cuda.synchronize()
        return count() - before

    program.run(given)
    # What the calls allocate, they allocate each time.
    assert allocations(program.replay) > 0 or not program.unplanned
    program.capture(Graphs(torch.device(DEVICE)))
    program.run(given)
    assert allocations(program.replay) == 0
    assert allocations(lambda: torch.zeros(100, device=DEVICE)) == 1


def test_the_peak_is_the_plans_and_the_workspaces(
    name: str, graph: Graph, cases: dict[str, Any]
) -> None:
    given = _on_device(cases[name].inputs(4, seed=1))
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated(DEVICE)
    weights = {n: w.load().to(DEVICE) for n, w in graph.weights.items()}
    program = Program(graph, 4, weights, device=torch.device(DEVICE))
    # Kernels in channels_last memory, and what is computed once, are there for good as weights are.
    constants = torch.cuda.memory_allocated(DEVICE) - before - program.memory.peak
    captures = Graphs(torch.device(DEVICE))
    program.capture(captures)
    torch.cuda.reset_peak_memory_stats(DEVICE)
    program.run(given)
    torch.cuda.synchronize()
    found = int(torch.cuda.max_memory_allocated(DEVICE)) - before - constants
    # The arena's size is rounded up to 512 bytes; the pool of graphs is apart, and told apart.
    assert captures.pool_bytes > 0 or not program.unplanned
    limit = 1.1 * program.memory.lower_bound + captures.library_bytes + 512
    assert found <= limit


def test_the_pool_is_the_largest_batchs(name: str, graph: Graph) -> None:
    space = Workspace(DEVICE)
    component = NativeComponent(graph, device=DEVICE, workspace=space)
    assert space.graphs is not None
    component.capture([4])
    first, arena = space.graphs.pool_bytes, space.bytes
    component.capture([2, 1])
    assert component.batches == [1, 2, 4]
    assert (space.graphs.pool_bytes, space.bytes) == (first, arena)


def test_an_operator_that_waits_for_the_device_is_named() -> None:
    value = torch.ones(3, device=DEVICE)
    captures = Graphs(torch.device(DEVICE))

    def run() -> None:
        try:
            torch.nonzero(value)
        except Exception as error:
            raise RuntimeError(f"aten.nonzero.default of mid: {error}") from error

    with pytest.raises(CaptureFailed, match=r"net of 1 rows can't .*: aten\.nonzero\.default"):
        captures.capture(run, "net of 1 rows")
    # The device can still be used, and the next capture is whole.
    out = torch.zeros(3, device=DEVICE)

    def add() -> None:
        torch.add(value, value, out=out)

    captured = captures.capture(add, "sum")
    value.fill_(4)
    captured()
    torch.cuda.synchronize()
    assert out.tolist() == [8.0] * 3


def test_components_on_two_streams_do_not_meet(
    graphs: Callable[[str], Graph], cases: dict[str, Any]
) -> None:
    spaces = Workspaces(DEVICE)
    parts = {
        name: NativeComponent(
            run_passes(graphs(name), PASSES_NATIVE), device=DEVICE, workspace=spaces.of(name)
        )
        for name in ("unet", "vae_decoder")
    }
    given = {name: cases[name].inputs(2, seed=1) for name in parts}
    wanted = {name: part.run(given[name]) for name, part in parts.items()}
    assert parts["unet"].workspace is not parts["vae_decoder"].workspace
    wrong: list[str] = []

    def loop(name: str) -> None:
        with torch.cuda.stream(torch.cuda.Stream(DEVICE)):
            for _ in range(50):
                found = parts[name].run(given[name])
                if not all(torch.equal(found[o], v) for o, v in wanted[name].items()):
                    wrong.append(name)

    threads = [threading.Thread(target=loop, args=(name,)) for name in parts for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_what_the_caller_gives_and_gets_needs_no_waiting(
    graphs: Callable[[str], Graph], cases: dict[str, Any]
) -> None:
    graph = run_passes(graphs("vae_decoder"), PASSES_NATIVE)
    component = NativeComponent(graph, device=DEVICE)
    given = _on_device(cases["vae_decoder"].inputs(2, seed=1))
    wanted = _copies(component.run(given))
    busy = torch.randn(2048, 2048, device=DEVICE)
    for _ in range(5):
        # Inputs and results are behind long work on the caller's stream.
        for _ in range(20):
            busy = busy @ busy / 2048
        late = {name: value + 0 * busy[0, 0].nan_to_num() for name, value in given.items()}
        found = component.run(late)
        assert all(torch.equal(found[output], value) for output, value in wanted.items())
