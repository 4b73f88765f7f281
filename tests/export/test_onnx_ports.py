"""Graphs with adapter ports in ONNX Runtime: same results, one file of weights, exact rows."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn

from heatsink.export.onnx import PATH_PROPERTY, to_onnx
from heatsink.runtime.backends.onnxruntime import OnnxRuntimeSession
from heatsink.runtime.graph.capture import capture_module
from heatsink.runtime.graph.graph import Graph, TensorSpec
from heatsink.runtime.graph.passes import run_passes
from heatsink.runtime.graph.passes.fold_scale import fold_scales
from heatsink.runtime.graph.passes.ports import add_ports
from heatsink.runtime.graph.weight import Origin
from heatsink.runtime.port_layout import PortLayout

SLOTS, RANK = 3, 2
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
WINDOWS = {"1x1 with stride", "1x1 with padding", "3x3 with too much padding", "3x3 with stride"}
WINDOWS.add("3x2 uneven")


class Net(nn.Module):
    layer: Any

    def __init__(self, layer: nn.Module, factor: float = 1.0) -> None:
        super().__init__()
        self.layer, self.factor = layer, factor

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return (self.layer(x) * self.factor,)


def graph_of(net: nn.Module, shape: tuple[int, ...]) -> Graph:
    module = copy.deepcopy(net).to("meta")
    inputs = {"x": TensorSpec(("batch", *shape), torch.float32)}
    return capture_module("net", module, net.state_dict(), {}, inputs, ("y",))


def ported_of(graph: Graph, paths: dict[str, tuple[int, ...]]) -> tuple[PortLayout, Graph]:
    layout = PortLayout.of("net", SLOTS, RANK, paths)
    return layout, run_passes(graph, [add_ports(layout)])


def inputs_of(layout: PortLayout, x: Tensor, rows: list[int], room: int, seed: int) -> Any:
    draw = torch.Generator().manual_seed(seed)
    slots = torch.full((len(rows), room), -1)
    for place in range(len(rows)):
        used = min(room, 1 + place)
        slots[place, :used] = (torch.arange(used) + place) % SLOTS
    return {
        "x": x,
        "adapter_rows": torch.tensor(rows, dtype=torch.int64),
        "adapter_slots": slots,
        "adapter_scales": torch.rand((len(rows), room), generator=draw) + 0.5,
        **{n: torch.randn(s, generator=draw) / 2 for n, s in layout.shapes().items()},
    }


def check(graph: Graph, session: OnnxRuntimeSession, given: dict[str, Tensor]) -> Any:
    """The session's result, within the budget of the graph's in float64."""
    exact, plain = graph.run(given, dtype=torch.float64)["y"], graph.run(given)["y"]
    found = session.run({name: value.numpy() for name, value in given.items()})["y"]
    limit = exact.abs().max() * torch.finfo(torch.float32).eps
    error = (plain.double() - exact).abs().max()
    assert (torch.from_numpy(found).double() - exact).abs().max() <= 2 * (error + limit)
    return found


@pytest.mark.parametrize("name", LAYERS)
def test_onnx_runtime_computes_the_ports(name: str, tmp_path: Path, seed: int) -> None:
    make, shape = LAYERS[name]
    torch.manual_seed(seed)
    net = Net(make())
    graph = graph_of(net, shape)
    layout, ported = ported_of(graph, {"layer": tuple(net.layer.weight.shape)})
    plain = to_onnx(graph, tmp_path / "net.onnx")
    written = to_onnx(ported, tmp_path / "net_ports.onnx", weights_of=plain.path)
    onnx.checker.check_model(str(written.path), full_check=True)
    base = OnnxRuntimeSession("net", plain.path, threads=1)
    session = OnnxRuntimeSession("net", written.path, threads=1)
    assert session.inputs == list(ported.inputs)
    for batch, rows, room in ((4, [2, 0], 2), (1, [0], 1), (3, [0, 1, 2], 4)):
        x = torch.randn(batch, *shape)
        found = check(ported, session, inputs_of(layout, x, rows, room, seed))
        without = base.run({"x": x.numpy()})["y"]
        for row in set(range(batch)) - set(rows):
            assert found[row].tobytes() == without[row].tobytes()
    nobody = inputs_of(layout, torch.randn(2, *shape), [], 1, seed)
    check(ported, session, nobody)
    found = session.run({key: value.numpy() for key, value in nobody.items()})["y"]
    assert found.tobytes() == base.run({"x": nobody["x"].numpy()})["y"].tobytes()
    # Which of the two ways a convolution went.
    nodes = [n.op_type for n in onnx.load(str(written.path), load_external_data=False).graph.node]
    if name.startswith("3x"):
        assert ("Col2Im" in nodes) == (name not in WINDOWS)
        assert ("Concat" in nodes and nodes.count("Slice") > 2) == (name in WINDOWS)


def test_more_room_changes_no_bit(tmp_path: Path, seed: int) -> None:
    torch.manual_seed(seed)
    for make, shape in (LAYERS["linear"], LAYERS["3x3"]):
        net = Net(make())
        layout, ported = ported_of(graph_of(net, shape), {"layer": tuple(net.layer.weight.shape)})
        session = OnnxRuntimeSession("net", to_onnx(ported, tmp_path / "net.onnx").path, threads=1)
        given = inputs_of(layout, torch.randn(3, *shape), [1], 1, seed)
        arrays = {name: value.numpy() for name, value in given.items()}
        narrow = session.run(arrays)["y"]
        arrays["adapter_slots"] = np.array([[int(given["adapter_slots"][0, 0]), -1, -1, -1]])
        arrays["adapter_scales"] = np.array([[given["adapter_scales"][0, 0], 7, 7, 7]], np.float32)
        assert session.run(arrays)["y"].tobytes() == narrow.tobytes()


@pytest.mark.parametrize("kind", ["linear", "3x3"])
def test_scaled_and_packed_weights(kind: str, tmp_path: Path, seed: int) -> None:
    torch.manual_seed(seed)
    make, shape = LAYERS[kind]
    net = Net(make(), 0.25)
    graph = run_passes(graph_of(net, shape), [fold_scales])
    rows, *rest = net.layer.weight.shape
    graph.origins["layer.weight"] = [
        Origin("q.weight", ((0, 2),), "scale by 0.25"),
        Origin("other.weight", ((0, rows - 3),)),
        Origin("q.weight", ((2, 3),)),
    ]
    layout, ported = ported_of(graph, {"q": (3, *rest)})
    session = OnnxRuntimeSession("net", to_onnx(ported, tmp_path / "net.onnx").path, threads=1)
    given = inputs_of(layout, torch.randn(3, *shape), [2, 0], 2, seed)
    found = check(ported, session, given)
    effect = np.abs(found - graph.run({"x": given["x"]})["y"].numpy())
    channels = effect.max(axis=tuple(i for i in range(found.ndim) if i != (1 if rest[1:] else 2)))
    assert (channels[:2] > 0.01).all()
    assert (channels[2:-1] < 1e-5).all()
    assert channels[-1] > 0.01


def test_the_weights_are_stored_once(tmp_path: Path) -> None:
    net = Net(nn.Conv2d(4, 6, 3, padding=1))
    graph = graph_of(net, (4, 5, 5))
    _, ported = ported_of(graph, {"layer": (6, 4, 3, 3)})
    plain = to_onnx(graph, tmp_path / "net.onnx")
    shared = to_onnx(ported, tmp_path / "net_ports.onnx", weights_of=plain.path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "net.onnx", "net.onnx.data", "net_ports.onnx",
    ]  # fmt: skip
    assert shared.data == plain.data == tmp_path / "net.onnx.data"
    assert shared.origins == plain.origins
    stored = [
        {i.name: [(e.key, e.value) for e in i.external_data] for i in model.graph.initializer}
        for model in (
            onnx.load(str(file.path), load_external_data=False) for file in (plain, shared)
        )
    ]
    assert stored[0] == stored[1]
    assert set(stored[0]) == {"layer.weight", "layer.bias"}
    model = onnx.load(str(shared.path), load_external_data=False)
    paths = {entry.value for n in model.graph.node for entry in n.metadata_props}
    assert {entry.key for n in model.graph.node for entry in n.metadata_props} == {PATH_PROPERTY}
    assert paths <= {"layer", ""}
