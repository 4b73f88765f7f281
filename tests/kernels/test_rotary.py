from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

import pytest
import torch
from torch import Tensor

from heatsink.kernels import reference
from heatsink.kernels.rotary import rotary

module = import_module("heatsink.kernels.rotary")

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
# Aligned, ragged in every axis, without samples, tokens, heads or channels; FLUX, a few tokens.
SHAPES = (
    (2, 4, 8, 64),
    (2, 3, 5, 40),
    (1, 2, 9, 6),
    (0, 3, 2, 8),
    (2, 0, 2, 8),
    (2, 3, 0, 8),
    (2, 3, 2, 0),
    (1, 3, 24, 128),
)
STYLES = pytest.mark.parametrize("interleaved", [True, False], ids=["pairs", "halves"])
BOTH = pytest.mark.parametrize(
    "run",
    [rotary, lambda x, cos, sin, interleaved: module._rotary_triton(x, cos, sin, interleaved)],
    ids=["op", "triton"],
)
Run = Callable[..., Tensor]


def make(
    shape: tuple[int, ...], dtype: torch.dtype, seed: int, own: bool = False
) -> dict[str, Tensor]:
    """A view of a packed projection, and angles that the samples share or have of their `own`."""
    batch, seq_len, heads, head_dim = shape
    generator = torch.Generator().manual_seed(seed)
    packed = torch.randn((batch, seq_len, 3, heads, head_dim), generator=generator).to(dtype)
    rows = (batch,) if own else ()
    angles = 9 * torch.randn((*rows, seq_len, head_dim // 2), generator=generator)
    return {"x": packed[:, :, 1], "cos": angles.cos(), "sin": angles.sin()}


def plain(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """In the dtype of `x`, as a model written in PyTorch has it."""
    cos, sin = cos.to(x.dtype)[..., None, :], sin.to(x.dtype)[..., None, :]
    if interleaved:
        cos, sin = cos.repeat_interleave(2, -1), sin.repeat_interleave(2, -1)
        swapped = torch.stack([-x[..., 1::2], x[..., ::2]], dim=-1).flatten(-2)
    else:
        cos, sin = torch.cat([cos, cos], -1), torch.cat([sin, sin], -1)
        first, second = x.chunk(2, dim=-1)
        swapped = torch.cat([-second, first], dim=-1)
    return x * cos + swapped * sin


@BOTH
@STYLES
@pytest.mark.parametrize("own", [False, True], ids=["shared", "own"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_against_float64(
    run: Run,
    interleaved: bool,
    own: bool,
    dtype: torch.dtype,
    shape: tuple[int, ...],
    seed: int,
    within_budget: Any,
    float64: Any,
) -> None:
    inputs = make(shape, dtype, seed, own)
    out = run(**inputs, interleaved=interleaved)
    wide = {name: float64(value) for name, value in inputs.items()}
    exact = reference.rotary(**wide, interleaved=interleaved)
    within_budget(out, plain(**inputs, interleaved=interleaved), exact)
    assert out.is_contiguous()


@STYLES
def test_a_quarter_turn_moves_channels(interleaved: bool) -> None:
    x = torch.tensor([1.0, 2.0, 3.0, 4.0]).view(1, 1, 1, 4)
    expected = [-2.0, 1.0, -4.0, 3.0] if interleaved else [-3.0, -4.0, 1.0, 2.0]
    cos, sin = torch.zeros(1, 2), torch.ones(1, 2)
    assert rotary(x, cos, sin, interleaved=interleaved).flatten().tolist() == expected


@BOTH
@STYLES
def test_strides_do_not_matter(run: Run, interleaved: bool, seed: int) -> None:
    inputs = make((2, 3, 5, 40), torch.float32, seed, own=True)
    dense = {name: value.contiguous() for name, value in inputs.items()}
    expected = run(**dense, interleaved=interleaved)
    turned = {name: value.mT.contiguous().mT for name, value in inputs.items()}
    heads_first = {**dense, "x": dense["x"].transpose(1, 2).contiguous().transpose(1, 2)}
    for views in (inputs, turned, heads_first):
        assert torch.equal(run(**views, interleaved=interleaved), expected)


@BOTH
@STYLES
def test_rows_are_exact(run: Run, interleaved: bool, seed: int, row_exact: Any) -> None:
    row_exact(
        lambda **inputs: run(**inputs, interleaved=interleaved),
        lambda batch: make((batch, 2, 3, 20), torch.float16, seed + batch, own=True),
        rows=("x", "cos", "sin"),
    )


@STYLES
def test_opcheck_and_compile(interleaved: bool, seed: int) -> None:
    inputs = make((2, 3, 4, 16), torch.float32, seed)
    torch.library.opcheck(torch.ops.heatsink.rotary, (*inputs.values(), interleaved))
    inside = inputs["x"].permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
    torch.library.opcheck(
        torch.ops.heatsink.rotary, (inside, inputs["cos"], inputs["sin"], interleaved)
    )
    for run in (rotary, module._rotary_triton):
        assert torch.equal(
            run(inside, inputs["cos"], inputs["sin"], interleaved=interleaved),
            rotary(**inputs, interleaved=interleaved),
        )
    compiled = torch.compile(rotary, fullgraph=True, backend="aot_eager")
    expected = rotary(**inputs, interleaved=interleaved)
    assert torch.equal(compiled(**inputs, interleaved=interleaved), expected)


@pytest.mark.gpu
@STYLES
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_on_a_gpu_and_in_a_graph(
    interleaved: bool, dtype: torch.dtype, seed: int, within_budget: Any, float64: Any
) -> None:
    inputs = make((2, 77, 24, 128), dtype, seed)
    there = {name: value.cuda() for name, value in inputs.items()}
    out = rotary(**there, interleaved=interleaved)
    wide = {name: float64(value) for name, value in inputs.items()}
    exact = reference.rotary(**wide, interleaved=interleaved)
    within_budget(out.cpu(), plain(**inputs, interleaved=interleaved), exact)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        again = rotary(**there, interleaved=interleaved)
    again.zero_()
    graph.replay()
    assert torch.equal(again, out)


X, ANGLE = torch.ones(2, 3, 4, 8), torch.ones(3, 4)


@pytest.mark.parametrize(
    ("changes", "error", "match"),
    [
        ({"x": [1.0]}, TypeError, "x: expected a tensor, got list"),
        ({"x": X.double()}, TypeError, "x: expected one of float16"),
        ({"x": X[0]}, ValueError, r"x: expected \(B, S, H, D\) with D even, got \(3, 4, 8\)"),
        ({"x": X[..., :7]}, ValueError, r"x: expected .* D even, got \(2, 3, 4, 7\)"),
        ({"x": X.clone().requires_grad_()}, ValueError, "x: expected no gradient"),
        ({"cos": ANGLE.half()}, TypeError, "cos: expected one of float32"),
        ({"cos": ANGLE[:2]}, ValueError, r"cos: expected shape \(3, 4\), got \(2, 4\)"),
        ({"cos": ANGLE[None]}, ValueError, r"cos: expected shape \(2, 3, 4\), got \(1, 3, 4\)"),
        ({"sin": ANGLE[:2]}, ValueError, r"sin: expected shape \(3, 4\), got \(2, 4\)"),
        ({"sin": ANGLE.to("meta")}, ValueError, "sin: expected device cpu"),
        ({"x": X.to("meta")}, ValueError, "cos: expected device meta like x, got cpu"),
    ],
)
def test_bad_arguments(changes: dict[str, Any], error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        rotary(**{"x": X, "cos": ANGLE, "sin": ANGLE, "interleaved": True, **changes})
