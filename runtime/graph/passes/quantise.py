"""Products of values rounded to 8 bits (float8_e4m3fn), simulated: what fp8 kernels would multiply.

Rules:
1. The weight of `linear(x, W)` and `conv2d(x, W)` is rounded to 8 bits, scaled so that the largest
   value of each output channel is the format's largest. It is rounded when it is loaded.
2. What such a product reads is rounded likewise while it runs: of a linear layer each token has its
   scale, of a convolution each sample. So a row's bits don't depend on the rows beside it.
3. Equal scaled and rounded values are made once, for q, k and v say.

Bias, sums and everything else stay as they were. A scale factors out of the product, so an fp8
kernel multiplies the rounded values as they are and scales its sums; here they are scaled back
before the product, which is the same but for the rounding of the graph's own dtype.

Products of modules in `high` stay, and so do those of two activations.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx

from heatsink.runtime.graph.graph import WEIGHT_KEY, Graph
from heatsink.runtime.graph.passes.edit import argument, inherit, operator, traced
from heatsink.runtime.graph.passes.high import High
from heatsink.runtime.graph.passes.protocol import Pass
from heatsink.runtime.graph.passes.trace import infer, insert, new_weight
from heatsink.runtime.graph.weight import Weight

FP8 = torch.float8_e4m3fn
LARGEST = torch.finfo(FP8).max
# Of zeros the scale must not be zero; every dtype but float16 holds it.
_SMALLEST = 1e-30
SCALED: dict[str, tuple[int, ...]] = {"aten.linear": (-1,), "aten.conv2d": (1, 2, 3)}
"""The products, and the dimensions of their input that share a scale."""
_TRANSFORM = "round to float8_e4m3fn by output channel"


def quantise_fp8(high: Collection[str] = ()) -> Pass:
    """The pass that applies the rules of this module.

    Args:
        high: what is not rounded; see `high.High`.

    Returns:
        A pass; it raises InvalidRequest for an entry of `high` that fits nothing.
    """
    kept = High(tuple(high))

    def quantise(graph: Graph) -> tuple[Graph, bool]:
        kept.check(graph)
        found = [node for node in graph.nodes if _fits(graph, node) and node not in kept]
        weights: dict[fx.Node, fx.Node] = {}
        rounded: dict[tuple[fx.Node, tuple[int, ...]], fx.Node] = {}
        for node in found:
            x, weight = (argument(node, name) for name in ("input", "weight"))
            dims = SCALED[operator(node)]
            if weight not in weights:
                weights[weight] = _rounded_weight(graph, weight)
            if (x, dims) not in rounded:
                rounded[x, dims] = _rounded(node, x, dims)
            node.replace_input_with(x, rounded[x, dims])
            node.replace_input_with(weight, weights[weight])
        return graph, bool(found)

    return quantise


def _fits(graph: Graph, node: fx.Node) -> bool:
    if operator(node) not in SCALED:
        return False
    x, weight = (argument(node, name) for name in ("input", "weight"))
    value = traced(x)
    if value is None or not value.is_floating_point() or WEIGHT_KEY not in weight.meta:
        return False
    # Of a convolution without a batch the first dimension is no row.
    rows = value.dim() == 4 if operator(node) == "aten.conv2d" else value.dim() > 1
    origins = graph.origins[weight.meta[WEIGHT_KEY]]
    return rows and not any(_TRANSFORM in origin.transform for origin in origins)


def _rounded_weight(graph: Graph, holder: fx.Node) -> fx.Node:
    name = holder.meta[WEIGHT_KEY]
    weight = graph.weights[name]

    def source() -> Tensor:
        return _round_weight(weight.load(torch.float64))

    origins = [origin.then(_TRANSFORM) for origin in graph.origins[name]]
    made: Weight = replace(weight, source=source)
    return new_weight(graph, holder, made, origins)


def round_fp8(values: Tensor, dims: tuple[int, ...]) -> Tensor:
    """Values rounded to float8_e4m3fn in units of their largest along `dims`, scaled back."""
    scale = (values.abs().amax(dims, keepdim=True) / LARGEST).clamp_min(_SMALLEST)
    # In float32 first: PyTorch has no other way to 8 bits that rounds once.
    units = (values / scale).clamp(-LARGEST, LARGEST).float().to(FP8)
    return units.to(values.dtype) * scale


def round_operands(product: str, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """What a product of `SCALED` reads, rounded as the pass rounds it."""
    return round_fp8(x, SCALED[product]), _round_weight(weight)


def _round_weight(weight: Tensor) -> Tensor:
    return round_fp8(weight, tuple(range(1, weight.dim())))


def _rounded(node: fx.Node, x: fx.Node, dims: tuple[int, ...]) -> fx.Node:
    """The operations of `round_fp8` before `node`."""
    aten: Any = torch.ops.aten
    size = insert(node, aten.abs.default, (x,), node)
    largest = insert(node, aten.amax.default, (size, list(dims), True), node)
    unit = insert(node, aten.div.Tensor, (largest, LARGEST), node)
    scale = insert(node, aten.clamp_min.default, (unit, _SMALLEST), node)
    units = insert(node, aten.div.Tensor, (x, scale), node)
    inside = insert(node, aten.clamp.default, (units, -LARGEST, LARGEST), node)
    value = traced(x)
    assert value is not None
    small = _to(inside, FP8, node)
    return insert(node, aten.mul.Tensor, (_to(small, value.dtype, node), scale), node)


def _to(source: fx.Node, dtype: torch.dtype, node: fx.Node) -> fx.Node:
    with node.graph.inserting_before(node):
        new = node.graph.call_function(torch.ops.aten._to_copy.default, (source,), {"dtype": dtype})
    new.meta["val"] = infer(new)
    inherit(new, node)
    return new
