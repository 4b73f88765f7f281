"""Phases kept by row: the whole graph's bits, computed and copied as rarely as inputs change."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from heatsink.runtime.errors import InvalidRequest
from heatsink.runtime.graph.capture import capture_module
from heatsink.runtime.graph.graph import Graph, TensorSpec
from heatsink.runtime.graph.passes import run_passes
from heatsink.runtime.graph.passes.pipeline import PASSES_NATIVE
from heatsink.runtime.graph.phases import Phase
from heatsink.runtime.native.component import NativeComponent
from heatsink.runtime.native.phased import PhasedComponent
from heatsink.runtime.native.program import Program
from heatsink.runtime.native.workspace import Workspace

Given = dict[str, Tensor]
NAMES = ["unet", "unet of SDXL"]


@pytest.fixture(scope="module", params=NAMES)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def graph(name: str, graphs: Callable[[str], Graph]) -> Graph:
    return run_passes(graphs(name), PASSES_NATIVE)


@pytest.fixture
def draw(name: str, cases: dict[str, Any]) -> Callable[[int, int], Given]:
    """Seeded inputs of some rows."""
    return lambda rows, seed: cases[name].inputs(rows, seed=seed)


Draw = Callable[[int, int], Given]


def rows_run(component: PhasedComponent) -> dict[Phase, int]:
    return {phase: use.rows for phase, use in component.uses().items()}


def take(given: Given, rows: list[int]) -> Given:
    return {name: value[rows] for name, value in given.items()}


def test_any_rows_at_any_place_give_the_whole_graphs_bits(graph: Graph, draw: Draw) -> None:
    whole, phased = NativeComponent(graph), PhasedComponent(graph)
    given = draw(9, 1)
    wanted = [whole.run(take(given, [row]))["out"][0] for row in range(9)]
    rng = random.Random(4)
    for count in (3, 1, 9, 4, 2, 9, 5):
        rows = rng.choices(range(9), k=count)
        found = phased.run(take(given, rows))["out"]
        assert all(torch.equal(found[i], wanted[row]) for i, row in enumerate(rows)), rows
    # Each row's own phases once, whatever it was beside.
    runs = rows_run(phased)
    assert runs[Phase.REQUEST] <= 9
    assert runs[Phase.STEP] == 33


def test_what_changes_and_nothing_else_is_computed_again(
    name: str, graph: Graph, draw: Draw
) -> None:
    component, given = PhasedComponent(graph), draw(2, 1)
    whole = NativeComponent(graph)
    component.run(given)
    before = rows_run(component)
    text = {"encoder_hidden_states": {Phase.REQUEST}}
    time = {"timestep": {Phase.SCHEDULE, Phase.BOTH}}
    sizes = {key: {Phase.REQUEST, Phase.BOTH} for key in ("text_embeds", "time_ids")}
    for changed, phases in {"sample": set[Phase](), **text, **time, **sizes}.items():
        if changed not in given:
            continue
        # One row of the two: the other's values are there.
        given[changed] = given[changed].clone()
        given[changed][1] += 1
        found = component.run(given)["out"]
        assert torch.equal(found, whole.run(given)["out"])
        after = rows_run(component)
        again = {phase for phase in after if after[phase] > before[phase]} - {Phase.STEP}
        assert again == phases & set(after), changed
        assert all(after[phase] - before[phase] <= 1 for phase in again)
        before = after


def test_a_loop_copies_nothing_that_stays(graph: Graph, draw: Draw) -> None:
    component, given = PhasedComponent(graph), draw(3, 1)
    times = [torch.tensor([900.0, 500.0, 100.0])] * 3
    component.prepare({n: v for n, v in given.items() if n not in ("sample", "timestep")}, times)
    prepared = rows_run(component)
    assert prepared[Phase.REQUEST] == 3
    assert prepared[Phase.SCHEDULE] == 3
    assert prepared.get(Phase.BOTH, 9) == 9
    copies = []
    for step in range(3):
        given["timestep"] = torch.stack([each[step] for each in times])
        component.run(given)
        copies.append({phase: use.copies for phase, use in component.uses().items()})
    after = rows_run(component)
    assert {p: n for p, n in after.items() if p != Phase.STEP} == {
        p: n for p, n in prepared.items() if p != Phase.STEP
    }
    assert [each[Phase.REQUEST] for each in copies] == [copies[0][Phase.REQUEST]] * 3
    timed = Phase.BOTH if Phase.BOTH in after else Phase.SCHEDULE
    assert [each[timed] for each in copies] == [3, 6, 9]


def test_a_key_stands_for_an_input(graph: Graph, draw: Draw) -> None:
    component, given = PhasedComponent(graph), draw(2, 1)
    same = {"encoder_hidden_states": [b"one", b"two"]}
    first = component.run(given, same)["out"]
    other = given | {"encoder_hidden_states": given["encoder_hidden_states"] + 1}
    assert torch.equal(component.run(other, same)["out"], first)
    changed = component.run(other, {"encoder_hidden_states": [b"one", b"new"]})["out"]
    assert torch.equal(changed[0], first[0])
    assert not torch.equal(changed[1], first[1])


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"encoder_hidden_states": [b"one"]}, "expected 2 of 'encoder_hidden_states', got 1"),
        ({"encoder_hidden_states": [b"one", "two"]}, "expected bytes for 'encoder_.*', got str"),
        ({"hidden_states": [b"one", b"two"]}, "unet takes .*, got 'hidden_states'"),
    ],
)
def test_keys_that_say_nothing(
    graph: Graph, draw: Draw, keys: dict[str, Any], message: str
) -> None:
    with pytest.raises(InvalidRequest, match=f"keys: {message}"):
        PhasedComponent(graph).run(draw(2, 1), keys)


def test_what_was_prepared_stays_for_the_loop_however_little_room_there_is(
    graph: Graph, draw: Draw
) -> None:
    given = draw(2, 1)
    times = [torch.tensor([900.0, 500.0]), torch.tensor([700.0, 300.0])]
    roomy = PhasedComponent(graph)
    roomy.prepare(given, times)
    component = PhasedComponent(graph, keep_bytes=roomy._store.bytes - 1)
    component.prepare(given, times)
    prepared = rows_run(component)
    for step in range(2):
        given["timestep"] = torch.stack([each[step] for each in times])
        component.run(given)
    after = rows_run(component)
    assert {p: n for p, n in after.items() if p != Phase.STEP} == {
        p: n for p, n in prepared.items() if p != Phase.STEP
    }


def test_too_little_room_costs_time_and_no_bits(graph: Graph, draw: Draw) -> None:
    small, roomy = PhasedComponent(graph, keep_bytes=0), PhasedComponent(graph)
    one, other = draw(2, 1), draw(3, 2)
    for given in (one, other, one):
        assert torch.equal(small.run(given)["out"], roomy.run(given)["out"])
    assert rows_run(small)[Phase.REQUEST] == 7
    assert rows_run(roomy)[Phase.REQUEST] == 5
    assert small.kept_bytes < roomy.kept_bytes


def test_forgetting_computes_anew(graph: Graph, draw: Draw) -> None:
    component, given = PhasedComponent(graph), draw(2, 1)
    first = component.run(given)["out"]
    component.forget()
    assert component._store.bytes == 0
    assert torch.equal(component.run(given)["out"], first)
    assert rows_run(component)[Phase.REQUEST] == 4


def test_others_on_the_workspace_do_not_disturb(graph: Graph, draw: Draw) -> None:
    workspace = Workspace()
    component = PhasedComponent(graph, workspace=workspace)
    whole = NativeComponent(graph, workspace=workspace)
    given = draw(2, 1)
    first = component.run(given)["out"]
    # Overwrites the arena, and then makes it grow.
    for rows in (2, 7):
        whole.run(draw(rows, 5))
        assert torch.equal(component.run(given)["out"], first)
    assert rows_run(component)[Phase.REQUEST] == 2


def test_launches_and_replays_do_not_depend_on_the_rows(
    graph: Graph, draw: Draw, monkeypatch: pytest.MonkeyPatch
) -> None:
    component = PhasedComponent(graph)
    seen: list[tuple[str, int]] = []
    replay = Program.replay

    def watch(self: Program) -> None:
        seen.append(("replay", self.launches))
        replay(self)

    monkeypatch.setattr(Program, "replay", watch)
    found = []
    for rows in (1, 2, 8):
        seen.clear()
        component.run(draw(rows, rows))
        found.append(list(seen))
    assert found == found[:1] * 3
    assert len(found[0]) == len(component.phases.graphs)


class Counter(TorchDispatchMode):
    """Counts what reaches PyTorch's dispatcher."""

    def __init__(self) -> None:
        # The library's has no annotations.
        super().__init__()  # type: ignore[no-untyped-call]
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **kwargs or {})


