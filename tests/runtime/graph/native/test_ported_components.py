"""Native programs of whole components with ports, beside their twins and merged weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from heatsink.kernels import _native
from heatsink.runtime.errors import InvalidRequest
from heatsink.runtime.graph.cost import costs, total
from heatsink.runtime.graph.graph import Graph
from heatsink.runtime.graph.passes import run_passes
from heatsink.runtime.graph.passes.edit import operator
from heatsink.runtime.graph.passes.pipeline import PASSES_NATIVE, native_passes
from heatsink.runtime.graph.phases import Phase, split
from heatsink.runtime.graph.serial import graph_from_json, graph_to_json
from heatsink.runtime.native.component import NativeComponent

NAMES = ("unet", "unet of SDXL", "text_encoder")
DTYPES = (torch.float32, torch.bfloat16)
Mix = list[tuple[int, float]]
MIXES: list[Mix] = [[], [(2, 0.5), (0, -0.5)], [], [(1, 1.0)], [(0, 0.5), (1, 0.5), (2, 0.5)]]
ROWS = len(MIXES)


class Ported:
    """A component's native graphs without and with ports, a bank, and inputs."""

    def __init__(self, case: Any, bank: Any, dtype: torch.dtype) -> None:
        captured = case.capture(dtype=dtype)
        self.case, self.bank = case, bank
        self.twin_graph = run_passes(captured, PASSES_NATIVE)
        self.graph = run_passes(captured, native_passes(bank.layout))
        self.twin = NativeComponent(self.twin_graph)
        self.component = NativeComponent(self.graph, held=bank.bank)
        self.given: dict[str, Tensor] = case.inputs(ROWS, 5, dtype)

    def plain(self) -> dict[str, Tensor]:
        """The twin's outputs."""
        return self.twin.run(self.given)

    def run(self, mixes: list[Mix], rows: list[int] | None = None) -> dict[str, Tensor]:
        """The outputs of some rows, which have these adapters."""
        chosen = list(range(ROWS)) if rows is None else rows
        given = {name: value[chosen] for name, value in self.given.items()}
        own = self.bank.inputs([mixes[row] for row in chosen])
        return self.component.run({**given, **own})


@pytest.fixture(scope="module")
def ported(cases: Any, adapters: Any) -> Callable[[str, torch.dtype], Ported]:
    """Made once a component and dtype."""
    done: dict[tuple[str, torch.dtype], Ported] = {}

    def get(name: str, dtype: torch.dtype = torch.float32) -> Ported:
        if (name, dtype) not in done:
            case = cases[name]
            done[name, dtype] = Ported(case, adapters(case.module, 3, dtype), dtype)
        return done[name, dtype]

    return get


@pytest.mark.parametrize("name", NAMES)
def test_every_row_is_what_merged_weights_give(name: str, ported: Any) -> None:
    both = ported(name)
    plain, found = both.plain(), both.run(MIXES)
    for row, mix in enumerate(MIXES):
        one = {key: value[row : row + 1] for key, value in both.given.items()}
        wide = {k: v.double() if v.is_floating_point() else v for k, v in one.items()}
        with torch.no_grad():
            wanted = both.case.reference(both.bank.merged(mix), wide)
            single = both.case.reference(both.bank.merged(mix).float(), one)
        for output, exact, other in zip(found, wanted, single, strict=True):
            value, largest = found[output][row], exact.abs().max()
            eps = torch.finfo(torch.float32).eps
            # Ports sum in another order than merged weights: twice the usual budget.
            budget = 4 * ((other.double() - exact).abs().max() + eps * largest)
            assert (value.double() - exact[0]).abs().max() <= budget
            assert value.equal(plain[output][row]) == (not mix)
            if mix:
                assert (value - plain[output][row]).abs().max() > 0.01


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", NAMES)
def test_rows_without_adapters_have_the_twins_bits(
    name: str, dtype: torch.dtype, ported: Any
) -> None:
    both = ported(name, dtype)
    plain = both.plain()
    nobody: list[Mix] = [[] for _ in range(ROWS)]
    for mixes in (MIXES, nobody, MIXES[::-1]):
        for output, value in both.run(mixes).items():
            for row, mix in enumerate(mixes):
                assert value[row].equal(plain[output][row]) == (not mix)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", NAMES)
def test_a_rows_bits_depend_on_that_row_and_its_adapters(
    name: str, dtype: torch.dtype, ported: Any
) -> None:
    both = ported(name, dtype)
    whole = both.run(MIXES)
    for rows in ([4], [1], [0], [3, 1], [4, 3, 2, 1, 0], [1, 1, 4, 0, 1, 3, 2]):
        for output, value in both.run(MIXES, rows).items():
            for place, row in enumerate(rows):
                assert value[place].equal(whole[output][row])


