"""With how many adapters a graph with ports is exact is measured, not assumed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest

from heatsink.export import exactness
from heatsink.export.manifest import KnownAnswer, TensorSpec
from heatsink.export.ported_exactness import (
    COUNTS,
    adapter_probe,
    bank_probe,
    check,
    measure,
    port_inputs,
    uses,
)
from heatsink.runtime.backends.session import Array
from heatsink.runtime.errors import EngineMismatch
from heatsink.runtime.port_layout import PortLayout

SPECS = [TensorSpec(name="x", dtype="float32", shape=["batch", 3])]
LAYOUT = PortLayout.of("fake", 5, 2, {"one": (4, 3), "two": (4, 3)})
Spoil = Callable[[int, int], list[int]]


class FakeSession:
    """Adds what each row's adapters say, and one unit in the last place where `spoil` says so.

    `spoil` maps the batch and the room for adapters to places.
    """

    name = "fake"

    def __init__(self, spoil: Spoil = lambda batch, room: []) -> None:
        self.spoil = spoil
        self.runs: list[tuple[int, int]] = []

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        out = inputs["x"] * np.float32(1.5)
        if "adapter_rows" not in inputs:
            return {"out": out}
        slots, scales = inputs["adapter_slots"], inputs["adapter_scales"]
        for place, row in enumerate(inputs["adapter_rows"]):
            for slot, scale in zip(slots[place], scales[place], strict=True):
                if slot >= 0:
                    # The second port's values.
                    out[row] += scale * inputs["bank.0.a"][5 + slot, 0]
        self.runs.append((len(out), slots.shape[1]))
        for row in self.spoil(len(out), slots.shape[1]):
            out[row] = np.nextafter(out[row], np.float32(np.inf))
        return {"out": out}


def twin(largest: int) -> KnownAnswer:
    return exactness.measure(FakeSession(), SPECS, exactness.bucket_sizes(largest))


def measured(spoil: Spoil, largest: int = 8) -> tuple[list[int], KnownAnswer, bool]:
    return measure(
        FakeSession(spoil), SPECS, LAYOUT, exactness.bucket_sizes(largest), twin(largest)
    )


def test_an_exact_graph_runs_with_every_room_and_bucket() -> None:
    session = FakeSession()
    seen: list[tuple[int, int]] = []
    counts, known, agrees = measure(
        session,
        SPECS,
        LAYOUT,
        exactness.bucket_sizes(8),
        twin(8),
        lambda done, total: seen.append((done, total)),
    )
    assert counts == list(COUNTS)
    assert known.buckets == [1, 2, 4, 8]
    assert known.refused == []
    assert agrees
    assert seen == [(done + 1, 20) for done in range(20)]
    assert set(session.runs) == {(bucket, room) for bucket in (1, 2, 4, 8) for room in COUNTS}
    for bucket in known.buckets:
        for room in counts:
            session.runs.clear()
            check(session, SPECS, LAYOUT, counts, known, bucket, room)
            assert session.runs == [(bucket, room)]


def test_a_room_that_gives_other_bits_is_refused() -> None:
    counts, known, agrees = measured(lambda batch, room: list(range(batch)) if room == 4 else [])
    assert counts == [1, 2]
    assert known.buckets == [1, 2, 4, 8]
    assert agrees
    counts, _, agrees = measured(lambda batch, room: list(range(batch)) if room == 1 else [])
    assert counts == [2, 4]
    assert agrees


def test_a_bucket_that_gives_other_bits_is_refused() -> None:
    counts, known, agrees = measured(lambda batch, room: list(range(batch)) if batch == 1 else [])
    assert (counts, known.buckets, known.refused) == ([1, 2, 4], [2, 4, 8], [1])
    assert agrees


def test_a_graph_whose_other_rows_differ_from_the_twins_is_told() -> None:
    counts, known, agrees = measured(lambda batch, room: list(range(batch)))
    assert (counts, known.buckets) == ([1, 2, 4], [1, 2, 4, 8])
    assert not agrees


@pytest.mark.parametrize("place", [0, 3, 7])
def test_a_place_that_gives_other_bits_is_found(place: int) -> None:
    _, known, _ = measured(lambda batch, room: [place] if batch == 8 else [])
    assert known.buckets == [1, 2, 4]


@pytest.mark.parametrize("whole", [False, True])
def test_a_graph_that_adds_a_neighbour_is_found(whole: bool) -> None:
    class Mixed(FakeSession):
        def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
            out = super().run(inputs)["out"]
            added = out if whole else out - inputs["x"] * np.float32(1.5)
            return {"out": out + np.roll(added, 1, axis=0)}

    counts, known, agrees = measure(Mixed(), SPECS, LAYOUT, [1, 2, 4], twin(4))
    # A row alone is its own neighbour: what is added of its adapters only, it has none of without.
    assert known.buckets == [1]
    assert counts == [1, 2, 4]
    assert agrees == (not whole)


def test_rows_that_differ_where_none_has_an_adapter_are_found() -> None:
    class Empty(FakeSession):
        def __init__(self, wrong: int | None) -> None:
            super().__init__()
            self.wrong = wrong

        def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
            out = super().run(inputs)["out"]
            if not len(inputs["adapter_rows"]) and self.wrong in (None, len(out)):
                out[0] = np.nextafter(out[0], np.float32(np.inf))
            return {"out": out}

    # Row 0 has an adapter wherever the probe's rows have theirs.
    _, known, agrees = measure(Empty(None), SPECS, LAYOUT, [1, 2, 4], twin(4))
    assert known.buckets == [1, 2, 4]
    assert not agrees
    with pytest.raises(EngineMismatch, match="the same bits at another place and beside other"):
        measure(Empty(2), SPECS, LAYOUT, [1, 2, 4], twin(4))


def test_a_graph_that_reads_the_slots_number_is_found() -> None:
    class Numbered(FakeSession):
        def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
            out = super().run(inputs)["out"]
            if "adapter_rows" in inputs:
                first = inputs["adapter_slots"][:, :1]
                out[inputs["adapter_rows"]] += first.astype(np.float32)
            return {"out": out}

    # Each run has the adapters in other slots.
    with pytest.raises(EngineMismatch, match="fake: no batch size up to 4 gives a row the same"):
        measure(Numbered(), SPECS, LAYOUT, [1, 2, 4], twin(4))


@pytest.mark.parametrize("room", COUNTS)
@pytest.mark.parametrize("place", range(4))
def test_check_looks_at_every_place_with_every_room(room: int, place: int) -> None:
    counts, known, _ = measured(lambda batch, room: [])
    # The rows of the probe whose adapters fit into 1, 2 and 4.
    row = {1: [0, 1, 4, 5], 2: [0, 1, 3, 4], 4: [0, 1, 2, 3]}[room][place]
    message = rf"fake with adapters: batch 4 with room for {room} a row .*\(rows \[{row}\]\)"
    spoiled = FakeSession(lambda batch, given: [place] if given == room else [])
    with pytest.raises(EngineMismatch, match=message):
        check(spoiled, SPECS, LAYOUT, counts, known, 4, room)
    for other in set(counts) - {room}:
        check(spoiled, SPECS, LAYOUT, counts, known, 4, other)


def test_check_serves_a_graph_with_room_for_less() -> None:
    counts, known, _ = measured(lambda batch, room: list(range(batch)) if room == 4 else [])
    assert counts == [1, 2]
    for room in counts:
        check(FakeSession(), SPECS, LAYOUT, counts, known, 8, room)


def test_the_probes_rows_have_none_one_two_and_four_adapters() -> None:
    assert {len(uses(row, 4, 4)) for row in range(4)} == {0, 1, 2, 4}
    assert [len(uses(row, 1, 4)) for row in range(4)] == [1, 0, 1, 1]
    assert [slot for slot, _ in uses(2, 4, 4)] == [2, 3, 0, 1]
    given = port_inputs([[], [(2, 0.5)], [(0, 1.0), (1, 2.0)]], 2)
    assert given["adapter_rows"].tolist() == [1, 2]
    assert given["adapter_slots"].tolist() == [[2, -1], [0, 1]]
    assert given["adapter_scales"].tolist() == [[0.5, 0.0], [1.0, 2.0]]


def test_the_probes_adapters_are_the_same_in_any_slot() -> None:
    first, second = (bank_probe(LAYOUT, slots, 7) for slots in ([0, 1], [4, 2]))
    for name in LAYOUT.shapes():
        parts: list[Any] = [
            bank[name].reshape(2, 5, *bank[name].shape[1:]) for bank in (first, second)
        ]
        for content, (a, b) in enumerate([(0, 4), (1, 2)]):
            wanted = adapter_probe(LAYOUT, name, content, 7)
            np.testing.assert_array_equal(parts[0][:, a], wanted)
            np.testing.assert_array_equal(parts[1][:, b], wanted)
        assert not parts[0][:, 2:].any()
    one, other = (adapter_probe(LAYOUT, "bank.0.a", content, 7) for content in (0, 1))
    assert not np.array_equal(one, other)
