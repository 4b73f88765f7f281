"""The arena's plan: nothing that is needed at one step overlaps, and little is wasted."""

from __future__ import annotations

import random

import pytest

from heatsink.runtime.memory import Lifetime, lower_bound, plan


def _random(seed: int, count: int) -> list[Lifetime]:
    rng = random.Random(seed)
    values = []
    for index in range(count):
        first = rng.randrange(count)
        last = min(count, first + int(rng.expovariate(0.3)))
        values.append(Lifetime(f"v{index}", rng.randrange(0, 100_000), first, last))
    return values


def _overlapping(values: list[Lifetime], offsets: dict[str, int]) -> list[tuple[str, str]]:
    found = []
    for i, one in enumerate(values):
        for other in values[:i]:
            apart = (
                offsets[one.name] + one.size <= offsets[other.name]
                or offsets[other.name] + other.size <= offsets[one.name]
            )
            together = any(
                step in range(other.first, other.last + 1)
                for step in range(one.first, one.last + 1)
            )
            if together and not apart:
                found.append((one.name, other.name))
    return found


@pytest.mark.parametrize("seed", range(20))
def test_values_needed_together_never_overlap(seed: int) -> None:
    values = _random(seed, 120)
    found = plan(values)
    assert _overlapping(values, found.offsets) == []
    assert all(offset % 64 == 0 for offset in found.offsets.values())
    assert found.peak >= max(found.offsets[v.name] + v.size for v in values)
    assert found.peak >= found.lower_bound


@pytest.mark.parametrize("seed", range(20))
def test_random_lifetimes_waste_little(seed: int) -> None:
    found = plan(_random(seed, 120))
    assert found.peak <= 1.15 * found.lower_bound


def test_a_chain_needs_two_values_at_a_time() -> None:
    # Value i is written at step i and read at step i + 1.
    values = [Lifetime(str(i), 640, i, i + 1) for i in range(50)]
    found = plan(values)
    assert found.lower_bound == 2 * 640
    assert found.peak == found.lower_bound


def test_the_lower_bound_counts_the_busiest_step() -> None:
    values = [Lifetime("a", 64, 0, 4), Lifetime("b", 128, 1, 2), Lifetime("c", 256, 2, 3)]
    assert lower_bound(values) == 64 + 128 + 256
    assert plan(values).lower_bound == 448


def test_sizes_are_rounded_up_to_the_alignment() -> None:
    found = plan([Lifetime("a", 1, 0, 1), Lifetime("b", 65, 0, 1)])
    assert found.peak == 64 + 128
    assert plan([Lifetime("a", 1, 0, 1), Lifetime("b", 65, 0, 1)], alignment=1).peak == 66


def test_the_order_of_the_values_does_not_count() -> None:
    values = _random(5, 60)
    assert plan(values) == plan(values[::-1])


def test_nothing_to_place() -> None:
    found = plan([])
    assert (found.peak, found.lower_bound, found.offsets) == (0, 0, {})


def test_what_is_refused() -> None:
    with pytest.raises(ValueError, match="a: expected size >= 0 and last >= first"):
        Lifetime("a", 1, 2, 1)
    with pytest.raises(ValueError, match="one name"):
        plan([Lifetime("a", 1, 0, 0), Lifetime("a", 1, 0, 0)])
    with pytest.raises(ValueError, match="alignment"):
        plan([], alignment=0)
