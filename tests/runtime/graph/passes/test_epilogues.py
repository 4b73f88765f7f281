from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.functional import gelu, silu

from heatsink.runtime.graph.graph import Graph
from heatsink.runtime.graph.passes import run_passes
from heatsink.runtime.graph.passes.edit import argument, operator
from heatsink.runtime.graph.passes.epilogues import fuse_epilogues
from heatsink.runtime.graph.passes.fuse_geglu import fuse_geglu
from heatsink.runtime.graph.passes.lower_products import lower_products

Function = Callable[[Any, Tensor], Tensor]


class Net(nn.Module):
    """Layers of 4 to 6 channels, and rows of 6 that each sample adds."""

    def __init__(self, function: Function) -> None:
        super().__init__()
        self.function = function
        self.linear, self.bare = nn.Linear(4, 6), nn.Linear(4, 6, bias=False)
        self.other = nn.Linear(4, 6)
        self.conv, self.conv2 = nn.Conv2d(4, 6, 3, padding=1), nn.Conv2d(4, 6, 1)
        self.shift = nn.Parameter(torch.randn(6))

    def rows(self, x: Tensor) -> Tensor:
        """(B, 6), one row a sample."""
        return torch.tanh(x.flatten(1)[:, :6])

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return (self.function(self, x),)


def _quick(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.702 * x)


def _halves(x: Tensor) -> Tensor:
    value, gate = x.chunk(2, dim=-1)
    return value * gelu(gate)


TOKENS, IMAGE = (5, 4), (4, 5, 6)
Given = dict[str, str | bool]
FUSED: dict[str, tuple[tuple[int, ...], Given, Function]] = {
    "rule 1: bias": (TOKENS, {"bias": True}, lambda n, x: n.bare(x) + n.shift),
    "rule 2: rows over tokens": (
        TOKENS,
        {"bias": True, "sample_add": True},
        lambda n, x: n.linear(x) + n.rows(x).unsqueeze(1),
    ),
    "rule 2: rows over an image": (
        IMAGE,
        {"bias": True, "sample_add": True},
        lambda n, x: n.rows(x)[:, :, None, None] + n.conv(x),
    ),
    "rule 3: silu": (TOKENS, {"bias": True, "activation": "silu"}, lambda n, x: silu(n.linear(x))),
    "rule 3: gelu": (IMAGE, {"bias": True, "activation": "gelu"}, lambda n, x: gelu(n.conv(x))),
    "rule 3: gelu by tanh": (
        TOKENS,
        {"activation": "gelu_tanh"},
        lambda n, x: gelu(n.bare(x), approximate="tanh"),
    ),
    "rule 3: quick gelu": (
        TOKENS,
        {"bias": True, "activation": "quick_gelu"},
        lambda n, x: _quick(n.linear(x)),
    ),
    "rule 4: geglu": (
        TOKENS,
        {"bias": True, "activation": "geglu"},
        lambda n, x: _halves(n.linear(x)),
    ),
    "rule 5: residual": (
        TOKENS,
        {"bias": True, "residual": True},
        lambda n, x: torch.sin(x.repeat(1, 1, 2)[..., :6]) + n.linear(x),
    ),
    "rule 5: residual of an image": (
        IMAGE,
        {"bias": True, "residual": True},
        lambda n, x: n.conv(x) + x.repeat(1, 2, 1, 1)[:, :6],
    ),
    "all in order": (
        TOKENS,
        {"bias": True, "sample_add": True, "activation": "silu", "residual": True},
        lambda n, x: silu(n.bare(x) + n.shift + n.rows(x)[:, None]) + x.repeat(1, 1, 2)[..., :6],
    ),
}


def _fuse(graph: Graph) -> Graph:
    return run_passes(graph, [lower_products, fuse_geglu, fuse_epilogues])


def _products(graph: Graph) -> list[Any]:
    return [n for n in graph.nodes if operator(n) in {"heatsink.linear", "heatsink.conv2d"}]


def _taken(node: Any) -> Given:
    names = ("bias", "sample_add", "activation", "residual")
    found = {name: argument(node, name) for name in names}
    return {
        name: value if isinstance(value, str) else True for name, value in found.items() if value
    }


