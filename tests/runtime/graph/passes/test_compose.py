"""Pieces put together, where the rules hold and only there."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from heatsink.runtime.graph.graph import PATH_KEY, Graph
from heatsink.runtime.graph.passes import run_passes
from heatsink.runtime.graph.passes.compose import compose_operators
from heatsink.runtime.graph.passes.dead_code import remove_dead_code

aten = torch.ops.aten
Body = Callable[["Net", Tensor], Any]


class Net(nn.Module):
    """Weights for every rule, and a body that uses some of them."""

    def __init__(self, body: Body) -> None:
        super().__init__()
        self.body = body
        self.weight = nn.Parameter(torch.randn(6, 8))
        self.bias = nn.Parameter(torch.randn(6))
        self.scale = nn.Parameter(torch.randn(8))
        self.shift = nn.Parameter(torch.randn(8))
        self.kernel = nn.Parameter(torch.randn(5, 8, 3, 3))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        found = self.body(self, torch.sin(x))
        return (found[0] + found[1].sum(),) if isinstance(found, list) else (found,)


def _attend(x: Tensor, dropout: float = 0.0) -> Any:
    q = x.view(-1, 4, 2, 4).transpose(1, 2)
    return aten._scaled_dot_product_flash_attention_for_cpu.default(q, q, q, dropout)


def _back(heads: Tensor) -> Tensor:
    # Right for how the piece lays out its result.
    found: Tensor = aten.view.default(heads.transpose(1, 2), [-1, 4, 8])
    return found


def _product(net: Net, x: Tensor) -> Tensor:
    found: Tensor = aten.mm.default(aten.view.default(x, [-1, 8]), aten.t.default(net.weight))
    return found


def _pixels(x: Tensor) -> Tensor:
    return x.transpose(1, 2).reshape(-1, 8, 2, 2)


MADE: dict[str, tuple[list[str], Body]] = {
    "rule 1: with a bias": (
        ["linear"],
        lambda net, x: aten.addmm.default(net.bias, x[:, 0], aten.t.default(net.weight)),
    ),
    "rule 1: without": (["linear"], lambda net, x: aten.mm.default(x[:, 0], net.weight.t())),
    "rule 2": (["linear"], lambda net, x: aten.view.default(_product(net, x), [-1, 4, 6])),
    "rule 2: another view": (
        ["linear"],
        lambda net, x: aten._unsafe_view.default(_product(net, x), [-1, 4, 6]),
    ),
    "rule 3: groups": (
        ["group_norm"],
        lambda net, x: aten.native_group_norm.default(
            x.transpose(1, 2).contiguous(), net.scale, net.shift, x.shape[0], 8, 4, 2, 1e-5
        )[0],
    ),
    "rule 3: layers": (
        ["layer_norm"],
        lambda net, x: aten.native_layer_norm.default(x, [8], net.scale, net.shift, 1e-5)[0],
    ),
    "rules 4 and 6": (
        ["reshape", "scaled_dot_product_attention"],
        lambda net, x: _back(_attend(x)[0]),
    ),
    "rule 5": (
        ["conv2d"],
        lambda net, x: aten.convolution.default(
            _pixels(x), net.kernel, None, [2, 2], [1, 1], [1, 1], False, [0, 0], 1
        ),
    ),
}
KEPT: dict[str, tuple[str, Body]] = {
    "rule 1: a bias a row": (
        "addmm",
        lambda net, x: aten.addmm.default(x[:, 1, :6], x[:, 0], net.weight.t()),
    ),
    "rule 1: a factor": (
        "addmm",
        lambda net, x: aten.addmm.default(net.bias, x[:, 0], net.weight.t(), alpha=2),
    ),
    "rule 1: not transposed": ("mm", lambda net, x: aten.mm.default(x[:, 0, :6], net.weight)),
    "rule 2: other sizes": (
        "reshape",
        lambda net, x: aten.view.default(_product(net, x), [-1, 2, 12]),
    ),
    "rule 3: another result": (
        "native_layer_norm",
        lambda net, x: list(aten.native_layer_norm.default(x, [8], net.scale, net.shift, 1e-5)[:2]),
    ),
    "rule 4: another result": (
        "_scaled_dot_product_flash_attention_for_cpu",
        lambda net, x: list(_attend(x)),
    ),
    "rule 5: transposed": (
        "convolution",
        lambda net, x: aten.convolution.default(
            _pixels(x), net.kernel.transpose(0, 1), None, [1, 1], [0, 0], [1, 1], True, [0, 0], 1
        ),
    ),
    "rule 6: of a dtype": ("view", lambda net, x: aten.view.dtype(x, torch.int32).float()),
}


def _names(graph: Graph) -> list[str]:
    return [str(n.target).split(".")[1] for n in graph.nodes if str(n.target).startswith("aten.")]


def _same(before: Graph, after: Graph) -> bool:
    x = torch.randn(3, 4, 8, dtype=torch.float32)
    found, wanted = (graph.run({"x": x})["y"] for graph in (after, before))
    return torch.allclose(found, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rule", MADE)
def test_pieces_become_the_operator(
    rule: str, capture_net: Callable[..., Graph], seed: int
) -> None:
    torch.manual_seed(seed)
    wanted, body = MADE[rule]
    graph = capture_net(Net(body), 4, 8)
    after = run_passes(graph, (compose_operators, remove_dead_code))
    names = _names(after)
    assert set(wanted) <= set(names)
    pieces = {"mm", "addmm", "convolution", "view", "_unsafe_view", "t"}
    assert not pieces & set(names)
    assert not any(name.startswith(("native_", "_scaled")) for name in names)
    assert _same(graph, after)
    again, modified = compose_operators(after.copy())
    assert not modified
    assert _names(again) == names


@pytest.mark.parametrize("rule", KEPT)
def test_where_a_condition_fails_it_stays(
    rule: str, capture_net: Callable[..., Graph], seed: int
) -> None:
    torch.manual_seed(seed)
    kept, body = KEPT[rule]
    graph = capture_net(Net(body), 4, 8)
    after = run_passes(graph, (compose_operators, remove_dead_code))
    assert kept in _names(after)
    assert _same(graph, after)


def test_rule_2_keeps_a_product_that_is_read_elsewhere(
    capture_net: Callable[..., Graph], seed: int
) -> None:
    torch.manual_seed(seed)

    def body(net: Net, x: Tensor) -> list[Tensor]:
        product = _product(net, x)
        return [aten.view.default(product, [-1, 4, 6]), product]

    graph = capture_net(Net(body), 4, 8)
    after = run_passes(graph, (compose_operators, remove_dead_code))
    (linear,) = (n for n in after.nodes if str(n.target) == "aten.linear.default")
    assert linear.meta["val"].dim() == 2
    assert _same(graph, after)


def test_new_nodes_have_the_paths_of_what_they_replace(capture_net: Callable[..., Graph]) -> None:
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Net(MADE["rule 2"][1])

        def forward(self, x: Tensor) -> tuple[Tensor, ...]:
            return (self.inner(x)[0] * 2,)

    after = run_passes(capture_net(Outer(), 4, 8), (compose_operators, remove_dead_code))
    (linear,) = (n for n in after.nodes if str(n.target) == "aten.linear.default")
    assert linear.meta[PATH_KEY] == "inner"
