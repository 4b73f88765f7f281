"""A native component with adapter ports: one program for rows with adapters and for rows without.

It takes what a ported ONNX graph takes (`adapter_rows`, and slots and scales of those rows), so
that one measurement of exactness serves both. A row without adapters has the bits of the graph
without ports, so there is no second graph to run it in.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from heatsink.runtime.backends.native import NativeSession
from heatsink.runtime.backends.session import Array
from heatsink.runtime.errors import InvalidRequest
from heatsink.runtime.graph.graph import Graph
from heatsink.runtime.native.phased import PhasedComponent
from heatsink.runtime.native.values import Key
from heatsink.runtime.native.workspace import Workspace
from heatsink.runtime.port_layout import ROWS_INPUT, SCALES_INPUT, SLOTS_INPUT, PortLayout


@dataclass(frozen=True)
class BankView:
    """What a session needs of an adapter bank.

    Attributes:
        layout: of the component's ports.
        tensors: the bank's own by input name, ranks included, which are read where they are; none:
            every run brings a bank along, as measurements do.
        content: the digest of what a slot holds.
    """

    layout: PortLayout
    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    content: Callable[[int], str] = str


class PortedNativeSession(NativeSession):
    """A native graph with ports, on a bank.

    Args:
        name: as `NativeSession`.
        graph: with ports.
        workspace: as `NativeSession`.
        bank: whose adapters rows have, where a run brings no bank along.
        largest: as `NativeSession`.
        threads: as `NativeSession`.
    """

    def __init__(
        self,
        name: str,
        graph: Graph,
        workspace: Workspace,
        bank: BankView,
        *,
        largest: int = 1,
        threads: int = 0,
    ) -> None:
        self._graph, self._bank, self._device = graph, bank, workspace.device
        self._room = int(graph.inputs[SLOTS_INPUT].shape[1])
        self._brought: PhasedComponent | None = None
        super().__init__(
            name, graph, workspace, largest=largest, threads=threads, held=self._held(bank.tensors)
        )
        ports = {SLOTS_INPUT, SCALES_INPUT, *bank.layout.shapes(), *bank.layout.rank_shapes()}
        self.inputs = [name for name in self.inputs if name not in ports]

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Run the component once.

        Args:
            inputs: the component's own, and nothing else where no row has an adapter; otherwise
                `adapter_rows`, `adapter_slots` and `adapter_scales`, and to use another bank than
                the session's all of its tensors.

        Raises:
            InvalidRequest: an input is missing, unknown, or of another shape.
            ResourceError: the memory did not suffice; the session can still be used.
        """
        given, brought = dict(inputs), {}
        for name in self._bank.layout.shapes():
            if name in given:
                brought[name] = given.pop(name)
        # Nothing is kept of a bank that was brought along, so there a slot's number will do.
        ports, keys = self._ports(given, content=str if brought else self._bank.content)
        self._check_names(given)
        if brought:
            # Another thread may bring another bank, or let go of this one.
            with self._component.workspace.lock:
                return self._run(self._bring(brought), {**given, **ports}, keys)
        if not self._bank.tensors and bool((ports[SLOTS_INPUT] >= 0).any()):
            raise InvalidRequest(f"{self.name}: rows have adapters, and there is no bank")
        return self._run(self._component, {**given, **ports}, keys)

    def prepare(self, inputs: Mapping[str, Array], timesteps: Sequence[Array]) -> None:
        """As `NativeSession.prepare`, with the rows' adapters."""
        given = dict(inputs)
        ports, keys = self._ports(given, len(timesteps), self._bank.content)
        self._prepare({**given, **ports}, timesteps, keys)

    def forget(self) -> None:
        """Let go of what is kept of earlier runs, and of a bank that was brought along."""
        with self._component.workspace.lock:
            super().forget()
            self._brought = None

    def _ports(
        self,
        given: dict[str, Array],
        rows: int | None = None,
        content: Callable[[int], str] = str,
    ) -> tuple[dict[str, Array], dict[str, list[Key]]]:
        """Slots and scales of the whole batch, out of what `given` says; and what they mean."""
        count = len(next(iter(given.values()), ())) if rows is None else rows
        adapted = given.pop(ROWS_INPUT, np.zeros(0, np.int64))
        slots = np.full((count, self._room), -1, np.int64)
        scales = np.zeros((count, self._room), np.float32)
        if len(adapted):
            own = given.pop(SLOTS_INPUT)
            slots[adapted, : own.shape[1]] = own
            scales[adapted, : own.shape[1]] = given.pop(SCALES_INPUT)
        given.pop(SLOTS_INPUT, None)
        given.pop(SCALES_INPUT, None)
        keys = [
            repr([(content(int(s)), float(w)) for s, w in row if s >= 0]).encode()
            for row in (zip(*each, strict=True) for each in zip(slots, scales, strict=True))
        ]
        return {SLOTS_INPUT: slots, SCALES_INPUT: scales}, {SLOTS_INPUT: keys, SCALES_INPUT: keys}

    def _held(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A bank by input name; of none an empty one."""
        layout = self._bank.layout
        return {
            name: tensors[name]
            if name in tensors
            else torch.zeros(shape, dtype=self._graph.inputs[name].dtype, device=self._device)
            for name, shape in {**layout.shapes(), **layout.rank_shapes()}.items()
            if name in self._graph.inputs
        }

    def _bring(self, bank: Mapping[str, Array]) -> PhasedComponent:
        """The graph on memory of its own that holds this bank; nothing is kept between runs."""
        if self._brought is None:
            held = self._held({}) if self._bank.tensors else self._component.held
            self._brought = self._component
            if self._bank.tensors:
                space = self._component.workspace
                self._brought = PhasedComponent(
                    self._graph, device=self._device, workspace=space, held=held
                )
        for name, tensor in self._brought.held.items():
            if name in bank:
                tensor.copy_(torch.from_numpy(bank[name]))
            else:
                tensor.fill_(self._bank.layout.rank)
        self._brought.forget()
        return self._brought
