"""The gated GELU of transformers' feed-forward.

Rules:
1. `value * gelu(gate)`, where value and gate are the first and second half of x along the last
   dimension (`chunk`, `split`) and nothing else uses them, becomes `geglu(x)`. The order of the
   weight's rows stays: [values; gates] is the kernel's.
"""

from __future__ import annotations

import operator as python_operator

import torch
from torch import fx

import heatsink.kernels.geglu  # noqa: F401 - registers the op
from heatsink.runtime.graph.graph import Graph
from heatsink.runtime.graph.passes.edit import argument, only_user, operator, same_sizes, traced
from heatsink.runtime.graph.passes.trace import propagate, reads_strides, replace

_FLOATS = (torch.float16, torch.bfloat16, torch.float32)
_CUTS = {"aten.chunk", "aten.split", "aten.split_with_sizes"}


def fuse_geglu(graph: Graph) -> tuple[Graph, bool]:
    """Apply the rules of this module."""
    if reads_strides(graph):
        return graph, False
    modified = False
    for node in list(graph.nodes):
        cut = _match(node)
        if cut is None:
            continue
        left, right = node.args
        replace(node, torch.ops.heatsink.geglu.default, (cut.args[0],))
        gate = right if operator(right) == "aten.gelu" else left
        for dead in (gate, *cut.users, cut):
            assert isinstance(dead, fx.Node)
            graph.module.graph.erase_node(dead)
        modified = True
    if modified:
        propagate(graph)
    return graph, modified


def _match(node: fx.Node) -> fx.Node | None:
    """The node that cuts x, if `node` multiplies one half by the GELU of the other."""
    if operator(node) != "aten.mul":
        return None
    left, right = node.args[:2]
    if operator(left) == "aten.gelu":
        left, right = right, left
    if operator(right) != "aten.gelu" or not isinstance(right, fx.Node):
        return None
    if argument(right, "approximate") != "none":
        return None
    gate = right.args[0]
    if not isinstance(left, fx.Node) or not isinstance(gate, fx.Node):
        return None
    cut = _cut(left, 0)
    if cut is None or cut is not _cut(gate, 1) or len(cut.users) != 2 or not _halves(cut):
        return None
    alone = only_user(left) is node and only_user(right) is node and only_user(gate) is right
    return cut if alone else None


def _cut(node: fx.Node, index: int) -> fx.Node | None:
    """The node that `node` takes the piece `index` of."""
    if node.target is not python_operator.getitem:
        return None
    cut, at = node.args
    return cut if operator(cut) in _CUTS and at == index and isinstance(cut, fx.Node) else None


def _halves(cut: fx.Node) -> bool:
    value, pieces = traced(cut.args[0]), cut.meta["val"]
    if value is None or value.dtype not in _FLOATS or len(pieces) != 2:
        return False
    last = argument(cut, "dim") % value.dim() == value.dim() - 1
    return last and same_sizes(pieces[0].shape, pieces[1].shape)
