"""New operations with traced values, and traced values brought up to date."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch._dispatch.python import enable_python_dispatcher

from heatsink.runtime.graph.graph import WEIGHT_KEY, Graph
from heatsink.runtime.graph.passes.edit import inherit, operator, same_layout, traced
from heatsink.runtime.graph.weight import Origin, Weight

# What an operation's traced value was inferred from.
_SOURCES = "heatsink_sources"
VIEWS = {"aten.view", "aten._unsafe_view"}


def infer(node: fx.Node) -> Any:
    """The traced value of an operation, from those of its arguments."""
    args, kwargs = fx.node.map_aggregate((node.args, node.kwargs), _value)
    target: Any = node.target
    # The dispatcher in Python keeps symbols that the one in C++ would settle.
    with torch.no_grad(), enable_python_dispatcher():
        return target(*args, **kwargs)


def _value(argument: Any) -> Any:
    if isinstance(argument, fx.Node):
        return argument.meta["val"]
    # Traced values are meta tensors, so what is created beside them must be one too.
    return torch.device("meta") if isinstance(argument, torch.device) else argument


def insert(
    before: fx.Node, target: Callable[..., Any], args: Sequence[Any], replaced: fx.Node
) -> fx.Node:
    """A new operation before `before`, with the path of `replaced` and its own traced value."""
    with before.graph.inserting_before(before):
        node = before.graph.call_function(target, tuple(args))
    node.meta["val"] = infer(node)
    inherit(node, replaced)
    return node


def replace(
    node: fx.Node, target: Callable[..., Any], args: Sequence[Any], path: fx.Node | None = None
) -> fx.Node:
    """Put a new operation in the place of `node`, with the path of `path` (default: its own)."""
    new = insert(node, target, args, node if path is None else path)
    node.replace_all_uses_with(new)
    node.graph.erase_node(node)
    return new


def new_weight(graph: Graph, before: fx.Node, weight: Weight, origins: list[Origin]) -> fx.Node:
    """A placeholder before `before` that holds a new weight, under a name that is free."""
    name, count = weight.name, 1
    while name in graph.weights:
        name, count = f"{weight.name}#{count}", count + 1
    with graph.module.graph.inserting_before(before):
        node = graph.module.graph.placeholder("weight")
    # The name is made unique, and arguments are named by targets.
    node.target = node.name
    node.meta[WEIGHT_KEY] = name
    with fake_mode(graph):
        node.meta["val"] = torch.empty(weight.shape, dtype=weight.dtype, device="meta")
    graph.weights[name], graph.origins[name] = weight, origins
    return node


def fake_mode(graph: Graph) -> Any:
    """The mode in which the graph's values were traced."""
    values: Any = (node.meta.get("val") for node in graph.nodes)
    return next(value.fake_mode for value in values if hasattr(value, "fake_mode"))


def propagate(graph: Graph) -> None:
    """Bring the traced values up to date after layouts have changed.

    A `view` of what can no longer be viewed becomes a `reshape`.
    """
    with fake_mode(graph):
        for node in graph.nodes:
            if node.op != "call_function" or not node.all_input_nodes:
                continue
            # Asking for a symbol's value would settle it.
            if not isinstance(node.meta.get("val"), Tensor | list | tuple) or _is_fresh(node):
                continue
            try:
                value = infer(node)
            except (RuntimeError, ValueError):
                if operator(node) not in VIEWS:
                    raise
                node.target = torch.ops.aten.reshape.default
                value = infer(node)
            before = traced(node)
            if before is None or not isinstance(value, Tensor) or not same_layout(before, value):
                node.meta["val"] = value
            node.meta[_SOURCES] = _sources(node)


def _sources(node: fx.Node) -> list[Any]:
    return [source.meta.get("val") for source in node.all_input_nodes]


def _is_fresh(node: fx.Node) -> bool:
    """Whether the traced value was inferred from the values that its inputs have now."""
    before, now = node.meta.get(_SOURCES, ()), _sources(node)
    return len(before) == len(now) and all(a is b for a, b in zip(before, now, strict=True))


def reads_strides(graph: Graph) -> bool:
    """Whether an operation's values depend on its input's strides: layouts must stay then."""
    return any(operator(node).startswith("aten.as_strided") for node in graph.nodes)