def test_operations_of_a_step_do_not_depend_on_the_rows(graph: Graph, draw: Draw) -> None:
    component, found = PhasedComponent(graph), []
    component.reserve(8)
    for rows in (1, 2, 8):
        given = draw(rows, 1)
        keys = {
            name: [f"{name} {row}".encode() for row in range(rows)]
            for name in given
            if name not in ("sample", "timestep")
        }
        times = {"timestep": [b"1"] * rows}
        component.run(given, keys | times)
        component.run(given, keys | {"timestep": [b"2"] * rows})
        # All rows get other values of the time, and those of the text lie there.
        with Counter() as counter:
            component.run(given, keys | times)
        found.append(counter.names)
    assert found[1] == found[2]
    assert len(found[0]) == len(found[1])


def test_a_step_allocates_nothing(graph: Graph, draw: Draw) -> None:
    component, given = PhasedComponent(graph), draw(2, 1)
    component.run(given)
    program = component._step.program(2)
    assert program.unplanned == []
    with torch.profiler.profile(profile_memory=True) as profile:
        program.replay()
    assert [event.name for event in profile.events() if event.self_cpu_memory_usage > 0] == []


def test_two_threads(graph: Graph, draw: Draw) -> None:
    component, whole = PhasedComponent(graph, keep_bytes=0), NativeComponent(graph)
    asked = [draw(rows, rows) for rows in (1, 2, 3, 4)]
    wanted = [whole.run(given)["out"] for given in asked]
    wrong: list[int] = []

    def work(seed: int) -> None:
        rng = random.Random(seed)
        for _ in range(8):
            place = rng.randrange(4)
            if not torch.equal(component.run(asked[place])["out"], wanted[place]):
                wrong.append(place)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in (1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda given: given.pop("timestep"), "takes the inputs"),
        (lambda given: given.update(more=torch.zeros(2)), "takes the inputs"),
        (lambda given: given.update(timestep=torch.zeros(3)), "'timestep' wants shape"),
        (lambda given: given.update(timestep=torch.zeros(2, dtype=torch.int64)), "torch.int64"),
        (lambda given: given.update({n: v[:0] for n, v in given.items()}), "at least 1 row"),
    ],
)
def test_other_inputs_are_refused(
    graph: Graph, draw: Draw, change: Callable[[Given], Any], message: str
) -> None:
    given = draw(2, 1)
    change(given)
    with pytest.raises(InvalidRequest, match=message):
        PhasedComponent(graph).run(given)


