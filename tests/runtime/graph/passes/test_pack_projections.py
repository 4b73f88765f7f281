from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from heatsink.runtime.graph.graph import Graph
from heatsink.runtime.graph.packing import spans
from heatsink.runtime.graph.passes import run_passes
from heatsink.runtime.graph.passes.dead_code import remove_dead_code
from heatsink.runtime.graph.passes.edit import operator
from heatsink.runtime.graph.passes.fuse_attention import fuse_attention
from heatsink.runtime.graph.passes.pack_projections import pack_projections
from heatsink.runtime.graph.weight import Origin

HEADS, SIZE, TOKENS = 2, 4, 5


class Net(nn.Module):
    """Attention whose q, k and v come from x, 2 x or 3 x, each with a bias or without."""

    def __init__(
        self,
        sources: str,
        biases: str,
        shared: bool = False,
        seen: bool = False,
        one: bool = False,
    ) -> None:
        super().__init__()
        self.one = one
        self.sources, self.seen = sources, seen
        layers = [nn.Linear(6, HEADS * SIZE, bias=b == "b") for b in biases]
        self.q, self.k, self.v = layers
        if shared:
            self.v = self.k

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        inputs = {"1": x, "2": 2 * x, "3": 3 * x}
        made = [
            layer(inputs[of])
            for layer, of in zip((self.q, self.k, self.v), self.sources, strict=True)
        ]
        heads = [m.view(x.shape[0], TOKENS, HEADS, SIZE).transpose(1, 2) for m in made]
        if self.one:
            heads[2] = heads[1]
        out = functional.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2)
        return (out + made[0] if self.seen else out,)


def _linears(graph: Graph) -> int:
    return Counter(operator(n) for n in graph.nodes)["aten.linear"]


# Where the inputs come from, which layers have a bias, and the products that are left.
PACKED = [
    ("111", "---", 1),
    ("111", "bbb", 1),
    ("122", "---", 2),
    ("122", "bbb", 2),
    ("121", "---", 2),
    ("111", "b-b", 2),
]


@pytest.mark.parametrize(("sources", "biases", "left"), PACKED)
def test_rule_1_products_of_one_input_become_one(
    sources: str,
    biases: str,
    left: int,
    capture_net: Callable[..., Graph],
    agree: Callable[..., None],
    seed: int,
) -> None:
    torch.manual_seed(seed)
    net = Net(sources, biases)
    graph = capture_net(net, TOKENS, 6)
    packed = run_passes(graph, [fuse_attention, pack_projections])
    assert _linears(graph) == 3
    assert _linears(packed) == left
    agree(graph, packed, {"x": torch.randn(3, TOKENS, 6)})
    # Cut along the channels, the parts are views: nothing is copied.
    reshapes = [n for n in packed.nodes if operator(n) == "aten.reshape"]
    assert not reshapes
    parameters = dict(net.named_parameters())
    undone: dict[str, Tensor] = {}
    for name, weight in packed.weights.items():
        for start, stop, origin in spans(packed.origins[name], weight.shape[0]):
            undone[origin.parameter] = weight.load()[start:stop]
    assert set(undone) == set(parameters)
    assert all(torch.equal(undone[name], values) for name, values in parameters.items())


def test_origins_are_in_order(capture_net: Callable[..., Graph]) -> None:
    packed = run_passes(
        capture_net(Net("111", "bbb"), TOKENS, 6), [fuse_attention, pack_projections]
    )
    rows = ((0, HEADS * SIZE),)
    assert sorted(packed.origins.values(), key=str) == [
        [Origin(f"{layer}.{kind}", rows) for layer in "qkv"] for kind in ("bias", "weight")
    ]


@pytest.mark.parametrize(
    "net",
    [Net("123", "---"), Net("112", "b-b"), Net("122", "---", shared=True)],
    ids=["three inputs", "one bias", "a shared weight"],
)
def test_what_shares_no_input_or_weight_stays(net: Net, capture_net: Callable[..., Graph]) -> None:
    graph = run_passes(capture_net(net, TOKENS, 6), [fuse_attention])
    _, changed = pack_projections(graph)
    assert not changed
    assert _linears(graph) == 3


def test_a_product_with_another_user_is_left_out(
    capture_net: Callable[..., Graph], agree: Callable[..., None], seed: int
) -> None:
    torch.manual_seed(seed)
    graph = capture_net(Net("111", "---", seen=True), TOKENS, 6)
    packed = run_passes(graph, [fuse_attention, pack_projections])
    assert _linears(packed) == 2
    assert "q.weight" in packed.weights
    agree(graph, packed, {"x": torch.randn(3, TOKENS, 6)})


def test_a_layer_that_serves_as_key_and_value_is_left_out(
    capture_net: Callable[..., Graph], agree: Callable[..., None], seed: int
) -> None:
    torch.manual_seed(seed)
    graph = run_passes(capture_net(Net("111", "---", one=True), TOKENS, 6), [remove_dead_code])
    packed = run_passes(graph, [fuse_attention, pack_projections])
    assert _linears(graph) == _linears(packed) == 2
    agree(graph, packed, {"x": torch.randn(3, TOKENS, 6)})
