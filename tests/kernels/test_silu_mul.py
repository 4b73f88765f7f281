from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from heatsink.kernels import reference
from heatsink.kernels import silu_mul as module
from heatsink.kernels.silu_mul import silu_mul

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
# Aligned, ragged, empty rows, no rows, one dimension, the bundled model's width.
SHAPES = ((4, 256), (3, 5, 77), (2, 0), (0, 16), (33,), (2, 64, 512))
# The op as a user calls it, and the Triton kernel, here under the interpreter.
BOTH = pytest.mark.parametrize("run", [silu_mul, module._silu_mul_triton], ids=["op", "triton"])
Run = Callable[[Tensor, Tensor], Tensor]


def packed(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> tuple[Tensor, Tensor]:
    """Two views of one projection: not contiguous."""
    generator = torch.Generator().manual_seed(seed)
    x = 3 * torch.randn((*shape[:-1], 2 * shape[-1]), generator=generator)
    gate, up = x.to(dtype).chunk(2, dim=-1)
    return gate, up


@BOTH
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_against_float64(
    run: Run,
    dtype: torch.dtype,
    shape: tuple[int, ...],
    seed: int,
    within_budget: Any,
    float64: Any,
) -> None:
    gate, up = packed(shape, dtype, seed)
    plain = torch.nn.functional.silu(gate) * up
    out = run(gate, up)
    within_budget(out, plain, reference.silu_mul(float64(gate), float64(up)))
    assert out.is_contiguous()


@BOTH
def test_rows_are_exact(run: Run, seed: int, row_exact: Any) -> None:
    def make(batch: int) -> dict[str, Tensor]:
        gate, up = packed((batch, 3, 77), torch.float32, seed + batch)
        return {"gate": gate, "up": up}

    row_exact(run, make, rows=("gate", "up"))


def test_large_values_do_not_overflow(seed: int) -> None:
    gate = torch.tensor([-1e4, -90.0, 0.0, 90.0, 1e4])
    expected = torch.tensor([0.0, 0.0, 0.0, 90.0, 1e4])
    for run in (silu_mul, module._silu_mul_triton):
        assert torch.allclose(run(gate, torch.ones(5)), expected, atol=1e-30)


def test_opcheck_and_compile(seed: int) -> None:
    gate, up = packed((3, 7, 64), torch.float32, seed)
    torch.library.opcheck(torch.ops.heatsink.silu_mul, (gate, up))
    compiled = torch.compile(silu_mul, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(gate, up), silu_mul(gate, up))


@pytest.mark.gpu
def test_in_a_cuda_graph(seed: int) -> None:
    gate, up = (x.cuda() for x in packed((3, 7, 640), torch.float16, seed))
    expected = silu_mul(gate, up)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = silu_mul(gate, up)
    out.zero_()
    graph.replay()
    assert torch.equal(out, expected)


@pytest.mark.parametrize(
    ("gate", "up", "error", "match"),
    [
        ([1.0], torch.ones(2), TypeError, "gate: expected a tensor, got list"),
        (torch.ones(2), torch.ones(3), ValueError, r"up: expected shape \(2,\), got \(3,\)"),
        (torch.ones(2), torch.ones(2).half(), TypeError, "up: expected torch.float32 like gate"),
        (torch.ones(2).double(), torch.ones(2), TypeError, "gate: expected one of float16"),
        (torch.ones(2), torch.ones(2, device="meta"), ValueError, "up: expected device cpu"),
        (torch.ones(()), torch.ones(()), ValueError, "gate: expected .* got a tensor without"),
        (torch.ones(2, requires_grad=True), torch.ones(2), ValueError, "gate: expected no grad"),
    ],
)
def test_bad_arguments(gate: Any, up: Any, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        silu_mul(gate, up)
