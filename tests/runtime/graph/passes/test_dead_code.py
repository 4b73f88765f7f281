from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from heatsink.runtime.graph.graph import Graph
from heatsink.runtime.graph.passes import run_passes
from heatsink.runtime.graph.passes.dead_code import remove_dead_code


class Net(nn.Module):
    def __init__(self, waste: bool) -> None:
        super().__init__()
        self.used, self.unused = nn.Linear(4, 3), nn.Linear(3, 2)
        self.waste = waste

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        y = self.used(x)
        if self.waste:
            torch.exp(self.unused(y))
        return (y,)


def test_chains_without_users_go_with_their_weights(capture_net: Callable[..., Graph]) -> None:
    graph = capture_net(Net(waste=True), 4)
    assert set(graph.weights) == {"used.weight", "used.bias", "unused.weight", "unused.bias"}
    _, changed = remove_dead_code(graph.copy())
    assert changed
    cleaned = run_passes(graph, [remove_dead_code])
    assert set(cleaned.weights) == set(cleaned.origins) == {"used.weight", "used.bias"}
    assert [str(n.target) for n in cleaned.nodes if n.op == "call_function"] == [
        "aten.linear.default"
    ]
    x = {"x": torch.ones(2, 4)}
    assert torch.equal(cleaned.run(x)["y"], graph.run(x)["y"])


def test_a_graph_in_full_use_stays(capture_net: Callable[..., Graph]) -> None:
    graph = capture_net(Net(waste=False), 4)
    before = str(graph.module.graph)
    graph, changed = remove_dead_code(graph)
    assert not changed
    assert str(graph.module.graph) == before


def test_an_unused_input_stays(capture_net: Callable[..., Graph]) -> None:
    class Constant(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, ...]:
            return (torch.ones(2),)

    graph = run_passes(capture_net(Constant(), 4), [remove_dead_code])
    assert [node.target for node in graph.input_nodes()] == ["x"]


def test_the_last_layer_of_a_penultimate_encoder_goes(graphs: Callable[[str], Graph]) -> None:
    graph = graphs("text_encoder of SDXL")
    cleaned = run_passes(graph, [remove_dead_code])
    layers = {name.split("layers.")[1][0] for name in cleaned.weights if "layers." in name}
    assert layers == {"0", "1"}
    ids = {"input_ids": torch.tensor([[1, 2, 3, 4, 5, 5, 5]])}
    assert torch.equal(cleaned.run(ids)["hidden"], graph.run(ids)["hidden"])


def test_what_writes_is_kept(capture_net: Callable[..., Graph]) -> None:
    graph = capture_net(Net(waste=False), 4)
    (linear,) = (n for n in graph.nodes if n.op == "call_function")
    with graph.module.graph.inserting_after(linear):
        check = graph.module.graph.call_function(
            torch.ops.aten._assert_tensor_metadata.default, (linear,)
        )
    check.meta = dict(linear.meta)
    _, changed = remove_dead_code(graph)
    assert not changed
    assert check in list(graph.nodes)