@pytest.mark.parametrize("case", FUSED)
def test_what_follows_a_product_goes_into_it(
    case: str, capture_net: Callable[..., Graph], agree: Callable[..., None], seed: int
) -> None:
    shape, expected, function = FUSED[case]
    torch.manual_seed(seed)
    graph = capture_net(Net(function), *shape)
    fused = _fuse(graph)
    (product,) = _products(fused)
    assert _taken(product) == expected
    (output,) = fused.output_nodes()
    assert output is product
    agree(graph, fused, {"x": torch.randn(3, *shape)})


# What is left after the product, for each that can't be taken, and what was.
KEPT: dict[str, tuple[tuple[int, ...], Given, Function]] = {
    "rule 1: not a weight": (TOKENS, {}, lambda n, x: n.bare(x) + n.rows(x)[0]),
    "rule 1: has a bias": (TOKENS, {"bias": True}, lambda n, x: n.linear(x) + n.shift),
    "rule 2: one row for all": (
        TOKENS,
        {"bias": True},
        lambda n, x: n.linear(x) + n.rows(x)[:1, None],
    ),
    "rule 2: after the activation": (
        TOKENS,
        {"bias": True, "activation": "silu"},
        lambda n, x: silu(n.linear(x)) + n.rows(x)[:, None],
    ),
    "rule 2: the wrong axis": (
        (6, 4),
        {"bias": True},
        lambda n, x: n.linear(x) + n.rows(x)[:, :, None],
    ),
    "rule 3: another user": (
        TOKENS,
        {"bias": True},
        lambda n, x: silu(y := n.linear(x)) * torch.exp(y),
    ),
    "rule 3: another number": (
        TOKENS,
        {"bias": True},
        lambda n, x: (y := n.linear(x)) * torch.sigmoid(1.7 * y),
    ),
    "rule 3: after the residual": (
        TOKENS,
        {"bias": True, "residual": True},
        lambda n, x: silu(n.linear(x) + torch.sin(x.repeat(1, 1, 2)[..., :6])),
    ),
    "rule 4: of an image's last axis": (
        IMAGE,
        {"bias": True},
        lambda n, x: _halves(n.conv(x)),
    ),
    "rule 5: spread": (
        TOKENS,
        {"bias": True},
        lambda n, x: n.linear(x) + torch.sin(x.repeat(1, 1, 2)[:, :1, :6]),
    ),
    "rule 5: times a number": (
        TOKENS,
        {"bias": True},
        lambda n, x: torch.add(n.linear(x), x.repeat(1, 1, 2)[..., :6], alpha=2),
    ),
    "rule 5: itself": (TOKENS, {"bias": True}, lambda n, x: (y := n.linear(x)) + y),
}


@pytest.mark.parametrize("case", KEPT)
def test_what_does_not_fit_stays_behind(
    case: str, capture_net: Callable[..., Graph], agree: Callable[..., None], seed: int
) -> None:
    shape, expected, function = KEPT[case]
    torch.manual_seed(seed)
    graph = capture_net(Net(function), *shape)
    fused = _fuse(graph)
    (product,) = _products(fused)
    assert _taken(product) == expected
    (output,) = fused.output_nodes()
    assert output is not product
    agree(graph, fused, {"x": torch.randn(3, *shape)})


@pytest.mark.parametrize("swapped", [False, True])
def test_rule_5_the_later_of_two_products_takes_the_other(
    swapped: bool, capture_net: Callable[..., Graph], agree: Callable[..., None], seed: int
) -> None:
    def both(net: Any, x: Tensor) -> Tensor:
        first, second = net.conv(x), net.conv2(x)
        total: Tensor = second + first if swapped else first + second
        return total

    torch.manual_seed(seed)
    graph = capture_net(Net(both), *IMAGE)
    fused = _fuse(graph)
    first, second = _products(fused)
    assert argument(second, "residual") is first
    assert argument(first, "residual") is None
    agree(graph, fused, {"x": torch.randn(3, *IMAGE)})


def test_a_product_keeps_its_module(capture_net: Callable[..., Graph]) -> None:
    net = Net(lambda n, x: silu(n.linear(x)) + functional.pad(x, (0, 2)))
    (product,) = _products(_fuse(capture_net(net, *TOKENS)))
    assert product.meta["heatsink_path"] == "linear"
