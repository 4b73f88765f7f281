"""Attention in the layout of `heatsink::attention`: tokens before heads, no transposed copies.

Rules:
1. `scaled_dot_product_attention(q, k, v)` of four dimensions, without dropout and grouped heads,
   becomes `attention` of the transposed `q`, `k`, `v`, transposed back. A transposition that is
   there already is left out instead of undone.
2. `is_causal`, and a computed boolean mask that lets query i see keys 0 to i, become `causal`.
3. Another computed boolean mask becomes a computed bias of 0 and -inf.
4. A mask of numbers is the bias.

Not matched is a boolean mask that depends on an input, and a head dim that the kernel lacks.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, fx

import heatsink.kernels.attention  # noqa: F401 - registers the op
from heatsink.kernels._heads import MAX_HEAD_DIM, VAE_HEAD_DIM
from heatsink.runtime.graph.graph import WEIGHT_KEY, Graph
from heatsink.runtime.graph.passes.edit import argument, erase_unused, operator, same_sizes, traced
from heatsink.runtime.graph.passes.fold_constants import computed
from heatsink.runtime.graph.passes.trace import insert, new_weight, propagate, reads_strides
from heatsink.runtime.graph.weight import COMPUTED, Origin, Weight

_FLOATS = (torch.float16, torch.bfloat16, torch.float32)


def fuse_attention(graph: Graph) -> tuple[Graph, bool]:
    """Apply the rules of this module."""
    found = [n for n in graph.nodes if operator(n) == "aten.scaled_dot_product_attention"]
    if reads_strides(graph):
        return graph, False
    fused = [_fuse(graph, node) for node in found if _fits(node)]
    if any(fused):
        propagate(graph)
    return graph, any(fused)


def _fits(node: fx.Node) -> bool:
    q, k, v = (traced(value) for value in node.args[:3])
    if q is None or k is None or v is None or q.dim() != 4 or q.dtype not in _FLOATS:
        return False
    if argument(node, "dropout_p") != 0 or argument(node, "enable_gqa"):
        return False
    scale, head_dim = argument(node, "scale"), q.shape[-1]
    if not isinstance(head_dim, int) or not (
        1 <= head_dim <= MAX_HEAD_DIM or head_dim == VAE_HEAD_DIM
    ):
        return False
    if scale is not None and not (isinstance(scale, int | float) and 0 < scale < math.inf):
        return False
    # No broadcasting between the three: batch, heads and head dim are one.
    like = (*q.shape[:2], k.shape[2], head_dim)
    return same_sizes(k.shape, like) and same_sizes(v.shape, like)


def _fuse(graph: Graph, node: fx.Node) -> bool:
    mask = _mask(graph, node)
    if mask is None:
        return False
    bias, causal = mask
    scale = argument(node, "scale")
    value = traced(node.args[0])
    assert value is not None
    scale = 1 / math.sqrt(value.shape[-1]) if scale is None else float(scale)
    q, k, v = (_tokens_first(node, source) for source in node.args[:3])
    fused = insert(node, torch.ops.heatsink.attention.default, (q, k, v, scale, causal, bias), node)
    for user in list(node.users):
        if _swaps(user):
            user.replace_all_uses_with(fused)
            graph.module.graph.erase_node(user)
    if node.users:
        back = insert(node, torch.ops.aten.transpose.int, (fused, 1, 2), node)
        node.replace_all_uses_with(back)
    erase_unused(node)
    return True


def _swaps(node: Any) -> bool:
    """Whether a node exchanges dimensions 1 and 2 of 4."""
    name = operator(node)
    if name == "aten.transpose":
        return {argument(node, d) % 4 for d in ("dim0", "dim1")} == {1, 2}
    if name == "aten.permute":
        return [dim % 4 for dim in argument(node, "dims")] == [0, 2, 1, 3]
    return False


def _tokens_first(node: fx.Node, source: Any) -> fx.Node:
    if _swaps(source):
        inner = source.args[0]
        assert isinstance(inner, fx.Node)
        return inner
    return insert(node, torch.ops.aten.transpose.int, (source, 1, 2), node)


def _mask(graph: Graph, node: fx.Node) -> tuple[fx.Node | None, bool] | None:
    """The bias and whether it is causal; None where the kernel has no such mask."""
    mask, causal = argument(node, "attn_mask"), bool(argument(node, "is_causal"))
    value = traced(mask)
    if mask is None:
        return None, causal
    if value is None or causal:
        return None
    if value.dtype != torch.bool:
        q = traced(node.args[0])
        assert q is not None
        return (mask, False) if value.dtype == q.dtype else None
    if operator(mask) == "aten.expand":
        mask = mask.args[0]
    name = computed(graph, mask)
    return None if name is None else _computed_mask(graph, node, mask, name)


def _computed_mask(
    graph: Graph, node: fx.Node, mask: fx.Node, name: str
) -> tuple[fx.Node | None, bool]:
    q, k = (traced(value) for value in node.args[:2])
    assert q is not None
    assert k is not None
    sees = graph.weights[name].load()
    scores = (q.shape[2], k.shape[2])
    earlier = torch.ones(scores, dtype=torch.bool).tril()
    if sees.numel() == earlier.numel() and torch.equal(sees.reshape(scores), earlier):
        return None, True
    return _bias(graph, mask, q.dtype), False


def _bias(graph: Graph, mask: fx.Node, dtype: torch.dtype) -> fx.Node:
    weight = graph.weights[mask.meta[WEIGHT_KEY]]
    name = f"{weight.name}.bias"

    def source() -> Tensor:
        return torch.zeros(weight.shape).masked_fill(~weight.load(), -torch.inf)

    bias = Weight(weight.shape, dtype, source, name)
    return new_weight(graph, mask, bias, [Origin(name, None, COMPUTED)])
