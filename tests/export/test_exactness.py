"""Which batch sizes agree bit by bit is measured, not assumed."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import pytest

from heatsink.export.exactness import (
    PROBE_SEED,
    bucket_sizes,
    check,
    close_sizes,
    measure,
    probe,
    row_answers,
)
from heatsink.export.manifest import KnownAnswer, TensorSpec
from heatsink.runtime.backends.session import Array
from heatsink.runtime.errors import EngineMismatch, NumericError

SPECS = [
    TensorSpec(name="sample", dtype="float32", shape=["batch", 3, 2]),
    TensorSpec(name="timestep", dtype="float32", shape=["batch"]),
    TensorSpec(name="ids", dtype="int64", shape=["batch", 5]),
]


def exact(inputs: Mapping[str, Array]) -> Array:
    """A value for every element that depends on its own row alone."""
    rows = inputs["sample"].astype(np.float32) * np.float32(1.5)
    rows += inputs["timestep"].astype(np.float32)[:, None, None]
    return np.asarray(rows + inputs["ids"].sum(axis=1).astype(np.float32)[:, None, None])


class FakeSession:
    """A component whose rows are spoilt by one unit in the last place where `spoil` says so."""

    name = "fake"

    def __init__(self, spoil: Callable[[int], list[int]] = lambda batch: []) -> None:
        self.spoil = spoil
        self.batches: list[int] = []

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        out = exact(inputs)
        self.batches.append(len(out))
        for row in self.spoil(len(out)):
            out[row] = np.nextafter(out[row], np.float32(np.inf))
        return {"out": out}


@pytest.mark.parametrize(
    ("largest", "sizes"), [(1, [1]), (2, [1, 2]), (6, [1, 2, 4, 6]), (16, [1, 2, 4, 8, 16])]
)
def test_buckets_are_powers_of_two_and_the_largest(largest: int, sizes: list[int]) -> None:
    assert bucket_sizes(largest) == sizes


@pytest.mark.parametrize("largest", [1, 2, 3, 7, 8, 9, 16, 17, 100, 256])
def test_close_sizes_leave_little_padding(largest: int) -> None:
    sizes = close_sizes(largest)
    assert (sizes[0], sizes[-1]) == (1, largest)
    assert sizes == sorted(set(sizes))
    for rows in range(1, largest + 1):
        size = min(size for size in sizes if size >= rows)
        assert size - rows <= size / 5


def test_probe_rows_are_the_same_however_many_there_are() -> None:
    few, many = probe(SPECS, 2, 7), probe(SPECS, 5, 7)
    for name in few:
        assert few[name].tobytes() == many[name][:2].tobytes()
        assert few[name].dtype == many[name].dtype
        assert len({many[name][row].tobytes() for row in range(5)}) == 5
    assert probe(SPECS, 2, 8)["sample"].tobytes() != few["sample"].tobytes()


def test_probe_values_are_what_the_inputs_are_for() -> None:
    values = probe(SPECS, 64, PROBE_SEED)
    assert values["timestep"].shape == (64,)
    assert (values["timestep"] == np.round(values["timestep"])).all()
    assert (values["timestep"] >= 0).all()
    assert (values["timestep"] < 1000).all()
    assert values["ids"].dtype == np.int64
    assert values["ids"].min() >= 0
    assert values["ids"].max() < 256
    # 384 standard normal values: six deviations of their mean are 6 / sqrt(384).
    assert abs(float(values["sample"].mean())) < 6 / np.sqrt(384)


def test_a_row_exact_session_may_run_every_bucket() -> None:
    session = FakeSession()
    progress: list[tuple[int, int]] = []
    known = measure(
        session, SPECS, bucket_sizes(8), lambda done, total: progress.append((done, total))
    )
    assert known.buckets == [1, 2, 4, 8]
    assert known.refused == []
    assert known.answers == row_answers({"out": exact(probe(SPECS, 8, PROBE_SEED))})
    assert len(set(known.answers)) == 8
    assert progress == [(1, 4), (2, 4), (3, 4), (4, 4)]
    # Every bucket was run twice, with its rows at other places.
    assert session.batches == [1, 1, 2, 2, 4, 4, 8, 8]


def test_the_largest_class_is_chosen() -> None:
    def from_four(batch: int) -> list[int]:
        return list(range(batch)) if batch >= 4 else []

    known = measure(FakeSession(from_four), SPECS, bucket_sizes(16))
    assert known.buckets == [4, 8, 16]
    assert known.refused == [1, 2]
    assert len(known.answers) == 16


def test_of_classes_of_one_size_the_larger_batch_wins() -> None:
    def from_four(batch: int) -> list[int]:
        return list(range(batch)) if batch >= 4 else []

    assert measure(FakeSession(from_four), SPECS, bucket_sizes(8)).buckets == [4, 8]


def at_place(bucket: int, place: int) -> Callable[[int], list[int]]:
    return lambda batch: [place] if batch == bucket else []


@pytest.mark.parametrize("bucket", [2, 4, 7])
def test_a_bucket_with_one_deviating_place_is_refused(bucket: int) -> None:
    for place in range(bucket):
        known = measure(FakeSession(at_place(bucket, place)), SPECS, bucket_sizes(7))
        assert known.buckets == [size for size in (1, 2, 4, 7) if size != bucket]
        assert known.refused == [bucket]


def test_a_session_whose_rows_depend_on_their_place_is_left_with_one_row() -> None:
    class Places(FakeSession):
        def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
            out = super().run(inputs)["out"]
            return {"out": out + np.arange(len(out), dtype=np.float32)[:, None, None]}

    assert measure(Places(), SPECS, bucket_sizes(4)).buckets == [1]


def test_a_session_that_never_answers_twice_alike_is_refused() -> None:
    class Restless(FakeSession):
        def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
            out = super().run(inputs)["out"]
            return {"out": out + np.float32(len(self.batches))}

    with pytest.raises(EngineMismatch, match=r"fake: no batch size up to 4 .*--fast"):
        measure(Restless(), SPECS, bucket_sizes(4))


@pytest.mark.parametrize("mix", [lambda x: np.roll(x, 1, axis=0), lambda x: x.mean(axis=0)])
def test_rows_that_depend_on_their_neighbours_are_refused(mix: Callable[[Array], Array]) -> None:
    class Mixed(FakeSession):
        def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
            out = super().run(inputs)["out"]
            return {"out": out + mix(out)}

    assert measure(Mixed(), SPECS, bucket_sizes(4)).buckets == [1]


def test_non_finite_results_are_named() -> None:
    with pytest.raises(NumericError, match="output 'b' holds 2 non-finite values"):
        row_answers(
            {"a": np.zeros((1, 3), np.float32), "b": np.array([[np.nan, np.inf, 0]], np.float32)}
        )


def test_answers_cover_all_outputs() -> None:
    one = {"a": np.ones((2, 3), np.float32), "b": np.ones((2, 3), np.float32)}
    other = {"a": one["a"], "b": one["b"].copy()}
    other["b"][1, 2] = np.nextafter(np.float32(1), np.float32(2))
    before, after = row_answers(one), row_answers(other)
    assert before[0] == after[0]
    assert before[1] != after[1]


def test_check_names_component_batch_and_rows() -> None:
    known = measure(FakeSession(), SPECS, bucket_sizes(4))
    for bucket in known.buckets:
        check(FakeSession(), SPECS, known, bucket)
    with pytest.raises(EngineMismatch, match=r"fake: batch 4 .*rows \[2\].*heatsink build"):
        check(FakeSession(lambda batch: [2]), SPECS, known, 4)
    wrong = KnownAnswer(buckets=[1], probe_seed=PROBE_SEED + 1, answers=known.answers[:1])
    with pytest.raises(EngineMismatch, match="batch 1"):
        check(FakeSession(), SPECS, wrong, 1)
