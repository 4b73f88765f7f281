"""Linear layers and convolutions as ops that take what follows them.

Rules:
1. `linear(x, W, b)` with a matrix W becomes `heatsink::linear`.
2. `conv2d(x, W, b)` of images in a batch, with one stride, one padding, no dilation and no groups,
   becomes `heatsink::conv2d`, whose result has channels innermost in memory.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

import heatsink.kernels.conv2d
import heatsink.kernels.linear  # noqa: F401 - both register their ops
from heatsink.runtime.graph.graph import Graph
from heatsink.runtime.graph.passes.edit import argument, operator, traced
from heatsink.runtime.graph.passes.trace import propagate, reads_strides, replace

_FLOATS = (torch.float16, torch.bfloat16, torch.float32)


def lower_products(graph: Graph) -> tuple[Graph, bool]:
    """Apply the rules of this module."""
    if reads_strides(graph):
        return graph, False
    modified = False
    for node in list(graph.nodes):
        if operator(node) == "aten.linear" and _is_matrix(node):
            x, weight, bias = (argument(node, name) for name in ("input", "weight", "bias"))
            args: tuple[Any, ...] = (x, weight, bias, None, None, "")
            replace(node, torch.ops.heatsink.linear.default, args)
        elif (steps := _steps(node)) is not None:
            x, weight, bias = (argument(node, name) for name in ("input", "weight", "bias"))
            args = (x, None, weight, bias, None, None, *steps, 1, "")
            replace(node, torch.ops.heatsink.conv2d.default, args)
        else:
            continue
        modified = True
    if modified:
        propagate(graph)
    return graph, modified


def _is_matrix(node: fx.Node) -> bool:
    x, weight = (traced(value) for value in node.args[:2])
    if x is None or weight is None or x.dtype not in _FLOATS:
        return False
    return weight.dim() == 2 and x.dim() > 1


def _steps(node: fx.Node) -> tuple[int, int] | None:
    """Stride and padding of a convolution that the kernel has."""
    if operator(node) != "aten.conv2d":
        return None
    x = traced(node.args[0])
    if x is None or x.dim() != 4 or x.dtype not in _FLOATS or argument(node, "groups") != 1:
        return None
    stride, padding = _one(argument(node, "stride")), _one(argument(node, "padding"))
    if stride is None or padding is None or _one(argument(node, "dilation")) != 1:
        return None
    return stride, padding


def _one(sizes: Any) -> int | None:
    """The number that all sizes are; None if they differ or are named, as padding "same" is."""
    if isinstance(sizes, str):
        return None
    sizes = [sizes] if isinstance(sizes, int) else list(sizes)
    return sizes[0] if all(isinstance(s, int) and s == sizes[0] for s in sizes) else None
