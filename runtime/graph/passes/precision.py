"""Compute a float32 graph in half precision, but for the modules that stay high.

Rules:
1. An operation that reads a weight, or anything that is low already, is computed in the low dtype:
   its weights are kept in it, and what it reads in float32 is converted. So sinusoids of timesteps
   and sizes, masks, and what is done to an input before its first weight stay float32.
2. An operation of a module in `high` is computed in float32, its weights too: what it reads of low
   tensors is converted.
3. One conversion serves all readers of a tensor in the other dtype. A weight that both read is kept
   in float32.
4. Inputs and outputs stay float32: the last conversion is the output's.

Passes that fuse look at dtypes only where an operation reads both, so they match on both sides of
a border. `passes.pipeline.NATIVE["clean"]` comes first: it removes conversions to float32 that
change nothing in a float32 graph, and folds scales that lie before a weight.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx

from heatsink.runtime.graph.graph import PATH_KEY, WEIGHT_KEY, Graph, TensorSpec
from heatsink.runtime.graph.passes.edit import inherit, operator, traced
from heatsink.runtime.graph.passes.fold_constants import computed
from heatsink.runtime.graph.passes.high import High
from heatsink.runtime.graph.passes.protocol import Pass
from heatsink.runtime.graph.passes.trace import fake_mode, infer

HALVES = (torch.bfloat16, torch.float16)
_CONVERSIONS = {"aten.to", "aten._to_copy"}


def lower_precision(dtype: torch.dtype, high: Collection[str] = ()) -> Pass:
    """The pass that applies the rules of this module.

    Args:
        dtype: bfloat16 or float16.
        high: what stays float32; see `high.High`.

    Returns:
        A pass for float32 graphs; it leaves a graph of `dtype` as it is, and raises InvalidRequest
        for an entry of `high` that fits nothing.

    Raises:
        ValueError: another dtype.
    """
    if dtype not in HALVES:
        raise ValueError(f"dtype: expected one of {HALVES}, got {dtype}")
    kept = High(tuple(high))

    def lower(graph: Graph) -> tuple[Graph, bool]:
        if graph.dtype == dtype:
            return graph, False
        if graph.dtype != torch.float32:
            raise ValueError(f"{graph.component}: expected a float32 graph, got {graph.dtype}")
        kept.check(graph)
        _Lowering(graph, dtype, kept).run()
        return graph, True

    lower.__name__ = f"lower_precision to {str(dtype).removeprefix('torch.')}"
    return lower


class _Lowering:
    def __init__(self, graph: Graph, dtype: torch.dtype, high: High) -> None:
        self._graph, self._dtype, self._high = graph, dtype, high
        self._made: dict[tuple[fx.Node, torch.dtype], fx.Node] = {}

    def run(self) -> None:
        calls = [node for node in self._graph.nodes if node.op == "call_function"]
        high = [node for node in calls if node in self._high]
        (output,) = (node for node in self._graph.nodes if node.op == "output")
        last = [node for node in self._graph.nodes if node.op == "placeholder"][-1]
        with fake_mode(self._graph):
            self._retype_weights({s for node in [*high, output] for s in node.all_input_nodes})
            for node in calls:
                self._convert(node, self._wanted(node), last)
            self._convert_outputs(output, last)
        self._graph.dtype = self._dtype

    def _retype_weights(self, read_high: Collection[fx.Node]) -> None:
        """Weights that are not read high, or returned, are kept low."""
        for name, holder in self._graph.weight_nodes().items():
            if holder in read_high or not self._is_weight(holder):
                continue
            weight = replace(self._graph.weights[name], dtype=self._dtype)
            self._graph.weights[name] = weight
            holder.meta["val"] = torch.empty(weight.shape, dtype=self._dtype, device="meta")

    def _wanted(self, node: fx.Node) -> torch.dtype:
        """What an operation is computed in."""
        if node in self._high:
            return torch.float32
        sources = node.all_input_nodes
        low = any(_dtype(source) == self._dtype or self._is_weight(source) for source in sources)
        return self._dtype if low else torch.float32

    def _is_weight(self, node: fx.Node) -> bool:
        floats = _dtype(node) == torch.float32 and WEIGHT_KEY in node.meta
        return floats and computed(self._graph, node) is None

    def _convert(self, node: fx.Node, wanted: torch.dtype, last: fx.Node) -> None:
        """Let an operation read the dtype it is computed in, and trace it anew."""
        other = torch.float32 if wanted == self._dtype else self._dtype

        def of(argument: fx.Node) -> fx.Node:
            if _dtype(argument) != other:
                return argument
            return self._converted(argument, wanted, node, last)

        before = node.all_input_nodes
        node.args = fx.node.map_arg(node.args, of)
        node.kwargs = fx.node.map_arg(node.kwargs, of)
        if operator(node) in _CONVERSIONS and wanted == self._dtype:
            # It kept what was float32 as it was, which is low now.
            node.args, node.kwargs = (self._retyped(part) for part in (node.args, node.kwargs))
        if before != node.all_input_nodes or self._dtype in map(_dtype, before):
            node.meta["val"] = self._traced(node, wanted)

    @staticmethod
    def _traced(node: fx.Node, wanted: torch.dtype) -> Any:
        """The traced value of an operation whose arguments have another dtype now."""
        literal = any(isinstance(v, torch.dtype) for v in (*node.args, *node.kwargs.values()))
        before = traced(node)
        if literal or before is None or before.dtype != torch.float32:
            return infer(node)
        # Shapes and strides stay, and asking the operator for them takes its time.
        return torch.empty_strided(before.shape, before.stride(), dtype=wanted, device="meta")

    def _retyped(self, value: Any) -> Any:
        def of(each: Any) -> Any:
            return self._dtype if each == torch.float32 else each

        return fx.node.map_aggregate(value, of)

    def _converted(
        self, source: fx.Node, dtype: torch.dtype, reader: fx.Node, last: fx.Node
    ) -> fx.Node:
        """The tensor in the other dtype; made right behind it, so that it need not live longer."""
        if (source, dtype) not in self._made:
            place = last if source.op == "placeholder" else source
            with self._graph.module.graph.inserting_after(place):
                new = self._graph.module.graph.call_function(
                    torch.ops.aten._to_copy.default, (source,), {"dtype": dtype}
                )
            new.meta["val"] = infer(new)
            # Of the reader's module where the source is of none.
            inherit(new, source if PATH_KEY in source.meta else reader)
            self._made[source, dtype] = new
        return self._made[source, dtype]

    def _convert_outputs(self, output: fx.Node, last: fx.Node) -> None:

        def of(value: fx.Node) -> fx.Node:
            if _dtype(value) != self._dtype:
                return value
            return self._converted(value, torch.float32, value, last)

        output.args = fx.node.map_arg(output.args, of)
        values = zip(self._graph.outputs.items(), self._graph.output_nodes(), strict=True)
        self._graph.outputs = {
            name: TensorSpec(spec.shape, value.dtype)
            for (name, spec), node in values
            if (value := traced(node)) is not None
        }


def _dtype(node: fx.Node) -> torch.dtype | None:
    """The dtype of a floating-point tensor, or of a node's tensors."""
    value = node.meta.get("val")
    several = value if isinstance(value, list | tuple) else [value]
    first = next((v for v in several if isinstance(v, Tensor)), None)
    return first.dtype if isinstance(first, Tensor) and first.is_floating_point() else None
