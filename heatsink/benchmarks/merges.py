"""What `lora_merge` is measured against: one weight after the other, in plain PyTorch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from heatsink.benchmarks.family import Cost, Family
from heatsink.kernels._checks import short
from heatsink.kernels._op import Inputs
from heatsink.kernels.lora_merge import Term


def lora_merge(
    base: Sequence[Tensor], out: Sequence[Tensor], terms: Sequence[Term]
) -> list[Tensor]:
    """Copies of the weights, and every term's product added in fp32 (float64 to float64)."""
    merged = [x.clone() for x in base]
    for j, weight in enumerate(base):
        wide = torch.promote_types(weight.dtype, torch.float32)
        total = weight.to(wide).flatten(1)
        factor = torch.ones_like(total[:, :1])
        delta = torch.zeros_like(total)
        for term in terms:
            if term.weight == j:
                part = term.scale * (term.b.to(wide) @ term.a.to(wide).flatten(1))
                if term.magnitude is not None:
                    gain = term.magnitude.to(wide)[:, None] / (total + part).norm(
                        dim=1, keepdim=True
                    )
                    factor, part = factor + (gain - 1), gain * part
                delta += part
        merged[j].copy_((total * factor + delta).reshape(weight.shape))
    return merged


def _to_float64(inputs: Inputs) -> Inputs:
    def wide(x: Tensor | None) -> Tensor | None:
        return None if x is None else x.double()

    terms = [
        replace(term, a=term.a.double(), b=term.b.double(), magnitude=wide(term.magnitude))
        for term in inputs["terms"]
    ]
    return {"base": [x.double() for x in inputs["base"]], "out": [], "terms": terms}


def _cost(inputs: Inputs, outputs: Any) -> Cost:
    parts = [x for term in inputs["terms"] for x in (term.a, term.b, term.magnitude)]
    read = [*inputs["base"], *(x for x in parts if x is not None)]
    flops: dict[str, int] = {}
    for term in inputs["terms"]:
        name = short(torch.promote_types(term.a.dtype, term.b.dtype))
        flops[name] = flops.get(name, 0) + 2 * term.b.numel() * term.a[0].numel()
    return Cost(sum(x.numel() * x.element_size() for x in (*read, *outputs)), flops)


FAMILIES = {"lora_merge": Family(lora_merge, cost=_cost, widen=_to_float64)}
