"""What requests hold of the bank while they run."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from types import TracebackType

import numpy as np

from heatsink.runtime.adapter_mix import Mix
from heatsink.runtime.adapter_slots import Slot
from heatsink.runtime.backends.session import Array
from heatsink.runtime.port_layout import SCALES_INPUT, SLOTS_INPUT


class Lease:
    """Slots that keep their bytes until `release`; a context manager that releases at its end.

    Args:
        mixes: one for each request.
        slots: by digest, every adapter of the mixes.
        release: gives the slots back.
    """

    def __init__(
        self,
        mixes: Sequence[Mix],
        slots: Mapping[str, Slot],
        release: Callable[[Iterable[Slot]], None],
    ) -> None:
        self.mixes = tuple(mixes)
        self._slots, self._release = dict(slots), release
        self._loads = [slot.load for slot in slots.values() if slot.load is not None]
        self._touched = {
            digest: slot.adapter.components
            for digest, slot in slots.items()
            if slot.adapter is not None
        }
        self._open = True

    def __enter__(self) -> Lease:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.release()

    def wait(self) -> None:
        """Whatever is queued from here on sees the adapters.

        On the CPU the caller waits until they are there; on a GPU its current stream does.

        Raises:
            ResourceError: one could not be copied into its slot.
        """
        for load in self._loads:
            load.wait()

    def release(self) -> None:
        """Give the slots back; on a GPU from the stream that used them. Again does nothing."""
        if self._open:
            self._open = False
            self._release(self._slots.values())

    def entries(self, place: int, component: str) -> list[tuple[int, float]]:
        """Slot and scale of each adapter of request `place` that changes `component`, in order."""
        return [
            (self._slots[digest].number, weight)
            for digest, weight in self.mixes[place].weights.items()
            if component in self._touched[digest]
        ]

    def row_inputs(self, component: str, owners: Sequence[int]) -> dict[str, Array]:
        """The ports' inputs for rows of these requests.

        Args:
            component: its name.
            owners: for each row the place of its request.

        Returns:
            `adapter_slots` int64 and `adapter_scales` float32, both `(rows, n)` with n the most
            adapters of a row, the rest -1 and 0; nothing where no row has one.
        """
        entries = [self.entries(owner, component) for owner in owners]
        width = max(map(len, entries), default=0)
        if not width:
            return {}
        slots = np.full((len(entries), width), -1, np.int64)
        scales = np.zeros((len(entries), width), np.float32)
        for row, own in enumerate(entries):
            for column, (slot, scale) in enumerate(own):
                slots[row, column], scales[row, column] = slot, scale
        return {SLOTS_INPUT: slots, SCALES_INPUT: scales}


def trimmed(inputs: Mapping[str, Array]) -> dict[str, Array]:
    """Row inputs without the columns of `adapter_slots` in which no row has an adapter."""
    found = dict(inputs)
    if SLOTS_INPUT in found:
        width = int((found[SLOTS_INPUT] >= 0).sum(axis=1).max(initial=0))
        for name in (SLOTS_INPUT, SCALES_INPUT):
            found[name] = found[name][:, :width]
            if not width:
                del found[name]
    return found
