"""Rows are split into the allowed batch sizes with the least padding, and come back in order."""

from __future__ import annotations

import itertools
from collections.abc import Mapping

import numpy as np
import pytest

from heatsink.runtime.backends.session import Array
from heatsink.runtime.buckets import alike, in_one_run, plan, run_rows


class Doubling:
    """Returns every row twice as large, and remembers what it was given."""

    name = "doubling"

    def __init__(self) -> None:
        self.runs: list[Array] = []

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        self.runs.append(inputs["x"].copy())
        return {"y": inputs["x"] * 2, "z": inputs["k"] + 1}


def best_by_trying(rows: int, buckets: list[int]) -> tuple[int, int]:
    """Least padding, then fewest runs, over all multisets of buckets."""
    return min(
        (sum(chosen) - rows, len(chosen))
        for count in range(1, rows + 1)
        for chosen in itertools.combinations_with_replacement(buckets, count)
        if sum(chosen) >= rows
    )


@pytest.mark.parametrize("buckets", [[1, 2, 4], [2, 8], [3], [1, 4, 6], [4, 8]])
@pytest.mark.parametrize("rows", [1, 2, 3, 5, 7, 9])
def test_plan_is_the_best_there_is(rows: int, buckets: list[int]) -> None:
    chosen = plan(rows, buckets)
    assert set(chosen) <= set(buckets)
    assert (sum(chosen) - rows, len(chosen)) == best_by_trying(rows, buckets)
    # Largest first, and none is all padding.
    assert chosen == sorted(chosen, reverse=True)
    assert sum(chosen[:-1]) < rows


def test_no_rows_need_no_bucket() -> None:
    assert plan(0, [1, 2]) == []
    assert in_one_run(0, [1, 2]) == []


@pytest.mark.parametrize("buckets", [[1, 2, 4], [2, 8], [3], [4, 8]])
@pytest.mark.parametrize("rows", range(1, 20))
def test_as_few_runs_as_can_be(rows: int, buckets: list[int]) -> None:
    chosen = in_one_run(rows, buckets)
    assert set(chosen) <= set(buckets)
    assert len(chosen) == -(-rows // max(buckets))
    assert chosen == sorted(chosen, reverse=True)
    smaller = [bucket for bucket in buckets if bucket < chosen[-1]]
    assert sum(chosen) >= rows > sum(chosen[:-1]) + max(smaller, default=0)


@pytest.mark.parametrize("rows", [1, 3, 4, 5, 11])
@pytest.mark.parametrize("buckets", [[1, 2, 4], [4], [3, 4]])
def test_rows_come_back_in_order(rows: int, buckets: list[int]) -> None:
    session = Doubling()
    before: list[int] = []
    x = np.arange(rows * 6, dtype=np.float32).reshape(rows, 2, 3)
    k = np.arange(rows, dtype=np.int64)
    out = run_rows(session, {"x": x, "k": k}, buckets, before.append)
    np.testing.assert_array_equal(out["y"], x * 2)
    np.testing.assert_array_equal(out["z"], k + 1)
    assert before == [len(run) for run in session.runs] == plan(rows, buckets)


def test_padding_repeats_a_row_of_the_same_run() -> None:
    session = Doubling()
    x = np.arange(1, 6, dtype=np.float32)
    run_rows(session, {"x": x, "k": np.zeros(5)}, [4])
    np.testing.assert_array_equal(session.runs[0], [1, 2, 3, 4])
    np.testing.assert_array_equal(session.runs[1], [5, 5, 5, 5])


def test_alike_groups_places_by_key() -> None:
    assert alike([]) == []
    assert alike([(8, 8), (8, 16), (8, 8), (8, 16), (1,)]) == [[0, 2], [1, 3], [4]]
