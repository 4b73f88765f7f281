from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from heatsink.runtime.errors import NotBuilt
from heatsink.runtime.graph.graph import PATH_KEY, Graph, TensorSpec
from heatsink.runtime.graph.passes import run_passes
from heatsink.runtime.graph.passes.edit import operator
from heatsink.runtime.graph.passes.fold_scale import fold_scales
from heatsink.runtime.graph.passes.ports import add_ports
from heatsink.runtime.graph.weight import Origin
from heatsink.runtime.port_layout import PortLayout

SLOTS, RANK = 3, 2
ROWS, USED = [3, 1], [[2, 0], [1, -1]]
SCALES = [[0.5, -1.5], [2.0, 9.0]]

Function = Callable[[Any, Tensor], Tensor]


class Net(nn.Module):
    layer: Any

    def __init__(self, layer: nn.Module, function: Function | None = None) -> None:
        super().__init__()
        self.layer = layer
        self.function = function

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return (self.layer(x) if self.function is None else self.function(self.layer, x),)


def layout_of(module: nn.Module) -> PortLayout:
    weights = {
        name.removesuffix(".weight"): tuple(value.shape)
        for name, value in module.named_parameters()
        if name.endswith(".weight")
    }
    return PortLayout.of("net", SLOTS, RANK, weights)


def bank_of(layout: PortLayout, seed: int) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=draw) / 2 for name, shape in layout.shapes().items()}


def port_inputs(
    rows: list[int], slots: list[list[int]], scales: list[list[float]]
) -> dict[str, Tensor]:
    return {
        "adapter_rows": torch.tensor(rows),
        "adapter_slots": torch.tensor(slots),
        "adapter_scales": torch.tensor(scales),
    }


def merged(
    module: nn.Module, layout: PortLayout, bank: dict[str, Tensor], mix: list[tuple[int, float]]
) -> nn.Module:
    """The module in float64 with the adapters of one row in its weights."""
    module = copy.deepcopy(module).double()
    for path, (group, port) in layout.places().items():
        weight: Any = module.get_submodule(path).weight
        for slot, scale in mix:
            row = port * layout.slots + slot
            a, b = (bank[f"bank.{group}.{name}"][row].double() for name in "ab")
            # The bank keeps a convolution's inputs behind its taps.
            usual = a if a.dim() == 2 else a.permute(0, 3, 1, 2)
            weight.data += scale * torch.einsum("ro,r...->o...", b, usual).reshape(weight.shape)
    return module


def mixes_of(batch: int) -> list[list[tuple[int, float]]]:
    """What `ROWS`, `USED` and `SCALES` say, by row of the batch."""
    found: list[list[tuple[int, float]]] = [[] for _ in range(batch)]
    for row, slots, scales in zip(ROWS, USED, SCALES, strict=True):
        found[row] = [(s, w) for s, w in zip(slots, scales, strict=True) if s >= 0]
    return found


LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(6, 5), (7, 6)),
    "linear of one token": (lambda: nn.Linear(6, 5), (6,)),
    "linear of an image's positions": (lambda: nn.Linear(6, 5, bias=False), (2, 3, 6)),
    "1x1": (lambda: nn.Conv2d(4, 6, 1), (4, 5, 3)),
    "1x1 with stride": (lambda: nn.Conv2d(4, 6, 1, stride=2), (4, 5, 3)),
    "1x1 with padding": (lambda: nn.Conv2d(4, 6, 1, padding=1), (4, 5, 3)),
    "3x3": (lambda: nn.Conv2d(4, 6, 3, padding=1), (4, 5, 3)),
    "3x3 without padding": (lambda: nn.Conv2d(4, 6, 3, bias=False), (4, 5, 6)),
    "3x3 with too much padding": (lambda: nn.Conv2d(4, 6, 3, padding=3), (4, 5, 3)),
    "3x3 with stride": (lambda: nn.Conv2d(4, 6, 3, stride=2, padding=1), (4, 8, 6)),
    "3x3 dilated": (lambda: nn.Conv2d(4, 6, 3, padding=2, dilation=2), (4, 5, 6)),
    "3x2 uneven": (
        lambda: nn.Conv2d(4, 6, (3, 2), stride=(2, 1), padding=(1, 0), dilation=(1, 2)),
        (4, 7, 6),
    ),
}


