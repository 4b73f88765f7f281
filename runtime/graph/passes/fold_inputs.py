"""What comes before a convolution goes into it: upsampling and concatenation.

Rules:
1. `conv2d(upsample_nearest2d(x))` to twice the height and width becomes `conv2d(x, upsample=2)`.
2. `conv2d(cat([a, b], 1))` becomes `conv2d(a, x2=b)`.
3. `conv2d(group_norm_silu(cat([a, b], 1)))` becomes `conv2d(group_norm_silu(a), x2=...(b))`, where
   the groups end at the seam: each half's groups are normalised alone. The norm's weights are cut
   in two, their origins say which rows are whose.

Rules 2 and 3 hold only where they take in every user of the concatenation, since otherwise it must
be made anyhow. In a UNet a skip connection meets a norm and a 1x1 convolution; where the seam lies
within a group (1280 channels beside 640 in 32 groups, say) the concatenation stays.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from heatsink.runtime.graph.graph import WEIGHT_KEY, Graph
from heatsink.runtime.graph.packing import cut
from heatsink.runtime.graph.passes.edit import argument, only_user, operator, own_weight, traced
from heatsink.runtime.graph.passes.trace import insert, new_weight, propagate, replace


def fold_inputs(graph: Graph) -> tuple[Graph, bool]:
    """Apply the rules of this module."""
    modified = False
    for node in list(graph.nodes):
        if operator(node) == "aten.upsample_nearest2d":
            modified |= _fold_upsample(node)
        elif operator(node) in {"aten.cat", "aten.concat"}:
            modified |= _fold_concat(graph, node)
    if modified:
        propagate(graph)
    return graph, modified


def _changed(conv: fx.Node, **changes: Any) -> fx.Node:
    target: Any = conv.target
    names = [declared.name for declared in target._schema.arguments]
    args = [changes.get(name, argument(conv, name)) for name in names]
    return replace(conv, target, args)


def _is_input(conv: Any, node: fx.Node) -> bool:
    """Whether `node` is the one input of a convolution, and nothing else of it."""
    if operator(conv) != "heatsink.conv2d" or argument(conv, "x") is not node:
        return False
    plain = argument(conv, "x2") is None and argument(conv, "upsample") == 1
    return plain and sum(arg is node for arg in conv.args) == 1


def _fold_upsample(node: fx.Node) -> bool:
    before, after = traced(node.args[0]), traced(node)
    if before is None or after is None or not node.users:
        return False
    if list(after.shape[2:]) != [2 * size for size in before.shape[2:]]:
        return False
    if not all(_is_input(user, node) for user in node.users):
        return False
    for conv in list(node.users):
        _changed(conv, x=node.args[0], upsample=2)
    node.graph.erase_node(node)
    return True


@dataclass(frozen=True)
class _Concat:
    """A concatenation of two along the channels."""

    node: fx.Node
    first: fx.Node
    second: fx.Node
    seam: int


def _fold_concat(graph: Graph, node: fx.Node) -> bool:
    found = _match_concat(node)
    if found is None:
        return False
    edits: list[Callable[[], None]] = []
    for user in node.users:
        edit = _edit_of(graph, found, user)
        if edit is None:
            return False
        edits.append(edit)
    for edit in edits:
        edit()
    node.graph.erase_node(node)
    return bool(edits)


def _match_concat(node: fx.Node) -> _Concat | None:
    parts, value = node.args[0], traced(node)
    if not isinstance(parts, list | tuple) or len(parts) != 2 or value is None or not node.users:
        return None
    first, second = parts
    if value.dim() != 4 or argument(node, "dim") % 4 != 1:
        return None
    left, right = traced(first), traced(second)
    if left is None or right is None or not left.dtype == right.dtype == value.dtype:
        return None
    assert isinstance(first, fx.Node)
    assert isinstance(second, fx.Node)
    return _Concat(node, first, second, int(left.shape[1]))


def _edit_of(graph: Graph, concat: _Concat, user: fx.Node) -> Callable[[], None] | None:
    """How a user does without the concatenation; None if it can't."""
    if _is_input(user, concat.node):
        return lambda: _join(user, concat.first, concat.second)
    conv = only_user(user)
    if conv is None or not _is_input(conv, user) or not _splits(graph, concat, user):
        return None

    def split() -> None:
        halves = _split_norm(graph, concat, user)
        _join(conv, *halves)
        norms = argument(user, "weight"), argument(user, "bias")
        user.graph.erase_node(user)
        for holder in norms:
            _drop(graph, holder)

    return split


def _join(conv: fx.Node, first: fx.Node, second: fx.Node) -> None:
    _changed(conv, x=first, x2=second)


def _splits(graph: Graph, concat: _Concat, norm: fx.Node) -> bool:
    """Whether a norm of the concatenation is two norms, side by side."""
    if operator(norm) != "heatsink.group_norm_silu" or norm.args[0] is not concat.node:
        return False
    value = traced(norm)
    assert value is not None
    size = int(value.shape[1]) // argument(norm, "groups")
    if concat.seam % size:
        return False
    holders = [argument(norm, name) for name in ("weight", "bias")]
    if any(h is not None and own_weight(graph, h) is None for h in holders):
        return False
    return all(argument(norm, name) is None for name in ("scale", "shift"))


def _split_norm(graph: Graph, concat: _Concat, norm: fx.Node) -> list[fx.Node]:
    value, groups = traced(norm), argument(norm, "groups")
    assert value is not None
    channels, target = int(value.shape[1]), torch.ops.heatsink.group_norm_silu.default
    size = channels // groups
    halves = []
    for part, start, stop in (
        (concat.first, 0, concat.seam),
        (concat.second, concat.seam, channels),
    ):
        weight, bias = (
            _cut(graph, argument(norm, name), start, stop) for name in ("weight", "bias")
        )
        rest = [argument(norm, name) for name in ("eps", "scale", "shift", "silu")]
        args = (part, (stop - start) // size, weight, bias, *rest)
        halves.append(insert(norm, target, args, norm))
    return halves


def _cut(graph: Graph, holder: Any, start: int, stop: int) -> fx.Node | None:
    name = own_weight(graph, holder)
    if name is None:
        return None
    part = cut(graph.weights[name], graph.origins[name], start, stop)
    return new_weight(graph, holder, *part)


def _drop(graph: Graph, holder: Any) -> None:
    if isinstance(holder, fx.Node):
        name = holder.meta[WEIGHT_KEY]
        holder.graph.erase_node(holder)
        del graph.weights[name], graph.origins[name]
