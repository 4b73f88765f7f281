"""One product for the projections that an attention takes from the same tokens.

Rules:
1. Of `attention(view(linear(x, Wq)), view(linear(y, Wk)), view(linear(y, Wv)))`, the products of
   one input become one product of their stacked rows, cut along its channels into views: q, k and v
   of self-attention, k and v of cross-attention. The kernel takes such views as they are.

Products must be used by this attention alone and have weights of their own, of one dtype, all with
a bias or all without. The packed weight's origins are those of its parts in order, each with its
rows, so `packing.spans` undoes it: what knows the parts (adapters, merge) finds their rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from heatsink.runtime.graph.graph import Graph
from heatsink.runtime.graph.packing import stack
from heatsink.runtime.graph.passes.edit import argument, only_user, operator, own_weight, traced
from heatsink.runtime.graph.passes.trace import VIEWS, insert, new_weight, propagate, replace

_SPLITS = VIEWS | {"aten.reshape", "aten.unflatten"}


@dataclass(frozen=True)
class _Projection:
    """`view(linear(...))` before an attention, with the names of its weights."""

    view: fx.Node
    linear: fx.Node
    weight: str
    bias: str | None


def pack_projections(graph: Graph) -> tuple[Graph, bool]:
    """Apply the rules of this module."""
    modified = False
    for node in list(graph.nodes):
        if operator(node) != "heatsink.attention":
            continue
        for group in _groups(graph, node):
            _pack(graph, node, group)
            modified = True
    if modified:
        propagate(graph)
    return graph, modified


def _groups(graph: Graph, attention: fx.Node) -> Iterator[list[_Projection]]:
    groups: dict[tuple[Any, ...], list[_Projection]] = {}
    for source in attention.args[:3]:
        found = _projection(graph, source)
        # One layer may serve as two.
        if found is not None and attention.args[:3].count(source) == 1:
            weight = graph.weights[found.weight]
            kind = (found.linear.args[0], found.bias is None, weight.dtype)
            groups.setdefault(kind, []).append(found)
    return (group for group in groups.values() if len(group) > 1)


def _projection(graph: Graph, source: Any) -> _Projection | None:
    if operator(source) not in _SPLITS or not isinstance(source, fx.Node):
        return None
    if only_user(source) is None:
        return None
    linear = source.args[0]
    if operator(linear) != "aten.linear" or not isinstance(linear, fx.Node):
        return None
    if only_user(linear) is not source:
        return None
    before, after = traced(linear), traced(source)
    # The last dimension alone is split, into heads.
    if before is None or after is None or before.dim() != 3 or after.dim() != 4:
        return None
    bias = argument(linear, "bias")
    names = own_weight(graph, linear.args[1]), None if bias is None else own_weight(graph, bias)
    if names[0] is None or (bias is not None and names[1] is None):
        return None
    return _Projection(source, linear, names[0], names[1])


def _pack(graph: Graph, attention: fx.Node, group: Sequence[_Projection]) -> None:
    rows = [graph.weights[each.weight].shape[0] for each in group]
    first = min((each.linear for each in group), key=list(graph.nodes).index)
    holders = [_stack(graph, [each.linear.args[1] for each in group])]
    if group[0].bias is not None:
        holders.append(_stack(graph, [argument(each.linear, "bias") for each in group]))
    args = (first.args[0], *holders)
    packed = insert(first, torch.ops.aten.linear.default, args, attention)
    stop = 0
    for each, width in zip(group, rows, strict=True):
        start, stop = stop, stop + width
        part = (packed, -1, start, stop)
        replace(each.linear, torch.ops.aten.slice.Tensor, part, each.view)
    for weight in {h for each in group for h in (each.weight, each.bias) if h is not None}:
        holder = graph.weight_nodes()[weight]
        graph.module.graph.erase_node(holder)
        del graph.weights[weight], graph.origins[weight]


def _stack(graph: Graph, holders: Sequence[Any]) -> fx.Node:
    """The placeholder of one weight made of those of `holders`."""
    names = [own_weight(graph, holder) for holder in holders]
    weights = [graph.weights[name] for name in names if name is not None]
    origins = [graph.origins[name] for name in names if name is not None]
    return new_weight(graph, holders[0], *stack(weights, origins))
