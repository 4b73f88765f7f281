"""Phases: the whole graph's bits, with everything out of the loop that can be."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from heatsink.runtime.graph.capture import capture_module
from heatsink.runtime.graph.graph import BATCH, Graph, TensorSpec
from heatsink.runtime.graph.phases import Phase, Phases, phase_of_input, split


def _ancestors(node: fx.Node) -> set[str]:
    """Names of the inputs that a node's data depends on."""
    found, todo, seen = set(), [node], set()
    while todo:
        one = todo.pop()
        if one in seen or isinstance(one.meta.get("val"), torch.SymInt):
            continue
        seen.add(one)
        if one.op == "placeholder":
            found.add(str(one.target))
        todo += one.all_input_nodes
    return found


def _calls(graph: Graph) -> list[fx.Node]:
    return [node for node in graph.nodes if node.op == "call_function"]


@pytest.mark.parametrize("name", ["unet", "unet of SDXL"])
def test_the_phases_together_give_the_whole_graphs_bits(
    name: str, graphs: Callable[[str], Graph], cases: dict[str, Any]
) -> None:
    graph = graphs(name)
    phases = split(graph)
    given = cases[name].inputs(3, seed=1)
    assert torch.equal(phases.run(given)["out"], graph.run(given)["out"])


def test_the_text_and_the_time_leave_the_loop(graphs: Callable[[str], Graph]) -> None:
    phases = split(graphs("unet"))
    assert list(phases.graphs) == [Phase.REQUEST, Phase.SCHEDULE, Phase.STEP]
    assert list(phases.graphs[Phase.REQUEST].inputs) == ["encoder_hidden_states"]
    assert list(phases.graphs[Phase.SCHEDULE].inputs) == ["timestep"]
    step = phases.graphs[Phase.STEP]
    given = set(step.inputs) - set(phases.sources[Phase.STEP])
    assert given == {"sample"}


def test_sdxl_computes_its_embedding_of_time_and_text_by_request(
    graphs: Callable[[str], Graph],
) -> None:
    phases = split(graphs("unet of SDXL"))
    assert list(phases.graphs) == list(Phase)
    both = phases.graphs[Phase.BOTH]
    homes = set(phases.sources[Phase.BOTH].values())
    assert homes == {Phase.REQUEST, Phase.SCHEDULE}
    assert set(both.inputs) == set(phases.sources[Phase.BOTH])


@pytest.mark.parametrize("name", ["unet", "unet of SDXL"])
def test_every_operation_of_the_step_depends_on_the_latents_or_on_no_row(
    name: str, graphs: Callable[[str], Graph]
) -> None:
    step = split(graphs(name)).graphs[Phase.STEP]
    weights = set(step.weight_nodes().values())
    for node in _calls(step):
        inputs = _ancestors(node) - {n.target for n in weights}
        assert "sample" in inputs or not inputs or isinstance(node.meta["val"], torch.SymInt), node


class Net(nn.Module):
    """`forward` is any function of the weight and one or two inputs."""

    def __init__(self, forward: Callable[..., Any]) -> None:
        super().__init__()
        self.function = forward
        self.weight = nn.Parameter(torch.ones(4))

    def forward(self, sample: Tensor, other: Tensor | None = None) -> tuple[Tensor, ...]:
        given = (sample,) if other is None else (sample, other)
        return (self.function(self.weight, *given),)


def _tiny(forward: Callable[..., Tensor], **shapes: tuple[int, ...]) -> Phases:
    specs = {n: TensorSpec((BATCH, *shape), torch.float32) for n, shape in shapes.items()}
    net = Net(forward)
    graph = capture_module("net", Net(forward).to("meta"), net.state_dict(), {}, specs, ("y",))
    phases = split(graph)
    draw = torch.Generator().manual_seed(1)
    given = {n: torch.randn(3, *shape, generator=draw) for n, shape in shapes.items()}
    assert torch.equal(phases.run(given)["y"], graph.run(given)["y"])
    return phases


def test_a_size_taken_from_the_latents_is_no_data() -> None:
    phases = _tiny(
        lambda w, sample, encoder_hidden_states: (
            sample + (encoder_hidden_states * w).reshape(sample.shape[0], 4).exp()
        ),
        sample=(4,),
        encoder_hidden_states=(4,),
    )
    request = phases.graphs[Phase.REQUEST]
    assert list(request.inputs) == ["encoder_hidden_states"]
    assert "aten.exp.default" in [str(node.target) for node in _calls(request)]
    assert [str(n.target) for n in _calls(phases.graphs[Phase.STEP])] == ["aten.add.Tensor"]


def test_what_has_no_batch_is_computed_where_it_is_needed() -> None:
    # The mean over the rows is no row's own: it can't be kept by row.
    phases = _tiny(
        lambda w, sample, encoder_hidden_states: sample * (encoder_hidden_states.exp() * w).mean(0),
        sample=(4,),
        encoder_hidden_states=(4,),
    )
    step = [str(node.target) for node in _calls(phases.graphs[Phase.STEP])]
    assert step == ["aten.mean.dim", "aten.mul.Tensor"]


def test_an_output_that_needs_no_latents_is_handed_over() -> None:
    phases = _tiny(lambda w, sample, timestep: (timestep * w).sin(), sample=(4,), timestep=(4,))
    assert _calls(phases.graphs[Phase.STEP]) == []
    assert list(phases.sources[Phase.STEP].values()) == [Phase.SCHEDULE]


def test_without_a_phase_there_is_the_step_alone() -> None:
    phases = _tiny(lambda w, sample: sample * w, sample=(4,))
    assert list(phases.graphs) == [Phase.STEP]


def test_weights_go_where_they_are_used(graphs: Callable[[str], Graph]) -> None:
    graph = graphs("unet")
    phases = split(graph)
    held = [set(part.weights) for part in phases.graphs.values()]
    assert set().union(*held) == set(graph.weights)
    for part in phases.graphs.values():
        assert set(part.origins) == set(part.weights)


def test_adapters_belong_to_the_request() -> None:
    names = ("adapter_slots", "adapter_scales", "bank.0.a", "encoder_hidden_states", "text_embeds")
    assert {phase_of_input(name) for name in names} == {Phase.REQUEST}
    assert phase_of_input("timestep") == Phase.SCHEDULE
    assert phase_of_input("sample") == phase_of_input("mask") == Phase.STEP
