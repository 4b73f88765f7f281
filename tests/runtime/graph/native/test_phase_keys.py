"""Phases of small networks: what has no rows, what lies elsewhere, whose bits depend on more."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from heatsink.kernels import _native
from heatsink.runtime.errors import InvalidRequest
from heatsink.runtime.graph.capture import capture_module
from heatsink.runtime.graph.graph import Graph, TensorSpec
from heatsink.runtime.graph.passes import run_passes
from heatsink.runtime.graph.passes.pipeline import PASSES_NATIVE
from heatsink.runtime.graph.phases import Phase, split
from heatsink.runtime.native.component import NativeComponent
from heatsink.runtime.native.exact import by_place, inexact
from heatsink.runtime.native.phased import SIZES, PhasedComponent
from heatsink.runtime.port_layout import SLOTS_INPUT

CHANNELS, TEXT, SLOTS = 64, 16, 3
SAMPLE = TensorSpec(("batch", CHANNELS), torch.float32)
TIME = TensorSpec(("batch",), torch.float32)


class Timed(nn.Module):
    """A time embedding of library products: the passes are left out."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(320, 320), nn.Linear(320, CHANNELS)

    def forward(self, sample: Tensor, timestep: Tensor) -> tuple[Tensor, ...]:
        waves = torch.sin(timestep[:, None] * torch.arange(320, device=timestep.device) / 320)
        return (sample * self.second(nn.functional.silu(self.first(waves))),)


class Banked(nn.Module):
    """Rows pick from a bank; text is multiplied with what they pick."""

    def forward(
        self,
        sample: Tensor,
        adapter_slots: Tensor,
        encoder_hidden_states: Tensor,
        bank: Tensor,
    ) -> tuple[Tensor, ...]:
        return (sample + encoder_hidden_states * bank[adapter_slots],)


