"""The tables of a merge on a GPU: weights, terms and strips, as one launch reads them.

All are int64, in one buffer that travels to the device once. A row of them is
- of a weight: addresses of base and out, rows, columns, first and last term, 0, 0;
- of a term: addresses of a, b and magnitude, where its gains begin, rank, row, step, count, form,
  the dtypes of a and b, `inner` and `pixels` (the weight's column n is A's column
  n % inner * pixels + n // inner), the scale's bits, magnitude's dtype, 0;
- a strip: weight, block of rows, block of columns, packed. A program works on one.

Weights are of classes, each of which has a binary and a launch of its own: so that a row's bits do
not depend on what else is merged, and what is rare does not slow down what is common. A model's
adapter is of one class as a rule: even (rows and addresses begin at multiples of 16, so that
vectors may be read), fp16 or bf16 throughout, no magnitudes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from heatsink.kernels._checks import short
from heatsink.kernels._config import Config
from heatsink.kernels._launch import Kernel, Launch, address
from heatsink.kernels._merge_terms import Term, channels_last, columns_of, rows_of

Table = npt.NDArray[np.int64]

# kernels/jit/lora_merge.py has the same.
WEIGHT_FIELDS, TERM_FIELDS, EVEN, STRIP_BITS = 8, 16, 16, 21
_GAINS, _FORM, _SCALE = 3, 8, 13
_DTYPES = {torch.float16: 0, torch.bfloat16: 1, torch.float32: 2}
# Forms of terms: fp16 or bf16 throughout, in the weight's order and even; or anything.
_FORMS = ("fp16", "bf16", "any")
_ANYTHING = 2


class TermTable:
    """Terms as the launch reads them; keeps the memory that it points to alive.

    Attributes:
        rows: the table, without scales and the places of gains.
        weights: each term's weight.
        scales: each term's scale, float64.
        gains: how many gains each term has: its rows if it has magnitudes, else 0.
        kept: what holds the tensors that the addresses are of.
    """

    def __init__(self, base: Sequence[Tensor], terms: Sequence[Term]) -> None:
        """Of terms that `check_terms` let through."""
        terms = [term for term in terms if term.counts]
        self.kept = [_dense(base[term.weight], term) for term in terms]
        fields = [
            _fields(base[term.weight], term, *dense)
            for term, dense in zip(terms, self.kept, strict=True)
        ]
        self.rows: Table = np.array(fields, np.int64).reshape(-1, TERM_FIELDS)
        self.weights = np.array([term.weight for term in terms], np.int64)
        self.scales = np.array([term.scale for term in terms], np.float64)
        self.gains = np.array([0 if t.magnitude is None else len(t.b) for t in terms], np.int64)

    @classmethod
    def joined(cls, parts: Sequence[tuple[TermTable, float]]) -> TermTable:
        """The terms of several tables one after the other, each table's scales times a number.

        A table whose number is 0 is left out.
        """
        whole = cls([], [])
        parts = [(table, weight) for table, weight in parts if weight != 0]
        if parts:
            whole.kept = [kept for table, _ in parts for kept in table.kept]
            whole.rows = np.concatenate([table.rows for table, _ in parts])
            whole.weights = np.concatenate([table.weights for table, _ in parts])
            whole.scales = np.concatenate([table.scales * weight for table, weight in parts])
            whole.gains = np.concatenate([table.gains for table, _ in parts])
        return whole


_Dense = tuple[Tensor, Tensor, Tensor | None]


def _dense(weight: Tensor, term: Term) -> _Dense:
    """A term's matrices, or dense copies: A's rows, in the weight's order or contiguous.

    Where an A begins must not choose its form, and so a row's bits: one that begins at no multiple
    of 16 is copied to one that does.
    """
    a = term.a
    if not a.is_contiguous() and not _in_order(weight, a):
        a = a.contiguous()
    if address(a) % EVEN:
        a = a.clone()
    return a, term.b.contiguous(), None if term.magnitude is None else term.magnitude.contiguous()


def _in_order(weight: Tensor, a: Tensor) -> bool:
    """Whether a convolution's A has its columns as the weight does, channels innermost."""
    return channels_last(weight) and a.dim() == weight.dim() and a.movedim(1, -1).is_contiguous()


def _fields(
    weight: Tensor, term: Term, a: Tensor, b: Tensor, magnitude: Tensor | None
) -> list[int]:
    columns = columns_of(weight)
    inner, pixels = columns, 1
    if channels_last(weight) and not _in_order(weight, a):
        inner = weight.shape[1]
        pixels = columns // inner
    even = pixels == 1 and columns % EVEN == 0
    alike = even and a.dtype == b.dtype != torch.float32
    row = [0] * TERM_FIELDS
    row[0:3] = address(a), address(b), 0 if magnitude is None else address(magnitude)
    row[4:8] = a.shape[0], term.row, term.step, b.shape[0]
    row[8:11] = _DTYPES[a.dtype] if alike else _ANYTHING, _DTYPES[a.dtype], _DTYPES[b.dtype]
    row[11:13] = inner, pixels
    row[14] = 0 if magnitude is None else _DTYPES[magnitude.dtype]
    return row


