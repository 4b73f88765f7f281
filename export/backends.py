"""The backends that this version builds for: what each writes of a graph, and how it is opened."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from heatsink.export.exactness import bucket_sizes, close_sizes
from heatsink.export.manifest import Backend as BackendName
from heatsink.export.ported_exactness import COUNTS
from heatsink.runtime import buckets
from heatsink.runtime.errors import NotBuilt

if TYPE_CHECKING:
    from heatsink.runtime.backends.native_ports import BankView
    from heatsink.runtime.backends.session import Session
    from heatsink.runtime.graph.graph import Graph
    from heatsink.runtime.graph.passes import Pass
    from heatsink.runtime.graph.weight import Origin
    from heatsink.runtime.native.workspace import Workspace
    from heatsink.runtime.port_layout import PortLayout


@dataclass(frozen=True)
class Written:
    """What a backend wrote of a graph.

    Attributes:
        graph: the file that is opened.
        files: all files, that one among them.
        origins: weight -> what it was made from.
        opset: of an ONNX file.
    """

    graph: Path
    files: tuple[Path, ...]
    origins: dict[str, list[Origin]]
    opset: int | None = None


class Backend(Protocol):
    """One way to run a component."""

    @property
    def name(self) -> BackendName:
        """As the manifest calls it."""
        ...

    @property
    def precisions(self) -> tuple[str, ...]:
        """What it can compute in."""
        ...

    def sizes(self, largest: int) -> list[int]:
        """The batch sizes to build and measure."""
        ...

    def runs(self, rows: int, sizes: Sequence[int]) -> list[int]:
        """The batch sizes that together run `rows` rows, of those that may be used."""
        ...

    def passes(self, *, ports: bool) -> Sequence[Pass]:
        """What a captured graph goes through; `ports`: it, or its twin, gets adapter ports."""
        ...

    def write(self, graph: Graph, folder: Path, *, opset: int | None) -> Written:
        """Write a graph after the passes into a folder, under its component's name.

        Raises:
            NotBuilt: it can't be written.
            ResourceError: the files can't be.
        """
        ...

    @property
    def rooms(self) -> tuple[int, ...]:
        """How many adapters a row of a ported graph may have room for."""
        ...

    def add_ports(self, layout: PortLayout, unused: Collection[str]) -> Pass:
        """The pass that gives a graph ports, after `passes`; the unused modules get none."""
        ...

    def write_ported(self, graph: Graph, twin: Written, *, opset: int | None) -> Path:
        """Write a graph with ports beside the one without, whose weights it shares.

        Raises:
            NotBuilt, ResourceError: as `write`.
        """
        ...

    def open(
        self,
        name: str,
        path: Path,
        *,
        largest: int,
        threads: int,
        workspace: Workspace | None,
        bank: BankView | None = None,
    ) -> Session:
        """Open what `write` or `write_ported` wrote.

        Args:
            name: of the component.
            path: of its graph.
            largest: rows that are run at once, at most.
            threads: of a CPU; 0 lets the backend choose.
            workspace: memory shared with other components that never run at the same time.
            bank: of a graph with ports.
        """
        ...


class OnnxRuntime:
    """Standard operators in an ONNX file, run by ONNX Runtime."""

    name: BackendName = "onnxruntime"
    precisions = ("fp32",)

    def sizes(self, largest: int) -> list[int]:
        """Powers of two: its time is near to proportional to the rows."""
        return bucket_sizes(largest)

    def runs(self, rows: int, sizes: Sequence[int]) -> list[int]:
        """With the least padding."""
        return buckets.plan(rows, sizes)

    def passes(self, *, ports: bool) -> Sequence[Pass]:
        """Few: the library fuses by itself."""
        from heatsink.runtime.graph.passes.pipeline import PASSES_ONNX, PASSES_ONNX_PORTS

        return PASSES_ONNX_PORTS if ports else PASSES_ONNX

    def write(self, graph: Graph, folder: Path, *, opset: int | None) -> Written:
        """`NAME.onnx` and `NAME.onnx.data`."""
        from heatsink.export.onnx import to_onnx

        made = to_onnx(graph, folder / f"{graph.component}.onnx", opset=opset)
        files = (made.path, *([made.data] if made.data else []))
        return Written(made.path, files, made.origins, made.opset)

    @property
    def rooms(self) -> tuple[int, ...]:
        """Each is another shape of the inputs."""
        return COUNTS

    def add_ports(self, layout: PortLayout, unused: Collection[str]) -> Pass:
        """One node a port, which is translated to standard operators."""
        from heatsink.runtime.graph.passes.ports import add_ports

        return add_ports(layout, unused)

    def write_ported(self, graph: Graph, twin: Written, *, opset: int | None) -> Path:
        """`NAME_ports.onnx`."""
        from heatsink.export.onnx import to_onnx

        path = twin.graph.with_name(f"{graph.component}_ports.onnx")
        to_onnx(graph, path, opset=opset, weights_of=twin.graph)
        return path

    def open(
        self,
        name: str,
        path: Path,
        *,
        largest: int,
        threads: int,
        workspace: Workspace | None,
        bank: BankView | None = None,
    ) -> Session:
        """The library plans its own memory, and takes the bank as inputs."""
        from heatsink.runtime.backends.onnxruntime import OnnxRuntimeSession

        return OnnxRuntimeSession(name, path, threads=threads)


class Native:
    """Fused graphs on this package's ops and planned memory."""

    name: BackendName = "torch"
    precisions = ("fp32", "bf16")

    def sizes(self, largest: int) -> list[int]:
        """Close to each other, so that any number of rows is one run with little padding."""
        return close_sizes(largest)

    def runs(self, rows: int, sizes: Sequence[int]) -> list[int]:
        """One, up to the largest size: launches don't depend on the rows."""
        return buckets.in_one_run(rows, sizes)

    def passes(self, *, ports: bool) -> Sequence[Pass]:
        """All of the native engine."""
        from heatsink.runtime.graph.passes.pipeline import PASSES_NATIVE

        return PASSES_NATIVE

    def write(self, graph: Graph, folder: Path, *, opset: int | None) -> Written:
        """`NAME.graph.json` and `NAME.safetensors`."""
        from heatsink.export.native import to_native

        made = to_native(graph, folder / f"{graph.component}.graph.json")
        return Written(made.path, (made.path, made.data), made.origins)

    @property
    def rooms(self) -> tuple[int, ...]:
        """One shape for any number: what a row lacks costs nothing."""
        from heatsink.runtime.graph.passes.row_ports import ROOM

        return (ROOM,)

    def add_ports(self, layout: PortLayout, unused: Collection[str]) -> Pass:
        """Ports in the finished graph; rows without adapters keep their bits."""
        from heatsink.runtime.graph.passes.row_ports import add_row_ports

        return add_row_ports(layout, unused)

    def write_ported(self, graph: Graph, twin: Written, *, opset: int | None) -> Path:
        """`NAME_ports.graph.json`."""
        from heatsink.export.native import to_native

        path = twin.graph.with_name(f"{graph.component}_ports.graph.json")
        return to_native(graph, path, weights=False).path

    def open(
        self,
        name: str,
        path: Path,
        *,
        largest: int,
        threads: int,
        workspace: Workspace | None,
        bank: BankView | None = None,
    ) -> Session:
        """A session on the workspace, or on one of its own."""
        from heatsink.export.native import data_of
        from heatsink.runtime.backends.native import NativeSession, read_graph
        from heatsink.runtime.backends.native_ports import PortedNativeSession
        from heatsink.runtime.native.workspace import Workspace

        graph, space = read_graph(path, data_of(path, name)), workspace or Workspace()
        if bank is None:
            return NativeSession(name, graph, space, largest=largest, threads=threads)
        return PortedNativeSession(name, graph, space, bank, largest=largest, threads=threads)


_ALL: tuple[Backend, ...] = (OnnxRuntime(), Native())
BACKENDS: dict[str, Backend] = {each.name: each for each in _ALL}
AUTO = "auto"


def backend(name: str) -> Backend:
    """A backend by its name in the manifest.

    Raises:
        NotBuilt: this version has none of that name.
    """
    if name not in BACKENDS:
        raise NotBuilt(f"backend {name!r} is not built yet; this version has {', '.join(BACKENDS)}")
    return BACKENDS[name]


def choose(name: str) -> str:
    """The backend to build for; `auto` is the fastest on this machine.

    That is `torch` with this package's C++ ops (`heatsink bench latency` compares them); its
    PyTorch implementations are slower than ONNX Runtime.
    """
    if name != AUTO:
        return name
    from heatsink.kernels import _native

    return Native.name if _native.available() else OnnxRuntime.name
