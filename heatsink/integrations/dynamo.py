"""`torch.compile(model, backend="heatsink")`: inference on programs with planned memory.

`aot_autograd` lowers what torch.compile traced to ATen operators; they are put together to those
that the passes know (`runtime/graph/passes/compose.py`), and become one program for each set of
sizes. Programs hold parameters and buffers in forms of their own: one that was written to is read
again, and one that is another tensor than before is copied in from then on, like any other
argument. A graph that can't be a program (random numbers, writes,
control flow, sizes that depend on data, several devices) runs as it was lowered, and a warning says
so and why. A graph that needs a gradient is refused.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from heatsink.integrations.aot_graph import (
    Argument,
    Converted,
    Result,
    arguments,
    convert,
    obstacle,
)
from heatsink.integrations.watch import Seen
from heatsink.runtime.errors import HeatsinkError, InvalidRequest, NotBuilt
from heatsink.runtime.graph.graph import Graph
from heatsink.runtime.graph.passes.compose import compose_operators
from heatsink.runtime.graph.passes.pipeline import PASSES_NATIVE
from heatsink.runtime.graph.symbols import symbolic_inputs
from heatsink.runtime.native.component import NativeComponent
from heatsink.runtime.native.shared_weights import SharedWeights
from heatsink.runtime.native.workspace import Workspace

_log = logging.getLogger(__name__)

MAX_SIZES = 16
"""Sets of sizes whose programs a compiled graph keeps."""


def backend(
    gm: fx.GraphModule, example_inputs: Sequence[Any], **options: Any
) -> Callable[..., Any]:
    """Compile a graph for torch.compile.

    Args:
        gm: as torch.compile traced it.
        example_inputs: fake or real.
        options: none is known.

    Raises:
        InvalidRequest: an option was given.
        NotBuilt: the graph needs a gradient.
    """
    from torch._dynamo.backends.common import aot_autograd

    # torch.compile hands its `options` on as one.
    if given := {**options.pop("options", {}), **options}:
        raise InvalidRequest(f"backend 'heatsink': unknown options {sorted(given)}")

    def lower(lowered: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        return compile_lowered(lowered, arguments(gm, len(inputs)))

    compiled: Callable[..., Any] = aot_autograd(
        fw_compiler=_refuse_gradients, inference_compiler=lower
    )(gm, example_inputs)
    return compiled


def _refuse_gradients(gm: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
    raise NotBuilt(
        "backend 'heatsink' is for inference: call the compiled module under torch.no_grad() or "
        "torch.inference_mode()"
    )


def compile_lowered(gm: fx.GraphModule, given: Sequence[Argument]) -> Callable[..., Any]:
    """A function of a list of arguments that gives the graph's results."""
    if why := obstacle(gm):
        return _as_it_is(gm, why)
    return Lowered(gm, given)


def _as_it_is(gm: fx.GraphModule, why: str) -> Callable[..., Any]:
    count = sum(node.op == "call_function" for node in gm.graph.nodes)
    if count:
        _log.warning("heatsink: a graph of %d operations runs unfused: %s", count, why)

    def run(values: list[Any]) -> Any:
        return gm.forward(*values)

    run._boxed_call = True  # type: ignore[attr-defined]  # aot_autograd gives it one list
    return run


def trace_anew(graph: Graph) -> tuple[Graph, bool]:
    """Give every node a traced value of one kind: torch.compile's and capture's don't mix."""
    symbolic_inputs(graph)
    return graph, False


class Lowered:
    """A lowered graph: a program for each set of sizes, on one arena.

    Attributes:
        programs: what was built until now, by the sizes.
    """

    _boxed_call = True

    def __init__(self, gm: fx.GraphModule, given: Sequence[Argument]) -> None:
        self._gm = gm
        self._given = list(given)
        self._weights: dict[int, Seen] = {}
        self._workspace: Workspace | None = None
        # Programs of several sizes share their weights.
        self._shared: SharedWeights | None = None
        self._plain: Callable[..., Any] | None = None
        self._lock = threading.RLock()
        self.programs: dict[tuple[int, ...], tuple[Converted, NativeComponent]] = {}

    @property
    def unfused(self) -> bool:
        """Whether the graph turned out not to be a program."""
        return self._plain is not None

    def __call__(self, values: list[Any]) -> Any:
        """Run on a list of arguments, which is emptied, as `aot_autograd` asks for."""
        with self._lock:
            if self._plain is None:
                self._watch_weights(values)
                try:
                    found = self._find(values)
                except (HeatsinkError, RuntimeError, ValueError) as error:
                    # Views that fit only the traced strides, sizes that depend on data.
                    self._plain = _as_it_is(self._gm, str(error))
            if self._plain is not None:
                return self._plain(values)
            return self._run(*found, values)

    def _watch_weights(self, values: Sequence[Any]) -> None:
        """Hold the weights; one that was written to is read again, another one is an input."""
        others, written = False, set()
        for index, argument in enumerate(self._given):
            if not argument.weight:
                continue
            value: Tensor = values[index]
            held = self._weights.get(index)
            # Nothing counts what is written into inference tensors.
            if value.is_inference() or (held is not None and held.tensor is not value):
                self._given[index] = Argument(argument.name, False)
                others = True
            elif held is None or held.changed:
                written.add(argument.name)
                self._weights[index] = Seen(value)
        if others:
            self.programs.clear()
        for _, component in self.programs.values():
            component.reload(written)

    def _find(self, values: Sequence[Any]) -> tuple[Converted, NativeComponent]:
        sizes = tuple(int(value) for value in values if not isinstance(value, Tensor))
        if sizes not in self.programs:
            converted = convert(self._gm, self._given, values, lambda i: self._weights[i].tensor)
            if self._workspace is None:
                tensors = (value for value in values if isinstance(value, Tensor))
                self._workspace = Workspace(next(tensors).device)
                self._shared = SharedWeights(self._workspace.device)
            component = NativeComponent(
                converted.graph,
                device=self._workspace.device,
                passes=(compose_operators, trace_anew, *PASSES_NATIVE),
                workspace=self._workspace,
                weights=self._shared,
            )
            # Built now, so that what does not work shows here.
            component.program(1)
            while len(self.programs) >= MAX_SIZES:
                del self.programs[next(iter(self.programs))]
            self.programs[sizes] = converted, component
        return self.programs[sizes]

    def _run(self, converted: Converted, component: NativeComponent, values: list[Any]) -> Any:
        inputs = {
            f"input_{index}": value
            for index, value in enumerate(values)
            if isinstance(value, Tensor) and not self._given[index].weight
        }
        values.clear()
        done = {}
        with component.workspace.turn():
            for name, value in component.program(1).run(inputs).items():
                # As they were traced: what comes after the graph may count on it.
                out = torch.empty_strided(
                    value.shape, converted.strides[name], dtype=value.dtype, device=value.device
                )
                done[name] = out.copy_(value)
            component.workspace.lend(done.values())
        return [done[r.name] if isinstance(r, Result) else r for r in converted.results]
