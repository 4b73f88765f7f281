"""A component whose phases are computed as rarely as they change, and kept by row.

What depends on a request or a schedule alone is computed once, and lies in memory that the step's
program reads where it is: a step copies in the latents and nothing else, while the rows stay what
they were. Values are known by the digest of the inputs that they depend on, so they outlive a call
and are shared by rows that ask for the same.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from heatsink.runtime.errors import InvalidRequest
from heatsink.runtime.graph.cost import Cost, costs, total
from heatsink.runtime.graph.graph import BATCH, Graph
from heatsink.runtime.graph.phases import Phase, Phases, split
from heatsink.runtime.native.component import NativeComponent, Workspace, check_inputs
from heatsink.runtime.native.layout import lay_out
from heatsink.runtime.native.values import Digests, Key, Store, digest, joined

KEEP_BYTES = 1 << 28
"""What a component keeps of values between calls, by default."""
TIMESTEP = "timestep"
# Rows of a phase that are computed at once; more take several runs.
_LARGEST = 16
Fetch = Callable[[str, Tensor], Tensor]


@dataclass(frozen=True)
class Use:
    """What a phase costs, and how often it was computed.

    Attributes:
        cost: of one row.
        launches: calls of one run.
        rows: that were computed until now.
        copies: rows that were copied to where the step reads them.
    """

    cost: Cost
    launches: int
    rows: int
    copies: int


class PhasedComponent:
    """Runs a graph by its phases, at any batch size; several threads may call it.

    Attributes:
        graph: the whole, after the passes.
        phases: its parts.
        workspace: the arena and lock of all programs.
    """

    def __init__(
        self,
        graph: Graph,
        *,
        device: torch.device | str = "cpu",
        workspace: Workspace | None = None,
        held: Mapping[str, Tensor] | None = None,
        keep_bytes: int = KEEP_BYTES,
    ) -> None:
        """Take the graph; nothing is loaded or built yet.

        Args:
            graph: valid, after the passes; it is not changed.
            device: where it runs.
            workspace: shared with other components, on the same device; its own by default.
            held: inputs that are read where they are, as `NativeComponent` takes them. What depends
                on them is kept by the keys that the caller gives `run` for their users.
            keep_bytes: how much of values is kept that no row needs now.
        """
        self.graph = graph
        self.workspace = workspace or Workspace(device)
        self.phases: Phases = split(graph)
        self._held = dict(held or {})
        self._store = Store(keep_bytes)
        self._digests: dict[str, Digests] = {}
        self._rows: dict[Phase, int] = {}
        self._copies: dict[Phase, int] = {}
        self._parts: dict[Phase, NativeComponent] = {
            phase: NativeComponent(
                part,
                device=device,
                workspace=self.workspace,
                held={name: value for name, value in self._held.items() if name in part.inputs},
            )
            for phase, part in self.phases.graphs.items()
            if phase != Phase.STEP
        }
        self._bases: dict[Phase, list[str]] = {phase: self._base(phase) for phase in self._parts}
        # What the step reads of other phases, and for each of them the key of what lies in a row.
        self._buffers = self._make_buffers(1)
        self._lying: dict[Phase, list[Key | None]] = {phase: [None] for phase in self._parts}
        own = {n: v for n, v in self._held.items() if n in self.phases.graphs[Phase.STEP].inputs}
        self._step = NativeComponent(
            self.phases.graphs[Phase.STEP],
            device=device,
            workspace=self.workspace,
            held={**own, **self._buffers},
        )

    @property
    def held(self) -> Mapping[str, Tensor]:
        """The inputs that lie in memory of the caller's."""
        return self._held

    @property
    def kept_bytes(self) -> int:
        """Values that are kept by key, and where the step reads them."""
        buffers = sum(value.nbytes for value in self._buffers.values())
        return self._store.bytes + buffers

    def reserve(self, batch: int) -> None:
        """Make room for this batch size, so that smaller programs stay when it comes."""
        with self.workspace.lock:
            self._fit(batch)
            self._step.reserve(batch)

    def forget(self) -> None:
        """Let go of all values that are kept."""
        with self.workspace.lock:
            self._store.clear()
            for digests in self._digests.values():
                digests.forget()
            for lying in self._lying.values():
                lying[:] = [None] * len(lying)

    def uses(self, rows: int = 1) -> dict[Phase, Use]:
        """Every phase's cost for a row, its launches in a run of `rows`, and how often it ran."""
        found = {}
        with self.workspace.lock:
            for phase, graph in self.phases.graphs.items():
                part = self._parts.get(phase, self._step)
                if phase == Phase.STEP:
                    self._fit(rows)
                found[phase] = Use(
                    total(costs(graph, 1)),
                    part.program(rows).launches,
                    self._rows.get(phase, 0),
                    self._copies.get(phase, 0),
                )
        return found

    def run(
        self, inputs: Mapping[str, Tensor], keys: Mapping[str, Sequence[Key]] | None = None
    ) -> dict[str, Tensor]:
        """Compute the outputs.

        Args:
            inputs: every input of the whole graph by name that is not held.
            keys: for inputs whose bytes don't say what they mean (an adapter's slot), a key of each
                row that does.

        Returns:
            The outputs by name; they are the caller's own.

        Raises:
            InvalidRequest: an input is missing, unknown, of another shape or kind; no rows.
        """
        rows = self._check(inputs)
        with self.workspace.lock:
            known = self._input_keys(inputs, keys or {}, rows)
            wanted = {phase: self._phase_keys(phase, known) for phase in self._parts}
            self._compute(wanted, lambda name, places: inputs[name][places])
            self._fit(rows)
            self._lay(wanted)
            graph = self.phases.graphs[Phase.STEP]
            given = {name: inputs[name] for name in graph.inputs if name in inputs}
            found = self._step.program(rows).run(given)
            out = {name: value.clone() for name, value in found.items()}
            self._count(Phase.STEP, rows)
            self._store.trim({key for each in wanted.values() for key in each})
        return out

    def prepare(
        self,
        inputs: Mapping[str, Tensor],
        timesteps: Sequence[Tensor],
        keys: Mapping[str, Sequence[Key]] | None = None,
    ) -> None:
        """Compute ahead, batched, what `run` will need for these rows at these times.

        Args:
            inputs: the inputs that a request decides, by name; what changes every step may lack.
            timesteps: for every row the times it will be run at, `(steps,)`.
            keys: as in `run`.

        Raises:
            InvalidRequest: there are not as many `timesteps` as rows, or an input is missing.
        """
        rows = len(timesteps)
        needed = {name for base in self._bases.values() for name in base} - {TIMESTEP}
        if missing := sorted(needed - set(inputs)):
            raise InvalidRequest(f"{self.graph.component}: prepare lacks the inputs {missing}")
        if short := sorted(name for name in needed if len(inputs[name]) != rows):
            raise InvalidRequest(f"prepare: {rows} rows have timesteps, not as many {short[0]!r}")
        if not rows:
            return
        with self.workspace.lock:
            counts = torch.tensor([len(each) for each in timesteps])
            owners = torch.repeat_interleave(torch.arange(rows), counts)
            times = torch.cat(list(timesteps))
            by_row = self._input_keys({n: inputs[n] for n in needed}, keys or {}, rows)
            known = {n: [by_row[n][owner] for owner in owners.tolist()] for n in needed}
            known[TIMESTEP] = [digest(time) for time in times]
            self._compute(
                {phase: self._phase_keys(phase, known) for phase in self._parts},
                lambda n, places: times[places] if n == TIMESTEP else inputs[n][owners[places]],
            )
            self._store.trim()

    def _check(self, inputs: Mapping[str, Tensor]) -> int:
        if twice := sorted(set(inputs) & set(self._held)):
            raise InvalidRequest(f"{self.graph.component}: the inputs {twice} are held already")
        check_inputs(self.graph, {**inputs, **self._held})
        sizes = [len(inputs[n]) for n, s in self.graph.inputs.items() if s.shape[:1] == (BATCH,)]
        rows = sizes[0] if sizes else 1
        if rows < 1:
            raise InvalidRequest(f"{self.graph.component}: expected at least 1 row, got {rows}")
        return rows

    def _base(self, phase: Phase) -> list[str]:
        """The inputs of the whole graph that a phase's values depend on, row by row."""
        graph, handed = self.phases.graphs[phase], self.phases.sources[phase]
        names = {name for name in graph.inputs if name not in handed and name not in self._held}
        for source in set(handed.values()):
            names.update(self._base(source))
        return sorted(names)

    def _input_keys(
        self, inputs: Mapping[str, Tensor], keys: Mapping[str, Sequence[Key]], rows: int
    ) -> dict[str, Sequence[Key]]:
        """A key of every row, for every input that a phase depends on."""
        for name, given in keys.items():
            if len(given) != rows:
                raise InvalidRequest(f"keys: expected {rows} of {name!r}, got {len(given)}")
        found: dict[str, Sequence[Key]] = {}
        for name in dict.fromkeys(name for base in self._bases.values() for name in base):
            if name in keys:
                found[name] = keys[name]
            elif name in inputs:
                found[name] = self._digests.setdefault(name, Digests()).of(inputs[name])
        return found

    def _phase_keys(self, phase: Phase, known: Mapping[str, Sequence[Key]]) -> list[Key]:
        base = self._bases[phase]
        label = f"{phase} {' '.join(base)} ".encode()
        rows = zip(*(known[name] for name in base), strict=True)
        return [joined([label, *row]) for row in rows]

    def _compute(self, wanted: Mapping[Phase, Sequence[Key]], fetch: Fetch) -> None:
        """See that the store has the values of all keys; the phases come in order.

        `fetch` gives an input's rows at places of the keys.
        """
        for phase, keys in wanted.items():
            missing: dict[Key, int] = {}
            for place, key in enumerate(keys):
                if key not in self._store:
                    missing.setdefault(key, place)
            places = list(missing.values())
            for start in range(0, len(places), _LARGEST):
                self._compute_rows(phase, places[start : start + _LARGEST], wanted, fetch)

    def _compute_rows(
        self,
        phase: Phase,
        places: list[int],
        wanted: Mapping[Phase, Sequence[Key]],
        fetch: Fetch,
    ) -> None:
        part, handed = self._parts[phase], self.phases.sources[phase]
        # Few sizes, so that few programs are made; the rows that fill them up are dropped.
        size = 1 << (len(places) - 1).bit_length()
        filled = places + places[:1] * (size - len(places))
        given = {}
        for name in part.graph.inputs:
            if name in handed:
                keys = [wanted[handed[name]][place] for place in filled]
                given[name] = torch.stack([self._store.get(key)[name] for key in keys])
            elif name not in self._held:
                given[name] = fetch(name, torch.tensor(filled))
        out = part.program(size).run(given)
        for row, place in enumerate(places):
            values = {name: value[row].clone() for name, value in out.items()}
            self._store.put(wanted[phase][place], values)
        self._count(phase, len(places))

    def _count(self, phase: Phase, rows: int) -> None:
        self._rows[phase] = self._rows.get(phase, 0) + rows

    def _lay(self, wanted: Mapping[Phase, Sequence[Key]]) -> None:
        """Put values where the step reads them, but for those that lie there."""
        handed = self.phases.sources[Phase.STEP]
        for phase, keys in wanted.items():
            names = [name for name, home in handed.items() if home == phase]
            lying = self._lying[phase]
            for row, key in enumerate(keys if names else ()):
                if lying[row] == key:
                    continue
                values = self._store.get(key)
                # Until all of it is there, nothing is.
                lying[row] = None
                for name in names:
                    self._buffers[name][row].copy_(values[name])
                lying[row] = key
                self._copies[phase] = self._copies.get(phase, 0) + 1

    def _fit(self, batch: int) -> None:
        """Make the buffers large enough; what lay in smaller ones is laid anew."""
        if any(len(buffer) < batch for buffer in self._buffers.values()):
            self._buffers = self._make_buffers(batch)
            self._lying = {phase: [None] * batch for phase in self._parts}
            own = {n: v for n, v in self._step.held.items() if n not in self._buffers}
            self._step.hold({**own, **self._buffers})

    def _make_buffers(self, batch: int) -> dict[str, Tensor]:
        """Memory of the step's handed-over inputs, outside of the arena."""
        graph, handed = self.phases.graphs[Phase.STEP], self.phases.sources[Phase.STEP]
        layout = lay_out(graph, batch)
        found = {}
        for name, node in zip(graph.inputs, graph.input_nodes(), strict=True):
            if name in handed:
                like = layout.values[node]
                flat = torch.zeros(like.numel(), dtype=like.dtype, device=self.workspace.device)
                found[name] = flat.as_strided(like.shape, like.stride())
        return found
