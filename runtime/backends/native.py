"""Components run by this package: a planned program for every batch size (backend `torch`)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from heatsink.runtime.backends.session import Array
from heatsink.runtime.errors import EngineMismatch, InvalidRequest, ResourceError
from heatsink.runtime.graph.graph import Graph
from heatsink.runtime.graph.serial import graph_from_json
from heatsink.runtime.native.phased import PhasedComponent
from heatsink.runtime.native.values import Key
from heatsink.runtime.native.workspace import Workspace
from heatsink.runtime.weights import open_safetensors

# PyTorch has no type for it on a CPU.
_NO_MEMORY = ("can't allocate memory", "not enough memory", "bad_alloc")


def read_graph(path: Path, data: Path) -> Graph:
    """The graph of an engine's component; its weights are mapped, and read when they are used.

    Args:
        path: its JSON.
        data: the safetensors file of its weights.

    Raises:
        EngineMismatch: a file is missing or damaged, or the graph names an operator that may not be
            named.
    """
    entries, _ = open_safetensors(data, EngineMismatch)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise EngineMismatch(f"{path} can't be read: {error}") from error
    try:
        return graph_from_json(text, {name: entry.read() for name, entry in entries.items()})
    except EngineMismatch as error:
        raise EngineMismatch(f"{path}: {error}") from error


class NativeSession:
    """A graph that runs natively.

    Args:
        name: the component's name, used in messages.
        graph: after the passes of the native engine.
        workspace: the memory of the engine's components, which run one after the other.
        largest: rows that will be run at once, at most: memory is planned for them.
        threads: of the operators; 0 takes PyTorch's setting.
        held: inputs that are read where they are, as `NativeComponent` takes them.
    """

    def __init__(
        self,
        name: str,
        graph: Graph,
        workspace: Workspace,
        *,
        largest: int = 1,
        threads: int = 0,
        held: Mapping[str, Tensor] | None = None,
    ) -> None:
        self.name = name
        self.inputs, self.outputs = list(graph.inputs), list(graph.outputs)
        self._threads = threads
        self._component = PhasedComponent(
            graph, device=workspace.device, workspace=workspace, held=held
        )
        with _no_memory(f"open {name} for {largest} rows"):
            self._component.reserve(largest)

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Run the component once; floats come back as float32, whatever it computes in.

        Raises:
            InvalidRequest: an input is missing, or one is given that the component was not built
                with, or of another shape.
            ResourceError: the memory did not suffice; the session can still be used.
        """
        self._check_names(inputs)
        return self._run(self._component, inputs)

    def prepare(self, inputs: Mapping[str, Array], timesteps: Sequence[Array]) -> None:
        """Compute ahead what the rows' request and schedule decide; see `PhasedComponent`."""
        self._prepare(inputs, timesteps)

    def forget(self) -> None:
        """Let go of what is kept of earlier runs."""
        self._component.forget()

    def _check_names(self, inputs: Mapping[str, Array]) -> None:
        if set(inputs) != set(self.inputs):
            raise InvalidRequest(
                f"{self.name} takes the inputs {sorted(self.inputs)}, got {sorted(inputs)}"
            )

    def _run(
        self,
        component: PhasedComponent,
        inputs: Mapping[str, Array],
        keys: Mapping[str, Sequence[Key]] | None = None,
    ) -> dict[str, Array]:
        with (
            self._component.workspace.lock,
            _no_memory(f"run {self.name} on {_shapes(inputs)}"),
            _threads(self._threads),
        ):
            found = component.run(_tensors(inputs), keys)
        return {name: _array(value) for name, value in found.items()}

    def _prepare(
        self,
        inputs: Mapping[str, Array],
        timesteps: Sequence[Array],
        keys: Mapping[str, Sequence[Key]] | None = None,
    ) -> None:
        times = [torch.from_numpy(each) for each in timesteps]
        with (
            self._component.workspace.lock,
            _no_memory(f"prepare {self.name} for {_shapes(inputs)}"),
            _threads(self._threads),
        ):
            self._component.prepare(_tensors(inputs), times, keys)


def _shapes(inputs: Mapping[str, Array]) -> str:
    return ", ".join(f"{name} {list(value.shape)}" for name, value in inputs.items())


def _tensors(inputs: Mapping[str, Array]) -> dict[str, Tensor]:
    return {name: torch.from_numpy(np.asarray(value)) for name, value in inputs.items()}


def _array(value: Tensor) -> Array:
    if value.is_floating_point():
        value = value.float()
    found: Array = value.cpu().numpy()
    return found


@contextlib.contextmanager
def _no_memory(what: str) -> Iterator[None]:
    """Turn what PyTorch raises where memory is short into the error of this package."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        known = isinstance(error, MemoryError | torch.OutOfMemoryError)
        if not known and not any(text in str(error) for text in _NO_MEMORY):
            raise
        line = " ".join(str(error).split())
        raise ResourceError(
            f"no memory is left to {what}; an engine with a smaller --batch or --size needs less: "
            f"{line}"
        ) from error


@contextlib.contextmanager
def _threads(count: int) -> Iterator[None]:
    """PyTorch's threads are a setting of the process: ours holds while the component runs.

    Hold the workspace's lock: another thread's call would read ours as what was there before it.
    """
    before = torch.get_num_threads()
    if count in (0, before):
        yield
        return
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
