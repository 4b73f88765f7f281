"""Remove what no output depends on.

Rules:
1. An operation without users that writes nothing is erased, and so in turn what only it used.
2. A weight without users is erased with its origins.

Inputs stay: they are the component's contract.
"""

from __future__ import annotations

import torch
from torch import fx

from heatsink.runtime.graph.graph import WEIGHT_KEY, Graph


def remove_dead_code(graph: Graph) -> tuple[Graph, bool]:
    """Apply the rules of this module."""
    modified = False
    for node in reversed(list(graph.nodes)):
        if node.users:
            continue
        if node.op == "call_function" and not _has_effect(node):
            graph.module.graph.erase_node(node)
            modified = True
        elif node.op == "placeholder" and WEIGHT_KEY in node.meta:
            name = node.meta[WEIGHT_KEY]
            graph.module.graph.erase_node(node)
            graph.weights.pop(name, None)
            graph.origins.pop(name, None)
            modified = True
    return graph, modified


def _has_effect(node: fx.Node) -> bool:
    target = node.target
    if not isinstance(target, torch._ops.OpOverload):
        return False
    # An operator that returns nothing is there for what it does: an assertion.
    return bool(target._schema.is_mutable) or not target._schema.returns
