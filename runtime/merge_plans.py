"""A `MergePlan` for the weights of each device and dtype: what merges share is made once.

For pristine weights that stay where they are; what is staged for each merge has nothing to share.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from heatsink.kernels.lora_merge import Term
from heatsink.kernels.merge_plan import MergePlan
from heatsink.kernels.merge_plan import Prepared as PlanPrepared
from heatsink.runtime.merge_terms import Prepared

Group = tuple[torch.device, torch.dtype]


class _Planned:
    """One plan, and the adapters that were prepared for it."""

    def __init__(
        self, live: Mapping[str, Tensor], base: Mapping[str, Tensor], unknown: Iterable[str]
    ) -> None:
        self.places = {key: place for place, key in enumerate(live)}
        self._adapters: WeakKeyDictionary[Prepared, PlanPrepared] = WeakKeyDictionary()
        self.plan = MergePlan(
            [base[key] for key in live],
            list(live.values()),
            unknown=[self.places[key] for key in unknown],
        )

    def serves(self, live: Mapping[str, Tensor], base: Mapping[str, Tensor]) -> bool:
        """Whether the plan is of these tensors."""
        return list(self.places) == list(live) and all(
            mine.data_ptr() == live[key].data_ptr() and pristine is base[key]
            for key, mine, pristine in zip(live, self.plan.out, self.plan.base, strict=True)
        )

    def prepared(self, adapter: Prepared) -> PlanPrepared:
        """The adapter's terms on the plan's weights."""
        if adapter not in self._adapters:
            terms = [
                Term(self.places[p.key], p.a, p.b, p.scale, p.magnitude, p.row, p.step)
                for p in adapter.parts
                if p.key in self.places
            ]
            self._adapters[adapter] = self.plan.prepare(terms)
        return self._adapters[adapter]


class MergePlans:
    """Writes groups of weights, again and again."""

    def __init__(self) -> None:
        self._planned: dict[Group, _Planned] = {}

    def write(
        self,
        group: Group,
        live: Mapping[str, Tensor],
        base: Mapping[str, Tensor],
        touched: Iterable[str],
        adapters: Sequence[tuple[Prepared, float]],
    ) -> None:
        """Write what these adapters change, or what is to be written for another reason.

        Args:
            group: of which the weights are.
            live: all weights of the group whose pristine values are known, in a lasting order.
            base: their pristine values.
            touched: those that may hold something else than `base`, and those of the adapters.
            adapters: with their weights, none 0.
        """
        planned = self._planned.get(group)
        if planned is None or not planned.serves(live, base):
            planned = self._planned[group] = _Planned(live, base, touched)
        planned.plan.merge([(planned.prepared(one), weight) for one, weight in adapters])