@pytest.mark.parametrize("name", LAYERS)
def test_rows_get_their_own_adapters(
    name: str, capture_net: Callable[..., Graph], seed: int
) -> None:
    make, shape = LAYERS[name]
    torch.manual_seed(seed)
    net = Net(make())
    layout, graph = layout_of(net), capture_net(net, *shape)
    ported = run_passes(graph, [add_ports(layout)])
    bank, x = bank_of(layout, seed), torch.randn(4, *shape)
    given = {"x": x, **bank, **port_inputs(ROWS, USED, SCALES)}
    exact, single = ported.run(given, dtype=torch.float64)["y"], ported.run(given)["y"]
    plain = graph.run({"x": x})["y"]
    for row, mix in enumerate(mixes_of(4)):
        with torch.no_grad():
            (wanted,) = merged(net, layout, bank, mix)(x[row : row + 1].double())
        assert (exact[row] - wanted[0]).abs().max() <= 1e-12 * (1 + wanted.abs().max())
        if not mix:
            assert single[row].equal(plain[row])
        else:
            assert (exact[row] - plain[row]).abs().max() > 0.1


def test_a_row_without_adapters_is_not_touched(
    capture_net: Callable[..., Graph], seed: int
) -> None:
    # Multiplied by zero, the bank's NaN and infinity would show, and so would a negative zero.
    net = Net(nn.Linear(2, 2, bias=False))
    with torch.no_grad():
        net.layer.weight.copy_(torch.tensor([[-1.0, 0.0], [0.0, float("inf")]]))
    layout = layout_of(net)
    ported = run_passes(capture_net(net, 2), [add_ports(layout)])
    bank = {name: torch.full_like(t, float("nan")) for name, t in bank_of(layout, seed).items()}
    x = torch.zeros(3, 2)
    given = {"x": x, **bank, **port_inputs([1], [[0]], [[1.0]])}
    found = ported.run(given)["y"]
    plain = capture_net(net, 2).run({"x": x})["y"]
    for row in (0, 2):
        assert found[row].numpy().tobytes() == plain[row].numpy().tobytes()
    assert found[1].isnan().all()


def test_an_absent_slot_reads_nothing_of_others(
    capture_net: Callable[..., Graph], seed: int
) -> None:
    torch.manual_seed(seed)
    net = Net(nn.Linear(6, 5))
    layout = layout_of(net)
    ported = run_passes(capture_net(net, 6), [add_ports(layout)])
    bank, x = bank_of(layout, seed), torch.randn(2, 6)
    for tensor in bank.values():
        tensor.view(-1, SLOTS, *tensor.shape[1:])[:, :2] = float("nan")
    wide = ported.run({"x": x, **bank, **port_inputs([0], [[2, -1, -1]], [[1.0, 5.0, 5.0]])})["y"]
    narrow = ported.run({"x": x, **bank, **port_inputs([0], [[2]], [[1.0]])})["y"]
    assert wide.isfinite().all()
    torch.testing.assert_close(wide, narrow)


def test_ports_keep_paths_and_origins_and_come_once(
    capture_net: Callable[..., Graph],
) -> None:
    net = Net(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 1)))
    graph, layout = capture_net(net, 3, 6, 6), layout_of(net)
    ported = run_passes(graph, [add_ports(layout)])
    assert ported.origins == graph.origins
    assert list(ported.weights) == list(graph.weights)
    ports = [n for n in ported.nodes if operator(n) == "heatsink.adapter_port"]
    assert [n.meta[PATH_KEY] for n in ports] == ["layer.0", "layer.2"]
    assert list(ported.inputs) == [
        "x", "adapter_rows", "adapter_slots", "adapter_scales", *layout.shapes(),
    ]  # fmt: skip
    assert ported.inputs["adapter_slots"] == TensorSpec(("adapted", "n"), torch.int64)
    assert ported.inputs["bank.0.a"].shape == layout.shapes()["bank.0.a"]
    assert list(graph.inputs) == ["x"]
    _, changed = add_ports(layout)(ported)
    assert not changed


