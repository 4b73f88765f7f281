"""Write some sums over flattened positions, so that ONNX Runtime fuses nothing with them.

Rules:
1. `add(p, q)` of images `(batch, C, H, W)` of one dtype and the same sizes, one of them the result
   of a convolution, becomes the sum of their views `(batch, C * H * W)`, viewed back.
2. So does the sum of tokens `(batch, T, C)`, one of them the result of a linear, that only a layer
   norm uses.

The values are the same, and a view costs nothing. But ONNX Runtime's CPU provider lets a
convolution add into its partner of such a sum, and a layer norm add the linear's bias and the
residual itself, which rounds otherwise. It can't where an adapter's port comes between: a graph
with ports would give rows without adapters other bits than the graph without. Both get this pass
first.
"""

from __future__ import annotations

import math

import torch
from torch import fx

from heatsink.runtime.graph.graph import Graph
from heatsink.runtime.graph.passes.edit import (
    argument,
    inherit,
    only_user,
    operator,
    same_sizes,
    traced,
)


def flatten_sums(graph: Graph) -> tuple[Graph, bool]:
    """Apply the rules of this module."""
    modified = False
    for node in list(graph.nodes):
        if _may_be_fused(node):
            _rewrite(node)
            modified = True
    return graph, modified


def _may_be_fused(node: fx.Node) -> bool:
    if operator(node) != "aten.add" or argument(node, "alpha", 1) != 1:
        return False
    left, right = (traced(value) for value in node.args[:2])
    if left is None or right is None or left.dtype != right.dtype:
        return False
    # The first size is the batch, alone symbolic.
    if not all(isinstance(size, int) for size in left.shape[1:]):
        return False
    if not same_sizes(left.shape, right.shape):
        return False
    makers = {operator(value) for value in node.args[:2]}
    if left.dim() == 4:
        return "aten.conv2d" in makers
    return left.dim() == 3 and "aten.linear" in makers and _is_normed(node)


def _is_normed(node: fx.Node) -> bool:
    user = only_user(node)
    return user is not None and operator(user) == "aten.layer_norm"


def _rewrite(node: fx.Node) -> None:
    value = traced(node)
    assert value is not None
    sizes = [int(size) for size in value.shape[1:]]
    reshape = torch.ops.aten.reshape.default
    graph = node.graph
    with graph.inserting_before(node):
        shape = [-1, math.prod(sizes)]
        flat = [graph.call_function(reshape, (given, shape)) for given in node.args[:2]]
        total = graph.call_function(torch.ops.aten.add.Tensor, tuple(flat))
        back = graph.call_function(reshape, (total, [-1, *sizes]))
    for new in (*flat, total):
        new.meta["val"] = value.flatten(1)
    for new in (*flat, total, back):
        inherit(new, node)
        new.meta.pop("tensor_meta", None)
    node.replace_all_uses_with(back)
    graph.erase_node(node)
