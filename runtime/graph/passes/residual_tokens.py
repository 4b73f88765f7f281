"""A residual is added to tokens, before they become an image again, so that a product takes it.

Rules:
1. `image(p) + r` becomes `image(p + tokens(r))`, where p (B, HW, C) is a linear layer's result,
   `image` makes it (B, C, H, W) (`view` and `permute`, or `transpose` and `view`) and nothing else
   uses what lies between. `tokens(r)`, its inverse, must copy nothing: r has channels innermost.

Attention blocks with linear layers at their ends (SDXL, autoencoders) add their input so.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from heatsink.runtime.graph.graph import Graph
from heatsink.runtime.graph.passes.edit import (
    argument,
    bypass,
    only_user,
    operator,
    same_sizes,
    traced,
)
from heatsink.runtime.graph.passes.trace import VIEWS, insert, propagate

_SPLITS = VIEWS | {"aten.reshape", "aten.unflatten"}


def add_residuals_to_tokens(graph: Graph) -> tuple[Graph, bool]:
    """Apply the rules of this module."""
    modified = False
    for node in list(graph.nodes):
        if operator(node) == "aten.add" and argument(node, "alpha") == 1:
            modified |= any(_move(node, *pair) for pair in (node.args[:2], node.args[1::-1]))
    if modified:
        propagate(graph)
    return graph, modified


def _move(node: fx.Node, image: Any, residual: Any) -> bool:
    product = _tokens(image)
    if product is None or only_user(image) is not node or residual is image:
        return False
    first, into, given = traced(product), traced(image), traced(residual)
    if first is None or into is None or given is None or given.dtype != first.dtype:
        return False
    if not same_sizes(into.shape, given.shape):
        return False
    tokens = insert(node, torch.ops.aten.permute.default, (residual, [0, 2, 3, 1]), node)
    value = traced(tokens)
    assert value is not None
    if not _is_dense(value, first):
        node.graph.erase_node(tokens)
        return False
    sizes = [-1, *(int(size) for size in first.shape[1:])]
    tokens = insert(node, torch.ops.aten.view.default, (tokens, sizes), node)
    total = insert(node, torch.ops.aten.add.Tensor, (product, tokens), node)
    _follow(node, image, total)
    return True


def _is_dense(image: Tensor, tokens: Tensor) -> bool:
    """Whether (B, H, W, C) is (B, HW, C) in memory, channels side by side."""
    try:
        image.view(tokens.shape)
    except (RuntimeError, ValueError):
        return False
    return bool(image.stride(-1) == 1)


def _tokens(image: Any) -> fx.Node | None:
    """The linear layer's (B, HW, C) that `image` makes (B, C, H, W)."""
    value = traced(image)
    if value is None or value.dim() != 4:
        return None
    if operator(image) == "aten.permute":
        if [dim % 4 for dim in argument(image, "dims")] != [0, 3, 1, 2]:
            return None
        inner = image.args[0]
        spread = operator(inner) in _SPLITS
    else:
        inner = image.args[0] if operator(image) in _SPLITS else None
        spread = operator(inner) == "aten.transpose" and _swaps(inner)
    if not spread or only_user(inner) is not image:
        return None
    product = inner.args[0]
    tokens = traced(product)
    if operator(product) != "heatsink.linear" or only_user(product) is not inner:
        return None
    batch, channels, height, width = value.shape
    wanted = (batch, height * width, channels)
    fits = tokens is not None and tokens.dim() == 3 and same_sizes(tokens.shape, wanted)
    return product if fits else None


def _swaps(node: Any) -> bool:
    value = traced(node)
    dims = {argument(node, name) % 3 for name in ("dim0", "dim1")}
    return value is not None and value.dim() == 3 and dims == {1, 2}


def _follow(node: fx.Node, image: fx.Node, total: fx.Node) -> None:
    """Make an image of `total` as `image` is one of its product, in the place of the addition."""
    inner = image.args[0]
    assert isinstance(inner, fx.Node)
    for each in (inner, image):
        node.prepend(each)
    inner.args = (total, *inner.args[1:])
    bypass(node, image)
