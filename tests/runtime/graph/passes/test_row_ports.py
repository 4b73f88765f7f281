"""Ports of native graphs: terms of the right rows, and the twin's bits for all others."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from heatsink.runtime.errors import NotBuilt
from heatsink.runtime.graph.capture import capture_module
from heatsink.runtime.graph.graph import BATCH, PATH_KEY, Graph, TensorSpec
from heatsink.runtime.graph.passes import run_passes
from heatsink.runtime.graph.passes.edit import operator
from heatsink.runtime.graph.passes.pipeline import PASSES_NATIVE, native_passes
from heatsink.runtime.graph.passes.row_ports import add_row_ports
from heatsink.runtime.native.program import Program

Mix = list[tuple[int, float]]
MIXES: list[Mix] = [[], [(2, 0.5), (0, -1.5)], [], [(1, 2.0)], [(1, 1.0), (1, 0.25), (2, 0.5)]]
ROWS = len(MIXES)


class Net(nn.Module):
    """Layers by number, used by a function."""

    layers: Any

    def __init__(self, function: Callable[[Any, Tensor], Tensor], *layers: nn.Module) -> None:
        super().__init__()
        self.layers, self.function = nn.ModuleList(layers), function

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return (self.function(self.layers, x),)


def first(layers: Any, x: Tensor) -> Tensor:
    found: Tensor = layers[0](x)
    return found


def geglu(layers: Any, x: Tensor) -> Any:
    value, gate = layers[0](x).chunk(2, dim=-1)
    return value * F.gelu(gate)


def quick(layers: Any, x: Tensor) -> Any:
    y = layers[0](x)
    return y * torch.sigmoid(1.702 * y)


def self_attention(layers: Any, x: Tensor) -> Any:
    q, k, v = (layer(x).unflatten(-1, (2, -1)).transpose(1, 2) for layer in layers[:3])
    y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
    return layers[3](y) + x


def skips(layers: Any, x: Tensor) -> Any:
    """Two convolutions of a concatenation, behind a norm that is split at its seam."""
    both = torch.cat([layers[0](x), x], dim=1)
    return layers[2](F.silu(layers[1](both))) + layers[3](both)


Case = tuple[Callable[[], nn.Module], tuple[int, ...]]
CASES: dict[str, Case] = {
    "linear": (lambda: Net(first, nn.Linear(6, 5)), (7, 6)),
    "linear of one token": (lambda: Net(first, nn.Linear(6, 5)), (6,)),
    "linear of positions": (lambda: Net(first, nn.Linear(6, 5, bias=False)), (2, 3, 6)),
    "linear and residual": (lambda: Net(lambda m, x: m[0](x) + x, nn.Linear(6, 6)), (3, 6)),
    "silu": (lambda: Net(lambda m, x: F.silu(m[0](x)), nn.Linear(6, 5)), (6,)),
    "gelu": (lambda: Net(lambda m, x: F.gelu(m[0](x)), nn.Linear(6, 5)), (7, 6)),
    "quick gelu and residual": (
        lambda: Net(lambda m, x: quick(m, x) + x, nn.Linear(6, 6)),
        (2, 7, 6),
    ),
    "geglu": (lambda: Net(geglu, nn.Linear(6, 40)), (7, 6)),
    "rows of a sample, then silu": (
        lambda: Net(
            lambda m, x: F.silu(m[0](x) + m[1](x[:, 0])[:, None]), nn.Linear(6, 5), nn.Linear(6, 5)
        ),
        (7, 6),
    ),
    "1x1": (lambda: Net(first, nn.Conv2d(4, 6, 1)), (4, 5, 3)),
    "1x1 with stride": (lambda: Net(first, nn.Conv2d(4, 6, 1, stride=2)), (4, 5, 3)),
    "3x3": (lambda: Net(first, nn.Conv2d(4, 6, 3, padding=1)), (4, 5, 3)),
    "3x3 with stride": (lambda: Net(first, nn.Conv2d(4, 6, 3, 2, 1, bias=False)), (4, 8, 6)),
    "3x3 dilated": (lambda: Net(first, nn.Conv2d(4, 6, 3, 1, 2, 2)), (4, 5, 6)),
    "3x2 uneven": (lambda: Net(first, nn.Conv2d(4, 6, (3, 2), (2, 1), (1, 0))), (4, 7, 6)),
    "upsampled": (
        lambda: Net(
            lambda m, x: m[0](F.interpolate(x, scale_factor=2.0, mode="nearest")),
            nn.Conv2d(4, 6, 3, padding=1),
        ),
        (4, 5, 3),
    ),
    "concatenated": (
        lambda: Net(
            skips, nn.Conv2d(4, 8, 3, padding=1), nn.GroupNorm(3, 12),
            nn.Conv2d(12, 6, 3, padding=1), nn.Conv2d(12, 6, 1),
        ),
        (4, 5, 3),
    ),
    "time": (
        lambda: Net(
            lambda m, x: m[0](x) + m[1](x.mean((2, 3)))[:, :, None, None],
            nn.Conv2d(4, 6, 3, padding=1), nn.Linear(4, 6),
        ),
        (4, 5, 3),
    ),
    "attention": (
        lambda: Net(self_attention, *(nn.Linear(8, 8, bias=False) for _ in range(4))),
        (5, 8),
    ),
    "scaled": (lambda: Net(lambda m, x: m[0](x * 0.25) / 3.0, nn.Conv2d(4, 6, 3)), (4, 5, 5)),
}  # fmt: skip


def run(graph: Graph, held: dict[str, Tensor], given: dict[str, Tensor]) -> Tensor:
    """The graph's result as a native program's."""
    weights = {name: weight.load() for name, weight in graph.weights.items()}
    return Program(graph, ROWS, weights, held=held).run(given)["y"].clone()


@pytest.mark.parametrize("name", CASES)
def test_rows_get_their_own_adapters(name: str, capture_net: Any, adapters: Any, seed: int) -> None:
    make, shape = CASES[name]
    torch.manual_seed(seed)
    net = make()
    bank = adapters(net, seed)
    graph = capture_net(net, *shape)
    twin = run_passes(graph, PASSES_NATIVE)
    ported = run_passes(graph, native_passes(bank.layout))
    x = torch.randn(ROWS, *shape)
    given = {"x": x, **bank.inputs(MIXES)}
    exact = ported.run({**given, **bank.bank}, dtype=torch.float64)["y"]
    plain, found = run(twin, {}, {"x": x}), run(ported, bank.bank, given)
    for row, mix in enumerate(MIXES):
        with torch.no_grad():
            (wanted,) = bank.merged(mix)(x[row : row + 1].double())
        largest = wanted.abs().max()
        assert (exact[row] - wanted[0]).abs().max() <= 1e-12 * (1 + largest)
        if mix:
            assert (found[row] - plain[row]).abs().max() > 0.01
            # Some hundred sums of eps each, of terms that may be larger than their sum.
            assert (found[row].double() - wanted[0]).abs().max() <= 1e-5 * (1 + largest)
        else:
            assert found[row].equal(plain[row])


@pytest.mark.parametrize("name", CASES)
def test_rows_without_adapters_keep_the_twins_bits_in_bfloat16(
    name: str, adapters: Any, seed: int
) -> None:
    make, shape = CASES[name]
    torch.manual_seed(seed)
    net = make()
    bank = adapters(net, seed, torch.bfloat16)
    graph = _capture(net, shape, torch.bfloat16)
    twin = run_passes(graph, PASSES_NATIVE)
    ported = run_passes(graph, native_passes(bank.layout))
    x = torch.randn(ROWS, *shape).bfloat16()
    plain = run(twin, {}, {"x": x})
    found = run(ported, bank.bank, {"x": x, **bank.inputs(MIXES)})
    for row, mix in enumerate(MIXES):
        if not mix:
            assert found[row].equal(plain[row])
            continue
        with torch.no_grad():
            (wanted,) = bank.merged(mix)(x[row : row + 1].double())
        # Eight bits of mantissa, a few roundings, and weights that are rounded too.
        assert (found[row].double() - wanted[0]).abs().max() <= 0.05 * (1 + wanted.abs().max())
    none = run(ported, bank.bank, {"x": x, **bank.inputs([[]] * ROWS)})
    assert none.equal(plain)


def _capture(net: nn.Module, shape: tuple[int, ...], dtype: torch.dtype) -> Graph:
    meta = copy.deepcopy(net).to("meta", dtype)
    specs = {"x": TensorSpec((BATCH, *shape), dtype)}
    return capture_module("net", meta, net.state_dict(), {}, specs, ["y"], dtype=dtype)


def _ops(graph: Graph) -> Counter[str]:
    return Counter(operator(node) for node in graph.nodes if node.op == "call_function")


EXPECTED = {
    "geglu": {"heatsink.port_linear": 1},
    "linear and residual": {"heatsink.linear": 1, "heatsink.row_port": 1},
    # One product for q, k and v, and its three ports; and the last layer's.
    "attention": {"heatsink.linear": 2, "heatsink.row_port": 4},
    # The convolutions of a concatenation have a port for each of its halves.
    "concatenated": {"heatsink.conv2d": 3, "heatsink.row_port": 5, "aten.cat": 0},
    "upsampled": {"heatsink.conv2d": 1, "heatsink.row_port": 1, "aten.upsample_nearest2d": 1},
    "scaled": {"heatsink.conv2d": 1, "heatsink.row_port": 1, "aten.mul": 1},
    "3x3 dilated": {"aten.conv2d": 1, "heatsink.row_port": 1},
}


@pytest.mark.parametrize("name", EXPECTED)
def test_what_passes_have_fused_stays_fused(name: str, capture_net: Any, adapters: Any) -> None:
    make, shape = CASES[name]
    net = make()
    graph, layout = capture_net(net, *shape), adapters(net, 1).layout
    ported = _ops(run_passes(graph, native_passes(layout)))
    twin = _ops(run_passes(graph, PASSES_NATIVE))
    assert {key: ported[key] for key in EXPECTED[name]} == EXPECTED[name]
    products = ("heatsink.linear", "heatsink.conv2d", "aten.conv2d")
    assert sum(twin[p] for p in products) == sum(
        ported[p] for p in (*products, "heatsink.port_linear")
    )


def test_only_some_of_a_packed_products_modules_have_ports(
    capture_net: Any, adapters: Any, seed: int
) -> None:
    make, shape = CASES["attention"]
    torch.manual_seed(seed)
    net = make()
    bank = adapters(net, seed, torch.float32, ["layers.1"])
    ported = run_passes(capture_net(net, *shape), native_passes(bank.layout))
    assert _ops(ported)["heatsink.row_port"] == 1
    x = torch.randn(ROWS, *shape)
    found = run(ported, bank.bank, {"x": x, **bank.inputs(MIXES)})
    for row, mix in enumerate(MIXES):
        with torch.no_grad():
            (wanted,) = bank.merged(mix)(x[row : row + 1].double())
        assert (found[row] - wanted[0]).abs().max() <= 1e-5 * (1 + wanted.abs().max())


def test_inputs_paths_and_origins(capture_net: Any, adapters: Any) -> None:
    make, shape = CASES["attention"]
    net = make()
    graph, layout = capture_net(net, *shape), adapters(net, 1).layout
    twin = run_passes(graph, PASSES_NATIVE)
    ported = run_passes(twin, [add_row_ports(layout, room=2)])
    assert ported.origins == twin.origins
    assert list(ported.weights) == list(twin.weights)
    assert list(ported.inputs) == [
        "x", "adapter_slots", "adapter_scales", "bank.0.a", "bank.0.b", "bank.0.ranks",
    ]  # fmt: skip
    assert ported.inputs["adapter_slots"] == TensorSpec((BATCH, 2), torch.int64)
    assert ported.inputs["adapter_scales"] == TensorSpec((BATCH, 2), torch.float32)
    assert ported.inputs["bank.0.ranks"] == TensorSpec((4 * layout.slots,), torch.int32)
    assert list(twin.inputs) == ["x"]
    ports = [n for n in ported.nodes if operator(n) == "heatsink.row_port"]
    paths = {n.meta[PATH_KEY] for n in ported.nodes if operator(n) == "heatsink.linear"}
    assert {n.meta[PATH_KEY] for n in ports} == paths
    _, changed = add_row_ports(layout)(ported)
    assert not changed


def test_names_do_not_matter(capture_net: Any, adapters: Any, structure: Any) -> None:
    class Other(nn.Module):
        def __init__(self, attribute: str) -> None:
            super().__init__()
            self.attribute = attribute
            self.add_module(attribute, nn.Linear(6, 6))

        def forward(self, x: Tensor) -> tuple[Tensor, ...]:
            return (F.gelu(getattr(self, self.attribute)(x)),)

    found = [
        structure(run_passes(capture_net(net, 4, 6), native_passes(adapters(net, 1).layout)))
        for net in (Other("to_q"), Other("zebra"))
    ]
    assert found[0] == found[1]


def test_an_activation_that_no_port_can_come_before_is_refused(
    capture_net: Any, adapters: Any
) -> None:
    net = Net(lambda m, x: F.silu(m[0](x)), nn.Conv2d(4, 6, 3))
    graph = capture_net(net, 4, 5, 5)
    with pytest.raises(NotBuilt, match=r"layers\.0\.weight.*silu is part of its convolution"):
        run_passes(graph, native_passes(adapters(net, 1).layout))


def test_a_module_that_is_not_there_is_refused_unless_it_is_said_to_be(
    capture_net: Any, adapters: Any
) -> None:
    net = Net(lambda m, x: m[0](x), nn.Linear(6, 5), nn.Linear(6, 5))
    layout, graph = adapters(net, 1).layout, capture_net(net, 6)
    with pytest.raises(NotBuilt, match=r"no operation uses the weights of \['layers.1'\]"):
        run_passes(graph, native_passes(layout))
    ported = run_passes(graph, native_passes(layout, ["layers.1"]))
    assert _ops(ported)["heatsink.row_port"] == 1
