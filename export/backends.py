"""The backends that this version builds for: what each writes of a graph, and how it is opened."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from heatsink.export.exactness import bucket_sizes, close_sizes
from heatsink.export.manifest import Backend as BackendName
from heatsink.runtime import buckets
from heatsink.runtime.errors import NotBuilt

if TYPE_CHECKING:
    from heatsink.runtime.backends.session import Session
    from heatsink.runtime.graph.graph import Graph
    from heatsink.runtime.graph.passes import Pass
    from heatsink.runtime.graph.weight import Origin
    from heatsink.runtime.native.component import Workspace


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

    def open(
        self, name: str, path: Path, *, largest: int, threads: int, workspace: Workspace | None
    ) -> Session:
        """Open what `write` wrote.

        Args:
            name: of the component.
            path: of its graph.
            largest: rows that are run at once, at most.
            threads: of a CPU; 0 lets the backend choose.
            workspace: memory shared with other components that never run at the same time.
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

    def open(
        self, name: str, path: Path, *, largest: int, threads: int, workspace: Workspace | None
    ) -> Session:
        """The library plans its own memory."""
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

    def open(
        self, name: str, path: Path, *, largest: int, threads: int, workspace: Workspace | None
    ) -> Session:
        """A session on the workspace, or on one of its own."""
        from heatsink.export.native import data_of
        from heatsink.runtime.backends.native import NativeSession, read_graph
        from heatsink.runtime.native.component import Workspace

        graph = read_graph(path, data_of(path))
        return NativeSession(
            name, graph, workspace or Workspace(), largest=largest, threads=threads
        )


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


def choose(name: str, *, ports: bool = False) -> str:
    """The backend to build for; `auto` is the fastest on this machine.

    That is `torch` with this package's C++ ops (`heatsink bench latency` compares them); its
    PyTorch implementations are slower than ONNX Runtime.
    """
    if name != AUTO:
        return name
    from heatsink.kernels import _native

    return Native.name if _native.available() and not ports else OnnxRuntime.name
