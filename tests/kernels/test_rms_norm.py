from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

import pytest
import torch
from torch import Tensor

from heatsink.kernels import _native, reference
from heatsink.kernels._rows import as_grid
from heatsink.kernels.rms_norm import rms_norm

module = import_module("heatsink.kernels.rms_norm")

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
Run = Callable[..., Tensor]


def flat(run: Run) -> Run:
    """An implementation, called as the public function is."""

    def call(x: Tensor, weight: Tensor | None = None, *, eps: float = 1e-6) -> Tensor:
        return run(x, weight, eps)

    return call


# The op as a user calls it, what serves without a compiler, and the Triton kernel, here under the
# interpreter.
RUNS = {
    "op": rms_norm,
    "torch": flat(module._rms_norm_torch),
    "triton": flat(module._rms_norm_triton),
}
ALL = pytest.mark.parametrize("run", RUNS.values(), ids=RUNS)
# Aligned, ragged, one value, empty rows, no rows, one dimension, the widest entry of the
# configurations but one, heads of a real model.
SHAPES = ((4, 256), (3, 5, 77), (2, 1), (2, 0), (0, 16), (33,), (2, 8192), (1, 5, 24, 64))


def make(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> dict[str, Any]:
    """Arguments; x is a part of a packed projection."""
    generator = torch.Generator().manual_seed(seed)
    x = 3 * torch.randn((*shape[:-1], 2 * shape[-1]), generator=generator)
    weight = torch.randn(shape[-1], generator=generator)
    return {"x": x.to(dtype).chunk(2, dim=-1)[0], "weight": weight.to(dtype)}


def plain(x: Tensor, weight: Tensor | None = None, eps: float = 1e-6) -> Tensor:
    """What a user would write."""
    return torch.nn.functional.rms_norm(x, x.shape[-1:], weight, eps)


@ALL
@pytest.mark.parametrize("weighted", [True, False], ids=["weighted", "plain"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_against_float64(
    run: Run,
    dtype: torch.dtype,
    shape: tuple[int, ...],
    weighted: bool,
    seed: int,
    within_budget: Any,
    float64: Any,
) -> None:
    given = make(shape, dtype, seed)
    if not weighted:
        del given["weight"]
    out = run(**given)
    arrays = {name: float64(x) for name, x in given.items()}
    within_budget(out, plain(**given), reference.rms_norm(**arrays))
    assert out.is_contiguous()


@ALL
def test_strides_change_no_bit(run: Run, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    packed = torch.randn((2, 5, 3, 4, 24), generator=generator)
    weight = torch.randn(24, generator=generator)
    for part in (packed[:, :, 1], packed[:, :, 1].mT.contiguous().mT, packed.transpose(0, 3)):
        assert not part.is_contiguous()
        assert torch.equal(run(part, weight), run(part.contiguous(), weight))


@pytest.mark.parametrize("width", [48, 30])
def test_one_binary_wherever_a_row_lies(width: int) -> None:
    # The order of a GPU's sums follows from what a kernel is specialised for.
    packed = torch.ones((2, 5, 3, 4, width), dtype=torch.float16)
    parts = [packed[:, :, 0], packed[:, :, 1], packed[1:, 3:4, 2], packed[0, 0, 0, 3:], packed.mT]
    parts[-1] = parts[-1].contiguous().mT
    keys = {module.plan({"BLOCK_R": 1, "warps": 4}, x)[1][0].key() for x in parts}
    assert len(keys) == 1


def test_a_packed_projection_is_not_copied() -> None:
    packed = torch.randn(2, 5, 3, 4, 24)
    grid = as_grid(packed[:, :, 1])
    assert grid.shape == (10, 4, 24)
    assert grid.data_ptr() == packed[:, :, 1].data_ptr()
    assert torch.equal(grid.flatten(), packed[:, :, 1].flatten())


@ALL
def test_rows_are_exact(run: Run, seed: int, row_exact: Any) -> None:
    weight = make((77,), torch.float32, seed)["weight"]

    def arguments(batch: int) -> dict[str, Tensor]:
        return {"x": make((batch, 3, 77), torch.float32, seed + batch)["x"], "weight": weight}

    row_exact(run, arguments, rows=("x",), interpreted=run is RUNS["triton"])


@pytest.mark.skipif(not _native.available(), reason="there is no extension to compare with")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_extension_gives_the_bits_of_pytorch(dtype: torch.dtype, seed: int) -> None:
    # Whole rounds of 64 lanes, a vector more, a part of one, less than one.
    for width in (320, 336, 77, 7):
        given = make((2, 5, width), dtype, seed)
        assert torch.equal(rms_norm(**given), RUNS["torch"](**given))


@pytest.mark.skipif(not _native.available(), reason="there is no extension to compare with")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_every_16_bit_number_is_read_and_written_as_pytorch_does(dtype: torch.dtype) -> None:
    # In rows of 64, some subnormal, some that overflow on the way out, some infinite, some NaN.
    x = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype).reshape(-1, 64)
    for weight in (torch.ones(64, dtype=dtype), torch.linspace(1e-6, 6e4, 64).to(dtype)):
        found, expected = rms_norm(x, weight, eps=1e-12), RUNS["torch"](x, weight, eps=1e-12)
        assert torch.equal(found.isnan(), expected.isnan())
        assert torch.equal(found.nan_to_num(0.0), expected.nan_to_num(0.0))


def test_fake_strides_are_the_real_ones_in_every_implementation(seed: int) -> None:
    x = torch.randn(2, 3, 5, 30, generator=torch.Generator().manual_seed(seed))
    for order in ((0, 1, 2, 3), (2, 1, 0, 3), (0, 3, 2, 1), (1, 0, 3, 2)):
        view = x.permute(order)
        torch.library.opcheck(torch.ops.heatsink.rms_norm, (view, None, 1e-6))
        fake = module._rms_norm_fake(view, None, 1e-6)
        for run in RUNS.values():
            out = run(view)
            assert (out.shape, out.stride()) == (fake.shape, fake.stride())


def test_opcheck_and_compile(seed: int) -> None:
    given = make((3, 7, 64), torch.float32, seed)
    x, weight = given.values()
    torch.library.opcheck(torch.ops.heatsink.rms_norm, (x, weight, 1e-6))
    torch.library.opcheck(torch.ops.heatsink.rms_norm, (x.mT, None, 1e-6))
    compiled = torch.compile(rms_norm, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(**given), rms_norm(**given))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_on_a_gpu(dtype: torch.dtype, seed: int, within_budget: Any, float64: Any) -> None:
    for shape in (*SHAPES, (2, 256, 24, 128), (9, 16384)):
        given = {name: x.cuda() for name, x in make(shape, dtype, seed).items()}
        arrays = {name: float64(x) for name, x in given.items()}
        within_budget(rms_norm(**given), plain(**given), reference.rms_norm(**arrays))


@pytest.mark.gpu
def test_in_a_cuda_graph(seed: int) -> None:
    given = {name: x.cuda() for name, x in make((3, 7, 640), torch.float16, seed).items()}
    expected = rms_norm(**given)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = rms_norm(**given)
    out.zero_()
    graph.replay()
    assert torch.equal(out, expected)


X = torch.ones(2, 6)


@pytest.mark.parametrize(
    ("given", "error", "match"),
    [
        ({"x": [1.0]}, TypeError, "x: expected a tensor, got list"),
        ({"x": X.double()}, TypeError, "x: expected one of float16, bfloat16, float32"),
        ({"x": torch.ones(())}, ValueError, "x: expected .* got a tensor without dimensions"),
        ({"x": torch.ones(1, 16385)}, ValueError, "x: expected a last .* 16384, got 16385"),
        ({"x": X.clone().requires_grad_()}, ValueError, "x: expected no gradient"),
        ({"eps": 0.0}, ValueError, "eps: expected a positive number below .* got 0.0"),
        ({"eps": float("inf")}, ValueError, "eps: expected a positive number below .* got inf"),
        ({"eps": 10**400}, ValueError, "eps: expected a positive number below .* got 1000"),
        ({"eps": "a"}, TypeError, "eps: expected a number, got str"),
        ({"eps": True}, TypeError, "eps: expected a number, got bool"),
        ({"weight": torch.ones(5)}, ValueError, r"weight: expected shape \(6,\), got \(5,\)"),
        ({"weight": torch.ones(6).half()}, TypeError, "weight: expected torch.float32 like x"),
        ({"weight": torch.ones(6, device="meta")}, ValueError, "weight: expected device cpu"),
    ],
)
def test_bad_arguments(given: dict[str, Any], error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        rms_norm(**{"x": X, **given})
