"""The order of captures, streams and errors, against a log in CUDA's place.

That real graphs hold what they should is `test_cuda_programs.py`, marked gpu.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from heatsink.runtime.errors import CaptureFailed
from heatsink.runtime.graph.graph import Graph
from heatsink.runtime.graph.passes import run_passes
from heatsink.runtime.graph.passes.pipeline import PASSES_NATIVE
from heatsink.runtime.native.component import NativeComponent
from heatsink.runtime.native.cuda_graph import WARM_UPS, Graphs
from heatsink.runtime.native.phased import PhasedComponent
from heatsink.runtime.native.program import Program
from heatsink.runtime.native.workspace import Workspace, Workspaces

CUDA = torch.device("cuda", 0)


class Log:
    """What was asked of CUDA, in order; `capturing` as a device would know it."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.capturing = False
        self.pools = 0

    def stream(self, name: str) -> Any:
        return SimpleNamespace(
            name=name,
            wait_stream=lambda other: self.calls.append(f"{name} waits for {other.name}"),
            synchronize=lambda: self.calls.append(f"wait for {name}"),
        )


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> Log:
    found = Log()
    caller = found.stream("caller")
    current = [caller]

    class Entered:
        def __init__(self, stream: Any) -> None:
            self.stream = stream

        def __enter__(self) -> None:
            current.append(self.stream)

        def __exit__(self, *_: object) -> None:
            current.pop()

    class Recorded:
        def capture_begin(self, *, pool: Any, capture_error_mode: str) -> None:
            found.calls.append(f"begin in pool {pool[1]} on {current[-1].name}")
            found.capturing = True

        def capture_end(self) -> None:
            found.calls.append("end")
            found.capturing = False

        def replay(self) -> None:
            found.calls.append("replay")

    def handle() -> tuple[int, int]:
        found.pools += 1
        return 0, found.pools

    names = iter(("own", "other", "third"))
    fakes = {
        "Stream": lambda device: found.stream(next(names)),
        "stream": Entered,
        "current_stream": lambda device: current[-1],
        "CUDAGraph": Recorded,
        "graph_pool_handle": handle,
        "memory_allocated": lambda device: 0,
        "empty_cache": lambda: None,
    }
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    return found


def test_a_capture_follows_its_warm_up_on_one_stream(log: Log) -> None:
    captured = Graphs(CUDA).capture(lambda: log.calls.append("run"), "net of 2 rows")
    warm = ["own waits for caller", *["run"] * WARM_UPS, "wait for own"]
    record = ["begin in pool 1 on own", "run", "end", "caller waits for own"]
    assert log.calls == [*warm, *record]
    log.calls.clear()
    captured()
    assert log.calls == ["replay"]


def test_graphs_share_a_pool_for_as_long_as_one_lives(log: Log) -> None:
    graphs = Graphs(CUDA)
    held = [graphs.capture(lambda: None, "net") for _ in range(2)]
    held.pop()
    held.append(graphs.capture(lambda: None, "net"))
    assert log.pools == 1
    held.clear()
    # PyTorch let go of the pool with the last.
    graphs.capture(lambda: None, "net")
    assert log.pools == 2


def test_what_can_not_be_captured_is_named(log: Log) -> None:
    graphs = Graphs(CUDA)
    kept = graphs.capture(lambda: None, "net of 4 rows")

    def run() -> None:
        if log.capturing:
            raise RuntimeError("aten.nonzero.default of mid: not permitted when capturing")

    with pytest.raises(CaptureFailed, match=r"net of 2 rows can't .*: aten\.nonzero.* of mid: not"):
        graphs.capture(run, "net of 2 rows")
    # The capture was ended, and the next one has a pool that is whole.
    assert not log.capturing
    graphs.capture(lambda: None, "net of 2 rows")
    assert log.pools == 2
    kept()


def test_memory_that_is_short_is_no_fault_of_an_operator(log: Log) -> None:
    def run() -> None:
        if log.capturing:
            try:
                raise torch.OutOfMemoryError("CUDA out of memory")
            except torch.OutOfMemoryError as error:
                raise RuntimeError(f"heatsink.conv2d.default of up: {error}") from error

    with pytest.raises(torch.OutOfMemoryError):
        Graphs(CUDA).capture(run, "net")


