"""Where the step reads what other phases computed: memory of its own, which rows are laid into."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from heatsink.runtime.graph.phases import Phase, Phases
from heatsink.runtime.native.layout import lay_out
from heatsink.runtime.native.values import Key, Store


class HandedRows:
    """The step's handed-over inputs, outside of the arena; one set for all batch sizes.

    Attributes:
        buffers: by input, `(largest batch until now, ...)`.
        copies: rows that were laid until now, by phase.
    """

    def __init__(self, phases: Phases, device: torch.device) -> None:
        self._device = device
        graph, handed = phases.graphs[Phase.STEP], phases.sources[Phase.STEP]
        layout = lay_out(graph, 1)
        named = zip(graph.inputs, graph.input_nodes(), strict=True)
        # One row of each as the program wants it, on meta.
        self._shapes = {name: layout.values[node] for name, node in named if name in handed}
        self._names = {
            home: [name for name in self._shapes if handed[name] == home]
            for home in phases.graphs
            if home in handed.values()
        }
        self.copies = dict.fromkeys(self._names, 0)
        self.buffers = self._make(1)
        # The key of what lies in a row.
        self._lying: dict[Phase, list[Key | None]] = {phase: [None] for phase in self._names}

    @property
    def bytes(self) -> int:
        """What all buffers take."""
        return sum(value.nbytes for value in self.buffers.values())

    def fit(self, batch: int) -> bool:
        """Make room for a batch; whether there are other buffers now, in which nothing lies."""
        if all(len(buffer) >= batch for buffer in self.buffers.values()):
            return False
        self.buffers = self._make(batch)
        self._lying = {phase: [None] * batch for phase in self._names}
        return True

    def lay(self, wanted: Mapping[Phase, Sequence[Key]], store: Store) -> None:
        """Copy the first rows' values here out of the store, but for those that lie here."""
        for phase, names in self._names.items():
            keys, lying = wanted[phase], self._lying[phase]
            changed = [row for row, key in enumerate(keys) if lying[row] != key]
            for first, end in _runs(changed):
                values = [store.get(key) for key in keys[first:end]]
                # Until all of it is here, nothing is.
                lying[first:end] = [None] * (end - first)
                for name in names:
                    rows = [value[name] for value in values]
                    torch.stack(rows, out=self.buffers[name][first:end])
                lying[first:end] = keys[first:end]
            self.copies[phase] += len(changed)

    def forget(self) -> None:
        """Let nothing that lies here be what is wanted."""
        self._lying = {phase: [None] * len(lying) for phase, lying in self._lying.items()}

    def _make(self, batch: int) -> dict[str, Tensor]:
        found = {}
        for name, row in self._shapes.items():
            flat = torch.zeros(batch * row.numel(), dtype=row.dtype, device=self._device)
            strides = (row.numel(), *row.stride()[1:])
            found[name] = flat.as_strided((batch, *row.shape[1:]), strides)
        return found


def _runs(rows: Sequence[int]) -> list[tuple[int, int]]:
    """Ascending rows as ranges without gaps."""
    found: list[tuple[int, int]] = []
    for row in rows:
        if found and found[-1][1] == row:
            found[-1] = found[-1][0], row + 1
        else:
            found.append((row, row + 1))
    return found
