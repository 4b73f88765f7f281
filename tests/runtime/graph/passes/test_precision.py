from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from heatsink.runtime.errors import InvalidRequest
from heatsink.runtime.graph.graph import Graph, module_path
from heatsink.runtime.graph.passes import run_passes
from heatsink.runtime.graph.passes.edit import bypass, operator, traced
from heatsink.runtime.graph.passes.pipeline import (
    NATIVE,
    PASSES_NATIVE,
    PASSES_ONNX,
    precision_passes,
)
from heatsink.runtime.graph.passes.precision import lower_precision
from heatsink.runtime.graph.weight import Weight
from heatsink.runtime.native.component import NativeComponent

BF16 = torch.bfloat16
HIGH = {"unet": ("conv_out", "time_embedding"), "vae_decoder": ("decoder.conv_out",)}
CONVERSIONS = {"aten._to_copy", "aten.to"}


class Net(nn.Module):
    """Modules to lower, and what is done with them."""

    def __init__(self, function: Callable[[Any, Tensor], Any]) -> None:
        super().__init__()
        self.function = function
        self.a, self.b, self.c = (nn.Linear(4, 4) for _ in range(3))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        result = self.function(self, x)
        return result if isinstance(result, tuple) else (result,)


@pytest.fixture
def net(capture_net: Callable[..., Graph], seed: int) -> Callable[..., Graph]:
    def make(function: Callable[[Any, Tensor], Any], *outputs: str) -> Graph:
        torch.manual_seed(seed)
        graph = capture_net(Net(function), 3, 4, outputs=outputs or ("y",))
        return run_passes(graph, PASSES_ONNX)

    return make


def _calls(graph: Graph, name: str = "") -> list[torch.fx.Node]:
    calls = (node for node in graph.nodes if node.op == "call_function")
    return [node for node in calls if name in ("", operator(node))]


def _conversions(graph: Graph) -> list[tuple[str, torch.dtype]]:
    """What is converted, by its name, and to what."""
    return [(node.args[0].name, node.kwargs["dtype"]) for node in _calls(graph, "aten._to_copy")]  # type: ignore[union-attr, misc]


def _dtypes(graph: Graph, name: str) -> list[torch.dtype]:
    return [value.dtype for node in _calls(graph, name) if (value := traced(node)) is not None]


def _bare(graph: Graph) -> Graph:
    """Without conversions between floats."""

    def drop(graph: Graph) -> tuple[Graph, bool]:
        for node in _calls(graph):
            if operator(node) in CONVERSIONS and traced(node.args[0]).is_floating_point():  # type: ignore[union-attr]
                bypass(node, node.args[0])  # type: ignore[arg-type]
        return graph, True

    return run_passes(graph, [drop])


def _lowered(graph: Graph, *high: str) -> Graph:
    return run_passes(graph, [lower_precision(BF16, high)])


@pytest.mark.parametrize(
    "name", ["text_encoder_2", "vae_decoder", "vae_encoder", "unet", "unet of SDXL"]
)
def test_all_low_is_what_capture_in_bf16_gives(
    name: str, cases: Any, graphs: Any, structure: Any, seed: int
) -> None:
    lowered = run_passes(graphs(name), [*precision_passes("bf16"), *PASSES_NATIVE])
    other = run_passes(cases[name].capture(dtype=BF16), PASSES_NATIVE)
    assert structure(_bare(lowered)) == structure(_bare(other))
    assert [w.dtype for w in lowered.weights.values()] == [w.dtype for w in other.weights.values()]
    assert lowered.dtype == BF16
    # What is given and returned is float32 all the same.
    for specs in (lowered.inputs, lowered.outputs):
        assert {spec.dtype for spec in specs.values()} <= {torch.float32, torch.int64}
    inputs = cases[name].inputs(3, seed)
    plain = other.run({n: v.to(other.inputs[n].dtype) for n, v in inputs.items()})
    exact = graphs(name).run(inputs, dtype=torch.float64)
    for output, found in lowered.run(inputs).items():
        assert found.dtype == torch.float32
        error = (plain[output].double() - exact[output]).abs().max()
        budget = 2 * (error + torch.finfo(BF16).eps * exact[output].abs().max())
        assert (found.double() - exact[output]).abs().max() <= budget


