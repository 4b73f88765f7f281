from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from heatsink.runtime.graph.cost import Cost, costs, total
from heatsink.runtime.graph.graph import Graph
from heatsink.runtime.graph.passes import run_passes
from heatsink.runtime.graph.passes.pipeline import PASSES_NATIVE


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 6, 3, padding=1)
        self.up, self.down = nn.Linear(6, 2 * 10), nn.Linear(10, 6)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        tokens = self.conv(x).permute(0, 2, 3, 1).reshape(x.shape[0], 20, 6)
        heads = tokens.view(x.shape[0], 20, 2, 3).transpose(1, 2)
        seen = functional.scaled_dot_product_attention(heads, heads, heads)
        tokens = seen.transpose(1, 2).reshape(x.shape[0], 20, 6)
        value, gate = self.up(tokens).chunk(2, dim=-1)
        return (self.down(value * functional.gelu(gate)),)


@pytest.mark.parametrize("rows", [1, 7])
def test_products_are_counted_by_their_shapes(rows: int, capture_net: Callable[..., Graph]) -> None:
    graph = capture_net(Net(), 4, 4, 5)
    conv = 2 * rows * 6 * 20 * 4 * 9
    attention = 2 * 2 * rows * 2 * 20 * 20 * 3
    linear = 2 * rows * 20 * (6 * 20 + 10 * 6)
    before, after = costs(graph, rows), costs(run_passes(graph, PASSES_NATIVE), rows)
    assert before["aten.conv2d"].flops == after["heatsink.conv2d"].flops == conv
    assert before["aten.linear"].flops == after["heatsink.linear"].flops == linear
    name = "aten.scaled_dot_product_attention"
    assert before[name].flops == after["heatsink.attention"].flops == attention
    assert total(before).flops == total(after).flops == conv + attention + linear
    # Input, weight, bias and output, in float32.
    assert before["aten.conv2d"].bytes == 4 * (rows * 80 + 216 + 6 + rows * 120)


def test_views_move_nothing_and_the_dearest_comes_first(
    capture_net: Callable[..., Graph],
) -> None:
    found = costs(capture_net(Net(), 4, 4, 5), 2)
    for name in ("aten.permute", "aten.view", "aten.transpose", "aten.chunk"):
        assert found[name].nodes > 0
        assert found[name].bytes == found[name].flops == 0
    # A reshape of a permuted image copies it.
    assert found["aten.reshape"].bytes > 0
    flops = [cost.flops for cost in found.values()]
    assert flops == sorted(flops, reverse=True)
    assert found["getitem"] == Cost(nodes=2)


def test_an_operation_on_integers_has_bytes(capture_net: Callable[..., Graph]) -> None:
    class Ids(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, ...]:
            return ((x > 0).to(torch.int64).argmax(dim=-1),)

    found = costs(capture_net(Ids(), 5), 3)
    assert found["aten.gt"].bytes == 3 * 5 * (4 + 1)
    assert found["aten.argmax"].bytes == 3 * (5 * 8 + 8)