class MergeTables:
    """What a merge of these weights always needs; the terms are given to each launch."""

    def __init__(self, base: Sequence[Tensor], out: Sequence[Tensor]) -> None:
        """Of weights that `check_weights` let through, at least one."""
        self._base, self._out = base, out
        self._table = np.zeros((len(base), WEIGHT_FIELDS), np.int64)
        self._table[:, 0] = [address(x) for x in base]
        self._table[:, 1] = [address(x) for x in out]
        self._table[:, 2] = [rows_of(x) for x in base]
        self._table[:, 3] = [columns_of(x) for x in base]
        self._even = (self._table[:, (0, 1, 3)] % EVEN == 0).all(axis=1)
        # Nothing is done where out is base, but tensors of the meta device have no memory.
        apart = np.array([x is not y for x, y in zip(base, out, strict=True)])
        if base[0].device.type != "meta":
            apart = self._table[:, 0] != self._table[:, 1]
        self._written = apart & (self._table[:, 2:4] > 0).all(axis=1)
        self._strips: tuple[bytes, list[Table]] = b"", []

    def launches(
        self, config: Config, kernel: Kernel, terms: TermTable, only: npt.NDArray[Any] | None = None
    ) -> list[Launch]:
        """The launches, one a class, that write the weights that `only` marks, or all.

        Raises:
            ValueError: if the stream is being captured: what a graph replays would read tables that
                are no more.
        """
        device = self._base[0].device
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            raise ValueError("lora_merge: expected no CUDA graph to be captured meanwhile")
        chosen = np.flatnonzero(self._written if only is None else self._written & only)
        if not chosen.size:
            return []
        weights, rows, classes = self._rows(chosen, terms)
        found = np.unique(classes)
        strips = self._cut(weights, classes, found, config)
        tables = _send([weights, rows, *strips], device)
        gains = torch.empty(max(1, int(terms.gains.sum())), dtype=torch.float32, device=device)
        return [
            Launch(
                kernel,
                grid=(strips[i].size, 1, 1),
                args={
                    "weights_ptr": tables[0],
                    "terms_ptr": tables[1],
                    "strips_ptr": tables[2 + i],
                    "gains_ptr": gains,
                },
                constants={
                    **self._constants(int(found[i]), config),
                    "UPCAST": device.type == "cpu",
                },
                warps=config["warps"],
                stages=config["stages"],
                kept=(self._base, self._out, terms.kept),
            )
            for i in range(len(found))
        ]

    def _constants(self, kind: int, config: Config) -> dict[str, Any]:
        even, form, gains = kind // 6, kind // 2 % 3, kind % 2
        names = ("COLUMNS", "BLOCK_N", "BLOCK_K")
        return {
            "DTYPE": short(self._base[0].dtype),
            "EVEN_ROWS": bool(even),
            "FORM": _FORMS[form],
            "GAINS": bool(gains),
            "BLOCK_M": config["ANY_M" if form == _ANYTHING else "BLOCK_M"],
            **{name: config[name] for name in names},
        }

    def _rows(self, chosen: Table, terms: TermTable) -> tuple[Table, Table, Table]:
        """The tables of the chosen weights and of their terms, in their order; and the classes."""
        weights = self._table[chosen]
        order = np.argsort(terms.weights, kind="stable")
        order = order[np.isin(terms.weights[order], chosen)]
        of_weight = terms.weights[order]
        rows = terms.rows[order]
        gains = terms.gains[order]
        rows[:, _GAINS] = np.cumsum(gains) - gains
        rows[:, _SCALE] = terms.scales[order].astype(np.float32).view(np.int32)
        weights[:, 4] = np.searchsorted(of_weight, chosen, side="left")
        weights[:, 5] = np.searchsorted(of_weight, chosen, side="right")
        first, last = np.full(len(self._table), _ANYTHING), np.zeros(len(self._table), np.int64)
        np.minimum.at(first, of_weight, rows[:, _FORM])
        np.maximum.at(last, of_weight, rows[:, _FORM])
        even = self._even[chosen]
        form = np.where(even & (first == last)[chosen], last[chosen], _ANYTHING)
        form[even & (weights[:, 4] == weights[:, 5])] = 0
        with_gains = np.isin(chosen, of_weight[gains > 0])
        return weights, rows, even * 6 + form * 2 + with_gains

    def _cut(self, weights: Table, classes: Table, found: Table, config: Config) -> list[Table]:
        """Each class's strips; a row with magnitudes is all in one, for its norm."""
        any_form = classes // 2 % 3 == _ANYTHING
        height = np.where(any_form, config["ANY_M"], config["BLOCK_M"])
        width = config["COLUMNS"]
        # The same weights as last time are cut in the same way.
        known = b"".join(x.tobytes() for x in (weights[:, 2:4], classes, height, np.array(width)))
        if self._strips[0] != known:
            across = np.where(classes % 2 != 0, 1, -(-weights[:, 3] // width))
            counts = -(-weights[:, 2] // height) * across
            number = np.repeat(np.arange(len(weights)), counts)
            place = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
            down, right = np.divmod(place, across[number])
            strips = (number << STRIP_BITS | down) << STRIP_BITS | right
            self._strips = known, [strips[classes[number] == kind] for kind in found]
        return self._strips[1]


def _send(parts: Sequence[Table], device: torch.device) -> list[Tensor]:
    """Tables in one buffer on the device, queued on the current stream."""
    # Each begins at a multiple of 16 bytes, so that one binary reads all.
    sizes = [part.size + part.size % 2 for part in parts]
    if device.type == "meta":
        return list(torch.empty(sum(sizes), dtype=torch.int64, device=device).split(sizes))
    # PyTorch keeps pinned memory from being used again until the copy is done.
    host = torch.empty(sum(sizes), dtype=torch.int64, pin_memory=device.type == "cuda")
    for part, place in zip(parts, host.split(sizes), strict=True):
        place.numpy()[: part.size] = part.reshape(-1)
    return list(host.to(device, non_blocking=True).split(sizes))
