"""The plain forms against the ops themselves: same values within rounding, same strides."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import heatsink.runtime.graph.passes.pipeline  # noqa: F401 - registers the ops
from heatsink.runtime.graph.plain import PLAIN


def _n(*shape: int) -> Tensor:
    return torch.randn(shape)


CASES: dict[str, Callable[[], tuple[str, tuple[Any, ...]]]] = {
    "attention": lambda: (
        "attention",
        (_n(2, 5, 2, 8), _n(2, 7, 2, 8), _n(2, 7, 2, 8), 0.3, False, None),
    ),
    "attention, causal and bias": lambda: (
        "attention",
        (_n(2, 5, 2, 8), _n(2, 5, 2, 8), _n(2, 5, 2, 8), 0.3, True, _n(1, 2, 5, 5)),
    ),
    "attention, blind": lambda: (
        "attention",
        (_n(1, 2, 1, 8), _n(1, 3, 1, 8), _n(1, 3, 1, 8), 1.0, False, _blind()),
    ),
    "group norm": lambda: (
        "group_norm_silu",
        (_n(2, 8, 3, 4), 4, _n(8), _n(8), 1e-5, _n(2, 8), _n(2, 8), True),
    ),
    "group norm of tokens": lambda: (
        "group_norm_silu",
        (_n(2, 8, 6), 2, None, None, 1e-5, None, None, False),
    ),
    "layer norm": lambda: ("layer_norm", (_n(2, 5, 8), _n(8), _n(8), 1e-5, None, None)),
    "layer norm, modulated": lambda: (
        "layer_norm",
        (_n(2, 5, 8), None, None, 1e-6, _n(2, 8), _n(2, 8)),
    ),
    "geglu": lambda: ("geglu", (_n(2, 5, 8),)),
    "linear, residual": lambda: (
        "linear",
        (_n(2, 5, 8), _n(6, 8), None, _n(2, 5, 6), None, "silu"),
    ),
    "conv2d": lambda: (
        "conv2d",
        (_n(2, 4, 6, 8), None, _n(5, 4, 3, 3), None, None, None, 2, 1, 1, ""),
    ),
    "conv2d, all": lambda: (
        "conv2d",
        (
            *(_n(2, 3, 4, 5), _n(2, 1, 4, 5), _n(6, 4, 3, 3), _n(6), _n(2, 6, 8, 10), _n(2, 6)),
            *(1, 1, 2, "silu"),
        ),
    ),
}


def _activated(activation: str) -> tuple[str, tuple[Any, ...]]:
    return "linear", (_n(2, 5, 8), _n(6, 8), _n(6), None, _n(2, 6), activation)


for _name in ("", "silu", "gelu", "gelu_tanh", "quick_gelu", "geglu"):
    CASES[f"linear {_name}"] = functools.partial(_activated, _name)


def _blind() -> Tensor:
    bias = torch.zeros(1, 1, 2, 3)
    bias[:, :, 1] = -torch.inf
    return bias


@pytest.mark.parametrize("case", CASES)
def test_plain_forms_are_the_ops(case: str, seed: int) -> None:
    torch.manual_seed(seed)
    name, args = CASES[case]()
    function = PLAIN[f"heatsink.{name}"]
    wide = [arg.double() if isinstance(arg, Tensor) else arg for arg in args]
    exact, plain = function(*wide), function(*args)
    found = getattr(torch.ops.heatsink, name).default(*args)
    assert exact.dtype == torch.float64
    assert found.shape == exact.shape
    for size, *steps in zip(found.shape, *(y.stride() for y in (found, exact, plain)), strict=True):
        # The stride of a dimension of size 1 means nothing.
        assert size == 1 or len(set(steps)) == 1
    limit = exact.abs().max() * torch.finfo(torch.float32).eps
    assert (found.double() - exact).abs().max() <= 2 * ((plain - exact).abs().max() + limit)


def test_a_query_that_sees_no_key_gives_zero(seed: int) -> None:
    torch.manual_seed(seed)
    _, args = CASES["attention, blind"]()
    out = PLAIN["heatsink.attention"](*args)
    assert not out[:, 1].any()
    assert out[:, 0].all()
