"""Execution of a captured graph in PyTorch, one node at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx

from heatsink.runtime.graph.graph import WEIGHT_KEY, Graph, input_name
from heatsink.runtime.graph.plain import PLAIN
from heatsink.runtime.graph.weight import Weight


class GraphInterpreter(fx.Interpreter):
    """Runs a graph on real weights, each loaded for the node that uses it and dropped after it."""

    def __init__(self, graph: Graph, dtype: torch.dtype | None, device: torch.device) -> None:
        super().__init__(graph.module)
        self._captured = graph
        self._dtype = dtype
        self._device = device

    def execute(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The outputs by name."""
        given = {name: self._cast_input(name, value) for name, value in inputs.items()}
        values = [
            self._captured.weights[node.meta[WEIGHT_KEY]]
            if WEIGHT_KEY in node.meta
            else given[input_name(node)]
            for node in self._captured.nodes
            if node.op == "placeholder"
        ]
        with torch.inference_mode():
            outputs = self.run(*values)
        return dict(zip(self._captured.outputs, outputs, strict=True))

    def _cast_input(self, name: str, value: Tensor) -> Tensor:
        return value.to(self._device, self._map_dtype(self._captured.inputs[name].dtype))

    def _map_dtype(self, dtype: torch.dtype) -> torch.dtype:
        return self._dtype if self._dtype is not None and dtype.is_floating_point else dtype

    def _materialise(self, value: Any) -> Any:
        if isinstance(value, Weight):
            return value.load(self._map_dtype(value.dtype)).to(self._device)
        if isinstance(value, torch.dtype):
            return self._map_dtype(value)
        return self._device if isinstance(value, torch.device) else value

    def call_function(
        self, target: Callable[..., Any] | str, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Run one operation; assertions about the traced tensors do not hold for this run's."""
        if str(target).startswith("aten._assert_tensor_metadata"):
            return None
        # `map_aggregate` leaves tuples, lists and slices as they were otherwise.
        args = fx.node.map_aggregate(args, self._materialise)
        kwargs = fx.node.map_aggregate(kwargs, self._materialise)
        if self._dtype == torch.float64 and isinstance(target, torch._ops.OpOverload):
            # No kernel computes in float64.
            target = PLAIN.get(str(target.overloadpacket), target)
        return super().call_function(target, args, kwargs)

    def output(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What the graph returns; a weight returned as it is becomes its values."""
        return fx.node.map_aggregate(super().output(target, args, kwargs), self._materialise)
