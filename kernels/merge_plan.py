"""Merging again and again into the same weights: what does not change is made once.

    plan = MergePlan(base, out)
    one, other = plan.prepare(terms_of_one), plan.prepare(terms_of_other)
    plan.merge([(one, 0.8), (other, 0.3)])
    plan.merge([(one, 1.0)])
    plan.merge()  # the pristine weights

Only weights that have terms, or had some at the last merge, are written. The result is that of
`lora_merge`, bit by bit. On CUDA everything is queued on the current stream and nothing waits.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from heatsink.kernels._config import lookup, target_of
from heatsink.kernels._launch import run
from heatsink.kernels._merge_tables import MergeTables, TermTable
from heatsink.kernels._merge_terms import Term, check_memory, check_terms, check_weights, flat
from heatsink.kernels.lora_merge import KERNEL, key


class Prepared:
    """One adapter's terms for one plan; holds its tensors."""

    def __init__(self, plan: MergePlan, terms: Sequence[Term]) -> None:
        """Checks the terms; see `MergePlan.prepare`."""
        check_terms(terms, plan.base)
        self.plan = plan
        self.terms = tuple(terms)
        self.weights = np.unique([term.weight for term in terms if term.counts]).astype(np.int64)
        self.table = TermTable(plan.base, terms) if plan.on_gpu else None


class MergePlan:
    """Pristine weights and those that adapters are merged into.

    Attributes:
        base: the pristine weights.
        out: the weights that are written.
        on_gpu: whether they lie on a CUDA device.
    """

    def __init__(
        self,
        base: Sequence[Tensor],
        out: Sequence[Tensor],
        *,
        unknown: Sequence[int] | None = None,
    ) -> None:
        """Check the weights; nothing is written yet.

        Args:
            base: see `lora_merge`.
            out: see `lora_merge`; no weight may be its own base.
            unknown: numbers of the weights that may hold something else than their base: the first
                merge writes them. All by default.

        Raises:
            TypeError: as `lora_merge` does.
            ValueError: as `lora_merge` does.
        """
        check_weights(base, out)
        check_memory(base, out, range(len(base)))
        self.base, self.out = tuple(base), tuple(out)
        self.on_gpu = bool(base) and base[0].is_cuda
        self._tables = MergeTables(self.base, self.out) if self.on_gpu else None
        # Which of `out` hold something else than their base.
        self._other = np.full(len(base), unknown is None)
        self._other[list(unknown or ())] = True

    def prepare(self, terms: Sequence[Term]) -> Prepared:
        """Check an adapter's terms and keep them as a merge needs them.

        Their tensors are held, not copied (but for those that are not dense or, on CUDA, begin at
        no multiple of 16 bytes): they must stay as they are for as long as this is used.

        Raises:
            TypeError: as `lora_merge` does.
            ValueError: as `lora_merge` does.
        """
        return Prepared(self, terms)

    def forget(self) -> None:
        """Say that `out` was written by someone else: the next merge writes all of it."""
        self._other[:] = True

    def merge(self, adapters: Iterable[tuple[Prepared, float]] = ()) -> None:
        """Make `out` the pristine weights with these adapters, each at a weight, in this order.

        An adapter of weight 0 is left out.

        Raises:
            ValueError: if one was prepared by another plan, or a weight is not finite.
        """
        chosen = [(prepared, float(weight)) for prepared, weight in adapters]
        for prepared, weight in chosen:
            if prepared.plan is not self:
                raise ValueError("adapters: expected some that this plan prepared, got another's")
            if not np.isfinite(weight):
                raise ValueError(f"adapters: expected finite weights, got {weight}")
        chosen = [(prepared, weight) for prepared, weight in chosen if weight != 0]
        now = np.zeros(len(self.base), np.bool_)
        for prepared, _ in chosen:
            now[prepared.weights] = True
        written = now | self._other
        # If what follows fails, these are in no known state.
        self._other = written
        if self._tables is not None:
            self._launch(self._tables, chosen, written)
        else:
            self._call(chosen, np.flatnonzero(written))
        self._other = now

    def _launch(
        self,
        tables: MergeTables,
        chosen: Sequence[tuple[Prepared, float]],
        written: np.ndarray[tuple[int], np.dtype[np.bool_]],
    ) -> None:
        config = lookup("lora_merge", key(self.base), target_of(self.base[0].device))
        parts = [(prepared.table, weight) for prepared, weight in chosen]
        terms = TermTable.joined([(table, w) for table, w in parts if table is not None])
        run(tables.launches(config, KERNEL, terms, written))

    def _call(
        self,
        chosen: Sequence[tuple[Prepared, float]],
        written: np.ndarray[tuple[int], np.dtype[np.int64]],
    ) -> None:
        if not written.size:
            return
        places = {int(j): place for place, j in enumerate(written)}
        terms = [
            replace(term, weight=places[term.weight], scale=term.scale * weight)
            for prepared, weight in chosen
            for term in prepared.terms
            if term.counts
        ]
        base, out = [self.base[j] for j in written], [self.out[j] for j in written]
        torch.ops.heatsink.lora_merge(base, out, *flat(terms))
