from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from heatsink.runtime.errors import HeatsinkError
from heatsink.runtime.graph.graph import PATH_KEY, Graph
from heatsink.runtime.graph.passes import run_passes, to_fixpoint
from heatsink.runtime.graph.passes.dead_code import remove_dead_code
from heatsink.runtime.graph.passes.drop_noops import drop_noop_nodes
from heatsink.runtime.graph.passes.edit import inherit
from heatsink.runtime.graph.passes.fold_scale import fold_scales
from heatsink.runtime.graph.weight import Origin

ALL = to_fixpoint(drop_noop_nodes, fold_scales, remove_dead_code)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return (torch.relu(self.linear(x)),)


@pytest.fixture
def graph(capture_net: Callable[..., Graph]) -> Graph:
    return capture_net(Net(), 4)


def _relu_to_silu(graph: Graph, keep_path: bool) -> tuple[Graph, bool]:
    for node in list(graph.nodes):
        if node.target is torch.ops.aten.relu.default:
            with graph.module.graph.inserting_after(node):
                new = graph.module.graph.call_function(torch.ops.aten.silu.default, node.args)
            if keep_path:
                inherit(new, node)
            node.replace_all_uses_with(new)
            graph.module.graph.erase_node(node)
            return graph, True
    return graph, False


def careful(graph: Graph) -> tuple[Graph, bool]:
    return _relu_to_silu(graph, keep_path=True)


def careless(graph: Graph) -> tuple[Graph, bool]:
    return _relu_to_silu(graph, keep_path=False)


def test_passes_edit_a_copy(graph: Graph) -> None:
    before = str(graph.module.graph)
    edited = run_passes(graph, [careful])
    assert str(graph.module.graph) == before
    assert "silu" in str(edited.module.graph)
    inputs = {"x": torch.arange(8.0).reshape(2, 4)}
    assert not torch.equal(edited.run(inputs)["y"], graph.run(inputs)["y"])


def test_the_pass_that_lost_a_path_is_named(graph: Graph) -> None:
    for passes in ([careless], [to_fixpoint(drop_noop_nodes, careless)]):
        with pytest.raises(HeatsinkError, match=r"pass careless: .*silu.* has no module path"):
            run_passes(graph, passes)


def test_the_pass_that_lost_an_origin_is_named(graph: Graph) -> None:
    def forgetful(graph: Graph) -> tuple[Graph, bool]:
        del graph.origins["linear.weight"]
        return graph, True

    with pytest.raises(HeatsinkError, match=r"pass forgetful: .*'linear\.weight' has no origin"):
        run_passes(graph, [forgetful])


def test_the_pass_that_made_up_provenance_is_named(graph: Graph) -> None:
    def liar(graph: Graph) -> tuple[Graph, bool]:
        graph.origins["linear.weight"] = [Origin("other.weight")]
        return graph, True

    def inventor(graph: Graph) -> tuple[Graph, bool]:
        next(n for n in graph.nodes if n.op == "call_function").meta[PATH_KEY] = "nowhere"
        return graph, True

    with pytest.raises(HeatsinkError, match=r"pass liar: .*\['other\.weight'\]"):
        run_passes(graph, [liar])
    with pytest.raises(HeatsinkError, match=r"pass inventor: .*\['nowhere'\]"):
        run_passes(graph, [inventor])


def test_a_fixpoint_runs_until_nothing_changes(graph: Graph) -> None:
    rounds: list[bool] = []

    def countdown(graph: Graph) -> tuple[Graph, bool]:
        rounds.append(len(rounds) < 3)
        return graph, rounds[-1]

    _, changed = to_fixpoint(countdown)(graph)
    assert rounds == [True, True, True, False]
    assert changed
    _, changed = to_fixpoint(countdown)(graph)
    assert not changed


def test_a_pass_without_end_is_stopped(graph: Graph) -> None:
    def restless(graph: Graph) -> tuple[Graph, bool]:
        return graph, True

    with pytest.raises(HeatsinkError, match="restless still change the graph after 64 rounds"):
        run_passes(graph, [to_fixpoint(restless)])


@pytest.mark.parametrize("name", ["unet", "vae_decoder", "vae_encoder"])
def test_nothing_depends_on_names(
    name: str, graphs: Callable[[str], Graph], renamed: Any, structure: Any
) -> None:
    graph = graphs(name)
    plain, other = run_passes(graph, [ALL]), run_passes(renamed(graph), [ALL])
    assert structure(plain) == structure(other)
    assert structure(plain) != structure(graph)
    transforms = [[o.transform for o in origins] for origins in plain.origins.values()]
    assert transforms == [[o.transform for o in origins] for origins in other.origins.values()]


def test_wrapped_modules_give_the_same_structure(
    structure: Any, capture_net: Callable[..., Graph]
) -> None:
    class Outer(nn.Module):
        def __init__(self, attribute: str) -> None:
            super().__init__()
            self.attribute = attribute
            torch.manual_seed(0)
            block = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Dropout(0.5), nn.Conv2d(4, 5, 3))
            self.add_module(attribute, block)

        def forward(self, x: Tensor) -> tuple[Tensor, ...]:
            return (getattr(self, self.attribute)(x / 3.0) * 2.0,)

    found = [run_passes(capture_net(Outer(n), 3, 6, 6), [ALL]) for n in ("quant_conv", "zebra")]
    assert structure(found[0]) == structure(found[1])
    assert set(found[1].weights) == {
        "zebra.0.weight",
        "zebra.0.bias",
        "zebra.2.weight",
        "zebra.2.bias",
    }


@pytest.mark.parametrize("name", ["text_encoder_2", "vae_decoder", "vae_encoder", "unet"])
def test_all_passes_keep_the_result(
    name: str, cases: Any, graphs: Callable[[str], Graph], seed: int
) -> None:
    graph = graphs(name)
    edited = run_passes(graph, [ALL])
    assert len(list(edited.nodes)) < len(list(graph.nodes))
    inputs = cases[name].inputs(2, seed)
    exact = graph.run(inputs, dtype=torch.float64)
    plain, result = graph.run(inputs), edited.run(inputs)
    for output, reference in exact.items():
        limit = reference.abs().max() * torch.finfo(torch.float32).eps
        budget = 2 * ((plain[output].double() - reference).abs().max() + limit)
        assert (result[output].double() - reference).abs().max() <= budget
    _, changed = ALL(edited)
    assert not changed
