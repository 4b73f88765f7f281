"""What `lora_rows` refuses, and with which words."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import pytest
import torch

from heatsink.kernels.lora_rows import lora_rows

module = import_module("heatsink.kernels.lora_rows")
Given = dict[str, Any]

BANK: Given = {"b": torch.ones(4, 2, 4), "ranks": torch.ones(4, dtype=torch.int32)}
G: Given = {
    "y": torch.ones(2, 3, 4),
    "x": torch.ones(2, 3, 6),
    "a": torch.ones(4, 2, 6),
    "slots": torch.zeros(2, 2, dtype=torch.int64),
    "scales": torch.ones(2, 2),
    **BANK,
}
C: Given = {
    "y": torch.ones(2, 4, 2, 2),
    "x": torch.ones(2, 6, 4, 4),
    "a": torch.ones(4, 2, 6, 3, 3),
    "slots": torch.zeros(2, 1, dtype=torch.int64),
    "scales": torch.ones(2, 1),
    **BANK,
}


@pytest.mark.parametrize(
    ("base", "given", "error", "match"),
    [
        (G, {"y": [1.0]}, TypeError, "y: expected a tensor, got list"),
        (G, {"y": G["y"].double()}, TypeError, "y: expected one of float16"),
        (G, {"a": G["a"].half()}, TypeError, "a: expected torch.float32 like y"),
        (G, {"x": G["x"].clone().requires_grad_()}, ValueError, "x: expected no gradient"),
        (G, {"slots": G["scales"]}, TypeError, "slots: expected one of int32, int64"),
        (G, {"scales": G["slots"]}, TypeError, "scales: expected one of float32"),
        (G, {"ranks": G["slots"][0]}, TypeError, "ranks: expected one of int32"),
        (G, {"ranks": G["ranks"].to("meta")}, ValueError, "ranks: expected device cpu like y"),
        (G, {"a": G["a"][0]}, ValueError, r"a: expected \(S, rank, in\) or .* got \(2, 6\)"),
        (G, {"b": G["b"][1:]}, ValueError, r"b: expected shape \(4, 2, 4\), got \(3, 2, 4\)"),
        (G, {"x": G["x"][..., 1:]}, ValueError, r"x: expected \(R, ..., 6\), got \(2, 3, 5\)"),
        (G, {"y": G["y"][:1]}, ValueError, r"y: expected shape \(2, 3, 4\), got \(1, 3, 4\)"),
        (G, {"y": G["y"][:, :1].expand(2, 3, 4)}, ValueError, "y: expected memory of its own"),
        (G, {"slots": G["slots"][:1]}, ValueError, r"slots: expected shape \(2, n\)"),
        (G, {"scales": G["scales"][:, :1]}, ValueError, r"scales: expected shape \(2, 2\)"),
        (G, {"ranks": G["ranks"][1:]}, ValueError, r"ranks: expected shape \(4,\)"),
        (G, {"stride": 2}, ValueError, "stride, padding, dilation: expected none for a linear"),
        (C, {"x": C["x"][0]}, ValueError, r"x: expected \(R, 6, H, W\), got \(6, 4, 4\)"),
        (C, {"x": C["x"][..., :2]}, ValueError, "x: expected pixels for .* got"),
        (C, {"padding": 1}, ValueError, r"y: expected shape \(2, 4, 4, 4\)"),
        (C, {"padding": -1}, ValueError, "padding: expected 0 or more, got -1"),
        (C, {"stride": (1, 0)}, ValueError, "stride: expected 1 or more"),
        (C, {"dilation": (1, 1, 1)}, TypeError, "dilation: expected an integer or"),
        (C, {"stride": True}, TypeError, "stride: expected an integer or"),
    ],
)
def test_bad_arguments(base: Given, given: Given, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        lora_rows(**{**base, **given})


def test_a_slot_that_the_bank_has_not() -> None:
    operands = (G["x"], G["a"], G["b"], torch.tensor([[0, 3], [1, 4]]), G["scales"])
    with pytest.raises(RuntimeError, match=r"slots: expected .* up to 3, got 4"):
        lora_rows(G["y"].clone(), *operands)
    # PyTorch's implementation says so too; a device can't, and shows it in the row alone.
    geometry = (None, 1, 1, 0, 0, 1, 1)
    with pytest.raises(RuntimeError, match=r"slots: expected .* up to 3, got 4"):
        module._lora_rows_torch(G["y"].clone(), *operands, *geometry)
    y = G["y"].clone()
    module._lora_rows_triton(y, *operands, *geometry)
    assert y[1].isnan().all()
    # Two adapters, two ranks, six channels, all ones.
    assert torch.equal(y[0], torch.full((3, 4), 1.0 + 2 * 2 * 6))
