"""What a merge is told: an adapter's effect on one weight, and the checks of weights and terms."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from heatsink.kernels._checks import FLOATS, check_shape, check_tensors


@dataclass(frozen=True, eq=False)
class Term:
    """One adapter's effect on the rows `row + i * step` of one weight.

    Attributes:
        weight: the weight's number among those of the merge.
        a: `(rank, columns)` or `(rank, *shape of a row)`: fp16, bf16 or fp32.
        b: `(count, rank)`, fp16, bf16 or fp32.
        scale: the adapter's scale times its weight. At 0 only a magnitude has an effect.
        magnitude: of DoRA, `(count,)`, the length of every adapted row; None for plain LoRA.
        row: the first row.
        step: from a row to the next; more than 1 where a pass interleaved several weights.
    """

    weight: int
    a: Tensor
    b: Tensor
    scale: float
    magnitude: Tensor | None = None
    row: int = 0
    step: int = 1

    @property
    def counts(self) -> bool:
        """Whether it has any effect."""
        rows, rank = self.b.shape
        adds = self.scale != 0 and rank > 0
        return rows > 0 and (adds or self.magnitude is not None)


def rows_of(x: Tensor) -> int:
    """The rows of a weight: its size along dimension 0."""
    return x.shape[0] if x.dim() else 1


def columns_of(x: Tensor) -> int:
    """The values of a row of a weight."""
    return x.shape[1:].numel()


def channels_last(x: Tensor) -> bool:
    """Whether a row's values lie dense with its first dimension innermost, and not as in the shape.

    Raises:
        ValueError: if they lie in neither order.
    """
    if x.is_contiguous():
        return False
    if x.dim() > 2 and x.movedim(1, -1).is_contiguous():
        return True
    raise ValueError(
        f"expected contiguous or channels_last memory, got shape {tuple(x.shape)} with strides "
        f"{tuple(x.stride())}"
    )


def check_weights(base: Sequence[Tensor], out: Sequence[Tensor]) -> None:
    """Check that weights can be merged into; not what their memory overlaps with.

    Raises:
        TypeError: if one is no tensor or has another dtype.
        ValueError: if counts, shapes, layouts or devices differ or a gradient is required.
    """
    for name, weights in (("base", base), ("out", out)):
        if not isinstance(weights, list | tuple):
            raise TypeError(f"{name}: expected a list of tensors, got {type(weights).__name__}")
    if len(base) != len(out):
        raise ValueError(f"out: expected {len(base)} weights like base, got {len(out)}")
    if not base:
        return
    named = {f"base[{j}]": x for j, x in enumerate(base)}
    check_tensors({**named, **{f"out[{j}]": x for j, x in enumerate(out)}}, FLOATS)
    for j, (before, after) in enumerate(zip(base, out, strict=True)):
        check_shape(f"out[{j}]", after, tuple(before.shape))
        for name, x in ((f"base[{j}]", before), (f"out[{j}]", after)):
            try:
                last = channels_last(x)
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from None
            if last != channels_last(before):
                raise ValueError(f"{name}: expected memory in the order of base[{j}]")


def check_terms(terms: Sequence[Term], base: Sequence[Tensor]) -> None:
    """Check terms against the weights that they are for.

    Raises:
        TypeError: if one is no term, or a part of it has the wrong type or dtype.
        ValueError: if a part of it does not fit its weight.
    """
    if not isinstance(terms, list | tuple):
        raise TypeError(f"terms: expected a list of terms, got {type(terms).__name__}")
    for number, term in enumerate(terms):
        name = f"terms[{number}]"
        if not isinstance(term, Term):
            raise TypeError(f"{name}: expected a Term, got {type(term).__name__}")
        _check_matrices(name, term)
        _check_place(name, term, base)


def _check_matrices(name: str, term: Term) -> None:
    parts = {"a": term.a, "b": term.b, "magnitude": term.magnitude}
    for part, x in parts.items():
        if x is not None or part != "magnitude":
            check_tensors({f"{name}.{part}": x}, FLOATS)
    a, b = term.a, term.b
    if a.dim() < 2 or b.dim() != 2 or a.shape[0] != b.shape[1]:
        raise ValueError(
            f"{name}: expected a (rank, ...) and b (rows, rank), got {tuple(a.shape)} and "
            f"{tuple(b.shape)}"
        )
    if term.magnitude is not None:
        check_shape(f"{name}.magnitude", term.magnitude, (b.shape[0],))
    if not isinstance(term.scale, int | float) or isinstance(term.scale, bool):
        raise TypeError(f"{name}.scale: expected a number, got {type(term.scale).__name__}")
    if not math.isfinite(term.scale) or abs(term.scale) >= 2.0**128:
        raise ValueError(f"{name}.scale: expected a finite fp32 number, got {term.scale}")


def _check_place(name: str, term: Term, base: Sequence[Tensor]) -> None:
    for part, value in (("weight", term.weight), ("row", term.row), ("step", term.step)):
        if not isinstance(value, int) or isinstance(value, bool):
            raise TypeError(f"{name}.{part}: expected an integer, got {type(value).__name__}")
    if not 0 <= term.weight < len(base):
        raise ValueError(f"{name}.weight: expected 0 to {len(base) - 1}, got {term.weight}")
    weight = base[term.weight]
    for part, x in (("a", term.a), ("b", term.b), ("magnitude", term.magnitude)):
        if x is not None and x.device != weight.device:
            raise ValueError(
                f"{name}.{part}: expected device {weight.device} like base, got {x.device}"
            )
    shape = tuple(weight.shape[1:])
    given = tuple(term.a.shape[1:])
    if given != shape and (len(given) > 1 or given[0] != math.prod(shape)):
        raise ValueError(
            f"{name}.a: expected {(term.a.shape[0], *shape)} for base[{term.weight}], got "
            f"{tuple(term.a.shape)}"
        )
    last = term.row + (term.b.shape[0] - 1) * term.step
    if term.row < 0 or term.step < 1 or last >= rows_of(weight):
        raise ValueError(
            f"{name}: expected rows among the {rows_of(weight)} of base[{term.weight}], got "
            f"{term.b.shape[0]} from {term.row} by steps of {term.step}"
        )


def check_memory(base: Sequence[Tensor], out: Sequence[Tensor], changed: Sequence[int]) -> None:
    """Check that no weight is written over another, nor over the base of one with terms.

    Args:
        base: the pristine weights.
        out: what is written.
        changed: the numbers of the weights that have terms.

    Raises:
        ValueError: if `out[j]` overlaps another weight of `out`, a base of another, or its own; its
            own it may be where it has no terms.
    """
    if not base or base[0].device.type == "meta":
        return
    starts = np.array([x.data_ptr() for x in out], np.int64)
    sizes = np.array([x.numel() * x.element_size() for x in out], np.int64)
    origins = np.array([x.data_ptr() for x in base], np.int64)
    same = origins == starts
    same[list(changed)] = False
    written = np.flatnonzero((sizes > 0) & ~same)
    written = written[np.argsort(starts[written], kind="stable")]
    first, last = starts[written], (starts + sizes)[written]
    for place in np.flatnonzero(first[1:] < last[:-1]):
        j, k = written[place + 1], written[place]
        raise ValueError(f"out[{j}]: expected memory of its own, got some of out[{k}]'s")
    # The last weight that begins before a base's end is the only one that may reach into it.
    places = np.searchsorted(first, origins + sizes, side="left") - 1
    for k in np.flatnonzero((places >= 0) & (sizes > 0)):
        if last[places[k]] > origins[k]:
            j = written[places[k]]
            raise ValueError(f"out[{j}]: expected memory of its own, got some of base[{k}]'s")


def flat(
    terms: Sequence[Term],
) -> tuple[list[Tensor], list[Tensor], list[Tensor], list[float], list[int]]:
    """Terms as the op takes them: `a`, `b`, `magnitudes`, `scales`, and four `places` of each.

    The places are the weight, the row, the step, and the number of its magnitude or -1.
    """
    kept = [term for term in terms if term.counts]
    magnitudes: list[Tensor] = []
    places: list[int] = []
    for term in kept:
        places += (term.weight, term.row, term.step)
        places.append(-1 if term.magnitude is None else len(magnitudes))
        if term.magnitude is not None:
            magnitudes.append(term.magnitude)
    scales = [float(term.scale) for term in kept]
    return [term.a for term in kept], [term.b for term in kept], magnitudes, scales, places


def unflat(
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    magnitudes: Sequence[Tensor],
    scales: Sequence[float],
    places: Sequence[int],
) -> list[Term]:
    """The terms that `flat` was given."""
    terms = []
    for t in range(len(a)):
        weight, row, step, number = places[4 * t : 4 * t + 4]
        magnitude = None if number < 0 else magnitudes[number]
        terms.append(Term(weight, a[t], b[t], scales[t], magnitude, row, step))
    return terms
