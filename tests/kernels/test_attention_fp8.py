from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from heatsink.kernels import reference
from heatsink.kernels._config import Config, Target
from heatsink.kernels._launch import run
from heatsink.kernels.attention import _attention_torch
from heatsink.kernels.attention_fp8 import attention_fp8

module = import_module("heatsink.kernels.attention_fp8")

# What the op's docstring promises of |out - exact| / |exact|, by `pure`.
BOUNDS = {False: 2e-2, True: 7e-2}
SMALL: Config = {
    "BLOCK_M": 32,
    "BLOCK_N": 32,
    "CHUNK": 16,
    "SPLIT_D": 1,
    "side_warps": 4,
    "warps": 4,
    "stages": 2,
}
# (batch, queries, keys, heads, head dim): aligned; ragged with a head of two parts; more chunks
# than are read at a time; a head below the least tile.
SHAPES = ((1, 64, 128, 1, 64), (2, 37, 77, 2, 80), (1, 16, 300, 1, 40), (1, 5, 33, 2, 8))


def packed(
    shape: tuple[int, ...], dtype: torch.dtype, seed: int, outliers: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """Views of packed projections; with `outliers` one channel in 16 of K is far from 0."""
    batch, queries, keys, heads, head_dim = shape
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn((batch, queries, 3, heads, head_dim), generator=generator)[:, :, 1]
    kv = torch.randn((batch, keys, 2, heads, head_dim), generator=generator)
    if outliers:
        kv[:, :, 0, :, ::16] += 20.0
    k, v = kv.to(dtype).unbind(2)
    return q.to(dtype), k, v


def small(q: Tensor, k: Tensor, v: Tensor, pure: bool = False) -> Tensor:
    out: Tensor
    out, launches = module.plan(SMALL, q, k, v, pure=pure)
    run(launches)
    return out


def default(q: Tensor, k: Tensor, v: Tensor, pure: bool = False) -> Tensor:
    out: Tensor = module._attention_fp8_triton(q, k, v, q.shape[-1] ** -0.5, pure)
    return out


RUNS: dict[str, Callable[..., Tensor]] = {"op": attention_fp8, "triton": default, "small": small}
ALL = pytest.mark.parametrize("run_as", RUNS)
PURE = pytest.mark.parametrize("pure", [False, True], ids=["int8", "e4m3"])


def relative_error(out: Tensor, exact: Any) -> float:
    found = out.to("cpu", torch.float64).numpy()
    return float(np.linalg.norm(found - exact) / np.linalg.norm(exact))


@ALL
@PURE
@pytest.mark.parametrize("outliers", [False, True], ids=["normal", "outliers"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_error_against_float64(
    run_as: str, pure: bool, outliers: bool, shape: tuple[int, ...], seed: int, float64: Any
) -> None:
    dtype = torch.bfloat16 if shape[4] == 80 else torch.float16
    q, k, v = packed(shape, dtype, seed, outliers)
    exact = reference.attention(*(float64(x) for x in (q, k, v)))
    out = RUNS[run_as](q, k, v, pure=pure)
    assert out.is_contiguous()
    assert out.dtype == dtype
    assert relative_error(out, exact) < BOUNDS[pure]


def test_smoothing_is_what_keeps_outliers(seed: int, float64: Any) -> None:
    """Without the mean taken off, the same quantisation is past its bound."""
    q, k, v = packed((1, 64, 256, 1, 64), torch.float16, seed, outliers=True)
    exact = reference.attention(*(float64(x) for x in (q, k, v)))
    rough = module._dequantised(k.float(), (1, 3), pure=False)
    q8 = module._dequantised(q.float(), (3,), pure=False)
    out = _attention_torch(q8, rough, v.float(), 0.125, False, None)
    assert relative_error(out, exact) > BOUNDS[False]
    assert relative_error(attention_fp8(q, k, v), exact) < BOUNDS[False]


def test_e4m3_rounds_to_nearest(seed: int) -> None:
    """What the kernels store is what PyTorch's conversion gives, subnormals included."""
    q, k, v = packed((1, 32, 32, 1, 32), torch.float16, seed)
    q = q * torch.logspace(-4, 0, 32).half()
    _, launches = module.plan(SMALL, q, k, v, pure=True)
    run(launches)
    stored = launches[1].args["out_ptr"]
    assert isinstance(stored, Tensor)
    top = q.float().abs().amax(-1, keepdim=True)
    expected = (q.float() * (448.0 / top)).to(torch.float8_e4m3fn)
    assert torch.equal(stored[0, 0].float(), expected[0, :, 0].float())


@pytest.mark.parametrize("run_as", ["op", "triton"])
@PURE
def test_rows_are_exact(run_as: str, pure: bool, seed: int, row_exact: Any) -> None:
    def make(batch: int) -> dict[str, Any]:
        q, k, v = packed((batch, 5, 37, 1, 40), torch.float16, seed + batch)
        return {"q": q, "k": k, "v": v, "pure": pure}

    batches = range(1, 18) if run_as == "op" else (17,)
    row_exact(RUNS[run_as], make, ("q", "k", "v"), batches)


@ALL
@PURE
def test_strides_do_not_matter(run_as: str, pure: bool, seed: int) -> None:
    q, k, v = packed((2, 19, 37, 2, 24), torch.float16, seed)
    expected = RUNS[run_as](*(x.contiguous() for x in (q, k, v)), pure=pure)
    apart = [x.transpose(1, 3).contiguous().transpose(1, 3) for x in (q, k, v)]
    for views in ((q, k, v), apart):
        assert torch.equal(RUNS[run_as](*views, pure=pure), expected)


@ALL
@PURE
def test_zeros(run_as: str, pure: bool) -> None:
    """Blocks without any magnitude: the mean of V, and no division by 0."""
    zero = torch.zeros(1, 8, 1, 16, dtype=torch.float16)
    assert (RUNS[run_as](zero, zero, zero, pure=pure) == 0).all()
    ones = torch.ones_like(zero)
    assert torch.allclose(RUNS[run_as](zero, zero, ones, pure=pure), ones, atol=2**-9)


@ALL
@PURE
@pytest.mark.parametrize("where", [0, 1, 2], ids="qkv")
def test_a_value_that_is_no_number_shows(run_as: str, pure: bool, where: int, seed: int) -> None:
    """In its own query's output if it is in q, in every query's of its head if in k or v."""
    tensors = [x.clone() for x in packed((2, 20, 37, 2, 16), torch.bfloat16, seed)]
    tensors[where][1, 3, 0, 5] = float("nan")
    bad = RUNS[run_as](*tensors, pure=pure).isnan().any(-1)
    expected = torch.zeros(2, 20, 2, dtype=torch.bool)
    expected[1, 3 if where == 0 else slice(None), 0] = True
    assert torch.equal(bad, expected)


def test_empty() -> None:
    x = torch.ones(2, 3, 1, 8, dtype=torch.float16)
    assert attention_fp8(x[:0], x[:0], x[:0]).shape == (0, 3, 1, 8)
    assert (attention_fp8(x, x[:, :0], x[:, :0]) == 0).all()


@PURE
def test_which_kernels_run(pure: bool) -> None:
    x = torch.empty(1, 64, 1, 64, dtype=torch.float16, device="meta")
    _, launches = module.plan(SMALL, x, x, x, pure=pure)
    found = [launch.kernel.name.removeprefix("attention_fp8") for launch in launches]
    assert found == ["_stats", "_rows", "_rows", *(["_values"] if pure else []), ""]
    dtype = torch.float8_e4m3fn if pure else torch.int8
    stored = [launches[-1].args[name] for name in ("q_ptr", "k_ptr")]
    assert [x.dtype for x in stored if isinstance(x, Tensor)] == [dtype, dtype]


@pytest.mark.parametrize("arch", [80, 86])
def test_e4m3_needs_a_device_that_has_it(arch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "target_of", lambda device: Target("", arch))
    x = torch.empty(1, 64, 1, 64, dtype=torch.float16, device="meta")
    match = f"pure: expected a device of sm_89 or later, got sm_{arch}"
    with pytest.raises(ValueError, match=match):
        module._attention_fp8_triton(x, x, x, 0.125, True)
    for pure, least in ((False, 80), (True, 89)):
        _, launches = module.plan(SMALL, x, x, x, pure=pure)
        assert {min(launch.kernel.archs) for launch in launches} == {least}


@PURE
def test_opcheck_and_compile(pure: bool, seed: int) -> None:
    q, k, v = packed((2, 9, 12, 2, 16), torch.float16, seed)
    torch.library.opcheck(torch.ops.heatsink.attention_fp8, (q, k, v, 0.25, pure))
    compiled = torch.compile(attention_fp8, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(q, k, v, pure=pure), attention_fp8(q, k, v, pure=pure))


@pytest.mark.gpu
@PURE
@pytest.mark.parametrize("dtype", module.FLOATS, ids=str)
@pytest.mark.parametrize("outliers", [False, True], ids=["normal", "outliers"])
@pytest.mark.parametrize("head_dim", [40, 64, 80, 128, 160])
def test_on_cuda(
    dtype: torch.dtype, pure: bool, outliers: bool, head_dim: int, seed: int, float64: Any
) -> None:
    q, k, v = packed((2, 1024, 1000, 2, head_dim), dtype, seed, outliers)
    exact = reference.attention(*(float64(x) for x in (q, k, v)))
    out = attention_fp8(q.cuda(), k.cuda(), v.cuda(), pure=pure)
    assert relative_error(out, exact) < BOUNDS[pure]


@pytest.mark.gpu
@PURE
def test_in_a_cuda_graph(pure: bool, seed: int) -> None:
    q, k, v = (x.cuda() for x in packed((2, 256, 256, 2, 64), torch.float16, seed))
    expected = attention_fp8(q, k, v, pure=pure)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = attention_fp8(q, k, v, pure=pure)
    out.zero_()
    graph.replay()
    assert torch.equal(out, expected)


X = torch.ones(2, 3, 4, 8, dtype=torch.float16)


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"q": X.float()}, TypeError, "q: expected one of float16, bfloat16, got torch.float32"),
        ({"k": X.bfloat16()}, TypeError, "k: expected torch.float16 like q"),
        ({"q": X[0]}, ValueError, r"q: expected \(B, Sq, H, D\), got shape \(3, 4, 8\)"),
        ({"v": X[:, :2]}, ValueError, r"v: expected shape \(2, 3, 4, 8\), got \(2, 2, 4, 8\)"),
        ({"scale": -1.0}, ValueError, "scale: expected a positive finite number, got -1.0"),
    ],
)
def test_bad_arguments(change: dict[str, Any], error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        attention_fp8(**{"q": X, "k": X, "v": X, **change})


def test_head_dim_out_of_range() -> None:
    x = torch.ones(1, 3, 1, 512, dtype=torch.float16)
    with pytest.raises(ValueError, match="q: expected a head dim of 1 to 256, got 512"):
        attention_fp8(x, x, x)
