"""A component whose phases are computed as rarely as they change, and kept by row.

What depends on a request or a schedule alone is computed once, and lies in memory that the step's
program reads where it is: a step copies in the latents and nothing else, while the rows stay what
they were. Values are known by the digest of the inputs that they depend on, so they outlive a call
and are shared by rows that ask for the same.

Rows are computed in few batch sizes, whatever number of them is missing; so a phase with operators
whose results may depend on the batch (`heatsink.runtime.native.exact`) is computed in one size
only, filled up, or its values would depend on what was asked before.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from heatsink.runtime.errors import InvalidRequest
from heatsink.runtime.graph.cost import Cost, costs, total
from heatsink.runtime.graph.graph import BATCH, Graph
from heatsink.runtime.graph.phases import Phase, Phases, split
from heatsink.runtime.native.component import NativeComponent, check_inputs
from heatsink.runtime.native.exact import by_place, inexact
from heatsink.runtime.native.handed import HandedRows
from heatsink.runtime.native.phase_keys import PhaseKeys
from heatsink.runtime.native.shared_weights import SharedWeights
from heatsink.runtime.native.values import Key, Store, digest
from heatsink.runtime.native.workspace import Workspace

KEEP_BYTES = 1 << 28
"""What a component keeps of values between calls, by default."""
TIMESTEP = "timestep"
SIZES = (1, 2, 4, 8, 16)
"""Rows of a phase that are computed at once, by default; more take several runs."""
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
        weights: SharedWeights | None = None,
        keep_bytes: int = KEEP_BYTES,
        sizes: Sequence[int] = SIZES,
    ) -> None:
        """Take the graph; nothing is loaded or built yet.

        Args:
            graph: valid, after the passes; it is not changed.
            device: where it runs.
            workspace: shared with other components, on the same device; its own by default.
            held: inputs that are read where they are, as `NativeComponent` takes them. What depends
                on them is kept by the keys that the caller gives `run` for their users.
            weights: shared with graphs of the same module; its own by default.
            keep_bytes: how much of values is kept that no row needs now.
            sizes: batch sizes in which phases are computed, ascending; the largest alone for a
                phase whose results may depend on it, and 1 for one whose results may depend on a
                row's place.

        Raises:
            ValueError: the workspace is on another device, a held tensor is not what the graph
                takes, or `sizes` is empty, not ascending or not positive.
        """
        if not sizes or sizes[0] < 1 or list(sizes) != sorted(set(sizes)):
            raise ValueError(f"sizes: expected ascending batch sizes, got {list(sizes)}")
        self.graph = graph
        self.workspace = workspace or Workspace(device)
        self.phases: Phases = split(graph)
        self._held = dict(held or {})
        weights = weights or SharedWeights(device)
        self._store = Store(keep_bytes)
        self._keys = PhaseKeys(graph, self.phases, self._held)
        self._rows: dict[Phase, int] = {}
        self._parts: dict[Phase, NativeComponent] = {
            phase: NativeComponent(
                part,
                device=device,
                workspace=self.workspace,
                weights=weights,
                held={name: value for name, value in self._held.items() if name in part.inputs},
            )
            for phase, part in self.phases.graphs.items()
            if phase != Phase.STEP
        }
        self._sizes: dict[Phase, Sequence[int]] = {
            phase: _sizes(part.graph, sizes) for phase, part in self._parts.items()
        }
        self._handed = HandedRows(self.phases, self.workspace.device)
        own = {n: v for n, v in self._held.items() if n in self.phases.graphs[Phase.STEP].inputs}
        self._step = NativeComponent(
            self.phases.graphs[Phase.STEP],
            device=device,
            workspace=self.workspace,
            weights=weights,
            held={**own, **self._handed.buffers},
        )

    @property
    def held(self) -> Mapping[str, Tensor]:
        """The inputs that lie in memory of the caller's."""
        return self._held

    @property
    def kept_bytes(self) -> int:
        """Values that are kept by key, and where the step reads them."""
        return self._store.bytes + self.buffer_bytes

    @property
    def buffer_bytes(self) -> int:
        """Where the step reads values of other phases, for the largest batch until now."""
        return self._handed.bytes

    def reserve(self, batch: int) -> None:
        """Make room for this batch size, so that smaller programs stay when it comes."""
        with self.workspace.turn():
            self._fit(batch)
            self._step.reserve(batch)

    def capture(self, batches: Iterable[int]) -> None:
        """Make all programs for these batch sizes, a part's largest first.

        On a CUDA device they are captured, so that no request waits for it.
        """
        batches = sorted(set(batches), reverse=True)
        if not batches:
            return
        with self.workspace.turn():
            self.reserve(batches[0])
            # An arena that grows later would drop what is captured by then.
            for phase, part in self._parts.items():
                part.reserve(self._sizes[phase][-1])
            self._step.capture(batches)
            for phase, part in self._parts.items():
                part.capture(self._sizes[phase])

    def forget(self) -> None:
        """Let go of all values that are kept."""
        with self.workspace.turn():
            self._store.clear()
            self._keys.forget()
            self._handed.forget()

    def reload(self, parameters: Container[str]) -> None:
        """Read the weights that are made of these parameters again before the next run.

        Values that a phase computed with them go.

        Args:
            parameters: names that the graph's origins have.
        """
        with self.workspace.turn():
            stale = [part.reload(parameters) for part in self._parts.values()]
            self._step.reload(parameters)
            if any(stale):
                self.forget()

    def uses(self, rows: int = 1) -> dict[Phase, Use]:
        """Every phase's cost for a row, its launches in a run of `rows`, and how often it ran."""
        found = {}
        with self.workspace.turn():
            for phase, graph in self.phases.graphs.items():
                part = self._parts.get(phase, self._step)
                if phase == Phase.STEP:
                    self._fit(rows)
                found[phase] = Use(
                    total(costs(graph, 1)),
                    part.program(rows).launches,
                    self._rows.get(phase, 0),
                    self._handed.copies.get(phase, 0),
                )
        return found

    def run(
        self, inputs: Mapping[str, Tensor], keys: Mapping[str, Sequence[Key]] | None = None
    ) -> dict[str, Tensor]:
        """Compute the outputs.

        Args:
            inputs: every input of the whole graph by name that is not held.
            keys: for inputs whose bytes don't say what they mean (an adapter's slot), or are many
                and known already, a key of each row that does.

        Returns:
            The outputs by name; they are the caller's own.

        Raises:
            InvalidRequest: an input is missing, unknown, of another shape or kind; no rows; keys of
                what is no input, or too few; none where what is kept depends on a held input.
        """
        rows = self._check(inputs)
        with self.workspace.turn():
            known = self._keys.of_inputs(inputs, keys or {}, rows)
            wanted = {phase: self._keys.of_phase(phase, known) for phase in self._parts}
            self._compute(wanted, lambda name, places: inputs[name][places], inputs)
            self._fit(rows)
            self._handed.lay(wanted, self._store)
            graph = self.phases.graphs[Phase.STEP]
            given = {name: inputs[name] for name in graph.inputs if name in inputs}
            out = self.workspace.copies(self._step.program(rows).run(given))
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

        All of it is kept until another call needs the memory.

        Args:
            inputs: the inputs that a request decides, by name; what changes every step may lack.
            timesteps: for every row the times it will be run at, `(steps,)`.
            keys: as in `run`; of `timestep` there are none.

        Raises:
            InvalidRequest: there are not as many `timesteps` as rows, or an input is missing, of
                another shape or kind; or keys are as `run` refuses them.
        """
        rows, keys = len(timesteps), keys or {}
        self._check_prepared(inputs, timesteps, keys)
        if not rows:
            return
        with self.workspace.turn():
            counts = torch.tensor([len(each) for each in timesteps])
            owners = torch.repeat_interleave(torch.arange(rows), counts)
            times = torch.cat(list(timesteps))
            given = {name: value for name, value in inputs.items() if name != TIMESTEP}
            by_row = self._keys.of_inputs(given, keys, rows)
            known = {n: [of[owner] for owner in owners.tolist()] for n, of in by_row.items()}
            known[TIMESTEP] = [digest(time) for time in times]
            wanted = {phase: self._keys.of_phase(phase, known) for phase in self._parts}
            self._compute(
                wanted,
                lambda n, places: times[places] if n == TIMESTEP else inputs[n][owners[places]],
                inputs,
            )
            self._store.trim({key for each in wanted.values() for key in each})

    def _check_prepared(
        self,
        inputs: Mapping[str, Tensor],
        timesteps: Sequence[Tensor],
        keys: Mapping[str, Sequence[Key]],
    ) -> None:
        rows, name = len(timesteps), self.graph.component
        needed = self._keys.needed - {TIMESTEP, *self._held}
        if missing := sorted(needed - set(inputs)):
            raise InvalidRequest(f"{name}: prepare lacks the inputs {missing}")
        if TIMESTEP in keys:
            raise InvalidRequest(f"{name}: prepare takes no keys of {TIMESTEP!r}")
        for each in sorted(needed):
            spec, value = self.graph.inputs[each], inputs[each]
            shape = tuple(rows if size == BATCH else size for size in spec.shape)
            same_kind = value.is_floating_point() == spec.dtype.is_floating_point
            if tuple(value.shape) != shape or not same_kind:
                raise InvalidRequest(
                    f"{name}: prepare wants {each!r} {shape} {spec.dtype} for {rows} rows with "
                    f"timesteps, got {tuple(value.shape)} {value.dtype}"
                )
        for times in timesteps:
            if times.dim() != 1 or not times.is_floating_point():
                raise InvalidRequest(
                    f"{name}: prepare wants float timesteps (steps,) of each row, "
                    f"got {tuple(times.shape)} {times.dtype}"
                )

    def _check(self, inputs: Mapping[str, Tensor]) -> int:
        if twice := sorted(set(inputs) & set(self._held)):
            raise InvalidRequest(f"{self.graph.component}: the inputs {twice} are held already")
        check_inputs(self.graph, {**inputs, **self._held})
        sizes = [len(inputs[n]) for n, s in self.graph.inputs.items() if s.shape[:1] == (BATCH,)]
        rows = sizes[0] if sizes else 1
        if rows < 1:
            raise InvalidRequest(f"{self.graph.component}: expected at least 1 row, got {rows}")
        return rows

    def _compute(
        self,
        wanted: Mapping[Phase, Sequence[Key]],
        fetch: Fetch,
        fixed: Mapping[str, Tensor],
    ) -> None:
        """See that the store has the values of all keys; the phases come in order.

        `fetch` gives an input's rows at places of the keys, `fixed` holds the inputs without rows.
        """
        for phase, keys in wanted.items():
            missing: dict[Key, int] = {}
            for place, key in enumerate(keys):
                if key not in self._store:
                    missing.setdefault(key, place)
            places, largest = list(missing.values()), self._sizes[phase][-1]
            for start in range(0, len(places), largest):
                self._compute_rows(phase, places[start : start + largest], wanted, fetch, fixed)

    def _compute_rows(
        self,
        phase: Phase,
        places: list[int],
        wanted: Mapping[Phase, Sequence[Key]],
        fetch: Fetch,
        fixed: Mapping[str, Tensor],
    ) -> None:
        part, handed = self._parts[phase], self.phases.sources[phase]
        # Few sizes, so that few programs are made; the rows that fill them up are dropped.
        size = next(size for size in self._sizes[phase] if size >= len(places))
        filled = places + places[:1] * (size - len(places))
        given = {}
        for name in part.graph.inputs:
            if name in handed:
                keys = [wanted[handed[name]][place] for place in filled]
                given[name] = torch.stack([self._store.get(key)[name] for key in keys])
            elif name in self._keys.rows[phase]:
                given[name] = fetch(name, torch.tensor(filled))
            elif name not in self._held:
                given[name] = fixed[name]
        out = part.program(size).run(given)
        for row, place in enumerate(places):
            values = {name: value[row].clone() for name, value in out.items()}
            self._store.put(wanted[phase][place], values)
        self._count(phase, len(places))

    def _count(self, phase: Phase, rows: int) -> None:
        self._rows[phase] = self._rows.get(phase, 0) + rows

    def _fit(self, batch: int) -> None:
        """Make room where the step reads; what lay in less is laid anew."""
        if self._handed.fit(batch):
            self._step.hold({**self._step.held, **self._handed.buffers})


def _sizes(graph: Graph, sizes: Sequence[int]) -> Sequence[int]:
    """The batch sizes in which a phase gives a row the same bits."""
    if by_place(graph, sizes[-1]):
        return (1,)
    return sizes[-1:] if inexact(graph) else sizes