def test_preparing_wants_all_rows(graph: Graph, draw: Draw) -> None:
    component, given = PhasedComponent(graph), draw(2, 1)
    with pytest.raises(InvalidRequest, match="prepare lacks the inputs"):
        component.prepare({}, [torch.ones(1)] * 2)
    with pytest.raises(InvalidRequest, match=r"prepare wants .* for 1 rows with timesteps, got"):
        component.prepare(given, [torch.ones(1)])
    # One that would be spread over the tokens.
    narrow = given | {"encoder_hidden_states": given["encoder_hidden_states"][:, :1]}
    with pytest.raises(InvalidRequest, match="prepare wants 'encoder_hidden_states'"):
        component.prepare(narrow, [torch.ones(1)] * 2)
    for times in (torch.ones(1, 1), torch.ones(1, dtype=torch.int64)):
        with pytest.raises(InvalidRequest, match="prepare wants float timesteps"):
            component.prepare(given, [times] * 2)
    with pytest.raises(InvalidRequest, match="prepare takes no keys of 'timestep'"):
        component.prepare(given, [torch.ones(1)] * 2, {"timestep": [b"1", b"2"]})
    component.prepare({n: v[:0] for n, v in given.items()}, [])


def test_without_phases_it_is_the_step_alone() -> None:
    class Net(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, ...]:
            return (x * 2,)

    spec = {"x": TensorSpec(("batch", 3), torch.float32)}
    component = PhasedComponent(capture_module("net", Net(), {}, {}, spec, ("y",)))
    x = torch.arange(6.0).view(2, 3)
    assert torch.equal(component.run({"x": x})["y"], x * 2)
    component.prepare({}, [torch.ones(4)])
    assert list(component.uses()) == [Phase.STEP]
