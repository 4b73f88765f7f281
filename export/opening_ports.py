"""A component of an engine with adapter ports: two graphs, and which of them runs which rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from heatsink.export import ported_exactness
from heatsink.export.manifest import PortedGraph, TensorSpec
from heatsink.runtime.backends.session import Array, Phased, Session
from heatsink.runtime.buckets import plan, run_rows
from heatsink.runtime.errors import InvalidRequest, NotBuilt
from heatsink.runtime.port_layout import SCALES_INPUT, SLOTS_INPUT, PortLayout

if TYPE_CHECKING:
    from torch import Tensor

    from heatsink.export.opening import OpenComponent

Mixes = list[list[tuple[int, float]]]


def _mixes(slots: Array, scales: Array) -> Mixes:
    return [
        [(int(s), float(w)) for s, w in zip(*row, strict=True) if s >= 0]
        for row in zip(slots, scales, strict=True)
    ]


class PortedComponent:
    """Runs rows with adapters in the graph with ports, and runs without any in its twin.

    It takes `adapter_slots` and `adapter_scales` `(rows, n)` beside the component's own inputs, or
    neither. Rows with adapters are put together, so that as few runs as possible have ports. The
    graph with ports is opened when it is first used, and each of its buckets is checked against the
    known answer before its first use, with each room for adapters.

    Args:
        twin: the component without ports.
        inputs: the component's own inputs.
        ported: what the manifest says of the graph with ports.
        layout: of its ports.
        bank: its bank's tensors, which are read where they are at every run; none where the graph
            with ports was opened on them.
        opener: opens the graph with ports.
        planned: chooses the buckets of a number of rows.
        hint: what the refusal of another answer ends with.
    """

    def __init__(
        self,
        twin: OpenComponent,
        inputs: list[TensorSpec],
        ported: PortedGraph,
        layout: PortLayout,
        bank: Mapping[str, Tensor],
        opener: Callable[[], Session],
        planned: Callable[[int, Sequence[int]], list[int]] = plan,
        hint: str = "",
    ) -> None:
        self._planned, self._hint = planned, hint
        self._twin, self._inputs, self._ported, self._layout = twin, inputs, ported, layout
        self._bank = {name: tensor.numpy() for name, tensor in bank.items()}
        self._opener = opener
        self._session: Session | None = None
        self._checked: set[tuple[int, int]] = set()
        self.name = layout.component

    def check_first(self) -> None:
        """Check the smallest bucket of the graph that rows without adapters run in."""
        if self._ported.twin:
            self._twin.check_first()
        else:
            self._check(min(self._ported.known.buckets), min(self._ported.counts))

    def __call__(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Run the rows of `inputs` and return the outputs' rows, in order.

        Raises:
            InvalidRequest: only one of slots and scales, their shapes differ, or there is no such
                slot.
            NotBuilt: a row has more adapters than the graph has room for.
            EngineMismatch: another answer than when the engine was built.
        """
        given = dict(inputs)
        slots, scales = given.pop(SLOTS_INPUT, None), given.pop(SCALES_INPUT, None)
        rows = len(next(iter(given.values())))
        slots, scales = self._checked_inputs(slots, scales, rows)
        adapted = (slots >= 0).any(axis=1)
        if self._ported.twin and not adapted.any():
            return self._twin(given)
        order = np.argsort(~adapted, kind="stable")
        given |= {SLOTS_INPUT: slots, SCALES_INPUT: scales}
        ordered = {name: value[order] for name, value in given.items()}
        out = run_rows(self, ordered, self._ported.known.buckets, planned=self._planned)
        back = np.argsort(order, kind="stable")
        return {name: value[back] for name, value in out.items()}

    def prepare(self, inputs: Mapping[str, Array], timesteps: Sequence[Array]) -> None:
        """Compute ahead what a request and a schedule decide, where the backend keeps it."""
        given = dict(inputs)
        slots, scales = self._checked_inputs(
            given.pop(SLOTS_INPUT, None), given.pop(SCALES_INPUT, None), len(timesteps)
        )
        mixes = _mixes(slots, scales)
        if self._ported.twin and not any(mixes):
            self._twin.prepare(given, timesteps)
            return
        session = self._open()
        if not isinstance(session, Phased):
            return
        room = max(self._ported.counts)
        # What is checked later would forget what is prepared now.
        for bucket in self._planned(len(timesteps), self._ported.known.buckets):
            self._check(bucket, room)
        session.prepare({**given, **ported_exactness.port_inputs(mixes, room)}, timesteps)

    def forget(self) -> None:
        """Let go of what the backend keeps of earlier runs."""
        self._twin.forget()
        if isinstance(self._session, Phased):
            self._session.forget()

    def _checked_inputs(
        self, slots: Array | None, scales: Array | None, rows: int
    ) -> tuple[Array, Array]:
        if slots is None and scales is None:
            return np.full((rows, 1), -1, np.int64), np.zeros((rows, 1), np.float32)
        if slots is None or scales is None:
            raise InvalidRequest(f"{self.name}: {SLOTS_INPUT} and {SCALES_INPUT} go together")
        if slots.ndim != 2 or slots.shape != scales.shape or len(slots) != rows:
            raise InvalidRequest(
                f"{self.name}: expected {SLOTS_INPUT} and {SCALES_INPUT} of shape ({rows}, n), "
                f"got {slots.shape} and {scales.shape}"
            )
        if slots.size and int(slots.max()) >= self._layout.slots:
            raise InvalidRequest(
                f"{SLOTS_INPUT}: expected slots below {self._layout.slots}, got {int(slots.max())}"
            )
        most = int((slots >= 0).sum(axis=1).max(initial=0))
        if most > max(self._ported.counts):
            raise NotBuilt(
                f"{self.name}: a row has {most} adapters, this engine has room for "
                f"{max(self._ported.counts)}"
            )
        return slots, scales

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Run one bucket, in the graph that its rows need."""
        given = dict(inputs)
        slots, scales = given.pop(SLOTS_INPUT), given.pop(SCALES_INPUT)
        mixes = _mixes(slots, scales)
        bucket = len(mixes)
        if not any(mixes) and self._ported.twin and bucket in self._twin.buckets:
            return self._twin(given)
        most = max(map(len, mixes))
        room = min(count for count in self._ported.counts if count >= most)
        self._check(bucket, room)
        ports = ported_exactness.port_inputs(mixes, room)
        return self._open().run({**given, **ports, **self._bank})

    def _open(self) -> Session:
        if self._session is None:
            self._session = self._opener()
        return self._session

    def _check(self, bucket: int, room: int) -> None:
        known, counts = self._ported.known, self._ported.counts
        if (bucket, room) not in self._checked and known.answers:
            ported_exactness.check(
                self._open(), self._inputs, self._layout, counts, known, bucket, room, self._hint
            )
        self._checked.add((bucket, room))
