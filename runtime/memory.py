"""Where intermediate values lie in one arena, planned once from when each is needed.

A value occupies its bytes from the step that writes it to the last step that reads it; two values
share bytes if they are never needed at the same step. Finding the smallest arena is hard in
general; placing values greedily, the largest first, each in the lowest gap that fits among those it
meets, comes close (Pisarchyk and Lee, "Efficient memory management for deep neural net inference",
https://arxiv.org/abs/2001.03288). Several orders are tried, and the smallest arena is taken.

No plan can be smaller than the most bytes needed at any one step: the lower bound.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

ALIGNMENT = 64
"""Bytes; a cache line, and what vector loads want."""


@dataclass(frozen=True)
class Lifetime:
    """A value to place.

    Attributes:
        name: unique.
        size: bytes.
        first: the step that writes it.
        last: the last step that reads it; at least `first`.
    """

    name: str
    size: int
    first: int
    last: int

    def __post_init__(self) -> None:
        if self.size < 0 or self.last < self.first:
            raise ValueError(
                f"{self.name}: expected size >= 0 and last >= first, got {self.size} bytes from "
                f"step {self.first} to {self.last}"
            )

    def meets(self, other: Lifetime) -> bool:
        """Whether both are needed at some step."""
        return self.first <= other.last and other.first <= self.last


@dataclass(frozen=True)
class Plan:
    """Places in the arena.

    Attributes:
        offsets: of every value, in bytes from the arena's beginning.
        peak: bytes of the arena.
        lower_bound: the most bytes needed at one step; no arena is smaller.
    """

    offsets: dict[str, int]
    peak: int
    lower_bound: int


def plan(lifetimes: Iterable[Lifetime], alignment: int = ALIGNMENT) -> Plan:
    """Place all values.

    Args:
        lifetimes: the values, in any order; equal inputs give equal plans.
        alignment: of every offset, in bytes; sizes are rounded up to it.

    Raises:
        ValueError: two values have one name, or the alignment is not positive.
    """
    if alignment < 1:
        raise ValueError(f"alignment: expected at least 1 byte, got {alignment}")
    values = [
        Lifetime(v.name, -(-v.size // alignment) * alignment, v.first, v.last) for v in lifetimes
    ]
    if len({value.name for value in values}) != len(values):
        raise ValueError("two values have one name")
    bound = lower_bound(values)
    best: tuple[int, dict[str, int]] | None = None
    for order in _ORDERS:
        peak, offsets = _place(sorted(values, key=order))
        if best is None or peak < best[0]:
            best = peak, offsets
        if peak == bound:
            break
    assert best is not None
    return Plan(best[1], best[0], bound)


def lower_bound(values: Sequence[Lifetime]) -> int:
    """The most bytes that are needed at one step."""
    changes: dict[int, int] = {}
    for value in values:
        changes[value.first] = changes.get(value.first, 0) + value.size
        changes[value.last + 1] = changes.get(value.last + 1, 0) - value.size
    most = now = 0
    for step in sorted(changes):
        now += changes[step]
        most = max(most, now)
    return most


_ORDERS: tuple[Callable[[Lifetime], tuple[int, int, str]], ...] = (
    lambda v: (-v.size, v.first, v.name),
    lambda v: (-v.size * (v.last - v.first + 1), v.first, v.name),
    lambda v: (v.first - v.last, -v.size, v.name),
    lambda v: (v.first, -v.size, v.name),
)


def _place(values: Sequence[Lifetime]) -> tuple[int, dict[str, int]]:
    """Each value in the smallest gap that holds it among those it meets, lowest first."""
    offsets: dict[str, int] = {}
    placed: list[tuple[int, Lifetime]] = []
    peak = 0
    for value in values:
        offset = _gap(value, [(at, other) for at, other in placed if other.meets(value)])
        offsets[value.name] = offset
        placed.append((offset, value))
        placed.sort(key=lambda pair: pair[0])
        peak = max(peak, offset + value.size)
    return peak, offsets


def _gap(value: Lifetime, neighbours: Sequence[tuple[int, Lifetime]]) -> int:
    """The offset of the smallest gap between the neighbours, or above them where none fits."""
    best: tuple[int, int] | None = None
    end = 0
    for at, other in neighbours:
        room = at - end
        if room >= value.size and (best is None or room < best[0]):
            best = room, end
        end = max(end, at + other.size)
    return end if best is None else best[1]
