from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from heatsink.runtime.errors import HeatsinkError, InvalidRequest, ModelError
from heatsink.runtime.graph.graph import PATH_KEY, Graph
from heatsink.runtime.graph.weight import Origin, Weight, transform_rows


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return (torch.relu(self.linear(x)),)


@pytest.fixture
def graph(capture_net: Callable[..., Graph]) -> Graph:
    return capture_net(Net(), 4)


def test_a_fresh_graph_is_valid_and_its_copy_is_its_own(graph: Graph) -> None:
    other = graph.copy()
    for node in other.nodes:
        node.meta.pop(PATH_KEY, None)
    other.origins["linear.weight"].clear()
    with pytest.raises(HeatsinkError):
        other.validate()
    graph.validate()


def test_validation_names_the_node_without_path(graph: Graph) -> None:
    node = next(n for n in graph.nodes if "relu" in str(n.target))
    del node.meta[PATH_KEY]
    with pytest.raises(
        HeatsinkError, match=r"net: node relu \(aten\.relu\.default\) has no module path"
    ):
        graph.validate()


def test_validation_names_the_weight_without_origin(graph: Graph) -> None:
    graph.origins["linear.bias"] = []
    with pytest.raises(HeatsinkError, match=r"weight 'linear\.bias' has no origin"):
        graph.validate()


def test_validation_finds_weights_and_placeholders_that_disagree(graph: Graph) -> None:
    del graph.weights["linear.bias"]
    with pytest.raises(HeatsinkError, match=r"disagree about \['linear\.bias'\]"):
        graph.validate()


def test_validation_finds_origins_of_absent_weights(graph: Graph) -> None:
    graph.origins["gone"] = [Origin("gone")]
    with pytest.raises(HeatsinkError, match=r"absent weights \['gone'\]"):
        graph.validate()


def test_validation_finds_an_input_that_is_not_specified(graph: Graph) -> None:
    graph.inputs["z"] = graph.inputs.pop("x")
    with pytest.raises(HeatsinkError, match=r"takes \['x'\], its specification says \['z'\]"):
        graph.validate()


def test_inputs_are_checked(graph: Graph) -> None:
    with pytest.raises(InvalidRequest, match=r"takes the inputs \['x'\], got \['y'\]"):
        graph.run({"y": torch.zeros(1, 4)})
    with pytest.raises(InvalidRequest, match=r"'x' wants shape \['batch', 4\].*got \[2, 5\]"):
        graph.run({"x": torch.zeros(2, 5)})
    with pytest.raises(InvalidRequest, match=r"got \[2\]"):
        graph.run({"x": torch.zeros(2)})


def test_rows_must_agree_between_inputs(cases: Any, graphs: Callable[[str], Graph]) -> None:
    inputs = cases["unet"].inputs(2, 0)
    inputs["timestep"] = inputs["timestep"][:1]
    with pytest.raises(InvalidRequest, match=r"'timestep' wants .*\{'batch': 2\}, got \[1\]"):
        graphs("unet").run(inputs)


def test_an_empty_batch_gives_an_empty_result(graph: Graph) -> None:
    assert graph.run({"x": torch.zeros(0, 4)})["y"].shape == (0, 3)


def test_a_weight_of_another_shape_is_refused_when_loaded() -> None:
    weight = Weight((2, 3), torch.float32, lambda: torch.zeros(3, 2), "conv.weight")
    with pytest.raises(ModelError, match=r"'conv\.weight'.*\[2, 3\].*\[3, 2\]"):
        weight.load()


def test_scaled_rows_are_rounded_once(seed: int) -> None:
    torch.manual_seed(seed)
    values = torch.randn(5, 4)
    weight = Weight((5, 4), torch.float16, lambda: values, "w")
    scaled = weight.scale_rows(lambda v: v / 3, 1, 3).scale_rows(lambda v: v * 7, 2, 5).load()
    expected = values.double()
    expected[1:3] /= 3
    expected[2:5] *= 7
    assert torch.equal(scaled, expected.to(torch.float16))
    assert torch.equal(weight.load(), values.half())


def test_origins_split_where_a_transform_begins_and_ends() -> None:
    whole = [Origin("a")]
    assert transform_rows(whole, 6, 0, 6, "scale by 2.0") == [Origin("a", None, "scale by 2.0")]
    cut = transform_rows(whole, 6, 2, 5, "t")
    assert cut == [
        Origin("a", ((0, 2),)),
        Origin("a", ((2, 5),), "t"),
        Origin("a", ((5, 6),)),
    ]
    again = transform_rows(cut, 6, 0, 4, "u")
    assert again == [
        Origin("a", ((0, 2),), "u"),
        Origin("a", ((2, 4),), "t, u"),
        Origin("a", ((4, 5),), "t"),
        Origin("a", ((5, 6),)),
    ]


def test_origins_of_packed_parameters_keep_their_own_rows() -> None:
    packed = [Origin("q", ((0, 4),)), Origin("k", ((4, 8), (0, 2)))]
    assert transform_rows(packed, 8, 3, 6, "t") == [
        Origin("q", ((0, 3),)),
        Origin("q", ((3, 4),), "t"),
        Origin("k", ((4, 6), (0, 2)), "t"),
        Origin("k", ((6, 8), (0, 2))),
    ]
