from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from heatsink.runtime.graph.graph import Graph
from heatsink.runtime.graph.passes import run_passes
from heatsink.runtime.graph.passes.edit import argument, operator
from heatsink.runtime.graph.passes.fuse_layer_norm import fuse_layer_norm


class Net(nn.Module):
    def __init__(self, norm: nn.Module, turn: bool = False) -> None:
        super().__init__()
        self.norm = norm
        self.turn = turn
        with torch.no_grad():
            for parameter in norm.parameters():
                parameter.add_(torch.randn(parameter.shape))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return (self.norm(x.transpose(1, 2) if self.turn else x),)


MADE: dict[str, Callable[[], Net]] = {
    "affine": lambda: Net(nn.LayerNorm(6, eps=1e-3)),
    "plain": lambda: Net(nn.LayerNorm(6, eps=1e-3, elementwise_affine=False)),
    "without bias": lambda: Net(nn.LayerNorm(6, eps=1e-3, bias=False)),
    "of a transposed input": lambda: Net(nn.LayerNorm(5, eps=1e-3), turn=True),
}


@pytest.mark.parametrize("case", MADE)
def test_rule_1_norms_of_rows_are_found(
    case: str, capture_net: Callable[..., Graph], agree: Callable[..., None], seed: int
) -> None:
    torch.manual_seed(seed)
    graph = capture_net(MADE[case](), 5, 6)
    fused = run_passes(graph, [fuse_layer_norm])
    (node,) = (n for n in fused.nodes if operator(n) == "heatsink.layer_norm")
    assert argument(node, "eps") == 1e-3
    assert not any(operator(n) == "aten.layer_norm" for n in fused.nodes)
    agree(graph, fused, {"x": 3 + torch.randn(3, 5, 6)})


@pytest.mark.parametrize("shape", [(5, 6), (20000,)])
def test_other_norms_stay(shape: tuple[int, ...], capture_net: Callable[..., Graph]) -> None:
    _, changed = fuse_layer_norm(capture_net(Net(nn.LayerNorm(shape)), *shape))
    assert not changed
