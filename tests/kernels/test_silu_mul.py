from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

import pytest
import torch
from torch import Tensor

from heatsink.kernels import _native, reference
from heatsink.kernels.silu_mul import silu_mul

module = import_module("heatsink.kernels.silu_mul")

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
# Aligned, ragged, empty rows, no rows, one dimension, the bundled model's width.
SHAPES = ((4, 256), (3, 5, 77), (2, 0), (0, 16), (33,), (2, 64, 512))
# C++ where it was built; the PyTorch implementation; Triton, here under the interpreter.
ALL = pytest.mark.parametrize(
    "run",
    [silu_mul, module._silu_mul_torch, module._silu_mul_triton],
    ids=["op", "torch", "triton"],
)
Run = Callable[[Tensor, Tensor], Tensor]


def packed(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> tuple[Tensor, Tensor]:
    """Two views of one projection: not contiguous."""
    generator = torch.Generator().manual_seed(seed)
    x = 3 * torch.randn((*shape[:-1], 2 * shape[-1]), generator=generator)
    gate, up = x.to(dtype).chunk(2, dim=-1)
    return gate, up


@ALL
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


@ALL
def test_rows_are_exact(run: Run, seed: int, row_exact: Any) -> None:
    def make(batch: int) -> dict[str, Tensor]:
        gate, up = packed((batch, 3, 77), torch.float32, seed + batch)
        return {"gate": gate, "up": up}

    row_exact(run, make, rows=("gate", "up"), interpreted=run is module._silu_mul_triton)


def test_large_values_do_not_overflow(seed: int) -> None:
    gate = torch.tensor([-1e4, -90.0, 0.0, 90.0, 1e4])
    expected = torch.tensor([0.0, 0.0, 0.0, 90.0, 1e4])
    for run in (silu_mul, module._silu_mul_torch, module._silu_mul_triton):
        assert torch.allclose(run(gate, torch.ones(5)), expected, atol=1e-30)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_implementations_agree_bit_by_bit(dtype: torch.dtype, seed: int) -> None:
    if not _native.available():
        pytest.skip(f"one implementation only: {_native.describe()}")
    generator = torch.Generator().manual_seed(seed)
    size = torch.empty(0, dtype=dtype).element_size()
    raw = torch.randint(0, 256, (2, 3, 4026, size), generator=generator, dtype=torch.uint8)
    gate, up = raw.view(dtype)[..., 0].chunk(2, dim=-1)
    out, expected = silu_mul(gate, up), module._silu_mul_torch(gate, up)
    assert torch.equal(out.isnan(), expected.isnan())
    assert torch.equal(out.nan_to_num(), expected.nan_to_num())


def test_strides_do_not_matter(seed: int) -> None:
    gate, up = packed((3, 4, 77), torch.float32, seed)
    inside = gate.transpose(1, 2).contiguous().transpose(1, 2)
    for run in (silu_mul, module._silu_mul_torch, module._silu_mul_triton):
        expected = run(gate.contiguous(), up.contiguous())
        assert torch.equal(run(gate, up), expected)
        assert torch.equal(run(inside, up), expected)
        assert torch.equal(run(gate[::2], up[::2]), expected[::2])


def test_rows_wider_than_the_second_axis_of_a_grid() -> None:
    gate = torch.empty(3, 2**27, dtype=torch.float16, device="meta")
    (launch,) = module.plan({"BLOCK_R": 2, "BLOCK_W": 1024, "warps": 4}, gate, gate)[1]
    assert launch.grid == (2 * 2**17, 1, 1)


def test_opcheck_and_compile(seed: int) -> None:
    gate, up = packed((3, 7, 64), torch.float32, seed)
    torch.library.opcheck(torch.ops.heatsink.silu_mul, (gate, up))
    compiled = torch.compile(silu_mul, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(gate, up), silu_mul(gate, up))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_on_a_gpu(dtype: torch.dtype, seed: int, within_budget: Any, float64: Any) -> None:
    gate, up = packed((2, 77, 1280), dtype, seed)
    plain = torch.nn.functional.silu(gate) * up
    out = silu_mul(gate.cuda(), up.cuda()).cpu()
    within_budget(out, plain, reference.silu_mul(float64(gate), float64(up)))


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
