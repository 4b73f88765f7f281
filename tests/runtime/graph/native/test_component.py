"""Components: programs made when they are needed, on one arena that grows."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from heatsink.runtime.errors import InvalidRequest
from heatsink.runtime.graph.capture import capture_module
from heatsink.runtime.graph.graph import Graph, TensorSpec
from heatsink.runtime.graph.passes.drop_noops import drop_noop_nodes
from heatsink.runtime.graph.passes.pipeline import PASSES_NATIVE
from heatsink.runtime.native.component import NativeComponent
from heatsink.runtime.native.shared_weights import SharedWeights
from heatsink.runtime.native.workspace import Workspace

Capture = Callable[..., Graph]


class Net(nn.Module):
    """Two products with something between that cannot be left out."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 8), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return (self.second(torch.nn.functional.silu(self.first(x) * 1.0)),)


@pytest.fixture
def graph(capture_net: Capture) -> Graph:
    torch.manual_seed(3)
    return capture_net(Net(), 6)


def _rows(count: int, seed: int = 0) -> dict[str, Tensor]:
    return {"x": torch.randn(count, 6, generator=torch.Generator().manual_seed(seed))}


def test_every_batch_size_gives_the_graphs_own_bits(graph: Graph) -> None:
    component = NativeComponent(graph)
    for rows in (2, 1, 5, 2):
        given = _rows(rows, rows)
        assert torch.equal(component.run(given)["y"], graph.run(given)["y"])


def test_a_larger_batch_grows_the_arena_and_drops_what_was_built_on_it(graph: Graph) -> None:
    component = NativeComponent(graph)
    component.run(_rows(2))
    small = component.workspace.bytes
    assert component.batches == [2]
    component.run(_rows(50))
    assert component.workspace.bytes > small
    assert component.batches == [50]
    # A smaller one fits.
    component.run(_rows(2))
    assert component.batches == [2, 50]


def test_reserving_keeps_smaller_programs(graph: Graph) -> None:
    component = NativeComponent(graph)
    component.reserve(50)
    component.run(_rows(2))
    program = component.program(2)
    component.run(_rows(50))
    assert component.program(2) is program


def test_components_share_an_arena(graph: Graph) -> None:
    space = Workspace()
    first, second = (NativeComponent(graph, workspace=space) for _ in range(2))
    first.run(_rows(2))
    second.run(_rows(40))
    assert first.batches == []
    kept = first.run(_rows(2, 1))["y"]
    wanted = kept.clone()
    second.run(_rows(40, 2))
    # What was returned is the caller's own.
    assert torch.equal(kept, wanted)
    assert torch.equal(first.run(_rows(2, 1))["y"], wanted)


def test_weights_are_loaded_once_and_not_copied(graph: Graph) -> None:
    component = NativeComponent(graph)
    component.run(_rows(1))
    held = {name: value.data_ptr() for name, value in component._constants.items()}
    component.run(_rows(30))
    assert {name: value.data_ptr() for name, value in component._constants.items()} == held
    assert held == {name: w.source().data_ptr() for name, w in graph.weights.items()}


def test_weights_that_were_written_are_read_again_and_no_others(graph: Graph) -> None:
    component = NativeComponent(graph, passes=PASSES_NATIVE)
    component.run(_rows(2))
    others = {n: v for n, v in component._constants.items() if n != "first.weight"}
    with torch.no_grad():
        graph.weights["first.weight"].source().mul_(2)
    assert component.reload({"first.weight"})
    # Packed anew, though it is the tensor that it was.
    found = component.run(_rows(2))["y"]
    assert torch.allclose(found, graph.run(_rows(2))["y"], atol=1e-5)
    assert all(component._constants[name] is value for name, value in others.items())
    assert not component.reload({"third.weight"})
    assert component.batches == [2]


def test_components_of_one_network_share_its_weights(graph: Graph) -> None:
    weights = SharedWeights()
    first, second = (
        NativeComponent(graph, passes=PASSES_NATIVE, weights=weights) for _ in range(2)
    )
    for component in (first, second):
        component.run(_rows(1))
    assert {id(v) for v in first._constants.values()} == {id(v) for v in second._constants.values()}
    with pytest.raises(ValueError, match="weights: expected one on meta, got one on cpu"):
        NativeComponent(graph, device="meta", weights=weights)


def test_a_product_with_a_computed_weight_is_not_packed() -> None:
    class Product(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bias = nn.Parameter(torch.ones(5))

        def forward(self, x: Tensor) -> tuple[Tensor, ...]:
            return (nn.functional.linear(x, x[:5] * 2, self.bias),)

    graph = capture_module(
        "product", Product().to("meta"), {"bias": torch.ones(5)}, {},
        {"x": TensorSpec((5, 6), torch.float32)}, ["y"],
    )  # fmt: skip
    component = NativeComponent(graph, passes=PASSES_NATIVE)
    for seed in (1, 2):
        given = _rows(5, seed)
        assert torch.allclose(component.run(given)["y"], graph.run(given)["y"], atol=1e-5)


def test_passes_run_on_a_copy(graph: Graph) -> None:
    before = len(list(graph.nodes))
    component = NativeComponent(graph, passes=(drop_noop_nodes,))
    assert len(list(component.graph.nodes)) == before - 1
    assert len(list(graph.nodes)) == before
    given = _rows(3)
    assert torch.equal(component.run(given)["y"], graph.run(given)["y"])


def test_results_are_ordinary_tensors(graph: Graph) -> None:
    with torch.no_grad():
        found = NativeComponent(graph).run(_rows(2))["y"]
    assert not found.is_inference()
    found.mul_(2)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({}, r"net takes the inputs \['x'\], got \[\]"),
        ({"x": torch.zeros(2, 5)}, r"input 'x' wants shape .*got \[2, 5\]"),
        ({"x": torch.zeros(2, 6, dtype=torch.int64)}, "input 'x' wants torch.float32"),
        ({"x": torch.zeros(0, 6)}, "expected at least 1 row, got 0"),
    ],
)
def test_wrong_inputs(graph: Graph, inputs: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        NativeComponent(graph).run(inputs)


def test_a_workspace_of_another_device(graph: Graph) -> None:
    with pytest.raises(ValueError, match="workspace: expected one on meta, got one on cpu"):
        NativeComponent(graph, device="meta", workspace=Workspace("cpu"))


def test_threads_do_not_meet_in_the_arena(graph: Graph) -> None:
    component = NativeComponent(graph)
    wrong: list[int] = []

    def work(rows: int) -> None:
        for seed in range(20):
            given = _rows(rows, seed)
            if not torch.equal(component.run(given)["y"], graph.run(given)["y"]):
                wrong.append(rows)

    threads = [threading.Thread(target=work, args=(rows,)) for rows in (1, 3, 17)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
