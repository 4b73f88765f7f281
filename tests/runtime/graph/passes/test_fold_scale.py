from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from heatsink.runtime.graph.graph import Graph
from heatsink.runtime.graph.passes import run_passes
from heatsink.runtime.graph.passes.fold_scale import fold_scales
from heatsink.runtime.graph.weight import IDENTITY, Origin

Function = Callable[[Any, Tensor], Tensor | tuple[Tensor, ...]]


class Net(nn.Module):
    def __init__(self, layer: nn.Module, function: Function) -> None:
        super().__init__()
        self.layer = layer
        self.function = function

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        result = self.function(self.layer, x)
        return result if isinstance(result, tuple) else (result,)


def _conv(bias: bool = True) -> nn.Module:
    return nn.Conv2d(4, 6, 3, padding=1, bias=bias)


def _scales(graph: Graph) -> int:
    return sum(str(n.target).startswith(("aten.mul", "aten.div")) for n in graph.nodes)


def _check(graph: Graph, folded: Graph, shape: tuple[int, ...], seed: int) -> None:
    torch.manual_seed(seed)
    inputs = {"x": torch.randn(2, *shape)}
    exact, plain = graph.run(inputs, dtype=torch.float64), graph.run(inputs)
    for output, result in folded.run(inputs).items():
        reference = exact[output]
        limit = reference.abs().max() * torch.finfo(torch.float32).eps
        budget = 2 * ((plain[output].double() - reference).abs().max() + limit)
        assert (result.double() - reference).abs().max() <= budget


FOLDED: dict[str, tuple[Callable[[], nn.Module], Function, dict[str, str]]] = {
    "rule 1: before a convolution": (_conv, lambda f, x: f(x * 0.3), {"weight": "scale by 0.3"}),
    "rule 1: division": (_conv, lambda f, x: f(x / 0.3), {"weight": "divide by 0.3"}),
    "rule 1: number first": (_conv, lambda f, x: f(3 * x), {"weight": "scale by 3.0"}),
    "rule 1: linear": (
        lambda: nn.Linear(5, 7),
        lambda f, x: f(x * -2.5),
        {"weight": "scale by -2.5"},
    ),
    "rule 2: after a convolution": (
        _conv,
        lambda f, x: f(x) * 0.3,
        {"weight": "scale by 0.3", "bias": "scale by 0.3"},
    ),
    "rule 2: no bias": (
        lambda: _conv(bias=False),
        lambda f, x: f(x) / 7,
        {"weight": "divide by 7.0"},
    ),
    "rule 2: linear": (
        lambda: nn.Linear(5, 7),
        lambda f, x: f(x) * 4,
        {"weight": "scale by 4.0", "bias": "scale by 4.0"},
    ),
    "rules 1 and 2": (
        _conv,
        lambda f, x: f(x * 2.0) / 3.0,
        {"weight": "scale by 2.0, divide by 3.0", "bias": "divide by 3.0"},
    ),
}


@pytest.mark.parametrize("rule", FOLDED)
def test_scales_are_folded(rule: str, capture_net: Callable[..., Graph], seed: int) -> None:
    make, function, transforms = FOLDED[rule]
    torch.manual_seed(seed)
    layer = make()
    graph = capture_net(Net(layer, function), 4, 5, 5)
    folded = run_passes(graph, [fold_scales])
    assert _scales(graph) > 0
    assert _scales(folded) == 0
    for name, origins in folded.origins.items():
        (origin,) = origins
        plain = name.removeprefix("layer.")
        assert origin == Origin(name, None, transforms.get(plain, IDENTITY))
    _check(graph, folded, (4, 5, 5), seed)


@pytest.mark.parametrize("cut", ["chunk", "split", "sizes", "linear"])
def test_a_piece_of_the_channels_is_scaled_alone(
    cut: str, capture_net: Callable[..., Graph], seed: int
) -> None:
    def halves(layer: nn.Module, x: Tensor) -> tuple[Tensor, ...]:
        y = layer(x)
        if cut == "chunk":
            first, second = y.chunk(2, dim=1)
        elif cut == "sizes":
            first, second = torch.split(y, [2, 4], dim=1)
        elif cut == "split":
            first, second = torch.split(y, 3, dim=-3)
        else:
            first, second = y.chunk(2, dim=-1)
        return torch.exp(first), second * 0.25

    torch.manual_seed(seed)
    layer = nn.Linear(5, 6) if cut == "linear" else _conv()
    graph = capture_net(Net(layer, halves), 4, 5, 5, outputs=("first", "second"))
    folded = run_passes(graph, [fold_scales])
    assert _scales(folded) == 0
    at = 2 if cut == "sizes" else 3
    for name in ("layer.weight", "layer.bias"):
        assert folded.origins[name] == [
            Origin(name, ((0, at),)),
            Origin(name, ((at, 6),), "scale by 0.25"),
        ]
    _check(graph, folded, (4, 5, 5), seed)


def _twice(layer: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    return layer(x * 0.5) + layer(x)


KEPT: dict[str, tuple[Callable[[], nn.Module], Function]] = {
    "by zero": (_conv, lambda f, x: f(x * 0)),
    "by infinity": (_conv, lambda f, x: f(x) * float("inf")),
    "a tensor": (_conv, lambda f, x: f(x * x)),
    "weights of two uses": (_conv, _twice),
    "a scale of two users": (_conv, lambda f, x: (lambda y: f(y) + y.sum())(x * 0.5)),
    "a product of two users": (_conv, lambda f, x: (lambda y: y * 0.5 + y)(f(x))),
    "something between": (_conv, lambda f, x: torch.relu(f(x)) * 0.5),
    "a cut across the positions": (_conv, lambda f, x: f(x).chunk(2, dim=2)[0] * 0.5),
    "transposed": (lambda: nn.ConvTranspose2d(4, 6, 3), lambda f, x: f(x) * 0.5),
    "weights that are computed": (
        lambda: nn.Linear(5, 7),
        lambda f, x: nn.functional.linear(x, f.weight.relu()) * 0.5,
    ),
}


@pytest.mark.parametrize("what", KEPT)
def test_what_is_not_safe_stays(what: str, capture_net: Callable[..., Graph]) -> None:
    make, function = KEPT[what]
    graph = capture_net(Net(make(), function), 4, 5, 5)
    before = str(graph.module.graph)
    graph, changed = fold_scales(graph)
    assert not changed
    assert str(graph.module.graph) == before
    assert all(o.transform == IDENTITY for origins in graph.origins.values() for o in origins)


def test_the_autoencoders_factor_goes_into_its_outer_convolutions(
    graphs: Callable[[str], Graph], cases: Any
) -> None:
    factor = cases["vae_decoder"].module.config.scaling_factor
    decoder = run_passes(graphs("vae_decoder"), [fold_scales])
    assert decoder.origins["post_quant_conv.weight"][0].transform == f"divide by {factor}"
    assert decoder.origins["post_quant_conv.bias"][0].transform == IDENTITY
    encoder = run_passes(graphs("vae_encoder"), [fold_scales])
    for name in ("quant_conv.weight", "quant_conv.bias"):
        # The mean's half is scaled, the variance's is not: an exponential comes after it.
        assert encoder.origins[name] == [
            Origin(name, ((0, 4),), f"scale by {factor}"),
            Origin(name, ((4, 8),)),
        ]
