"""Runs any number of rows in the batch sizes (buckets) that give a row the same bits."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence

import numpy as np

from heatsink.runtime.backends.session import Array, Session


def plan(rows: int, buckets: Sequence[int]) -> list[int]:
    """The buckets that together hold `rows` rows with the least padding, then the fewest runs.

    >>> plan(11, [1, 2, 4, 8])
    [8, 2, 1]
    >>> plan(3, [2, 8])
    [2, 2]
    """
    if rows <= 0:
        return []
    best: list[tuple[int, int, list[int]]] = [(0, 0, [])]
    for count in range(1, rows + 1):
        choices = []
        for bucket in buckets:
            padding, runs, chosen = best[max(0, count - bucket)]
            choices.append((padding + max(0, bucket - count), runs + 1, [*chosen, bucket]))
        best.append(min(choices))
    return sorted(best[rows][2], reverse=True)


def in_one_run(rows: int, buckets: Sequence[int]) -> list[int]:
    """The smallest bucket that holds all rows; before it the largest, as often as they fill it.

    For buckets that lie close, where another run costs more than the padding, and where the number
    of runs must not depend on the rows.

    >>> in_one_run(5, [1, 2, 4, 6])
    [6]
    >>> in_one_run(9, [1, 2, 4, 6])
    [6, 4]
    """
    largest = max(buckets)
    whole, rest = divmod(rows, largest)
    last = [min(bucket for bucket in buckets if bucket >= rest)] if rest else []
    return [largest] * whole + last


def alike(keys: Sequence[Hashable]) -> list[list[int]]:
    """The places of equal keys together, in order of first appearance.

    >>> alike(["b", "a", "b"])
    [[0, 2], [1]]
    """
    groups: dict[Hashable, list[int]] = {}
    for place, key in enumerate(keys):
        groups.setdefault(key, []).append(place)
    return list(groups.values())


def run_rows(
    session: Session,
    inputs: Mapping[str, Array],
    buckets: Sequence[int],
    before: Callable[[int], None] | None = None,
    planned: Callable[[int, Sequence[int]], list[int]] = plan,
) -> dict[str, Array]:
    """Run all rows of `inputs` (first dimension of each) and return the outputs' rows in order.

    Padding rows repeat the first row of their run and are dropped. `before` is called with every
    bucket that is about to be run; `planned` chooses them.
    """
    rows = len(next(iter(inputs.values())))
    parts: list[dict[str, Array]] = []
    start = 0
    for bucket in planned(rows, buckets):
        if before:
            before(bucket)
        stop = min(rows, start + bucket)
        index = np.arange(start, start + bucket)
        index[stop - start :] = start
        out = session.run({name: value[index] for name, value in inputs.items()})
        parts.append({name: value[: stop - start] for name, value in out.items()})
        start = stop
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
