"""Graphs as JSON: the same results, the same text, and nothing runs that a stranger names."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from heatsink.runtime.errors import EngineMismatch, NotBuilt
from heatsink.runtime.graph.graph import Graph, module_path
from heatsink.runtime.graph.passes import run_passes, to_fixpoint
from heatsink.runtime.graph.passes.dead_code import remove_dead_code
from heatsink.runtime.graph.passes.drop_noops import drop_noop_nodes
from heatsink.runtime.graph.passes.fold_scale import fold_scales
from heatsink.runtime.graph.serial import graph_from_json, graph_to_json

NAMES = ["unet", "vae_encoder", "text_encoder_2"]
PASSES = (to_fixpoint(drop_noop_nodes, fold_scales, remove_dead_code),)


def _again(graph: Graph) -> Graph:
    weights = {name: weight.load() for name, weight in graph.weights.items()}
    return graph_from_json(graph_to_json(graph), weights)


@pytest.mark.parametrize("name", NAMES)
def test_a_read_graph_is_the_one_that_was_written(
    name: str, graphs: Callable[[str], Graph], cases: dict[str, Any]
) -> None:
    graph = run_passes(graphs(name), PASSES)
    read = _again(graph)
    assert graph_to_json(read) == graph_to_json(graph)
    assert (read.inputs, read.outputs, read.origins) == (graph.inputs, graph.outputs, graph.origins)
    for old, new in zip(graph.nodes, read.nodes, strict=True):
        if old.op == "call_function":
            assert module_path(new) == module_path(old)
            assert _sizes(new) == _sizes(old)
    given = cases[name].inputs(3, seed=3)
    found = read.run(given)
    for key, value in graph.run(given).items():
        assert torch.equal(found[key], value)


def _sizes(node: Any) -> Any:
    value = node.meta["val"]
    if not isinstance(value, torch.Tensor):
        return "several" if isinstance(value, list | tuple) else "a size"
    return value.dtype, [s if isinstance(s, int) else "symbolic" for s in value.shape]


def test_passes_find_in_a_read_graph_what_they_find_in_a_captured_one(
    graphs: Callable[[str], Graph],
) -> None:
    graph = graphs("vae_decoder")
    assert graph_to_json(run_passes(_again(graph), PASSES)) == graph_to_json(
        run_passes(graph, PASSES)
    )


def _document(graph: Graph) -> dict[str, Any]:
    value: dict[str, Any] = json.loads(graph_to_json(graph))
    return value


@pytest.mark.parametrize(
    "target",
    [
        "operator.attrgetter",
        "prim.device.default",
        "aten.add_.Tensor",
        "os.system",
        "aten.nothing",
        "aten.from_file.default",
        "heatsink.program_free.default",
        "heatsink.program_new.default",
    ],
)
def test_only_harmless_operators_can_be_named(
    target: str, capture_net: Callable[..., Graph]
) -> None:
    value = _document(capture_net(nn.SiLU(), 4))
    (node,) = [node for node in value["nodes"] if node[1] == "call"]
    node[2] = target
    with pytest.raises(EngineMismatch, match=r"the graph is damaged: (Value|Attribute)Error"):
        graph_from_json(json.dumps(value), {})


def test_every_damage_is_one_kind_of_error(capture_net: Callable[..., Graph]) -> None:
    text = graph_to_json(capture_net(nn.SiLU(), 4))
    changes: list[Callable[[dict[str, Any]], object]] = [
        # Arguments that are no tuple, a size of 0 / 0, names that disagree, a lost module path.
        lambda value: value["nodes"][-2].__setitem__(3, []),
        lambda value: value["nodes"].insert(
            1, ["half", "call", "operator.mod", {"tuple": [1, 0]}, {}, ""]
        ),
        lambda value: value["inputs"].append(["more", ["batch", 4], "float32"]),
        lambda value: value["nodes"][-2].__setitem__(5, None),
    ]
    for change in changes:
        value = json.loads(text)
        change(value)
        with pytest.raises(EngineMismatch, match="the graph is damaged"):
            graph_from_json(json.dumps(value), {})


@pytest.mark.parametrize("weight", [torch.zeros(3, 5), torch.zeros(3, 4, dtype=torch.bfloat16)])
def test_a_weight_of_another_kind_is_told(
    weight: torch.Tensor, capture_net: Callable[..., Graph]
) -> None:
    text = graph_to_json(capture_net(nn.Linear(4, 3), 4))
    told = r"weight 'weight' .* is \[3, 4\] float32, the file holds \[3, [45]\] "
    with pytest.raises(EngineMismatch, match=told):
        graph_from_json(text, {"weight": weight, "bias": torch.zeros(3)})


def test_damage_is_told(capture_net: Callable[..., Graph]) -> None:
    graph = capture_net(nn.Linear(4, 3), 4)
    weights = {name: weight.load() for name, weight in graph.weights.items()}
    text = graph_to_json(graph)
    with pytest.raises(EngineMismatch, match="damaged"):
        graph_from_json(text[: len(text) // 2], weights)
    with pytest.raises(EngineMismatch, match="version 2"):
        graph_from_json(text.replace('"version": 1', '"version": 2'), weights)
    with pytest.raises(EngineMismatch, match="'bias' of the graph is missing"):
        graph_from_json(text, {"weight": weights["weight"]})
    value = _document(graph)
    value["nodes"] = [node for node in value["nodes"] if node[1] != "output"]
    with pytest.raises(EngineMismatch, match="damaged"):
        graph_from_json(json.dumps(value), weights)


def test_infinity_is_written(capture_net: Callable[..., Graph]) -> None:
    class Clamp(nn.Module):
        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
            return (torch.nn.functional.threshold(x, 0.0, float("-inf")),)

    graph = capture_net(Clamp(), 2)
    x = torch.tensor([[1.0, -1.0]])
    assert _again(graph).run({"x": x})["y"].tolist() == [[1.0, float("-inf")]]


def test_what_can_not_be_written_is_named(capture_net: Callable[..., Graph]) -> None:
    graph = capture_net(nn.SiLU(), 4)
    (node,) = [node for node in graph.nodes if node.op == "call_function"]
    node.target = torch.nn.functional.silu
    with pytest.raises(NotBuilt, match=f"node {node.name}"):
        graph_to_json(graph)