def test_names_do_not_matter(capture_net: Callable[..., Graph]) -> None:
    def structure(net: nn.Module) -> list[Any]:
        found = run_passes(capture_net(net, 3, 6, 6), [add_ports(layout_of(net))])
        places = {node: place for place, node in enumerate(found.nodes)}
        return [
            (
                str(n.target) if n.op == "call_function" else n.op,
                [places[given] for given in n.all_input_nodes],
            )
            for n in found.nodes
        ]

    class Other(nn.Module):
        def __init__(self, attribute: str) -> None:
            super().__init__()
            self.attribute = attribute
            self.add_module(attribute, nn.Conv2d(3, 4, 3))

        def forward(self, x: Tensor) -> tuple[Tensor, ...]:
            return (getattr(self, self.attribute)(x) * 2,)

    assert structure(Other("to_q")) == structure(Other("zebra"))


def test_a_weight_that_was_scaled_scales_its_port(
    capture_net: Callable[..., Graph], seed: int
) -> None:
    torch.manual_seed(seed)
    net = Net(nn.Conv2d(4, 6, 3), lambda f, x: f(x * 0.25) / 3.0)
    layout = layout_of(net)
    graph = run_passes(capture_net(net, 4, 5, 5), [fold_scales])
    assert graph.origins["layer.weight"][0].transform == "scale by 0.25, divide by 3.0"
    ported = run_passes(graph, [add_ports(layout)])
    bank, x = bank_of(layout, seed), torch.randn(4, 4, 5, 5)
    given = {"x": x, **bank, **port_inputs(ROWS, USED, SCALES)}
    found = ported.run(given, dtype=torch.float64)["y"]
    for row, mix in enumerate(mixes_of(4)):
        with torch.no_grad():
            (wanted,) = merged(net, layout, bank, mix)(x[row : row + 1].double())
        assert (found[row] - wanted[0]).abs().max() <= 1e-12 * (1 + wanted.abs().max())


def _packed(capture_net: Callable[..., Graph], origins: list[Origin]) -> tuple[Any, Graph]:
    """A linear whose weight is said to be packed of other modules' rows."""
    net = Net(nn.Linear(6, 8, bias=False))
    graph = capture_net(net, 3, 6)
    graph.origins["layer.weight"] = origins
    return net, graph


def test_a_packed_weight_gets_a_port_for_each_module(
    capture_net: Callable[..., Graph], seed: int
) -> None:
    torch.manual_seed(seed)
    origins = [
        Origin("q.weight", ((0, 3),), "scale by 2.0"),
        Origin("other.weight", ((5, 6),)),
        Origin("q.weight", ((3, 4),)),
        Origin("v.weight", ((0, 3),)),
    ]
    net, graph = _packed(capture_net, origins)
    layout = PortLayout.of("net", SLOTS, RANK, {"q": (4, 6), "v": (3, 6)})
    ported = run_passes(graph, [add_ports(layout)])
    bank, x = bank_of(layout, seed), torch.randn(2, 3, 6)
    given = {"x": x, **bank, **port_inputs([1], [[2]], [[0.5]])}
    found = ported.run(given, dtype=torch.float64)["y"]
    base = x.double() @ net.layer.weight.double().T
    places = layout.places()
    a, b = ({} for _ in range(2))
    for path, (group, port) in places.items():
        row = port * SLOTS + 2
        a[path], b[path] = (bank[f"bank.{group}.{k}"][row].double() for k in "ab")
    terms = {path: 0.5 * (x[1].double() @ a[path].T) @ b[path] for path in places}
    nothing = torch.zeros(3, 1, dtype=torch.float64)
    whole = torch.cat([2 * terms["q"][:, :3], nothing, terms["q"][:, 3:], terms["v"]], 1)
    assert (found[1] - base[1] - whole).abs().max() < 1e-12
    assert found[0].equal(base[0])