class Pictured(nn.Module):
    """A picture made of the text is read by a convolution beside the sample."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = (nn.Conv2d(c, 8, 3, padding=1) for c in (4, 8 + 4))

    def forward(self, sample: Tensor, encoder_hidden_states: Tensor) -> tuple[Tensor, ...]:
        picture = self.first(encoder_hidden_states)
        return (self.second(torch.cat([sample, picture], dim=1)),)


@pytest.fixture
def timed(seed: int) -> Graph:
    torch.manual_seed(seed)
    weights = Timed().state_dict()
    specs = {"sample": SAMPLE, "timestep": TIME}
    return capture_module("unet", Timed().to("meta"), weights, {}, specs, ("out",))


@pytest.fixture
def banked() -> Graph:
    specs = {
        "sample": SAMPLE,
        SLOTS_INPUT: TensorSpec(("batch",), torch.int64),
        "encoder_hidden_states": SAMPLE,
        "bank": TensorSpec((SLOTS, CHANNELS), torch.float32),
    }
    graph = capture_module("unet", Banked(), {}, {}, specs, ("out",))
    (node,) = (node for node in graph.input_nodes() if node.target == "bank")
    node.meta["heatsink_input"] = "bank.0.a"
    graph.inputs["bank.0.a"] = graph.inputs.pop("bank")
    graph.validate()
    return graph


def _given(seed: int) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return {
        "sample": torch.randn(2, CHANNELS, generator=draw),
        SLOTS_INPUT: torch.tensor([0, 2]),
        "encoder_hidden_states": torch.randn(2, CHANNELS, generator=draw),
    }


def _wanted(given: dict[str, Tensor], bank: Tensor) -> Tensor:
    return given["sample"] + given["encoder_hidden_states"] * bank[given[SLOTS_INPUT]]


@pytest.mark.parametrize("where", ["held", "given"])
def test_a_key_stands_for_what_a_bank_holds(banked: Graph, where: str) -> None:
    bank = torch.arange(SLOTS * CHANNELS, dtype=torch.float32).view(SLOTS, CHANNELS)
    held = {"bank.0.a": bank}
    component = PhasedComponent(banked, held=held if where == "held" else None)
    given = _given(1) | ({} if where == "held" else held)
    keys = {SLOTS_INPUT: [b"first", b"third"]}
    component.prepare({n: v for n, v in given.items() if n != "sample"}, [torch.ones(2)] * 2, keys)
    assert torch.equal(component.run(given, keys)["out"], _wanted(given, bank))
    assert component.uses()[Phase.REQUEST].rows == 2
    # The adapter of the second row went into another slot, and something else into its own.
    bank[1] = bank[2]
    bank[2] = -1.0
    given[SLOTS_INPUT] = torch.tensor([0, 1])
    assert torch.equal(component.run(given, keys)["out"], _wanted(given, bank))
    assert component.uses()[Phase.REQUEST].rows == 2
    given[SLOTS_INPUT] = torch.tensor([0, 2])
    found = component.run(given, {SLOTS_INPUT: [b"first", b"new"]})["out"]
    assert torch.equal(found, _wanted(given, bank))
    assert component.uses()[Phase.REQUEST].rows == 3


def test_without_a_key_nothing_is_kept_of_what_has_no_rows(banked: Graph) -> None:
    bank = torch.zeros(SLOTS, CHANNELS)
    component = PhasedComponent(banked, held={"bank.0.a": bank})
    message = r"kept of request depends on 'bank\.0\.a', which has no rows; .* \['adapter_slots', "
    with pytest.raises(InvalidRequest, match=message):
        component.run(_given(1))
    with pytest.raises(InvalidRequest, match=message):
        component.prepare(_given(1), [torch.ones(1)] * 2)
    with pytest.raises(InvalidRequest, match=r"keys: unet takes .*, got 'bank\.0\.a'"):
        component.run(_given(1), {"bank.0.a": [b"one", b"two"]})


def test_values_do_not_depend_on_what_was_asked_for_beside_them(timed: Graph) -> None:
    component = PhasedComponent(timed)
    assert inexact(component.phases.graphs[Phase.SCHEDULE]) == ["aten.linear"]
    sample = torch.ones(12, CHANNELS)
    times = torch.linspace(1, 999, 12)
    alone = [
        component.run({"sample": sample[:1], "timestep": times[row : row + 1]})["out"][0]
        for row in range(12)
    ]
    for rows in ([3, 4], [4, 4, 4], list(range(12)), [5, 3, 9, 1, 2]):
        component.forget()
        given = {"sample": sample[: len(rows)], "timestep": times[rows]}
        found = component.run(given)["out"]
        assert all(torch.equal(found[i], alone[row]) for i, row in enumerate(rows)), rows
    assert component._parts[Phase.SCHEDULE].batches == [16]


@pytest.mark.skipif(not _native.available(), reason="products are PyTorch's without the C++ ops")
def test_phases_run_in_few_sizes(timed: Graph) -> None:
    graph = run_passes(timed, PASSES_NATIVE)
    assert inexact(graph) == []
    component = PhasedComponent(graph, sizes=(2, 5))
    sample, times = torch.ones(9, CHANNELS), torch.linspace(1, 999, 9)
    alone = component.run({"sample": sample[:1], "timestep": times[:1]})["out"][0]
    assert component._parts[Phase.SCHEDULE].batches == [2]
    found = component.run({"sample": sample, "timestep": times})["out"]
    assert torch.equal(found[0], alone)
    assert component._parts[Phase.SCHEDULE].batches == [5]
    assert component.uses()[Phase.SCHEDULE].rows == 9


def test_products_of_pytorch_are_no_ops_of_ours(
    timed: Graph, monkeypatch: pytest.MonkeyPatch
) -> None:
    graph = split(run_passes(timed, PASSES_NATIVE)).graphs[Phase.SCHEDULE]
    monkeypatch.setattr(_native, "available", lambda: True)
    assert inexact(graph) == []
    monkeypatch.setattr(_native, "available", lambda: False)
    assert inexact(graph) == ["heatsink.linear"]


class Activated(nn.Module):
    """An activation of the time that no operator of this package takes over."""

    def __init__(self, channels: int, kind: str) -> None:
        super().__init__()
        self.channels, self.kind = channels, kind

    def forward(self, sample: Tensor, timestep: Tensor) -> tuple[Tensor, ...]:
        numbers = torch.arange(self.channels, device=timestep.device) / self.channels
        waves = torch.sin(timestep[:, None] * numbers) * 5
        if self.kind == "gelu":
            return (sample * nn.functional.gelu(waves, approximate="tanh"),)
        return (sample * getattr(torch, self.kind)(waves),)


@pytest.mark.parametrize("kind", ["sigmoid", "gelu"])
@pytest.mark.parametrize("channels", [5, 48, 128, 4096])
def test_activations_do_not_depend_on_a_rows_place(channels: int, kind: str) -> None:
    specs = {"sample": TensorSpec(("batch", channels), torch.float32), "timestep": TIME}
    net = Activated(channels, kind)
    component = PhasedComponent(capture_module("unet", net, {}, {}, specs, ("out",)))
    # A vector's width, and what the threads would share.
    alone_only = channels % 64 != 0 or channels == 4096
    graph = component.phases.graphs[Phase.SCHEDULE]
    assert by_place(graph, 16) == ([f"aten.{kind}"] if alone_only else [])
    sample, times = torch.ones(7, channels), torch.linspace(1, 999, 7)
    alone = [
        component.run({"sample": sample[:1], "timestep": times[row : row + 1]})["out"][0]
        for row in range(7)
    ]
    component.forget()
    found = component.run({"sample": sample, "timestep": times})["out"]
    assert all(torch.equal(found[row], alone[row]) for row in range(7))
    assert tuple(component._sizes[Phase.SCHEDULE]) == ((1,) if alone_only else SIZES)


@pytest.mark.parametrize("sizes", [(), (0, 1), (4, 2), (2, 2)])
def test_sizes_ascend(timed: Graph, sizes: Any) -> None:
    with pytest.raises(ValueError, match="sizes: expected ascending batch sizes"):
        PhasedComponent(timed, sizes=sizes)


def test_dependences_go_through_what_is_handed_over(banked: Graph, timed: Graph) -> None:
    phases = split(banked)
    (output,) = phases.graphs[Phase.REQUEST].outputs
    request = {SLOTS_INPUT, "encoder_hidden_states", "bank.0.a"}
    assert phases.dependences() == {
        Phase.REQUEST: {output: request},
        Phase.STEP: {"out": request | {"sample"}},
    }
    # The sample's size is no data.
    assert split(timed).dependences()[Phase.STEP] == {"out": {"sample", "timestep"}}


def test_pictures_are_handed_over_as_convolutions_read_them(seed: int) -> None:
    torch.manual_seed(seed)
    image = TensorSpec(("batch", 4, 6, 5), torch.float32)
    specs = {"sample": image, "encoder_hidden_states": image}
    weights = Pictured().state_dict()
    captured = capture_module("unet", Pictured().to("meta"), weights, {}, specs, ("out",))
    graph = run_passes(captured, PASSES_NATIVE)
    component, whole = PhasedComponent(graph), NativeComponent(graph)
    for rows in (3, 1, 2):
        given = {name: torch.randn(rows, 4, 6, 5) for name in specs}
        assert torch.equal(component.run(given)["out"], whole.run(given)["out"])
    (buffer,) = component._handed.buffers.values()
    assert buffer.is_contiguous(memory_format=torch.channels_last)
    assert not buffer.is_contiguous()
    assert component.buffer_bytes == 3 * 8 * 6 * 5 * 4
    assert component.kept_bytes == component.buffer_bytes * 3
    assert component._step.program(2).unplanned == []