@pytest.mark.parametrize("name", NAMES)
def test_nothing_is_allocated_and_rows_add_no_launches(
    name: str, ported: Any, allocations: Callable[..., int]
) -> None:
    both = ported(name)
    counts = set()
    for rows in ([0], [1, 3], list(range(ROWS))):
        both.run(MIXES, rows)
        program = both.component.program(len(rows))
        assert program.unplanned == []
        if _native.available():
            assert allocations(program.replay) == 0
            assert program.recorded >= 0.9 * program.launches
        counts.add(program.launches)
    assert len(counts) == 1
    # A launch for each port that comes behind a product, and no place in the arena for the bank.
    ports = sum(operator(node) == "heatsink.row_port" for node in both.graph.nodes)
    upsampled = sum(operator(node) == "aten.upsample_nearest2d" for node in both.graph.nodes)
    assert counts.pop() == both.twin.program(ROWS).launches + ports + upsampled
    small = both.given | both.bank.inputs(MIXES)
    added = sum(value.nbytes + 64 for value in small.values())
    peak = both.component.program(ROWS).memory.peak
    assert peak <= both.twin.program(ROWS).memory.peak + added


def test_the_bank_is_read_where_it_is(ported: Any) -> None:
    both = ported("text_encoder")
    before = both.run(MIXES)
    kept = {name: value.clone() for name, value in both.bank.bank.items()}
    program = both.component.program(ROWS)
    assert all(program.inputs[n].data_ptr() == v.data_ptr() for n, v in both.bank.bank.items())
    try:
        for name, value in both.bank.bank.items():
            if name.endswith(".b"):
                value.mul_(2.0)
        after = both.run(MIXES)
    finally:
        for name, value in both.bank.bank.items():
            value.copy_(kept[name])
    for output, value in both.run(MIXES).items():
        assert value.equal(before[output])
        for row, mix in enumerate(MIXES):
            assert value[row].equal(after[output][row]) == (not mix)
    with pytest.raises(InvalidRequest, match=r"'bank\.0\.a'.* are held already"):
        both.component.run({**both.given, **both.bank.inputs(MIXES), **both.bank.bank})


def _phase_paths(graph: Graph) -> set[str]:
    found = (node for node in graph.nodes if operator(node) == "heatsink.row_port")
    return {node.meta["heatsink_path"] for node in found}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["unet", "unet of SDXL"])
def test_phases_of_a_ported_graph(name: str, dtype: torch.dtype, ported: Any) -> None:
    both = ported(name, dtype)
    phases = split(both.graph)
    made = {**both.given, **both.bank.inputs(MIXES)}
    for graph in phases.graphs.values():
        graph.validate()
        held = {n: v for n, v in both.bank.bank.items() if n in graph.inputs}
        component = NativeComponent(graph, held=held)
        made |= component.run({n: made[n] for n in graph.inputs if n not in held})
    for output, value in both.run(MIXES).items():
        assert made[output].equal(value)
    request, step = phases.graphs[Phase.REQUEST], phases.graphs[Phase.STEP]
    # Keys and values of cross-attention with their adapters leave the loop, and the rest stays.
    crossed = [p for p in _phase_paths(request) if "attn2" in p]
    assert len(crossed) == sum(operator(n) == "heatsink.attention" for n in step.nodes) / 2
    assert not [p for p in _phase_paths(step) if "time_emb" in p or "time_embedding" in p]
    assert {"adapter_slots", "adapter_scales", "encoder_hidden_states"} <= set(request.inputs)
    assert "encoder_hidden_states" not in step.inputs
    assert any(n.startswith("bank.") for n in step.inputs)


@pytest.mark.parametrize("name", NAMES)
def test_json_and_back(name: str, ported: Any) -> None:
    both = ported(name)
    text = graph_to_json(both.graph)
    weights = {name: weight.load() for name, weight in both.graph.weights.items()}
    again = graph_from_json(text, weights)
    assert graph_to_json(again) == text
    assert again.inputs == both.graph.inputs
    found = NativeComponent(again, held=both.bank.bank).run(
        {**both.given, **both.bank.inputs(MIXES)}
    )
    for output, value in both.run(MIXES).items():
        assert found[output].equal(value)
    if name == "unet":
        part = split(both.graph).graphs[Phase.REQUEST]
        assert graph_from_json(graph_to_json(part), weights).inputs == part.inputs


@pytest.mark.parametrize("name", NAMES)
def test_costs_are_the_twins_and_the_ports_traffic(name: str, ported: Any) -> None:
    both = ported(name)
    twin, found = costs(both.twin_graph, 4), costs(both.graph, 4)
    assert total(found).flops == total(twin).flops
    products = [each.get("heatsink.linear") for each in (twin, found)]
    before = found.get("heatsink.port_linear")
    assert before is not None
    assert products[0].flops == products[1].flops + before.flops  # type: ignore[union-attr]
    ports = found["heatsink.row_port"]
    assert ports.nodes > 10
    # x is read, y read and written; of the bank, nothing is counted.
    assert 0 < ports.bytes < 4 * total(twin).bytes
