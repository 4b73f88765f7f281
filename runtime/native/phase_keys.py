"""What the values of a phase are known by: for every row, a digest of all that they depend on."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from torch import Tensor

from heatsink.runtime.errors import InvalidRequest
from heatsink.runtime.graph.graph import BATCH, Graph
from heatsink.runtime.graph.phases import Phase, Phases
from heatsink.runtime.native.values import Digests, Key, joined


class PhaseKeys:
    """Makes the keys of phases' rows from the inputs, or from what the caller gives instead.

    Attributes:
        rows: the inputs of the whole graph that a phase's values depend on and that have a row for
            every sample, by phase.
        fixed: those that have none, or lie in memory of the caller's: no digest is made of them.
        needed: all of both, of all phases.
    """

    def __init__(self, graph: Graph, phases: Phases, held: Collection[str]) -> None:
        self._graph = graph
        self._digests: dict[str, Digests] = {}
        self.rows: dict[Phase, list[str]] = {}
        self.fixed: dict[Phase, list[str]] = {}
        for phase, outputs in phases.dependences().items():
            names = sorted(set().union(*outputs.values()))
            fixed = {n for n in names if n in held or graph.inputs[n].shape[:1] != (BATCH,)}
            if phase != Phase.STEP:
                self.fixed[phase] = [name for name in names if name in fixed]
                self.rows[phase] = [name for name in names if name not in fixed]
        self._inputs = sorted(set().union(*self.rows.values()))
        self.needed = frozenset(self._inputs).union(*self.fixed.values())
        self._known = frozenset(graph.inputs) - set(held)

    def of_inputs(
        self, inputs: Mapping[str, Tensor], given: Mapping[str, Sequence[Key]], rows: int
    ) -> dict[str, Sequence[Key]]:
        """A key of every row for every input that a phase depends on: the given one, or a digest.

        Raises:
            InvalidRequest: keys are given of an input that there is not, or not one of each row; or
                something is computed from an input that has no rows, and no key says what it holds.
        """
        self._check(given, rows)
        found: dict[str, Sequence[Key]] = {}
        for name in self._inputs:
            if name in given:
                found[name] = given[name]
            elif name in inputs:
                found[name] = self._digests.setdefault(name, Digests()).of(inputs[name])
        return found

    def of_phase(self, phase: Phase, known: Mapping[str, Sequence[Key]]) -> list[Key]:
        """A key of every row of a phase, from the keys of its inputs."""
        base = self.rows[phase]
        label = f"{phase} {' '.join(base)}".encode()
        return [joined([label, *row]) for row in zip(*(known[name] for name in base), strict=True)]

    def forget(self) -> None:
        """Let go of the rows that the next ones would be compared with."""
        self._digests.clear()

    def _check(self, given: Mapping[str, Sequence[Key]], rows: int) -> None:
        for name, keys in given.items():
            if name not in self._known:
                raise InvalidRequest(
                    f"keys: {self._graph.component} takes {sorted(self._known)}, got {name!r}"
                )
            if len(keys) != rows:
                raise InvalidRequest(f"keys: expected {rows} of {name!r}, got {len(keys)}")
            if wrong := [type(key).__name__ for key in keys if not isinstance(key, bytes)]:
                raise InvalidRequest(f"keys: expected bytes for {name!r}, got {wrong[0]}")
        for phase, fixed in self.fixed.items():
            if fixed and not set(self.rows[phase]) & set(given):
                raise InvalidRequest(
                    f"{self._graph.component}: what is kept of {phase} depends on {fixed[0]!r}, "
                    f"which has no rows; a key for each row is wanted for one of "
                    f"{self.rows[phase]}, which says what it holds"
                )
