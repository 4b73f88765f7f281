"""Put together what lowering took apart, so that the other passes meet the operators they know.

`aot_autograd` gives a network's operators in pieces. Numbers and their order stay what they are;
only who says them changes.

Rules:
1. `addmm(b, x, t(W))` and `mm(x, t(W))` become `linear(x, W[, b])`, for a bias of one dimension and
   factors of one.
2. `view(linear(view(x, (N, C)), W, b), (..., O))` becomes `linear(x, W, b)` where the leading sizes
   of x and of the result are the same, and nothing else reads the product.
3. The first result of `native_group_norm` and `native_layer_norm` becomes `group_norm` and
   `layer_norm`, where no other result is read.
4. The first result of the fused attentions becomes `scaled_dot_product_attention`, where no other
   result is read and nothing is dropped out.
5. `convolution` with a weight of four dimensions, not transposed, becomes `conv2d`.
6. `view` and `_unsafe_view` become `reshape`: rule 4's result may lie otherwise in memory than the
   piece's did.
"""

from __future__ import annotations

import operator as python_operator
from collections.abc import Callable, Mapping
from typing import Any

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

aten = torch.ops.aten
_VIEWS = {"aten.view", "aten._unsafe_view", "aten.reshape"}


def compose_operators(graph: Graph) -> tuple[Graph, bool]:
    """Apply the rules of this module."""
    modified = False
    for node in list(graph.nodes):
        rule = _RULES.get(operator(node))
        # Other overloads say something else: `view.dtype`, `addmm.dtype`.
        if rule is not None and str(node.target).endswith(".default") and rule(node):
            modified = True
    return graph, modified


def _replace(
    node: fx.Node, target: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any] | None = None
) -> bool:
    with node.graph.inserting_before(node):
        new = node.graph.call_function(target, args, dict(kwargs or {}))
    inherit(new, node)
    node.replace_all_uses_with(new)
    node.graph.erase_node(node)
    return True


def _linear(node: fx.Node) -> bool:
    bias = argument(node, "self") if operator(node) == "aten.addmm" else None
    x = argument(node, "mat1" if bias is not None else "self")
    right = argument(node, "mat2")
    if bias is not None:
        value = traced(bias)
        if value is None or value.dim() != 1:
            return False
        if argument(node, "beta") != 1 or argument(node, "alpha") != 1:
            return False
    if operator(right) != "aten.t":
        return False
    weight = right.args[0]
    given = (x, weight) if bias is None else (x, weight, bias)
    return _replace(node, aten.linear.default, given)


def _view(node: fx.Node) -> bool:
    return _whole_linear(node) or (
        operator(node) != "aten.reshape" and _replace(node, aten.reshape.default, node.args)
    )


def _whole_linear(node: fx.Node) -> bool:
    product: Any = node.args[0]
    if operator(product) != "aten.linear" or only_user(product) is not node:
        return False
    flat, *others = product.args
    if operator(flat) not in _VIEWS:
        return False
    x = flat.args[0]
    before, rows, after = traced(x), traced(flat), traced(node)
    if before is None or rows is None or after is None or rows.dim() != 2:
        return False
    weight = traced(others[0])
    assert weight is not None
    fits = same_sizes(before.shape[:-1], after.shape[:-1]) and same_sizes(
        (before.shape[-1], after.shape[-1]), (weight.shape[1], weight.shape[0])
    )
    if not fits:
        return False
    _replace(node, aten.linear.default, (x, *others))
    node.graph.erase_node(product)
    return True


def _first(node: fx.Node) -> list[fx.Node]:
    """The nodes that read the first result, if no other is read."""
    users = [user for user in node.users if user.users]
    firsts = all(u.target is python_operator.getitem and u.args[1] == 0 for u in users)
    return users if firsts else []


def _first_becomes(node: fx.Node, target: Any, args: tuple[Any, ...], **kwargs: Any) -> bool:
    users = _first(node)
    for user in users:
        _replace(user, target, args, kwargs)
    # The other results, which nobody reads, go with the dead code.
    return bool(users)


def _group_norm(node: fx.Node) -> bool:
    names = ("input", "group", "weight", "bias", "eps")
    given = tuple(argument(node, name) for name in names)
    return _first_becomes(node, aten.group_norm.default, given)


def _layer_norm(node: fx.Node) -> bool:
    names = ("input", "normalized_shape", "weight", "bias", "eps")
    given = tuple(argument(node, name) for name in names)
    return _first_becomes(node, aten.layer_norm.default, given)


def _attention(node: fx.Node) -> bool:
    if argument(node, "dropout_p") != 0 or argument(node, "return_debug_mask", False):
        return False
    mask = argument(node, "attn_mask")
    mask = argument(node, "attn_bias") if mask is None else mask
    given = tuple(argument(node, name) for name in ("query", "key", "value"))
    return _first_becomes(
        node,
        aten.scaled_dot_product_attention.default,
        (*given, mask, 0.0, argument(node, "is_causal")),
        scale=argument(node, "scale"),
    )


def _convolution(node: fx.Node) -> bool:
    weight = traced(argument(node, "weight"))
    if weight is None or weight.dim() != 4 or argument(node, "transposed"):
        return False
    names = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
    return _replace(node, aten.conv2d.default, tuple(argument(node, name) for name in names))


_RULES: dict[str, Callable[[fx.Node], bool]] = {
    "aten.addmm": _linear,
    "aten.mm": _linear,
    **dict.fromkeys(_VIEWS, _view),
    "aten.native_group_norm": _group_norm,
    "aten.native_layer_norm": _layer_norm,
    "aten._scaled_dot_product_flash_attention_for_cpu": _attention,
    "aten._scaled_dot_product_flash_attention": _attention,
    "aten._scaled_dot_product_efficient_attention": _attention,
    "aten._scaled_dot_product_cudnn_attention": _attention,
    "aten.convolution": _convolution,
}