def test_a_turn_comes_behind_the_caller_who_then_waits(log: Log) -> None:
    graphs = Graphs(CUDA)
    lent: list[str] = []
    value: Any = SimpleNamespace(record_stream=lambda stream: lent.append(stream.name))
    with graphs.ordered(), graphs.ordered():
        log.calls.append("work")
        graphs.lend([value])
    assert log.calls == ["own waits for caller", "work", "caller waits for own"]
    assert lent == ["caller"]
    with pytest.raises(ValueError, match="inside"), graphs.ordered():
        raise ValueError("inside")
    assert log.calls[-1] == "caller waits for own"
    # Outside of a turn nobody waits for anything.
    graphs.lend([value])
    assert lent == ["caller"]


def test_a_vae_has_a_stream_of_its_own_where_there_are_streams(
    log: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = "heatsink.runtime.native.workspace.Arena"
    monkeypatch.setattr(module, lambda size, device: SimpleNamespace(memory=torch.empty(size)))
    spaces = Workspaces("cuda:0")
    unet, decoder = spaces.of("unet"), spaces.of("vae_decoder")
    assert unet.graphs is not None
    assert decoder.graphs is not None
    assert unet.graphs.stream is not decoder.graphs.stream
    assert unet.arena is not decoder.arena
    assert spaces.of("text_encoder") is unet
    assert spaces.of("vae_encoder") is decoder
    own = Workspaces()
    assert own.of("unet") is own.of("vae_decoder")
    assert own.of("unet").graphs is None


class Noted:
    """In the place of `Graphs`: it runs what it is given, and notes what that was."""

    def __init__(self, workspace: Workspace) -> None:
        self.made: list[tuple[str, int]] = []
        self.replays = 0
        self.stream = SimpleNamespace(synchronize=lambda: None)
        self._workspace = workspace
        workspace.graphs = self  # type: ignore[assignment]

    def capture(self, run: Callable[[], None], what: str) -> Callable[[], None]:
        run()
        self.made.append((what, self._workspace.bytes))

        def replay() -> None:
            self.replays += 1
            run()

        return replay

    def ordered(self) -> Any:
        import contextlib

        return contextlib.nullcontext()

    def lend(self, values: Any) -> None:
        pass


class Table(nn.Module):
    """Reads a table at ids, which must be such even when nobody gave any."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(3, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return (self.table((x[:, 0] * 0.5).to(torch.int64)) * 2.0,)


def test_a_program_is_captured_on_zeros_and_replayed_as_one(
    capture_net: Callable[..., Graph],
) -> None:
    torch.manual_seed(2)
    graph = capture_net(Table(), 2)
    space = Workspace()
    noted = Noted(space)
    program = Program(graph, 3, {n: w.load() for n, w in graph.weights.items()})
    with torch.inference_mode():
        # What memory may hold before: no id of any row.
        program.inputs["x"].fill_(1e6)
    program.capture(noted)  # type: ignore[arg-type]
    assert noted.made == [("net of 3 rows", 0)]
    assert not program.inputs["x"].any()
    given = {"x": torch.tensor([[4.0, 0.0], [2.0, 0.0], [0.0, 0.0]])}
    assert torch.equal(program.run(given)["y"], graph.run(given)["y"])
    assert noted.replays == 1


def test_a_component_captures_the_largest_batch_first(graphs: Callable[[str], Graph]) -> None:
    space = Workspace()
    noted = Noted(space)
    component = NativeComponent(run_passes(graphs("vae_decoder"), PASSES_NATIVE), workspace=space)
    component.capture([1, 4, 2, 4])
    # On one arena, which the first has sized.
    assert noted.made == [(f"vae_decoder of {rows} rows", space.bytes) for rows in (4, 2, 1)]
    component.capture([2])
    assert len(noted.made) == 3


def test_phases_are_captured_whole_and_a_request_captures_nothing(
    cases: dict[str, Any], graphs: Callable[[str], Graph]
) -> None:
    graph = run_passes(graphs("unet"), PASSES_NATIVE)
    space = Workspace()
    noted = Noted(space)
    component = PhasedComponent(graph, workspace=space, sizes=(1, 2))
    component.capture([])
    assert not noted.made
    component.capture([1, 3])
    steps, size = [what for what, _ in noted.made], space.bytes
    assert steps[:2] == [f"{steps[0].split(' of ')[0]} of {rows} rows" for rows in (3, 1)]
    assert {held for _, held in noted.made} == {size}
    plain = NativeComponent(graph)
    for rows in (3, 1):
        given = cases["unet"].inputs(rows, seed=rows)
        assert torch.equal(component.run(given)["out"], plain.run(given)["out"])
    assert [what for what, _ in noted.made] == steps
    assert noted.replays > 0