@pytest.mark.parametrize("name", HIGH)
def test_the_passes_find_as_much_beside_high_modules(
    name: str, cases: Any, graphs: Any, agree: Any, seed: int
) -> None:
    graph, high = graphs(name), HIGH[name]
    mixed = run_passes(graph, [*precision_passes("bf16", high), *PASSES_NATIVE])
    low = run_passes(graph, [*precision_passes("bf16"), *PASSES_NATIVE])
    count = [Counter(map(operator, _calls(each))) for each in (mixed, low)]
    for operators in count:
        for conversion in CONVERSIONS:
            operators.pop(conversion, None)
    assert count[0] == count[1]
    for weight, holder in mixed.weight_nodes().items():
        inside = any(weight.startswith(f"{path}.") for path in high)
        wanted = torch.float32 if inside else BF16
        computed = weight.startswith("computed")
        assert computed or traced(holder).dtype == mixed.weights[weight].dtype == wanted  # type: ignore[union-attr]
    inputs = cases[name].inputs(3, seed)
    # In float64 it is the same graph.
    (exact,), (wide,) = (each.run(inputs, dtype=torch.float64).values() for each in (graph, mixed))
    assert (exact - wide).abs().max() <= 1e-12 * exact.abs().max()
    component = NativeComponent(mixed)
    whole = component.run(inputs)
    assert component.program(3).unplanned == []
    (found,), (plain,) = whole.values(), low.run(inputs).values()
    budget = 2 * ((plain - exact).abs().max() + torch.finfo(BF16).eps * exact.abs().max())
    assert 0 < (found - exact).abs().max() <= budget
    for row in range(3):
        (alone,) = component.run({n: v[row : row + 1] for n, v in inputs.items()}).values()
        assert torch.equal(alone[0], found[row])


def test_sinusoids_stay_float32(graphs: Any) -> None:
    for name in ("unet", "unet of SDXL"):
        low = run_passes(graphs(name), precision_passes("bf16"))
        assert set(_dtypes(low, "aten.sin") + _dtypes(low, "aten.cos")) == {torch.float32}
        assert set(_dtypes(low, "aten.conv2d") + _dtypes(low, "aten.linear")) == {BF16}


def test_rule_1_what_reads_no_weight_stays(net: Callable[..., Graph]) -> None:
    graph = _lowered(net(lambda m, x: (m.a((2.5 * x).exp()).sin(), x.cos()), "y", "z"))
    assert _dtypes(graph, "aten.exp") == _dtypes(graph, "aten.cos") == [torch.float32]
    assert _dtypes(graph, "aten.linear") == _dtypes(graph, "aten.sin") == [BF16]
    assert _conversions(graph) == [("exp", BF16), ("sin", torch.float32)]


def test_rule_1_lists_and_literals_are_low_too(net: Callable[..., Graph]) -> None:
    def function(m: Any, x: Tensor) -> Tensor:
        left, right = m.a(x).chunk(2, dim=-1)
        both = torch.cat([x, left, right], dim=-1)
        return both.to(torch.float32, memory_format=torch.contiguous_format, copy=True)

    graph = _lowered(net(function))
    assert _dtypes(graph, "aten.cat") == [BF16]
    assert _conversions(graph)[0] == ("x", BF16)
    assert graph.outputs["y"].dtype == torch.float32
    (output,) = graph.output_nodes()
    assert output.kwargs == {"dtype": torch.float32}


def test_rule_2_high_modules_read_and_keep_float32(net: Callable[..., Graph]) -> None:
    graph = _lowered(net(lambda m, x: m.c(m.b(m.a(x).exp()).sin())), "b")
    assert _dtypes(graph, "aten.linear") == [BF16, torch.float32, BF16]
    # Between b and c nothing has a weight.
    assert _dtypes(graph, "aten.sin") == [torch.float32]
    assert _conversions(graph) == [
        ("x", BF16), ("exp", torch.float32), ("sin", BF16), ("linear_2", torch.float32),
    ]  # fmt: skip
    assert [name for name, w in graph.weights.items() if w.dtype == torch.float32] == [
        "b.weight", "b.bias",
    ]  # fmt: skip


def test_rule_2_an_operator_of_a_module_alone(net: Callable[..., Graph]) -> None:
    def function(m: Any, x: Tensor) -> Tensor:
        return functional.softmax(m.a(x), dim=-1).exp()

    graph = net(function)
    (softmax,) = _calls(graph, "aten.softmax")
    # The network's own operations have the path "".
    assert module_path(softmax) == ""
    lowered = _lowered(graph, ":softmax")
    assert _dtypes(lowered, "aten.softmax") == [torch.float32]
    assert _dtypes(lowered, "aten.linear") == [BF16]
    assert _conversions(lowered) == [("x", BF16), ("linear", torch.float32)]


