"""A component as programs, one a batch size, made when they are first needed."""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping, Sequence

import torch
from torch import Tensor

from heatsink.runtime.errors import InvalidRequest
from heatsink.runtime.graph.graph import BATCH, Graph
from heatsink.runtime.graph.passes import run_passes
from heatsink.runtime.graph.passes.protocol import Pass
from heatsink.runtime.memory import Plan, plan
from heatsink.runtime.native.layout import Layout, lay_out
from heatsink.runtime.native.outs import forget_packed
from heatsink.runtime.native.program import Program, check_held
from heatsink.runtime.native.shared_weights import SharedWeights, made_of
from heatsink.runtime.native.workspace import Workspace


def check_inputs(graph: Graph, inputs: Mapping[str, Tensor]) -> None:
    """See that inputs are what a graph takes; a float may have another width than its own.

    Raises:
        InvalidRequest: an input is missing, unknown, of another shape or kind.
    """
    graph.check_inputs(inputs)
    for name, spec in graph.inputs.items():
        if inputs[name].is_floating_point() != spec.dtype.is_floating_point:
            raise InvalidRequest(
                f"{graph.component}: input {name!r} wants {spec.dtype}, got {inputs[name].dtype}"
            )


class NativeComponent:
    """Runs a graph at any batch size; several threads may call it.

    Weights are loaded once, for the first program, and used where they lie if they have the graph's
    dtype and lie on the device already. Programs share them and the workspace's arena.

    Attributes:
        graph: after the passes.
        workspace: its arena and lock.
    """

    def __init__(
        self,
        graph: Graph,
        *,
        device: torch.device | str = "cpu",
        passes: Sequence[Pass] = (),
        workspace: Workspace | None = None,
        held: Mapping[str, Tensor] | None = None,
        weights: SharedWeights | None = None,
    ) -> None:
        """Take the graph; nothing is loaded or built yet.

        Args:
            graph: valid; it is not changed. It computes in its own dtype.
            device: where it runs.
            passes: run on a copy of the graph first.
            workspace: shared with other components, on the same device; its own by default.
            held: inputs by name that every program reads where they are, an adapter bank's say;
                they stay the caller's, who gives no others of these names. Of one with a row for
                each of the batch a program reads the first rows; it has as many as the largest
                batch.
            weights: shared with graphs of the same module; its own by default.

        Raises:
            ValueError: the workspace or the weights are on another device, or a held tensor is not
                what the graph takes.
        """
        self.workspace = workspace or Workspace(device)
        self._weights = weights or SharedWeights(device)
        for name, where in (
            ("workspace", self.workspace.device),
            ("weights", self._weights.device),
        ):
            if where != torch.device(device):
                raise ValueError(
                    f"{name}: expected one on {torch.device(device)}, got one on {where}"
                )
        self.graph = run_passes(graph, passes)
        self._held = dict(held or {})
        check_held(self.graph, None, self._held, self.workspace.device)
        self._constants: dict[str, Tensor] = {}
        self._plans: dict[int, tuple[Layout, Plan]] = {}
        self._programs: dict[int, Program] = {}
        self.workspace.join(self)

    @property
    def batches(self) -> list[int]:
        """The batch sizes that have a program now."""
        return sorted(self._programs)

    def reserve(self, batch: int) -> None:
        """Grow the arena for this batch size, so that smaller programs stay when it comes."""
        with self.workspace.turn():
            self.workspace.fit(self._planned(batch)[1].peak)

    def drop_programs(self) -> None:
        """Forget the programs; they are built again when they are next needed."""
        if self._programs:
            self.workspace.settle()
        self._programs.clear()

    def capture(self, batches: Iterable[int]) -> None:
        """Make the programs of these batch sizes, the largest first.

        So the arena is made once, and on a CUDA device the pool of graphs grows least.
        """
        with self.workspace.turn():
            for batch in sorted(set(batches), reverse=True):
                self.program(batch)

    def reload(self, parameters: Container[str]) -> bool:
        """Read the weights that are made of these parameters again before the next run.

        Only what they are in is read; the programs are built again, which reads nothing.

        Args:
            parameters: names that the graph's origins have. What is computed names none.

        Returns:
            Whether the graph has weights made of them.
        """
        with self.workspace.turn():
            self._weights.forget(parameters)
            stale = [n for n, parts in self.graph.origins.items() if made_of(parts, parameters)]
            if stale:
                self.drop_programs()
            for name in stale:
                if name in self._constants:
                    forget_packed(self._constants.pop(name))
            return bool(stale)

    @property
    def held(self) -> Mapping[str, Tensor]:
        """The inputs that lie in memory of the caller's."""
        return self._held

    def hold(self, held: Mapping[str, Tensor]) -> None:
        """Read other held tensors, of the same names, from now on.

        Raises:
            ValueError: the names differ, or a tensor is not what the graph takes.
        """
        if set(held) != set(self._held):
            raise ValueError(f"held: expected {sorted(self._held)}, got {sorted(held)}")
        check_held(self.graph, None, held, self.workspace.device)
        with self.workspace.turn():
            self.drop_programs()
            self._held = dict(held)

    def program(self, batch: int) -> Program:
        """The program of a batch size, captured on a CUDA device; use it in `workspace.turn`."""
        with self.workspace.turn():
            layout, memory = self._planned(batch)
            arena = self.workspace.fit(memory.peak)
            if batch not in self._programs:
                self._load()
                program = Program(
                    self.graph,
                    batch,
                    self._constants,
                    held=self._held_rows(batch),
                    layout=layout,
                    memory=memory,
                    arena=arena,
                    device=self.workspace.device,
                )
                if self.workspace.graphs:
                    program.capture(self.workspace.graphs)
                self._programs[batch] = program
            return self._programs[batch]

    def run(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Compute the outputs.

        Args:
            inputs: every input by name that is not held, of the specified shape; on any device, of
                any dtype of the same kind (float or integer): they are copied in.

        Returns:
            The outputs by name; they are the caller's own.

        Raises:
            InvalidRequest: an input is missing, unknown, of another shape or kind; no rows.
        """
        batch = self._rows(inputs)
        with self.workspace.turn():
            return self.workspace.copies(self.program(batch).run(inputs))

    def _rows(self, inputs: Mapping[str, Tensor]) -> int:
        if twice := sorted(set(inputs) & set(self._held)):
            raise InvalidRequest(f"{self.graph.component}: the inputs {twice} are held already")
        rows = 1
        for name, value in inputs.items():
            spec = self.graph.inputs.get(name)
            if spec is not None and BATCH in spec.shape and value.dim() == len(spec.shape):
                rows = value.shape[spec.shape.index(BATCH)]
        if rows < 1:
            raise InvalidRequest(f"{self.graph.component}: expected at least 1 row, got {rows}")
        check_inputs(self.graph, {**inputs, **self._held_rows(rows)})
        return rows

    def _held_rows(self, batch: int) -> dict[str, Tensor]:
        """What a program of a batch size reads where it is."""
        batched = {name for name in self._held if self.graph.inputs[name].shape[:1] == (BATCH,)}
        return {n: v[:batch] if n in batched else v for n, v in self._held.items()}

    def _load(self) -> None:
        for name in self.graph.weights.keys() - self._constants.keys():
            self._constants[name] = self._weights.load(self.graph, name)

    def _planned(self, batch: int) -> tuple[Layout, Plan]:
        if batch not in self._plans:
            layout = lay_out(self.graph, batch, self._held)
            self._plans[batch] = layout, plan(layout.lifetimes)
        return self._plans[batch]
