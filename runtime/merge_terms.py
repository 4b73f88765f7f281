"""Which rows of which live weights an adapter's modules are, through the origin map.

A pass packs weights (Q, K and V into one), interleaves their rows (value and gate of a GEGLU) and
scales them. What an adapter does to parameter P, then has to be done to the rows that P became.
With rows V = c P of a live weight (`scale by c`):

- `s B A` added to P adds `c s B A` to V: the term's scale is multiplied by c.
- DoRA gives a row of P the length m: `P' = m (P + s B A) / |P + s B A|`. V's own row has the
  length `|c|` times as large before and after, so the magnitude is multiplied by |c|; the sign of
  c is in V and in the term's scale already.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from heatsink.runtime.adapter_delta import AdapterDelta, digest_deltas
from heatsink.runtime.errors import AdapterError, HeatsinkError
from heatsink.runtime.graph.weight import COMPUTED, IDENTITY, Origin, Slice, placed


@dataclass(frozen=True)
class Place:
    """Rows of a live weight that some rows of a parameter became.

    Attributes:
        key: the live weight, `component.name`.
        slice: the rows (and further dimensions) of the parameter; None for all of it.
        scale: what the parameter was multiplied by.
        row: the first row of the live weight.
        step: from one row to the next.
    """

    key: str
    slice: Slice | None = None
    scale: float = 1.0
    row: int = 0
    step: int = 1


@dataclass(frozen=True, eq=False)
class Part:
    """A delta's effect on rows `row + i * step` of a live weight, at an adapter's full strength.

    Attributes:
        key: the live weight.
        a: `(r, in)` or `(r, in, kh, kw)`.
        b: `(rows, r)`.
        scale: of the product.
        magnitude: of DoRA, `(rows,)`; else None.
        row: the first row.
        step: from one row to the next.
    """

    key: str
    a: Tensor
    b: Tensor
    scale: float
    magnitude: Tensor | None
    row: int
    step: int


@dataclass(frozen=True, eq=False)
class Prepared:
    """An adapter ready to be merged: checked, on the devices of the weights it changes.

    Attributes:
        deltas: copies of those that came.
        parts: what they do to live weights.
    """

    deltas: tuple[AdapterDelta, ...]
    parts: tuple[Part, ...]

    @functools.cached_property
    def digest(self) -> str:
        """SHA-256 of the adapter's values."""
        return digest_deltas(self.deltas)


def weight_key(component: str, name: str) -> str:
    """The name of a component's weight among those of several components."""
    return f"{component}.{name}"


def places_of(
    shapes: Mapping[str, tuple[int, ...]], origins: Mapping[str, Sequence[Origin]] | None = None
) -> dict[str, list[Place]]:
    """Where the rows of every parameter are, by the parameter's key.

    Args:
        shapes: of the live weights, by key.
        origins: of live weights that are not parameters as the checkpoint has them, by key (a
            graph's `origins`); the others are themselves.

    Raises:
        HeatsinkError: the origins of a weight don't make it up.
    """
    places: dict[str, list[Place]] = {}
    for key, shape in shapes.items():
        made = (origins or {}).get(key)
        if made is None:
            places.setdefault(key, []).append(Place(key))
            continue
        component = key.partition(".")[0]
        try:
            found = placed(made, shape[0] if shape else 1)
        except ValueError as cause:
            raise HeatsinkError(f"{key}: {cause}") from cause
        for origin, rows in found:
            if origin.transform == COMPUTED:
                continue
            scale = transform_scale(origin.transform)
            place = Place(key, origin.slice, scale, rows.start, rows.step)
            places.setdefault(weight_key(component, origin.parameter), []).append(place)
    return places


def transform_scale(transform: str) -> float:
    """The number that `scale by c` and `divide by c`, one after the other, multiply by.

    Raises:
        HeatsinkError: something else was done, which an adapter can't be taken through.
    """
    scale = 1.0
    if transform == IDENTITY:
        return scale
    for step in transform.split(", "):
        verb, _, number = step.rpartition(" by ")
        if verb not in ("scale", "divide"):
            raise HeatsinkError(f"an adapter can't be taken through the transform {step!r}")
        scale = scale * float(number) if verb == "scale" else scale / float(number)
    return scale


def parts_of(
    delta: AdapterDelta,
    places: Mapping[str, Sequence[Place]],
    shapes: Mapping[str, tuple[int, ...]],
) -> list[Part]:
    """A delta as parts of live weights.

    Raises:
        AdapterError: the parameter is unknown, or of another shape.
    """
    found = places.get(weight_key(delta.component, delta.weight_name))
    if not found:
        raise AdapterError(f"{delta.component} has no weight {delta.weight_name}")
    _check_matrices(delta)
    for dim, size in enumerate(delta.weight_shape[: min(len(p.slice or ()) for p in found)]):
        extent = max(place.slice[dim][1] for place in found if place.slice)
        if size != extent:
            raise AdapterError(
                f"wrong shape: {delta.weight_shape}, but dimension {dim} has {extent}"
            )
    return [_part(delta, place, shapes[place.key]) for place in found]


def _check_matrices(delta: AdapterDelta) -> None:
    a, b, magnitude = delta.a, delta.b, delta.magnitude
    if a.dim() not in (2, 4) or b.dim() != 2 or a.shape[0] != b.shape[1] or not a.shape[0]:
        raise AdapterError(f"wrong shape: a {tuple(a.shape)} and b {tuple(b.shape)}")
    if magnitude is not None and tuple(magnitude.shape) != (b.shape[0],):
        raise AdapterError(
            f"wrong shape: magnitude {tuple(magnitude.shape)}, expected ({b.shape[0]},)"
        )
    if not math.isfinite(delta.scale):
        raise AdapterError(f"the scale is {delta.scale}")


def _part(delta: AdapterDelta, place: Place, shape: tuple[int, ...]) -> Part:
    a, b, magnitude = delta.a, delta.b, delta.magnitude
    if place.slice is None:
        cuts = [slice(None)]
    else:
        cuts = [slice(start, stop) for start, stop in place.slice]
    inner = a[(slice(None), *cuts[1:])]
    if magnitude is not None and inner.shape != a.shape:
        raise AdapterError("DoRA needs whole rows, and a pass cut this weight's columns")
    b = b[cuts[0]]
    magnitude = None if magnitude is None else magnitude[cuts[0]]
    if place.scale != 1.0 and magnitude is not None:
        magnitude = magnitude.float() * abs(place.scale)
    rows = len(range(place.row, shape[0], place.step))
    # Linears and 1x1 convolutions are the same.
    inputs = tuple(inner.shape[1:]) + (1,) * (len(shape) - inner.dim())
    fits = inputs == shape[1:] or (inner.dim() == 4 and inputs == (*shape[1:], 1, 1))
    if not fits or b.shape[0] > rows or (place.slice is None and b.shape[0] != rows):
        raise AdapterError(f"wrong shape: {delta.weight_shape} onto {shape}")
    inner = inner.reshape(inner.shape[0], *shape[1:])
    return Part(place.key, inner, b, delta.scale * place.scale, magnitude, place.row, place.step)
