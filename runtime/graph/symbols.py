"""The traced values of a graph, made anew: fake tensors with one symbolic batch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import fx
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import (
    DimDynamic,
    ShapeEnv,
    StatelessSymbolicContext,
)
from torch.fx.passes.fake_tensor_prop import FakeTensorProp
from torch.utils._sympy.value_ranges import ValueRanges

from heatsink.runtime.graph.graph import BATCH, WEIGHT_KEY, Graph, input_name

MAX_BATCH = 4096
# The batch's value while sizes are worked out; one that is no size of anything else.
_HINT = 4093


def symbolic_inputs(graph: Graph) -> Mapping[Any, Any]:
    """Give every node its traced value; returns the range of the batch's symbol.

    Args:
        graph: edited: `meta["val"]` of all nodes.
    """
    environment = ShapeEnv()
    mode = FakeTensorMode(shape_env=environment)
    values = []
    for node in graph.nodes:
        if node.op != "placeholder":
            continue
        if WEIGHT_KEY in node.meta:
            weight = graph.weights[node.meta[WEIGHT_KEY]]
            values.append(_fake(mode, weight.shape, weight.dtype))
        else:
            spec = graph.inputs[input_name(node)]
            values.append(_fake(mode, spec.shape, spec.dtype))
    # Without it some operators' own C++ shape functions would fix the symbol to its hint.
    with enable_python_dispatcher():
        _Propagate(graph.module, mode).propagate_dont_convert_inputs(*values)
    symbols = environment.var_to_range
    return {symbol: ValueRanges(1, MAX_BATCH) for symbol in symbols}


class _Propagate(FakeTensorProp):
    """Creates tensors on meta, as capture does, whatever device the graph names."""

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        kwargs = fx.node.map_aggregate(
            kwargs, lambda v: torch.device("meta") if isinstance(v, torch.device) else v
        )
        return super().call_function(target, args, kwargs)


def _fake(mode: FakeTensorMode, shape: tuple[int | str, ...], dtype: torch.dtype) -> Any:
    sizes = [_HINT if size == BATCH else int(size) for size in shape]
    dynamic = [DimDynamic.DUCK if size == BATCH else DimDynamic.STATIC for size in shape]
    context: Any = StatelessSymbolicContext(dynamic_sizes=dynamic)
    example = torch.empty(sizes, dtype=dtype, device="meta")
    return mode.from_tensor(example, symbolic_context=context)