def test_rule_3_one_conversion_serves_all(net: Callable[..., Graph]) -> None:
    graph = _lowered(net(lambda m, x: m.b(x) * m.c(x) + m.a(m.b(x)) - x), "a")
    assert Counter(_conversions(graph))[("x", BF16)] == 1
    assert max(Counter(_conversions(graph)).values()) == 1


def test_rule_3_a_weight_of_both_stays_float32(net: Callable[..., Graph], seed: int) -> None:
    def function(m: Any, x: Tensor) -> Any:
        return m.b(functional.linear(x, m.b.weight))

    graph = net(function)
    lowered = _lowered(graph, "b")
    assert lowered.weights["b.weight"].dtype == torch.float32
    (holder,) = (node for name, node in lowered.weight_nodes().items() if name == "b.weight")
    assert (holder.name, BF16) in _conversions(lowered)
    x = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(seed))
    rounded = functional.linear(x.to(BF16), graph.weights["b.weight"].load(BF16)).float()
    wanted = functional.linear(
        rounded, graph.weights["b.weight"].load(), graph.weights["b.bias"].load()
    )
    assert torch.equal(lowered.run({"x": x})["y"], wanted)


def test_rule_4_what_is_returned_as_it_is_stays(net: Callable[..., Graph]) -> None:
    graph = _lowered(net(lambda m, x: (m.a(x), m.a.bias), "y", "z"))
    assert {spec.dtype for spec in graph.outputs.values()} == {torch.float32}
    assert graph.weights["a.bias"].dtype == torch.float32
    assert graph.weights["a.weight"].dtype == BF16


def test_no_weight_is_read(net: Callable[..., Graph]) -> None:
    def refuse() -> Tensor:
        raise AssertionError("read")

    graph = net(lambda m, x: m.b(m.a(x)))
    graph.weights = {n: replace(w, source=refuse) for n, w in graph.weights.items()}
    weights = _lowered(graph, "b").weights.values()
    assert {w.dtype for w in weights} == {BF16, torch.float32}
    assert all(isinstance(w, Weight) and w.source is refuse for w in weights)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_a_second_time_changes_nothing(
    precision: str, net: Callable[..., Graph], structure: Any
) -> None:
    passes = precision_passes(precision, ("b",))
    once = run_passes(net(lambda m, x: m.b(m.a(x))), passes)
    assert once.dtype == {"bf16": BF16, "fp16": torch.float16}[precision]
    assert structure(run_passes(once, passes)) == structure(once)


def test_only_the_list_looks_at_names(graphs: Any, renamed: Any, structure: Any) -> None:
    graph = run_passes(graphs("unet"), [NATIVE["clean"]])
    other = renamed(graph)
    paths = {
        module_path(a): module_path(b) for a, b in zip(_calls(graph), _calls(other), strict=True)
    }
    for high in ((), ("conv_out", "down_blocks.0.resnets.0.conv1")):
        there = [paths[entry] for entry in high]
        assert structure(_lowered(other, *there)) == structure(_lowered(graph, *high))
    with pytest.raises(InvalidRequest, match="got 'conv_out', of which it has no operation"):
        _lowered(other, "conv_out")


@pytest.mark.parametrize("entry", ["conv", "conv_out:linear", "conv_out.weight", ""])
def test_entries_without_operations_are_refused(entry: str, graphs: Any) -> None:
    graph = run_passes(graphs("unet"), [NATIVE["clean"]])
    if entry:
        with pytest.raises(InvalidRequest, match=f"high: expected modules of unet, got {entry!r}"):
            _lowered(graph, entry)
    else:
        # The component's own operations, not all of it.
        assert set(_dtypes(_lowered(graph, entry), "aten.conv2d")) == {BF16}


def test_arguments_are_checked(net: Callable[..., Graph]) -> None:
    with pytest.raises(ValueError, match=r"dtype: expected one of .*, got torch.float64"):
        lower_precision(torch.float64)
    half = _lowered(net(lambda m, x: m.a(x)))
    with pytest.raises(ValueError, match=r"net: expected a float32 graph, got torch.bfloat16"):
        run_passes(half, [lower_precision(torch.float16)])
    with pytest.raises(ValueError, match=r"precision: expected fp32, fp8 or one of .* got 'int8'"):
        precision_passes("int8")
    assert precision_passes("fp32") == ()
