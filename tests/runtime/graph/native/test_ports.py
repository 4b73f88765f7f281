"""A bank's adapters in a native graph: what is loaded is used, in float32 and bfloat16."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from heatsink.runtime.adapter_delta import AdapterDelta
from heatsink.runtime.adapters import AdapterBank
from heatsink.runtime.errors import NotBuilt
from heatsink.runtime.graph.passes import run_passes
from heatsink.runtime.graph.passes.pipeline import PASSES_NATIVE, native_passes
from heatsink.runtime.native.component import NativeComponent
from heatsink.runtime.native.ports import held_of, room_of, row_inputs
from heatsink.runtime.port_layout import SCALES_INPUT, SLOTS_INPUT, PortLayout


class Net(nn.Module):
    """Two layers, of which the second has no adapter."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 8), nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (self.second(nn.functional.gelu(self.first(x))),)


def test_a_banks_adapters_change_the_rows_that_name_them(capture_net: Any, seed: int) -> None:
    torch.manual_seed(seed)
    net = Net()
    captured = capture_net(net, 3, 6)
    layout = PortLayout.of("net", 2, 4, {"first": (8, 6), "second": (5, 8)})
    graph = run_passes(captured, native_passes(layout, room=3))
    assert room_of(graph) == 3
    assert room_of(run_passes(captured, PASSES_NATIVE)) == 0
    bank = AdapterBank([layout])
    delta = AdapterDelta("net", "first", torch.randn(2, 6), torch.randn(8, 2), 0.5)
    bank.add("style", [delta])
    component = NativeComponent(graph, held=held_of(bank, graph))
    x = torch.randn(3, 3, 6)
    with bank.acquire({"style": 2.0}) as lease:
        lease.wait()
        ((slot, weight),) = lease.entries(0, "net")
        slots = np.array([[-1, -1], [slot, -1], [-1, -1]], np.int64)
        scales = np.array([[0, 0], [weight, 0], [0, 0]], np.float32)
        found = component.run({"x": x, **row_inputs(slots, scales, 3, 3)})["y"]
    none = component.run({"x": x, **row_inputs(None, None, 3, 3)})["y"]
    with torch.no_grad():
        plain = net.double()(x.double())[0]
        net.first.weight += 2.0 * 0.5 * delta.b.double() @ delta.a.double()
        merged = net(x.double())[0]
    assert (merged - plain)[1].abs().max() > 0.1
    for row in range(3):
        wanted = (merged if row == 1 else plain)[row]
        assert (found[row] - wanted).abs().max() < 1e-5 * (1 + wanted.abs().max())
        assert none[row].equal(found[row]) == (row != 1)


def test_rows_are_padded_to_the_graphs_room() -> None:
    slots = np.array([[3, 1, -1, -1], [-1, -1, -1, -1]], np.int64)
    scales = np.array([[0.5, 2, 0, 0], [0, 0, 0, 0]], np.float32)
    found = row_inputs(slots, scales, 2, 3)
    assert found[SLOTS_INPUT].tolist() == [[3, 1, -1], [-1, -1, -1]]
    assert found[SCALES_INPUT].tolist() == [[0.5, 2, 0], [0, 0, 0]]
    assert (found[SLOTS_INPUT].dtype, found[SCALES_INPUT].dtype) == (torch.int64, torch.float32)
    assert row_inputs(None, None, 2, 1)[SLOTS_INPUT].tolist() == [[-1], [-1]]
    with pytest.raises(NotBuilt, match="a row has 2 adapters, this graph has room for 1"):
        row_inputs(slots, scales, 2, 1)
