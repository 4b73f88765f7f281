from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from heatsink.runtime.graph.graph import Graph
from heatsink.runtime.graph.passes import run_passes
from heatsink.runtime.graph.passes.drop_noops import drop_noop_nodes

SHAPE = (4, 6)


class Net(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        # Between two operations that count, so that neither input nor output hides an effect.
        return (torch.relu(self.function(torch.sin(x))),)


def _ops(graph: Graph) -> Counter[str]:
    targets = (str(n.target) for n in graph.nodes if n.op == "call_function")
    return Counter(t.split(".")[1] for t in targets if t.startswith("aten."))


DROPPED: dict[str, Callable[[Tensor], Tensor]] = {
    "rule 1: dropout in eval": lambda x: functional.dropout(x, 0.5, training=False),
    "rule 1: dropout of nothing": lambda x: functional.dropout(x, 0.0, training=True),
    "rule 2: to the same dtype": lambda x: x.to(torch.float32, copy=True),
    "rule 2: to of a kind": lambda x: torch.ops.aten._to_copy.default(x, dtype=torch.float32),
    "rule 3: detach": lambda x: x.detach(),
    "rule 3: clone": lambda x: x.clone(),
    "rule 3: chain": lambda x: torch.ops.aten.alias.default(x.clone().detach()).contiguous(),
    "rule 4: assertion": lambda x: _asserted(x),
    "rule 5: times one": lambda x: x * 1.0,
    "rule 5: over one": lambda x: x / 1,
    "rule 6: view": lambda x: torch.ops.aten.view.default(x, [-1, 4, 6]),
    "rule 6: expand": lambda x: x.expand(-1, 4, 6),
    "rule 6: slice": lambda x: torch.ops.aten.slice.Tensor(x, 1, 0, 4),
    "rule 6: permute": lambda x: torch.ops.aten.permute.default(x, [0, 1, 2]),
    "rule 6: transpose": lambda x: torch.ops.aten.transpose.int(x, -1, 2),
}
KEPT: dict[str, tuple[str, Callable[[Tensor], Tensor]]] = {
    "rule 1: training": ("dropout", lambda x: functional.dropout(x, 0.5, training=True)),
    "rule 2: another dtype": ("to", lambda x: x.to(torch.float16).float()),
    "rule 3: another layout": ("contiguous", lambda x: x.transpose(1, 2).contiguous()),
    "rule 3: clone to another layout": (
        "clone",
        lambda x: x.transpose(1, 2).clone(memory_format=torch.contiguous_format),
    ),
    "rule 5: times two": ("mul", lambda x: x * 2.0),
    "rule 5: a tensor": ("mul", lambda x: x * x),
    "rule 5: rounding": ("div", lambda x: torch.div(x, 1.0, rounding_mode="floor")),
    "rule 5: adds a dtype": ("mul", lambda x: (x > 0) * 1.0),
    "rule 6: another shape": ("view", lambda x: x.view(-1, 6, 4)),
    "rule 6: part": ("slice", lambda x: x[:, 1:]),
    "rule 6: same shape, other order": (
        "permute",
        lambda x: torch.ops.aten.permute.default(x[:, :, :4], [0, 2, 1]),
    ),
}


def _asserted(x: Tensor) -> Tensor:
    torch.ops.aten._assert_tensor_metadata.default(x, dtype=torch.float32)
    return x


@pytest.mark.parametrize("rule", DROPPED)
def test_matches_are_dropped(rule: str, capture_net: Callable[..., Graph], seed: int) -> None:
    torch.manual_seed(seed)
    graph = capture_net(Net(DROPPED[rule]), *SHAPE)
    assert sum(_ops(graph).values()) > 2
    _, changed = drop_noop_nodes(graph.copy())
    assert changed
    cleaned = run_passes(graph, [drop_noop_nodes, drop_noop_nodes])
    assert set(_ops(cleaned)) <= {"sin", "relu", "sym_size"}
    x = {"x": torch.randn(3, *SHAPE)}
    assert torch.equal(cleaned.run(x)["y"], graph.run(x)["y"])


@pytest.mark.parametrize("rule", KEPT)
def test_what_changes_something_stays(
    rule: str, capture_net: Callable[..., Graph], seed: int
) -> None:
    operation, function = KEPT[rule]
    torch.manual_seed(seed)
    graph = capture_net(Net(function), *SHAPE)
    cleaned = run_passes(graph, [drop_noop_nodes])
    assert _ops(cleaned)[operation] == _ops(graph)[operation] > 0
    x = {"x": torch.randn(3, *SHAPE)}
    torch.manual_seed(seed)
    expected = graph.run(x)["y"]
    torch.manual_seed(seed)
    assert torch.equal(cleaned.run(x)["y"], expected)


def test_copies_stay_where_something_is_written(capture_net: Callable[..., Graph]) -> None:
    graph = capture_net(Net(lambda x: x.clone()), *SHAPE)
    (clone,) = (n for n in graph.nodes if "clone" in str(n.target))
    with graph.module.graph.inserting_after(clone):
        write = graph.module.graph.call_function(torch.ops.aten.add_.Scalar, (clone, 1.0))
    write.meta = dict(clone.meta)
    _, changed = drop_noop_nodes(graph)
    assert not changed


def test_a_real_network_loses_them_all(graphs: Callable[[str], Graph]) -> None:
    graph = graphs("unet")
    before, after = _ops(graph), _ops(run_passes(graph, [drop_noop_nodes]))
    gone: Any = before - after
    assert set(gone) >= {"dropout", "to", "_assert_tensor_metadata", "div"}
    assert not {"dropout", "_assert_tensor_metadata"} & set(after)
    for kept in ("linear", "conv2d", "scaled_dot_product_attention", "silu", "cat"):
        assert before[kept] == after[kept] > 0
