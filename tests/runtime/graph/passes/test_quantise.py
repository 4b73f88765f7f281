from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from heatsink.runtime.errors import InvalidRequest
from heatsink.runtime.graph.graph import Graph, module_path
from heatsink.runtime.graph.passes import run_passes
from heatsink.runtime.graph.passes.edit import operator, traced
from heatsink.runtime.graph.passes.pipeline import PASSES_NATIVE, PASSES_ONNX, precision_passes
from heatsink.runtime.graph.passes.quantise import FP8, quantise_fp8, round_fp8, round_operands
from heatsink.runtime.native.component import NativeComponent

Floats = npt.NDArray[np.float64]


class Net(nn.Module):
    def __init__(self, function: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4, bias=False)
        self.conv = nn.Conv2d(3, 2, 3, padding=1)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return (self.function(self, x),)


@pytest.fixture
def net(capture_net: Callable[..., Graph], seed: int) -> Callable[..., Graph]:
    def make(function: Callable[[Any, Tensor], Tensor], *shape: int) -> Graph:
        torch.manual_seed(seed)
        return run_passes(capture_net(Net(function), *(shape or (3, 4))), PASSES_ONNX)

    return make


@pytest.fixture
def draw(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _e4m3() -> Floats:
    """All finite values of the format, from its definition: 4 bits of exponent, 3 of mantissa."""
    small = [m / 8 * 2.0**-6 for m in range(8)]
    normal = [(1 + m / 8) * 2.0 ** (e - 7) for e in range(1, 16) for m in range(8)]
    # The last code is NaN.
    positive = np.array(small + normal[:-1])
    return np.unique(np.concatenate([-positive, positive]))


def _rounded(values: Floats, axes: tuple[int, ...]) -> Floats:
    """The nearest value of the format in units of the largest."""
    table = _e4m3()
    unit = np.abs(values).max(axis=axes, keepdims=True) / 448
    unit = np.where(unit == 0, 1, unit)
    nearest = np.abs((values / unit)[..., None] - table).argmin(axis=-1)
    found: Floats = table[nearest] * unit
    return found


def _count(graph: Graph) -> Counter[str]:
    return Counter(operator(node) for node in graph.nodes if node.op == "call_function")


def _fp8(graph: Graph) -> list[torch.fx.Node]:
    return [n for n in graph.nodes if (value := traced(n)) is not None and value.dtype == FP8]


def test_rounding_is_to_the_nearest_of_the_format(draw: torch.Generator) -> None:
    x = torch.randn(3, 50, generator=draw, dtype=torch.float64) * torch.tensor([[1e-3], [1], [1e4]])
    wanted = _rounded(x.numpy(), (1,))
    assert np.allclose(round_fp8(x, (-1,)).numpy(), wanted, rtol=1e-12, atol=0)
    for dtype in (torch.float32, torch.bfloat16):
        found = round_fp8(x.to(dtype), (-1,))
        # A tie may fall to the other side where the division has rounded.
        step = np.abs(x.numpy()).max(axis=1, keepdims=True) / 448 * 2.0**-9 + np.abs(x.numpy()) / 8
        assert found.dtype == dtype
        assert (np.abs(found.double().numpy() - wanted) <= step).all()
    assert torch.equal(round_fp8(torch.zeros(2, 3), (-1,)), torch.zeros(2, 3))


def test_rules_1_and_2_a_linear_layer(net: Callable[..., Graph], draw: torch.Generator) -> None:
    graph = net(lambda m, x: m.a(x))
    found = run_passes(graph, [quantise_fp8()])
    assert len(_fp8(found)) == 1
    x = torch.randn(2, 3, 4, generator=draw)
    weight, bias = (graph.weights[f"a.{n}"].load(torch.float64).numpy() for n in ("weight", "bias"))
    wanted = _rounded(x.double().numpy(), (-1,)) @ _rounded(weight, (1,)).T + bias
    assert np.abs(found.run({"x": x})["y"].numpy() - wanted).max() <= 1e-6 * np.abs(wanted).max()
    ((origin,),) = (found.origins[n] for n in found.origins if "weight" in n and n != "a.weight")
    assert (origin.parameter, origin.slice) == ("a.weight", None)
    assert origin.transform == "round to float8_e4m3fn by output channel"


def test_rules_1_and_2_a_convolution(net: Callable[..., Graph], draw: torch.Generator) -> None:
    graph = net(lambda m, x: m.conv(x), 3, 5, 5)
    found = run_passes(graph, [quantise_fp8()])
    scale = torch.tensor([1.0, 100.0])[:, None, None, None]
    x = torch.randn(2, 3, 5, 5, generator=draw) * scale
    weight, bias = (graph.weights[f"conv.{n}"].load(torch.float64) for n in ("weight", "bias"))
    read, held = _rounded(x.double().numpy(), (1, 2, 3)), _rounded(weight.numpy(), (1, 2, 3))
    wanted = functional.conv2d(torch.from_numpy(read), torch.from_numpy(held), bias, padding=1)
    result = found.run({"x": x})["y"].double()
    limit = 1e-6 * wanted.abs().amax((1, 2, 3), keepdim=True)
    assert ((result - wanted).abs() <= limit).all()


def test_rule_3_equal_values_are_rounded_once(net: Callable[..., Graph]) -> None:
    found = run_passes(net(lambda m, x: m.a(x) * m.b(x) + m.b(x.sin())), [quantise_fp8()])
    assert len(_fp8(found)) == 2
    rounded = [name for name in found.weights if name.startswith("b.weight")]
    assert len(rounded) == 2
    # What no product reads now goes.
    assert "b.weight" not in run_passes(found, PASSES_ONNX).weights


@pytest.mark.parametrize(
    ("function", "shape"),
    [
        (lambda m, x: functional.linear(x, x.sum(0)), (3, 4)),
        (lambda m, x: x @ m.a.weight, (3, 4)),
        (lambda m, x: functional.softmax(x, -1) * m.a.bias, (3, 4)),
    ],
    ids=["two activations", "another operator", "no product"],
)
def test_other_operations_stay(
    function: Any, shape: tuple[int, ...], net: Callable[..., Graph], structure: Any
) -> None:
    graph = net(function, *shape)
    assert structure(run_passes(graph, [quantise_fp8()])) == structure(graph)


def test_high_modules_stay(net: Callable[..., Graph]) -> None:
    graph = net(lambda m, x: m.b(m.a(x)))
    found = run_passes(graph, [quantise_fp8(("b",))])
    (low,) = _fp8(found)
    assert module_path(low) == "a"
    assert not any("round" in origin.transform for origin in found.origins["b.weight"])
    with pytest.raises(InvalidRequest, match="high: expected modules of net, got 'c'"):
        run_passes(graph, [quantise_fp8(("c",))])


def test_a_second_time_changes_nothing(net: Callable[..., Graph], structure: Any) -> None:
    once = run_passes(net(lambda m, x: m.a(x)), [quantise_fp8()])
    assert structure(run_passes(once, [quantise_fp8()])) == structure(once)


def test_the_rating_rounds_as_the_pass_does(
    net: Callable[..., Graph], draw: torch.Generator
) -> None:
    graph = net(lambda m, x: m.conv(x), 3, 5, 5)
    x = torch.randn(2, 3, 5, 5, generator=draw)
    weight, bias = (graph.weights[f"conv.{n}"].load() for n in ("weight", "bias"))
    read, held = round_operands("aten.conv2d", x, weight)
    wanted = functional.conv2d(read, held, bias, padding=1)
    found = run_passes(graph, [quantise_fp8()]).run({"x": x})["y"]
    assert (found - wanted).abs().max() <= 1e-6 * wanted.abs().max()


def test_a_whole_unet_beside_bf16(
    cases: Any, graphs: Any, renamed: Any, structure: Any, seed: int
) -> None:
    passes = (*precision_passes("fp8", ("conv_in", "conv_out")), *PASSES_NATIVE)
    graph = run_passes(graphs("unet"), passes)
    plain = run_passes(graphs("unet"), [*precision_passes("bf16"), *PASSES_NATIVE])
    count, before = _count(graph), _count(plain)
    # The passes find the same around the rounding.
    for name in ("heatsink.conv2d", "heatsink.linear", "heatsink.attention", "heatsink.geglu"):
        assert count[name] == before[name]
    assert graph.dtype == torch.bfloat16
    inputs = cases["unet"].inputs(2, seed)
    exact = graphs("unet").run(inputs, dtype=torch.float64)["out"]
    errors = [
        float((NativeComponent(each).run(inputs)["out"] - exact).norm() / exact.norm())
        for each in (graph, plain)
    ]
    # Three bits of mantissa instead of seven.
    assert 2 * errors[1] < errors[0] < 32 * errors[1]
    component = NativeComponent(graph)
    whole = component.run(inputs)["out"]
    alone = component.run({name: value[1:] for name, value in inputs.items()})["out"]
    assert torch.equal(alone[0], whole[1])
