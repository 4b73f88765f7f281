"""Weights that are read when used, and the record of where each came from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from heatsink.runtime.errors import ModelError

IDENTITY = "identity"
COMPUTED = "computed"
"""Transform of what the module makes itself and no checkpoint holds, a position table say."""

Slice = tuple[tuple[int, int], ...]
"""(start, stop) for the leading dimensions of a checkpoint parameter."""


@dataclass(frozen=True)
class Origin:
    """What a weight, or a stretch of its rows, was made from.

    A weight's origins in order, concatenated along dimension 0, make up the weight, save those
    that say at which rows they lie (`at`), as a pass that interleaves rows records them.

    Attributes:
        parameter: the dotted name in the checkpoint.
        slice: the part of that parameter, None for all of it.
        transform: what was done to it, in order: `identity`, `scale by 2.0, divide by 3.0`.
        at: (row, step): its row i is row `row + i * step` of the weight. None: it begins where the
            origin before it, of those without `at`, ends. Needs `slice`, which gives its length.
    """

    parameter: str
    slice: Slice | None = None
    transform: str = IDENTITY
    at: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        if self.at is None:
            return
        if self.slice is None or self.at[0] < 0 or self.at[1] < 1:
            raise ValueError(
                f"an origin of {self.parameter} lies at {self.at} with the slice {self.slice}:"
                " expected (row >= 0, step >= 1) and a slice"
            )

    def as_list(self) -> list[object]:
        """As JSON values; the place only where there is one."""
        place = [] if self.at is None else [list(self.at)]
        return [self.parameter, self.slice, self.transform, *place]

    def then(self, transform: str) -> Origin:
        """This origin with one more transform."""
        done = transform if self.transform == IDENTITY else f"{self.transform}, {transform}"
        return replace(self, transform=done)

    def rows(self, start: int, stop: int) -> Origin:
        """The origin of rows `start:stop` of what this origin describes."""
        at = self.at and (self.at[0] + start * self.at[1], self.at[1])
        if self.slice is None:
            return replace(self, slice=((start, stop),))
        first = self.slice[0][0]
        return replace(self, slice=((first + start, first + stop), *self.slice[1:]), at=at)


@dataclass(frozen=True)
class Weight:
    """A tensor of the graph whose values are read only when it is loaded.

    Attributes:
        shape: its shape.
        dtype: what it is in the graph; the checkpoint's may differ.
        source: reads the values, in any dtype.
        name: for messages.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    source: Callable[[], Tensor]
    name: str

    def load(self, dtype: torch.dtype | None = None) -> Tensor:
        """The values as `dtype` (default: the graph's), rounded once from the source.

        Raises:
            ModelError: the source's shape is not the module's.
        """
        values = self.source()
        if tuple(values.shape) != self.shape:
            raise ModelError(
                f"parameter {self.name!r}: the module wants shape {list(self.shape)}, "
                f"the checkpoint holds {list(values.shape)}"
            )
        return values.to(self.dtype if dtype is None else dtype)

    def scale_rows(self, factor: Callable[[Tensor], Tensor], start: int, stop: int) -> Weight:
        """This weight with `factor` applied in float64 to rows `start:stop`."""
        source = self.source

        def scaled() -> Tensor:
            values = source().to(torch.float64, copy=True)
            values[start:stop] = factor(values[start:stop])
            return values

        return replace(self, source=scaled)


def placed(origins: Sequence[Origin], rows: int) -> list[tuple[Origin, range]]:
    """Each origin with the rows of the weight that it makes.

    Args:
        origins: of one weight.
        rows: how many the weight has.

    Raises:
        ValueError: they don't make every row once.
    """
    found: list[tuple[Origin, range]] = []
    end = 0
    for origin in origins:
        length = rows - end if origin.slice is None else origin.slice[0][1] - origin.slice[0][0]
        if origin.at is None:
            places, end = range(end, end + length), end + length
        else:
            first, step = origin.at
            places = range(first, first + length * step, step)
        found.append((origin, places))
    if sorted(row for _, places in found for row in places) != list(range(rows)):
        raise ValueError(f"the origins {list(origins)} don't make each of {rows} rows once")
    return found


def transform_rows(
    origins: list[Origin], rows: int, start: int, stop: int, transform: str
) -> list[Origin]:
    """Record `transform` on rows `start:stop` of `rows`, splitting origins at its ends."""
    done: list[Origin] = []
    for origin, places in placed(origins, rows):
        length = len(places)
        # The first of its rows at or after each end.
        low = min(max(-((places.start - start) // places.step), 0), length)
        high = min(max(-((places.start - stop) // places.step), 0), length)
        if low >= high:
            done.append(origin)
        elif (low, high) == (0, length):
            done.append(origin.then(transform))
        else:
            if low > 0:
                done.append(origin.rows(0, low))
            done.append(origin.rows(low, high).then(transform))
            if high < length:
                done.append(origin.rows(high, length))
    return done
