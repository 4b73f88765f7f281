"""GroupNorm with the SiLU behind it.

Rules:
1. `group_norm(x)` of (N, C, ...) with pixels becomes `group_norm_silu`, whose result has channels
   innermost in memory.
2. A SiLU that alone uses it goes into it.

The time embedding that is added to x before the norm changes its mean and variance, so no scale or
shift behind the norm stands for it: it goes into the convolution that makes x (`epilogues`).
"""

from __future__ import annotations

import torch
from torch import fx

import heatsink.kernels.group_norm_silu  # noqa: F401 - registers the op
from heatsink.runtime.graph.graph import Graph
from heatsink.runtime.graph.passes.edit import argument, bypass, only_user, operator, traced
from heatsink.runtime.graph.passes.trace import propagate, reads_strides, replace

_FLOATS = (torch.float16, torch.bfloat16, torch.float32)


def fuse_group_norm(graph: Graph) -> tuple[Graph, bool]:
    """Apply the rules of this module."""
    if reads_strides(graph):
        return graph, False
    found = [node for node in graph.nodes if _fits(node)]
    for node in found:
        _fuse(node)
    if found:
        propagate(graph)
    return graph, bool(found)


def _fits(node: fx.Node) -> bool:
    if operator(node) != "aten.group_norm":
        return False
    value, eps = traced(node.args[0]), argument(node, "eps")
    return value is not None and value.dim() > 2 and value.dtype in _FLOATS and eps > 0


def _fuse(node: fx.Node) -> None:
    names = ("input", "num_groups", "weight", "bias", "eps")
    given = [argument(node, name) for name in names]
    after = only_user(node)
    silu = after is not None and operator(after) == "aten.silu"
    fused = replace(node, torch.ops.heatsink.group_norm_silu.default, (*given, None, None, silu))
    if silu:
        assert after is not None
        bypass(after, fused)
