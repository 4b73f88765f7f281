"""Merge operations that compute the same.

Rules:
1. Two operations with the same operator and arguments become the first of them; so a time embedding
   meets SiLU once, not once in every block.

Not merged is what draws random numbers, what writes, and anything in a graph that writes, where
equal arguments need not hold equal values. The module of the second operation loses it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from heatsink.runtime.graph.graph import Graph
from heatsink.runtime.graph.passes.edit import bypass


def merge_equal_nodes(graph: Graph) -> tuple[Graph, bool]:
    """Apply the rules of this module."""
    calls = [node for node in graph.nodes if node.op == "call_function"]
    if any(_schema(node) is not None and _schema(node).is_mutable for node in calls):
        return graph, False
    first: dict[tuple[Any, ...], fx.Node] = {}
    modified = False
    for node in calls:
        schema = _schema(node)
        if schema is not None and (not schema.returns or _random(node)):
            continue
        kept = first.setdefault(_signature(node), node)
        if kept is not node:
            bypass(node, kept)
            modified = True
    return graph, modified


def _schema(node: fx.Node) -> Any:
    target = node.target
    return target._schema if isinstance(target, torch._ops.OpOverload) else None


def _random(node: fx.Node) -> bool:
    target = node.target
    assert isinstance(target, torch._ops.OpOverload)
    return torch.Tag.nondeterministic_seeded in target.tags


def _signature(node: fx.Node) -> tuple[Any, ...]:
    return node.target, _frozen(node.args), _frozen(node.kwargs)


def _frozen(value: Any) -> Any:
    """A value that can be compared, types included: 1, 1.0 and True are three arguments."""
    if isinstance(value, dict):
        return tuple((key, _frozen(value[key])) for key in sorted(value))
    if isinstance(value, list | tuple):
        return tuple(_frozen(each) for each in value)
    return value if isinstance(value, fx.Node) else (type(value), repr(value))
