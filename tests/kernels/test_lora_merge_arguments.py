from __future__ import annotations

from typing import Any

import pytest
import torch

from heatsink.kernels.lora_merge import Term, lora_merge

X = torch.ones(4, 6)
OUT = torch.ones(4, 6)
A, B = torch.ones(2, 6), torch.ones(4, 2)
SHARED = torch.ones(6, 6)


def one(**changes: Any) -> dict[str, Any]:
    given: dict[str, Any] = {"weight": 0, "a": A, "b": B, "scale": 1.0} | changes
    return {"terms": [Term(**given)]}


@pytest.mark.parametrize(
    ("given", "error", "match"),
    [
        ({"base": X}, TypeError, "base: expected a list of tensors, got Tensor"),
        ({"out": []}, ValueError, "out: expected 1 weights like base, got 0"),
        ({"base": [1]}, TypeError, r"base\[0\]: expected a tensor, got int"),
        ({"base": [X.double()]}, TypeError, r"base\[0\]: expected one of float16"),
        ({"out": [OUT.half()]}, TypeError, r"out\[0\]: expected torch.float32 like base\[0\]"),
        ({"out": [OUT[:3]]}, ValueError, r"out\[0\]: expected shape \(4, 6\), got \(3, 6\)"),
        ({"out": [torch.ones(6, 4).t()]}, ValueError, r"out\[0\]: expected contiguous or channels"),
        ({"base": [X.clone().requires_grad_()]}, ValueError, r"base\[0\]: expected no gradient"),
        ({"base": [OUT]}, ValueError, r"out\[0\]: expected memory of its own, .* base\[0\]'s"),
        (
            {"base": [SHARED[:4]], "out": [SHARED[2:]]},
            ValueError,
            r"out\[0\]: expected memory of its own, .* base\[0\]'s",
        ),
        (
            {"base": [X, X], "out": [SHARED[:4], SHARED[2:]]},
            ValueError,
            r"out\[1\]: expected memory of its own, got some of out\[0\]'s",
        ),
        ({"terms": None}, TypeError, "terms: expected a list of terms, got NoneType"),
        ({"terms": [A]}, TypeError, r"terms\[0\]: expected a Term, got Tensor"),
        (one(weight=1), ValueError, r"terms\[0\].weight: expected 0 to 0, got 1"),
        (one(weight=0.0), TypeError, r"terms\[0\].weight: expected an integer, got float"),
        (one(a=None), TypeError, r"terms\[0\].a: expected a tensor, got NoneType"),
        (one(a=A.double()), TypeError, r"terms\[0\].a: expected one of float16"),
        (one(a=A[:, :5]), ValueError, r"terms\[0\].a: expected \(2, 6\) for base\[0\], got \(2, 5"),
        (one(a=A[:1]), ValueError, r"terms\[0\]: expected a \(rank, ...\) and b \(rows, rank\)"),
        (one(b=B.clone().requires_grad_()), ValueError, r"terms\[0\].b: expected no gradient"),
        (one(b=B.to("meta")), ValueError, r"terms\[0\].b: expected device cpu like base, got meta"),
        (one(magnitude=torch.ones(3)), ValueError, r"terms\[0\].magnitude: expected shape \(4,\)"),
        (one(scale="1"), TypeError, r"terms\[0\].scale: expected a number, got str"),
        (one(scale=float("nan")), ValueError, r"terms\[0\].scale: expected a finite .* got nan"),
        (one(row=1), ValueError, r"terms\[0\]: expected rows among the 4 .* got 4 from 1 by steps"),
        (one(step=2), ValueError, r"terms\[0\]: expected rows among the 4 of base\[0\]"),
        (one(step=0), ValueError, r"terms\[0\]: expected rows among the 4 of base\[0\]"),
    ],
)
def test_bad_arguments(given: dict[str, Any], error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        lora_merge(**({"base": [X], "out": [OUT]} | one() | given))
