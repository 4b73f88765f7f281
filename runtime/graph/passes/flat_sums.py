"""Write sums of images over flattened positions, so that ONNX Runtime takes no convolution into them.

Rule: `add(p, q)` of two tensors `(batch, C, H, W)` of one dtype and the same sizes, one of them the
result of a convolution, becomes the sum of their views `(batch, C, H * W)`, viewed back. The values
are the same, and a view costs nothing.

ONNX Runtime's CPU provider lets a convolution add into its partner of such a sum, which rounds
otherwise than adding two results. It can't where an adapter's port comes between: then a graph with
ports would give rows without adapters other bits than the graph without. Both get this pass first.
"""

from __future__ import annotations

import torch
from torch import fx

from heatsink.runtime.graph.graph import Graph
from heatsink.runtime.graph.passes.edit import argument, inherit, operator, same_sizes, traced


def flatten_sums(graph: Graph) -> tuple[Graph, bool]:
    """Apply the rule of this module."""
    modified = False
    for node in list(graph.nodes):
        if _adds_images(node):
            _rewrite(node)
            modified = True
    return graph, modified


def _adds_images(node: fx.Node) -> bool:
    if operator(node) != "aten.add" or argument(node, "alpha", 1) != 1:
        return False
    left, right = (traced(value) for value in node.args[:2])
    if left is None or right is None or left.dim() != 4 or left.dtype != right.dtype:
        return False
    # The first size is the batch, alone symbolic.
    fixed = all(isinstance(size, int) for size in left.shape[1:])
    convolved = any(operator(value) == "aten.conv2d" for value in node.args[:2])
    return fixed and convolved and same_sizes(left.shape, right.shape)


def _rewrite(node: fx.Node) -> None:
    value = traced(node)
    assert value is not None
    channels, height, width = value.shape[1:]
    graph = node.graph
    with graph.inserting_before(node):
        flat = []
        for given in node.args[:2]:
            view = graph.call_function(
                torch.ops.aten.reshape.default, (given, [-1, channels, height * width])
            )
            flat.append(view)
        total = graph.call_function(torch.ops.aten.add.Tensor, tuple(flat))
        back = graph.call_function(
            torch.ops.aten.reshape.default, (total, [-1, channels, height, width])
        )
    for new in (*flat, total):
        new.meta["val"] = value.flatten(2)
    for new in (*flat, total, back):
        inherit(new, node)
        new.meta.pop("tensor_meta", None)
    node.replace_all_uses_with(back)
    graph.erase_node(node)
