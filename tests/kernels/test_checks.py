from __future__ import annotations

from typing import Any

import pytest
import torch

from heatsink.kernels._checks import FLOATS, check_shape, check_tensors

X = torch.ones(2)


def test_parameters_pass_where_no_gradient_is_taken() -> None:
    weight = torch.nn.Parameter(torch.ones(2))
    with torch.no_grad():
        check_tensors({"x": X, "weight": weight, "bias": None}, FLOATS)
    with pytest.raises(ValueError, match="weight: expected no gradient"):
        check_tensors({"x": X, "weight": weight, "bias": None}, FLOATS)


@pytest.mark.parametrize(
    ("first", "last", "error", "match"),
    [
        (None, X, TypeError, "x: expected a tensor, got NoneType"),
        (X, 1.0, TypeError, "bias: expected a tensor, got float"),
        (X.double(), X, TypeError, "x: expected one of float16, bfloat16, float32, got"),
        (X.double(), X.double(), TypeError, "x: expected one of float16"),
        (X, X.half(), TypeError, "bias: expected torch.float32 like x, got torch.float16"),
        (X, X.to("meta"), ValueError, "bias: expected device cpu like x, got meta"),
    ],
)
def test_faults(first: Any, last: Any, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        check_tensors({"x": first, "weight": None, "bias": last}, FLOATS)


def test_shapes() -> None:
    check_shape("x", X, (2,))
    with pytest.raises(ValueError, match=r"x: expected shape \(3,\), got \(2,\)"):
        check_shape("x", X, torch.Size((3,)))
