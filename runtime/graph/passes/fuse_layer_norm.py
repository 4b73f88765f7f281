"""LayerNorm over the last dimension.

Rules:
1. `layer_norm(x, [C], W, b)` becomes `heatsink::layer_norm`. Norms over several dimensions stay,
   and so do rows that are wider than the kernel holds.
"""

from __future__ import annotations

import torch
from torch import fx

import heatsink.kernels.layer_norm  # noqa: F401 - registers the op
from heatsink.kernels._rows import MAX_WIDTH
from heatsink.runtime.graph.graph import Graph
from heatsink.runtime.graph.passes.edit import argument, operator, traced
from heatsink.runtime.graph.passes.trace import propagate, reads_strides, replace

_FLOATS = (torch.float16, torch.bfloat16, torch.float32)


def fuse_layer_norm(graph: Graph) -> tuple[Graph, bool]:
    """Apply the rules of this module."""
    if reads_strides(graph):
        return graph, False
    found = [node for node in graph.nodes if _fits(node)]
    for node in found:
        x, weight, bias, eps = (argument(node, n) for n in ("input", "weight", "bias", "eps"))
        args = (x, weight, bias, eps, None, None)
        replace(node, torch.ops.heatsink.layer_norm.default, args)
    if found:
        propagate(graph)
    return graph, bool(found)


def _fits(node: fx.Node) -> bool:
    if operator(node) != "aten.layer_norm":
        return False
    value, shape, eps = (
        traced(node.args[0]),
        argument(node, "normalized_shape"),
        argument(node, "eps"),
    )
    if value is None or value.dtype not in _FLOATS or len(shape) != 1 or eps <= 0:
        return False
    return isinstance(shape[0], int) and shape[0] <= MAX_WIDTH
