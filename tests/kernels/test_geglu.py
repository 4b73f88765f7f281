from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

import pytest
import torch
from torch import Tensor

from heatsink.kernels import _native, reference
from heatsink.kernels._gelu import gelu
from heatsink.kernels.geglu import geglu

module = import_module("heatsink.kernels.geglu")

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
# Aligned, ragged, empty rows, no rows, one dimension, the bundled model, SD1.5 (one token of it).
SHAPES = ((4, 256), (3, 5, 154), (2, 0), (0, 16), (66,), (2, 64, 1024), (1, 1, 2560))
# C++ where it was built; the PyTorch implementation; Triton, here under the interpreter.
ALL = pytest.mark.parametrize(
    "run",
    [geglu, module._geglu_torch, module._geglu_triton],
    ids=["op", "torch", "triton"],
)
Run = Callable[[Tensor], Tensor]


def make(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (3 * torch.randn(shape, generator=generator)).to(dtype)


def plain(x: Tensor) -> Tensor:
    hidden, gate = x.chunk(2, dim=-1)
    return hidden * torch.nn.functional.gelu(gate)


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
    x = make(shape, dtype, seed)
    out = run(x)
    within_budget(out, plain(x), reference.geglu(float64(x)))
    assert out.is_contiguous()


@ALL
@pytest.mark.parametrize("size", [1e-3, 1.0, 6.0])
def test_every_range_of_the_gate(run: Run, size: float, within_budget: Any, float64: Any) -> None:
    gate = torch.linspace(-size, size, 2001)
    x = torch.cat([torch.ones(2001), gate])
    within_budget(run(x), plain(x), reference.geglu(float64(x)))


@ALL
def test_ends(run: Run) -> None:
    gate = torch.tensor([-1e30, -100.0, -0.0, 0.0, 100.0, 1e30, torch.inf])
    expected = torch.tensor([0.0, 0.0, 0.0, 0.0, 100.0, 1e30, torch.inf])
    assert torch.allclose(run(torch.cat([torch.ones(7), gate])), expected, atol=1e-30)
    assert run(torch.tensor([1.0, 1.0, torch.nan, -torch.nan])).isnan().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_implementations_agree_bit_by_bit(dtype: torch.dtype, seed: int) -> None:
    if not _native.available():
        pytest.skip(f"one implementation only: {_native.describe()}")
    generator = torch.Generator().manual_seed(seed)
    size = torch.empty(0, dtype=dtype).element_size()
    raw = torch.randint(0, 256, (2, 3, 4026, size), generator=generator, dtype=torch.uint8)
    x = torch.cat([raw.view(dtype)[..., 0], make((2, 3, 4026), dtype, seed)])
    out, expected = geglu(x), module._geglu_torch(x)
    assert torch.equal(out.isnan(), expected.isnan())
    assert torch.equal(out.nan_to_num(), expected.nan_to_num())


def test_strides_do_not_matter(seed: int) -> None:
    x = make((3, 4, 154), torch.float32, seed)
    wide = torch.cat([x, x, x], dim=-1)[..., 154:308]
    swapped = x.transpose(0, 1).contiguous().transpose(0, 1)
    inside = x.transpose(1, 2).contiguous().transpose(1, 2)
    for run in (geglu, module._geglu_torch, module._geglu_triton):
        for view in (wide, swapped, inside, x[:, 1:], x[::2]):
            assert torch.equal(run(view), run(view.contiguous()))


@ALL
def test_rows_are_exact(run: Run, seed: int, row_exact: Any) -> None:
    def arguments(batch: int) -> dict[str, Tensor]:
        return {"x": make((batch, 3, 154), torch.float32, seed + batch)}

    row_exact(run, arguments, ["x"], interpreted=run is module._geglu_triton)


def test_gelu_does_not_depend_on_the_place(seed: int) -> None:
    x = make((67,), torch.float32, seed)
    assert torch.equal(gelu(x), torch.cat([gelu(element[None]) for element in x]))


def test_rows_wider_than_the_second_axis_of_a_grid() -> None:
    x = torch.empty(3, 2**28, dtype=torch.float16, device="meta")
    (launch,) = module.plan({"BLOCK_R": 2, "BLOCK_W": 1024, "warps": 4}, x)[1]
    assert launch.grid == (2 * 2**17, 1, 1)


def test_opcheck_and_compile(seed: int) -> None:
    x = make((3, 7, 64), torch.float32, seed)
    torch.library.opcheck(torch.ops.heatsink.geglu, (x,))
    compiled = torch.compile(geglu, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), geglu(x))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_on_a_gpu(dtype: torch.dtype, seed: int, within_budget: Any, float64: Any) -> None:
    x = make((2, 77, 2560), dtype, seed)
    within_budget(geglu(x.cuda()).cpu(), plain(x), reference.geglu(float64(x)))


@pytest.mark.gpu
def test_in_a_cuda_graph(seed: int) -> None:
    x = make((3, 7, 640), torch.float16, seed).cuda()
    expected = geglu(x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = geglu(x)
    out.zero_()
    graph.replay()
    assert torch.equal(out, expected)


@pytest.mark.parametrize(
    ("x", "error", "match"),
    [
        ([1.0], TypeError, "x: expected a tensor, got list"),
        (torch.ones(2).double(), TypeError, "x: expected one of float16"),
        (torch.ones(()), ValueError, r"x: expected \(..., 2 W\), got \(\)"),
        (torch.ones(2, 3), ValueError, r"x: expected \(..., 2 W\), got \(2, 3\)"),
        (torch.ones(2, requires_grad=True), ValueError, "x: expected no grad"),
    ],
)
def test_bad_arguments(x: Any, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        geglu(x)