REFUSED: dict[str, tuple[list[Origin], str]] = {
    "columns": ([Origin("q.weight", ((0, 8), (0, 3)))], "a part of the columns of q.weight"),
    "changed": ([Origin("q.weight", None, "identity, negate")], "was changed by 'negate'"),
    "interleaved": (
        [Origin("q.weight", ((i // 2, i // 2 + 1),)) for i in range(17)],
        "mixed from 17 pieces",
    ),
    "half": ([Origin("q.weight", ((0, 4),)), Origin("o.weight", ((0, 4),))], "only some rows"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_origins_that_no_port_can_follow_are_refused(
    what: str, capture_net: Callable[..., Graph]
) -> None:
    origins, message = REFUSED[what]
    _, graph = _packed(capture_net, origins)
    layout = PortLayout.of("net", SLOTS, RANK, {"q": (8, 6)})
    with pytest.raises(NotBuilt, match=message):
        add_ports(layout)(graph)


MISUSED: dict[str, tuple[Callable[[], nn.Module], Function | None, tuple[int, ...], str]] = {
    "computed": (
        lambda: nn.Linear(6, 5),
        lambda f, x: nn.functional.linear(x, f.weight.relu()),
        (6,),
        "used by aten.relu",
    ),
    "groups": (lambda: nn.Conv2d(4, 4, 3, groups=2), None, (4, 5, 5), "has 2 groups"),
    "padding by name": (
        lambda: nn.Conv2d(4, 4, 3, padding="same"),
        None,
        (4, 5, 5),
        "padding is given by name",
    ),
    "no rows of the batch": (
        lambda: nn.Linear(6, 5),
        lambda f, x: f(x.flatten(0, 1)),
        (3, 6),
        "takes no rows of the batch",
    ),
}


@pytest.mark.parametrize("what", MISUSED)
def test_uses_that_have_no_port_are_refused(what: str, capture_net: Callable[..., Graph]) -> None:
    make, function, shape, message = MISUSED[what]
    net = Net(make(), function)
    graph = capture_net(net, *shape)
    before = str(graph.module.graph)
    with pytest.raises(NotBuilt, match=message):
        add_ports(layout_of(net))(graph)
    assert str(graph.module.graph) == before


def test_a_module_that_is_not_there_is_refused_unless_it_is_said_to_be(
    capture_net: Callable[..., Graph],
) -> None:
    net = Net(nn.Linear(6, 5))
    layout = PortLayout.of("net", SLOTS, RANK, {"layer": (5, 6), "absent": (5, 6)})
    with pytest.raises(NotBuilt, match=r"no operation uses the weights of \['absent'\]"):
        add_ports(layout)(capture_net(net, 6))
    with pytest.raises(NotBuilt, match=r"do use the weights of \['layer'\]"):
        add_ports(layout, ["absent", "layer"])(capture_net(net, 6))
    _, changed = add_ports(layout, ["absent"])(capture_net(net, 6))
    assert changed


def test_a_layout_of_other_shapes_is_refused(capture_net: Callable[..., Graph]) -> None:
    layout = PortLayout.of("net", SLOTS, RANK, {"layer": (5, 7)})
    with pytest.raises(NotBuilt, match=r"inputs \(7,\) for layer, its weight \(6,\)"):
        add_ports(layout)(capture_net(Net(nn.Linear(6, 5)), 6))


def test_a_shared_weight_gets_a_port_at_each_use(
    capture_net: Callable[..., Graph], seed: int
) -> None:
    torch.manual_seed(seed)
    net = Net(nn.Linear(5, 5), lambda f, x: f(torch.relu(f(x))))
    layout = layout_of(net)
    ported = run_passes(capture_net(net, 5), [add_ports(layout)])
    assert sum(operator(n) == "heatsink.adapter_port" for n in ported.nodes) == 2
    bank, x = bank_of(layout, seed), torch.randn(4, 5)
    given = {"x": x, **bank, **port_inputs(ROWS, USED, SCALES)}
    found = ported.run(given, dtype=torch.float64)["y"]
    for row, mix in enumerate(mixes_of(4)):
        with torch.no_grad():
            (wanted,) = merged(net, layout, bank, mix)(x[row : row + 1].double())
        assert (found[row] - wanted[0]).abs().max() <= 1e-12 * (1 + wanted.abs().max())
