"""The products in C++: what `test_linear.py` and `test_conv2d.py` do not ask of every one."""

from __future__ import annotations

import math
import os
import platform
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from heatsink.kernels import _native
from heatsink.kernels._products import SCRATCH_BYTES, scratch_bytes
from heatsink.kernels.conv2d import conv2d
from heatsink.kernels.linear import linear, pack_linear

pytestmark = pytest.mark.skipif(
    not _native.available(), reason=f"needs the C++ extension: {_native.load()}"
)
DTYPES = (torch.float32, torch.bfloat16)
BATCHES = (*range(1, 18),)


def bits(x: Tensor) -> Tensor:
    raw = torch.int32 if x.dtype == torch.float32 else torch.int16
    return x.contiguous().view(raw)


def same_bits(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.equal(bits(a), bits(b))


def normal(generator: torch.Generator, dtype: torch.dtype, *sizes: int) -> Tensor:
    return torch.randn(sizes, generator=generator).to(dtype)


def images(generator: torch.Generator, dtype: torch.dtype, *sizes: int) -> Tensor:
    return normal(generator, dtype, *sizes).contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(64, 64, 96), (7, 70, 33), (1, 1300, 40)], ids=str)
def test_rows_are_exact(
    shape: tuple[int, int, int], dtype: torch.dtype, seed: int, row_exact: Any
) -> None:
    tokens, depth, columns = shape
    shared = torch.Generator().manual_seed(seed)
    weight = normal(shared, dtype, 2 * columns, depth)
    bias = normal(shared, dtype, 2 * columns)

    def make(batch: int) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(seed + batch)
        return {
            "x": normal(generator, dtype, batch, tokens, depth),
            "weight": weight,
            "bias": bias,
            "residual": normal(generator, dtype, batch, tokens, columns),
            "sample_add": normal(generator, dtype, batch, 2 * columns),
            "activation": "geglu",
        }

    row_exact(linear, make, rows=("x", "residual", "sample_add"), batches=BATCHES)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("size", "stride", "upsample"), [((8, 8), 1, 1), ((5, 7), 2, 2), ((2, 40), 1, 1)], ids=str
)
def test_images_are_exact(
    size: tuple[int, int], stride: int, upsample: int, dtype: torch.dtype, seed: int, row_exact: Any
) -> None:
    shared = torch.Generator().manual_seed(seed)
    weight = normal(shared, dtype, 40, 96, 3, 3)
    out = [(n * upsample - 1) // stride + 1 for n in size]

    def make(batch: int) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(seed + batch)
        return {
            "x": images(generator, dtype, batch, 64, *size),
            "x2": images(generator, dtype, batch, 32, *size),
            "weight": weight,
            "residual": images(generator, dtype, batch, 40, *out),
            "sample_add": normal(generator, dtype, batch, 40),
            "stride": stride,
            "padding": 1,
            "upsample": upsample,
            "activation": "silu",
        }

    row_exact(conv2d, make, rows=("x", "x2", "residual", "sample_add"), batches=BATCHES)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tokens_and_columns_are_exact(dtype: torch.dtype, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x, weight = normal(generator, dtype, 600, 700), normal(generator, dtype, 300, 700)
    whole = linear(x, weight)
    for first, last in ((0, 1), (599, 600), (5, 38), (17, 580)):
        assert same_bits(linear(x[first:last], weight), whole[first:last])
    for first, last in ((0, 1), (299, 300), (16, 40), (33, 290)):
        assert same_bits(linear(x[:70], weight[first:last]), whole[:70, first:last])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strides_do_not_matter(dtype: torch.dtype, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    packed = normal(generator, dtype, 3, 30, 2, 64)
    x, residual = packed.unbind(2)
    weight = normal(generator, dtype, 64, 64)
    both = normal(generator, dtype, 4, 64)
    expected = linear(x.contiguous(), weight, both[0], residual=residual.contiguous())
    assert not x.is_contiguous()
    assert same_bits(linear(x, weight, both[0], residual=residual), expected)
    uneven = x.transpose(0, 1).contiguous().transpose(0, 1)
    assert same_bits(linear(uneven, weight, both[0], residual=uneven * 0 + residual), expected)
    columns = [y.mT.contiguous().mT for y in (x, residual)]
    weight_t = weight.t().contiguous().t()
    every_other = both.repeat_interleave(2, 1)[0, ::2]
    assert same_bits(linear(columns[0], weight_t, every_other, residual=columns[1]), expected)
    one = x[:, :1].expand(3, 30, 64)
    assert same_bits(linear(one, weight), linear(one.contiguous(), weight))


def test_threads_do_not_matter(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    calls: list[Callable[[], Tensor]] = []
    for dtype in DTYPES:
        for rows, depth, columns in ((1000, 700, 200), (3, 1300, 1000), (64, 64, 64)):
            x, weight = (
                normal(generator, dtype, rows, depth),
                normal(generator, dtype, columns, depth),
            )
            calls.append(partial(linear, x, weight, activation="gelu"))
        image = images(generator, dtype, 2, 64, 24, 32)
        kernel = normal(generator, dtype, 70, 64, 3, 3)
        calls.append(partial(conv2d, image, kernel, padding=1))
    before = torch.get_num_threads()
    try:
        outs = []
        for threads in (1, 2, 3, 8):
            torch.set_num_threads(threads)
            outs.append([call() for call in calls])
    finally:
        torch.set_num_threads(before)
    for other in outs[1:]:
        assert all(same_bits(a, b) for a, b in zip(outs[0], other, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_is_not_finite_stays_in_its_row(dtype: torch.dtype, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x, weight = normal(generator, dtype, 50, 100), normal(generator, dtype, 40, 100)
    expected = linear(x, weight)
    x[17, 3], x[20, 99] = math.nan, math.inf
    out = linear(x, weight)
    assert out[17].isnan().all()
    assert out[20].isinf().all()
    out[17], out[20] = expected[17], expected[20]
    assert same_bits(out, expected)


def bfloat16_sum(x: Tensor, weight: Tensor) -> Tensor:
    """What one element is, product by product, as `kernels/linear.py` specifies bfloat16."""
    wide = torch.zeros((), dtype=torch.float32)
    for k in range(0, len(x), 32):
        chains = []
        for odd in (0, 1):
            chain = torch.zeros((), dtype=torch.float64)
            for j in range(k + odd, min(k + 32, len(x)), 2):
                # Exact in float64 for these numbers, then rounded once.
                chain = (chain + x[j].double() * weight[j].double()).float().double()
            chains.append(chain.float())
        wide = wide + (chains[0] + chains[1])
    return wide.bfloat16()


def test_bfloat16_sums_in_the_specified_order(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x, weight = normal(generator, torch.bfloat16, 4, 90), normal(generator, torch.bfloat16, 3, 90)
    # Of one binade or so, so that float64 holds a product and a sum exactly.
    x, weight = x.sign() * (1 + x.abs() % 1), weight.sign() * (1 + weight.abs() % 1)
    out = linear(x, weight)
    for i in range(4):
        for j in range(3):
            assert same_bits(out[i, j], bfloat16_sum(x[i], weight[j]))


def test_denormal_numbers_of_bfloat16_count_as_zero() -> None:
    tiny = torch.tensor([[2.0**-130, 1.0]]).bfloat16()
    weight = torch.tensor([[2.0**10, 0.0], [0.0, 2.0**-130], [2.0**10, 2.0**-126]]).bfloat16()
    assert linear(tiny, weight).tolist() == [[0.0, 0.0, 2.0**-126]]
    # In float32 they count, and the processor's mode is left as it was.
    assert linear(tiny.float(), weight.float())[0, 0] == 2.0**-120


ANSWERS = """
import torch
from heatsink.kernels import _native
from heatsink.kernels.conv2d import conv2d
from heatsink.kernels.fingerprint import fingerprint
from heatsink.kernels.linear import linear
digests = []
for dtype in (torch.float32, torch.bfloat16):
    for rows, depth, columns in ((45, 70, 84), (3, 1300, 18), (200, 33, 32)):
        x = torch.randn(1, rows, depth).to(dtype) * torch.exp2(torch.randint(-70, 3, (rows, 1)))
        x, weight = x.to(dtype), (torch.randn(columns, depth) / depth**0.5).to(dtype)
        sample_add = torch.randn(1, columns).to(dtype)
        for activation in ("", "silu", "gelu", "gelu_tanh", "quick_gelu", "geglu"):
            out = linear(x, weight, weight[:, 0], sample_add=sample_add, activation=activation)
            digests += fingerprint(linear(out, torch.ones(1, out.shape[-1], dtype=dtype))).hex()
            digests += fingerprint(out).hex()
    x, x2 = (torch.randn(2, c, 5, 34).to(dtype) for c in (64, 9))
    weight = torch.randn(20, 73, 3, 3).to(dtype)
    digests += fingerprint(conv2d(x, weight, x2=x2, padding=1, residual=x[:, :20])).hex()
    digests += fingerprint(conv2d(x, weight[:, :64], padding=1, stride=2, upsample=2)).hex()
print(_native.instruction_set(), *digests)
"""


def run_with(kernel: str, seed: int) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-P", "-c", f"import torch; torch.manual_seed({seed}){ANSWERS}"],
        env={**os.environ, "HEATSINK_CPU": kernel},
        capture_output=True,
        text=True,
    )


@pytest.mark.skipif(platform.machine() != "x86_64", reason="one kernel alone on other machines")
def test_every_instruction_set_gives_the_same_bits(seed: int) -> None:
    flags = Path("/proc/cpuinfo").read_text().split()
    expected = run_with("portable", seed)
    assert expected.returncode == 0, expected.stderr
    name, *digests = expected.stdout.split()
    assert name == "portable"
    assert len(digests) == 2 * (2 * 3 * 6 + 2 * 2)
    for kernel, flag in (("avx2", "avx2"), ("avx512", "avx512vl"), ("amx", "amx_bf16")):
        found = run_with(kernel, seed)
        if flag in flags:
            assert found.stdout.split() == [kernel, *digests], found.stderr
        else:
            assert f"on this processor, got {kernel}" in found.stderr


def test_the_fastest_instruction_set_is_chosen() -> None:
    flags = Path("/proc/cpuinfo").read_text().split() if platform.machine() == "x86_64" else []
    names = {"amx_bf16": "amx", "avx512vl": "avx512", "avx2": "avx2"}
    fastest = next((name for flag, name in names.items() if flag in flags), "portable")
    assert _native.instruction_set() == os.environ.get("HEATSINK_CPU", fastest)


def test_an_unknown_instruction_set_is_refused(seed: int) -> None:
    found = run_with("avx3", seed)
    assert found.returncode == 1
    assert "portable on this processor, got avx3" in found.stderr


def packed_calls(dtype: torch.dtype, seed: int) -> tuple[list[Callable[[], None]], list[Tensor]]:
    """Calls of the packed variants, and their results."""
    generator = torch.Generator().manual_seed(seed)
    scratch = torch.zeros(scratch_bytes(2), dtype=torch.uint8)
    x, weight = normal(generator, dtype, 2, 300, 700), normal(generator, dtype, 80, 700)
    image, kernel = images(generator, dtype, 2, 32, 20, 20), normal(generator, dtype, 40, 64, 3, 3)
    outs = [torch.zeros(2, 300, 40, dtype=dtype), images(generator, dtype, 2, 40, 40, 40)]
    blocks = [pack_linear(weight, geglu=True), pack_linear(kernel)]
    added = [normal(generator, dtype, 2, 80), normal(generator, dtype, 2, 40)]
    bias = normal(generator, dtype, 80)
    op, conv = torch.ops.heatsink.linear_packed, torch.ops.heatsink.conv2d_packed
    return [
        lambda: op(x, blocks[0], bias, x[..., :40], added[0], "geglu", scratch, outs[0]),
        lambda: conv(
            image,
            image,
            blocks[1],
            bias[:40],
            None,
            added[1],
            3,
            3,
            1,
            1,
            2,
            "silu",
            scratch,
            outs[1],
        ),
    ], outs


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_packed_variants_allocate_nothing(dtype: torch.dtype, threads: int, seed: int) -> None:
    calls, outs = packed_calls(dtype, seed)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
            for call in calls:
                call()
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as control:
            torch.empty(1000)
    finally:
        torch.set_num_threads(before)
    assert any(event.name() == "[memory]" for event in control.profiler.kineto_results.events())
    assert not any(event.name() == "[memory]" for event in seen.profiler.kineto_results.events())
    assert all(out.isfinite().all() and out.count_nonzero() for out in outs)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_scratch_decides_how_many_threads_work(dtype: torch.dtype, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x, weight = normal(generator, dtype, 300, 700), normal(generator, dtype, 80, 700)
    packed, expected = pack_linear(weight), linear(x, weight)
    op = torch.ops.heatsink.linear_packed
    for size in (SCRATCH_BYTES, 3 * SCRATCH_BYTES - 1):
        # What is behind must not be written to.
        memory = torch.full((size + 64,), 7, dtype=torch.uint8)
        out = torch.empty(300, 80, dtype=dtype)
        op(x, packed, None, None, None, "", memory[:size], out)
        assert same_bits(out, expected)
        assert (memory[size // SCRATCH_BYTES * SCRATCH_BYTES :] == 7).all()
    small = torch.empty(SCRATCH_BYTES - 1, dtype=torch.uint8)
    with pytest.raises(RuntimeError, match=f"scratch: .*at least {SCRATCH_BYTES} bytes"):
        op(x, packed, None, None, None, "", small, out)


def test_the_packed_ops_refuse_what_they_cannot_read() -> None:
    op, conv = torch.ops.heatsink.linear_packed, torch.ops.heatsink.conv2d_packed
    x, weight, out = torch.ones(2, 6, 4), pack_linear(torch.ones(5, 4)), torch.ones(2, 6, 5)
    scratch = torch.empty(SCRATCH_BYTES, dtype=torch.uint8)
    with pytest.raises(RuntimeError, match="weight: expected it of x's dtype, packed"):
        op(x, torch.ones(5, 4), None, None, None, "", scratch, out)
    with pytest.raises(RuntimeError, match="x: expected float32 or bfloat16"):
        op(x.half(), weight, None, None, None, "", scratch, out.half())
    with pytest.raises(RuntimeError, match="x: expected evenly spaced"):
        op(x.mT.contiguous().mT, weight, None, None, None, "", scratch, out)
    with pytest.raises(RuntimeError, match="out: expected evenly spaced"):
        op(x, weight, None, None, None, "", scratch, out.mT.contiguous().mT)
    with pytest.raises(RuntimeError, match="out: expected x's rows"):
        op(x, weight, None, None, None, "", scratch, out[:1])
    with pytest.raises(RuntimeError, match="residual: expected"):
        op(x, weight, None, out[:1], None, "", scratch, out)
    with pytest.raises(RuntimeError, match="bias: expected"):
        op(x, weight, torch.ones(4), None, None, "", scratch, out)
    with pytest.raises(RuntimeError, match="sample_add: expected"):
        op(x, weight, None, None, torch.ones(6, 5), "", scratch, out)
    with pytest.raises(RuntimeError, match=r"activation: expected .*got relu"):
        op(x, weight, None, None, None, "relu", scratch, out)
    image, kernel = torch.ones(1, 4, 3, 3), pack_linear(torch.ones(5, 4, 1, 1))
    result = torch.ones(1, 5, 3, 3).contiguous(memory_format=torch.channels_last)
    with pytest.raises(RuntimeError, match="expected images with dense channels"):
        conv(image, None, kernel, None, None, None, 1, 1, 1, 0, 1, "", scratch, result)
    image = image.contiguous(memory_format=torch.channels_last)
    with pytest.raises(RuntimeError, match="out: expected channels_last"):
        conv(image, None, kernel, None, None, None, 1, 1, 1, 0, 1, "", scratch, result.contiguous())
    with pytest.raises(RuntimeError, match="out: expected the result's shape"):
        conv(image, None, kernel, None, None, None, 1, 1, 2, 0, 1, "", scratch, result)
    with pytest.raises(RuntimeError, match="x2: expected"):
        conv(image, image[..., :2], kernel, None, None, None, 1, 1, 1, 0, 1, "", scratch, result)
