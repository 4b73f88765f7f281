"""Weights stacked along their rows and cut again, with the record of which rows are whose."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from heatsink.runtime.graph.weight import Origin, Weight


def spans(origins: Sequence[Origin], rows: int) -> Iterator[tuple[int, int, Origin]]:
    """Which rows of a weight each of its origins makes: (start, stop, origin), in order.

    This undoes a packing: rows `start:stop` belong to the rows `origin.slice` of
    `origin.parameter`, all of them where that is None.

    Args:
        origins: of one weight; only the last may be a whole parameter after others.
        rows: of the weight.
    """
    at = 0
    for origin in origins:
        length = rows - at if origin.slice is None else origin.slice[0][1] - origin.slice[0][0]
        yield at, at + length, origin
        at += length


def stack(
    weights: Sequence[Weight], origins: Sequence[Sequence[Origin]]
) -> tuple[Weight, list[Origin]]:
    """One weight with the rows of several in order, and its origins, each with its rows.

    Args:
        weights: of the same dtype and of the same sizes but for rows.
        origins: of each.
    """
    first = weights[0]
    rows = sum(weight.shape[0] for weight in weights)
    sources = [_checked(weight) for weight in weights]

    def stacked() -> Tensor:
        parts = [source() for source in sources]
        # A folded scale leaves float64, which is rounded once with the rest.
        wide = any(part.dtype == torch.float64 for part in parts)
        return torch.cat([part.double() if wide else part for part in parts])

    name = "+".join(weight.name for weight in weights)
    packed = Weight((rows, *first.shape[1:]), first.dtype, stacked, name)
    parts = [
        _explicit(origin, stop - start)
        for weight, own in zip(weights, origins, strict=True)
        for start, stop, origin in spans(own, weight.shape[0])
    ]
    return packed, parts


def cut(
    weight: Weight, origins: Sequence[Origin], start: int, stop: int
) -> tuple[Weight, list[Origin]]:
    """The rows `start:stop` of a weight as one of its own, and their origins."""
    source = _checked(weight)
    kept = [
        origin.rows(max(start, low) - low, min(stop, high) - low)
        for low, high, origin in spans(origins, weight.shape[0])
        if max(start, low) < min(stop, high)
    ]
    part = replace(
        weight,
        shape=(stop - start, *weight.shape[1:]),
        source=lambda: source()[start:stop],
        name=f"{weight.name}[{start}:{stop}]",
    )
    return part, kept


def _explicit(origin: Origin, rows: int) -> Origin:
    return origin.rows(0, rows) if origin.slice is None else origin


def _checked(weight: Weight) -> Callable[[], Tensor]:
    """The values as the source has them, of the shape that is wanted."""

    def values() -> Tensor:
        found = weight.source()
        # `load` says what is wrong with another shape.
        return found if tuple(found.shape) == weight.shape else weight.load()

    return values
