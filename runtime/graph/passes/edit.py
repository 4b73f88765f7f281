"""What passes share: questions about nodes, and edits that keep provenance."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from heatsink.runtime.graph.graph import PATH_KEY, WEIGHT_KEY, Graph


def inherit(new: fx.Node, replaced: fx.Node) -> None:
    """Give a new node the path, value and stack of the node it replaces."""
    new.meta = {**replaced.meta, **new.meta}
    new.meta[PATH_KEY] = replaced.meta[PATH_KEY]


def bypass(node: fx.Node, value: fx.Node) -> None:
    """Let the users of `node` use `value`, and erase `node`."""
    node.replace_all_uses_with(value)
    node.graph.erase_node(node)


def erase_unused(node: fx.Node) -> None:
    """Erase an operation that has no user, and then what only it used; nothing if it is gone."""
    if node.op == "call_function" and not node.users and not node._erased:
        sources = node.all_input_nodes
        node.graph.erase_node(node)
        for source in sources:
            erase_unused(source)


def operator(node: Any) -> str:
    """The operator without its overload, `aten.mul` say; "" if it is none."""
    if not isinstance(node, fx.Node) or node.op != "call_function":
        return ""
    if isinstance(node.target, torch._ops.OpOverload):
        return str(node.target.overloadpacket)
    return ""


def argument(node: fx.Node, name: str, default: Any = None) -> Any:
    """An argument of an operator by its name in the schema, its default where it is not given."""
    assert isinstance(node.target, torch._ops.OpOverload)
    if name in node.kwargs:
        return node.kwargs[name]
    for index, declared in enumerate(node.target._schema.arguments):
        if declared.name == name:
            given = index < len(node.args)
            return node.args[index] if given else declared.default_value
    return default


def traced(node: Any) -> Tensor | None:
    """The meta tensor that stands for a node's result, if that is one tensor."""
    value = node.meta.get("val") if isinstance(node, fx.Node) else None
    return value if isinstance(value, Tensor) else None


def same_sizes(left: Any, right: Any) -> bool:
    """Whether two sequences of sizes or strides are equal, symbols compared as expressions."""
    return len(left) == len(right) and all(
        _expression(a) == _expression(b) for a, b in zip(left, right, strict=True)
    )


def same_layout(left: Tensor, right: Tensor) -> bool:
    """Whether two traced tensors have the same dtype, shape and strides."""
    return (
        left.dtype == right.dtype
        and same_sizes(left.shape, right.shape)
        and same_sizes(left.stride(), right.stride())
    )


def _expression(size: Any) -> Any:
    return size.node.expr if isinstance(size, torch.SymInt) else size


def only_user(node: fx.Node) -> fx.Node | None:
    """The single node that uses this one, once; None if there are more or it is an output."""
    users = list(node.users)
    if len(users) != 1 or users[0].op == "output":
        return None
    return users[0]


def own_weight(graph: Graph, node: Any) -> str | None:
    """The name of the weight that `node` holds, if only one operation uses it."""
    if not isinstance(node, fx.Node) or WEIGHT_KEY not in node.meta or len(node.users) != 1:
        return None
    name = node.meta[WEIGHT_KEY]
    return name if name in graph.weights else None
