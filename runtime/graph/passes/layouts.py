"""Channels innermost from convolution to attention, so that going between them copies nothing.

The products and norms of this package give images with channels innermost in memory and read any
strides: (B, C, H, W) so laid out is (B, HW, C) as it is. What is left is to take out the copies
that the library made for other layouts. Values and shapes stay those of the captured graph.

Rules:
1. `contiguous` and `clone` go: what is made for its layout alone.
2. Two transpositions or permutations in a row become one, or none if they undo each other.
3. `reshape` and `flatten` that move nothing become views.
4. A size of -1 in a view or reshape is written out where it is known: an empty batch can be viewed.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from heatsink.runtime.graph.graph import Graph
from heatsink.runtime.graph.passes.edit import argument, bypass, erase_unused, operator, traced
from heatsink.runtime.graph.passes.trace import propagate, reads_strides, replace

_COPIES = {"aten.contiguous", "aten.clone"}
_RESHAPES = {"aten.reshape", "aten.flatten", "aten._unsafe_view"}


def settle_layouts(graph: Graph) -> tuple[Graph, bool]:
    """Apply the rules of this module."""
    if reads_strides(graph) or any(_writes(node) for node in graph.nodes):
        return graph, False
    modified = False
    for node in list(graph.nodes):
        if operator(node) in _COPIES:
            bypass(node, _source(node))
            modified = True
        elif (order := _order(node)) is not None:
            modified |= _join_orders(node, order)
    if modified:
        propagate(graph)
    for node in list(graph.nodes):
        if operator(node) in _RESHAPES:
            modified |= _to_view(node)
    for node in graph.nodes:
        if operator(node) in {"aten.view", "aten.reshape"}:
            modified |= _write_out(node)
    return graph, modified


def _source(node: fx.Node) -> fx.Node:
    source = node.args[0]
    assert isinstance(source, fx.Node)
    return source


def _writes(node: fx.Node) -> bool:
    target = node.target
    return isinstance(target, torch._ops.OpOverload) and bool(target._schema.is_mutable)


def _order(node: Any) -> list[int] | None:
    """Which dimension of its input each dimension of a transposition is."""
    value = traced(node)
    if value is None or operator(node) not in {"aten.transpose", "aten.permute"}:
        return None
    rank = value.dim()
    if operator(node) == "aten.permute":
        return [dim % rank for dim in argument(node, "dims")]
    order = list(range(rank))
    first, second = (argument(node, name) % rank for name in ("dim0", "dim1"))
    order[first], order[second] = order[second], order[first]
    return order


def _join_orders(node: fx.Node, order: list[int]) -> bool:
    inner = _source(node)
    before = _order(inner)
    if before is None:
        return False
    joined = [before[dim] for dim in order]
    if joined == sorted(joined):
        bypass(node, _source(inner))
    else:
        replace(node, torch.ops.aten.permute.default, (_source(inner), joined))
    erase_unused(inner)
    return True


def _write_out(node: fx.Node) -> bool:
    value, shape = traced(node), node.args[1]
    assert isinstance(shape, list | tuple)
    if value is None or -1 not in shape:
        return False
    size = value.shape[shape.index(-1)]
    if not isinstance(size, int):
        return False
    node.update_arg(1, [size if given == -1 else given for given in shape])
    return True


def _to_view(node: fx.Node) -> bool:
    """Make a reshape a view if its traced input can be viewed so."""
    value = traced(node)
    if value is None:
        return False
    shape: Any = node.args[1] if operator(node) != "aten.flatten" else None
    if shape is None:
        # A symbol has a node only where the graph computes it.
        if not all(isinstance(size, int) for size in value.shape[1:]):
            return False
        shape = [-1, *(int(size) for size in value.shape[1:])]
    before = traced(node.args[0])
    assert before is not None
    try:
        before.view(value.shape)
    except (RuntimeError, ValueError):
        return False
    replace(node, torch.ops.aten.view.default, (node.args[0], shape))
    return True
