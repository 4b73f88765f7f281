"""Attention in C++: what `tests/kernels/test_attention.py` does not ask of every implementation."""

from __future__ import annotations

import math
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from heatsink.kernels import _native
from heatsink.kernels.attention import attention

pytestmark = pytest.mark.skipif(
    not _native.available(), reason=f"needs the C++ extension: {_native.load()}"
)

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
HEAD_DIMS = (1, 4, 8, 16, 32, 40, 64, 80, 96, 128, 160, 512)
# (batch, queries, keys, heads): aligned, a block and a bit, ragged, few of each, the model's.
SHAPES = ((1, 32, 128, 1), (1, 100, 300, 2), (2, 5, 77, 3), (1, 1, 1, 1), (2, 64, 24, 2))
Three = tuple[Tensor, Tensor, Tensor]


def inputs(shape: tuple[int, int, int, int], head_dim: int, dtype: torch.dtype, seed: int) -> Three:
    batch, queries, keys, heads = shape
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (
        torch.randn((batch, tokens, heads, head_dim), generator=generator).to(dtype)
        for tokens in (queries, keys, keys)
    )
    return q, k, v


def exact(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None, causal: bool = False) -> Any:
    """Attention in float64; 0 for a query that sees no key."""
    wide = [x.double().numpy() for x in (q, k, v)]
    scores = np.einsum("bqhd,bkhd->bhqk", wide[0], wide[1]) / math.sqrt(q.shape[-1])
    if bias is not None:
        scores = scores + bias.double().numpy()
    if causal:
        after = np.triu(np.ones(scores.shape[-2:], dtype=bool), 1)
        scores = np.where(after, -np.inf, scores)
    top = scores.max(-1, keepdims=True)
    weights = np.exp(scores - np.where(np.isneginf(top), 0.0, top))
    total = weights.sum(-1, keepdims=True)
    weights = weights / np.where(total == 0.0, 1.0, total)
    return np.einsum("bhqk,bkhd->bqhd", weights, wide[2])


def plain(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None, causal: bool = False
) -> Tensor:
    """PyTorch's own, in the same dtype."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    if bias is not None:
        bias = bias.expand(q.shape[0], q.shape[1], q.shape[2], k.shape[2])
    out = torch.nn.functional.scaled_dot_product_attention(
        q, k, v, attn_mask=bias, is_causal=causal
    )
    return out.transpose(1, 2)


def same_bits(a: Tensor, b: Tensor) -> bool:
    raw = torch.int32 if a.dtype == torch.float32 else torch.int16
    return a.shape == b.shape and torch.equal(a.contiguous().view(raw), b.contiguous().view(raw))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_against_float64(head_dim: int, dtype: torch.dtype, seed: int, within_budget: Any) -> None:
    for shape in SHAPES:
        q, k, v = inputs(shape, head_dim, dtype, seed)
        within_budget(attention(q, k, v), plain(q, k, v), exact(q, k, v))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_many_keys(dtype: torch.dtype, seed: int, within_budget: Any) -> None:
    # Sums over thousands of keys: where a plain running sum in fp32 would lose digits.
    q, k, v = inputs((1, 16, 5000, 1), 40, dtype, seed)
    within_budget(attention(q, k, v), plain(q, k, v), exact(q, k, v))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("keys", [77, 40, 200])
def test_causal(keys: int, dtype: torch.dtype, seed: int, within_budget: Any) -> None:
    q, k, v = inputs((2, 77, keys, 2), 64, dtype, seed)
    out = attention(q, k, v, causal=True)
    within_budget(out, plain(q, k, v, causal=True), exact(q, k, v, causal=True))
    # The first query sees one key.
    assert torch.equal(out[:, 0], v[:, 0])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "shape", [(2, 3, 37, 150), (1, 3, 37, 150), (2, 1, 1, 150), (37, 1), (150,)], ids=str
)
def test_bias(shape: tuple[int, ...], dtype: torch.dtype, seed: int, within_budget: Any) -> None:
    q, k, v = inputs((2, 37, 150, 3), 16, dtype, seed)
    generator = torch.Generator().manual_seed(seed)
    bias = (3 * torch.randn(shape, generator=generator)).to(dtype)
    out = attention(q, k, v, bias=bias)
    within_budget(out, plain(q, k, v, bias), exact(q, k, v, bias))
    # Expanded, and as every other element of something larger.
    assert same_bits(out, attention(q, k, v, bias=bias.expand(2, 3, 37, 150)))
    assert same_bits(out, attention(q, k, v, bias=bias.repeat_interleave(2, -1)[..., ::2]))


def test_bias_and_causal(seed: int, within_budget: Any) -> None:
    q, k, v = inputs((1, 40, 40, 2), 32, torch.float32, seed)
    bias = torch.randn((2, 40, 40), generator=torch.Generator().manual_seed(seed))
    hidden = bias.masked_fill(torch.ones(40, 40).triu(1).bool(), -math.inf)
    out = attention(q, k, v, bias=bias, causal=True)
    within_budget(out, plain(q, k, v, hidden), exact(q, k, v, bias, causal=True))


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_hidden_keys(dtype: torch.dtype, seed: int, within_budget: Any) -> None:
    q, k, v = inputs((1, 20, 300, 1), 32, dtype, seed)
    bias = torch.zeros(20, 300, dtype=dtype)
    bias[0] = -math.inf
    bias[1, :290] = -math.inf  # two whole blocks of keys and a part of the third
    bias[2, 5:] = -math.inf
    bias[3] = torch.finfo(dtype).min
    out = attention(q, k, v, bias=bias)
    assert torch.equal(out[0, 0], torch.zeros(1, 32, dtype=dtype))
    within_budget(out[0, 3], v[0].mean(0), v[0].double().mean(0).numpy())
    rest = exact(q, k, v, bias)
    within_budget(out[:, 1:3], plain(q, k, v, bias)[:, 1:3], rest[:, 1:3])


@pytest.mark.parametrize("size", [1e3, 1e10, 1e18])
def test_large_scores_do_not_overflow(size: float, seed: int) -> None:
    q, k, v = inputs((1, 16, 200, 1), 8, torch.float32, seed)
    q, k = q * size, k * size
    scores = np.einsum("qd,kd->qk", q[0, :, 0].double().numpy(), k[0, :, 0].double().numpy())
    # So far apart that the largest score takes all.
    assert torch.equal(attention(q, k, v)[0], v[0, torch.from_numpy(scores.argmax(1))])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_stays_with_its_query(dtype: torch.dtype, seed: int) -> None:
    q, k, v = inputs((1, 20, 30, 2), 32, dtype, seed)
    expected = attention(q, k, v)
    q[0, 7, 1, 3] = math.nan
    out = attention(q, k, v)
    assert out[0, 7, 1].isnan().all()
    out[0, 7, 1] = expected[0, 7, 1]
    assert same_bits(out, expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_are_exact(dtype: torch.dtype, seed: int, row_exact: Any) -> None:
    def make(batch: int) -> dict[str, Any]:
        q, k, v = inputs((batch, 40, 150, 2), 40, dtype, seed + batch)
        generator = torch.Generator().manual_seed(batch)
        return {
            "q": q,
            "k": k,
            "v": v,
            "bias": torch.randn((batch, 1, 1, 150), generator=generator).to(dtype),
        }

    row_exact(attention, make, rows=("q", "k", "v", "bias"), batches=(*range(1, 18),))


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("causal", [False, True])
def test_queries_and_heads_are_exact(causal: bool, dtype: torch.dtype, seed: int) -> None:
    q, k, v = inputs((2, 330, 200, 5), 24, dtype, seed)
    whole = attention(q, k, v, causal=causal)
    for head in (0, 2, 4):
        one = slice(head, head + 1)
        part = attention(q[:, :, one], k[:, :, one], v[:, :, one], causal=causal)
        assert same_bits(part, whole[:, :, one])
    # With `causal` a query's number matters, so only the last ones may be missing.
    for first, last in ((0, 1), (0, 17), (0, 320)) if causal else ((0, 330), (5, 6), (31, 300)):
        part = attention(q[:, first:last], k, v, causal=causal)
        assert same_bits(part, whole[:, first:last])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strides_do_not_matter(dtype: torch.dtype, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    packed = torch.randn((2, 70, 3 * 4 * 36), generator=generator).to(dtype)
    views = packed.view(2, 70, 3, 4, 36).unbind(2)
    expected = attention(*(x.contiguous() for x in views))
    layouts = {
        "packed": views,
        "heads first": [x.transpose(1, 2).contiguous().transpose(1, 2) for x in views],
        "channels first": [x.permute(3, 0, 1, 2).contiguous().permute(1, 2, 3, 0) for x in views],
        "far apart": [torch.cat([x, x], -1).repeat(1, 1, 8, 1)[:, :, :4, :36] for x in views],
    }
    for name, layout in layouts.items():
        assert not layout[0].is_contiguous()
        assert same_bits(attention(*layout), expected), name
    one = views[1][:, :1].expand(2, 70, 4, 36)
    assert same_bits(attention(views[0], one, one), attention(views[0], *[one.contiguous()] * 2))


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_threads_do_not_matter(dtype: torch.dtype, seed: int) -> None:
    cases = [
        inputs(shape, head_dim, dtype, seed)
        for shape, head_dim in (((1, 700, 130, 1), 40), ((3, 70, 70, 3), 64), ((1, 64, 64, 2), 512))
    ]
    before = torch.get_num_threads()
    try:
        outs = []
        for threads in (1, 2, 3, 8):
            torch.set_num_threads(threads)
            outs.append([attention(*case, causal=True) for case in cases])
    finally:
        torch.set_num_threads(before)
    for other in outs[1:]:
        assert all(same_bits(a, b) for a, b in zip(outs[0], other, strict=True))


def test_fp16_is_float_inside(seed: int) -> None:
    q, k, v = inputs((2, 40, 150, 2), 37, torch.float16, seed)
    wide = attention(q.float(), k.float(), v.float())
    assert same_bits(attention(q, k, v), wide.half())


def test_weights_are_rounded_to_bf16(seed: int) -> None:
    # One query, 24 keys: its weights are of one block, and nothing is lost in sums of so few.
    q, k, v = inputs((1, 1, 24, 1), 32, torch.bfloat16, seed)
    scores = (q[0, :, 0].double() @ k[0, :, 0].double().mT)[0] / math.sqrt(32)
    weights = (scores - scores.max()).exp()
    rounded = weights.float().bfloat16().double()
    expected = rounded @ v[0, :, 0].double() / weights.sum()
    out = attention(q, k, v)[0, 0, 0]
    # Half a unit in the last place, and what the sums and the power lose.
    torch.testing.assert_close(out.double(), expected, rtol=2.0**-8, atol=1e-5)


@pytest.mark.parametrize("scale", [-0.3, 0.0, 1e-30, 3.0])
def test_any_scale(scale: float, seed: int, within_budget: Any) -> None:
    q, k, v = inputs((1, 40, 150, 2), 16, torch.bfloat16, seed)
    out = torch.ops.heatsink.attention(q, k, v, scale, False, None)
    wide = [x.transpose(1, 2).double() for x in (q, k, v)]
    reference = (scale * wide[0] @ wide[1].mT).softmax(-1) @ wide[2]
    plain_out = (scale * wide[0] @ wide[1].mT).softmax(-1).bfloat16() @ wide[2].bfloat16()
    within_budget(out, plain_out.transpose(1, 2), reference.transpose(1, 2).numpy())


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_every_number_is_read_and_written(dtype: torch.dtype) -> None:
    # One key: its value comes out as it is. All bit patterns, subnormals and infinities among them.
    v = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    v = v.view(256, 1, 4, 64)
    q = torch.ones(256, 1, 4, 64, dtype=dtype)
    expected = v
    if dtype == torch.bfloat16:
        # Products of bf16 take subnormals for 0.
        subnormal = v.float().abs() < torch.finfo(torch.bfloat16).tiny
        expected = torch.where(subnormal, torch.zeros_like(v), v)
    assert torch.equal(attention(q, q, v).nan_to_num(1.5), expected.nan_to_num(1.5))
    assert torch.equal(attention(q, q, v).isnan(), v.isnan())


def test_rounding_to_half_precision() -> None:
    # Two keys of equal weight: means of neighbours, of which every other one is a tie.
    for dtype in DTYPES[1:]:
        # Of bf16 normal numbers alone, since its products take others for 0.
        first = 0x100 if dtype == torch.bfloat16 else 0
        raw = torch.arange(first, first + 0x7700, dtype=torch.int32).to(torch.int16).view(dtype)
        v = torch.stack([raw[:-64], raw[64:]], 0).view(1, 2, 1, -1)[..., : 118 * 256]
        v = v.view(2, -1, 256).permute(1, 0, 2).unsqueeze(2)
        q = torch.zeros(v.shape[0], 1, 1, 256, dtype=dtype)
        expected = v.float().mean(1, keepdim=True).to(dtype)
        assert same_bits(attention(q, torch.zeros_like(v), v), expected)


ANSWERS = """
import torch
from heatsink.kernels.attention import attention
from heatsink.kernels.fingerprint import fingerprint
digests = []
for head_dim, causal in ((32, False), (40, True), (150, False), (7, False)):
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        q, k, v = (torch.randn(2, n, 3, head_dim).to(dtype) for n in (50, 150, 150))
        bias = torch.randn(50, 150).to(dtype) if head_dim == 40 else None
        digests += fingerprint(attention(q, k, v, causal=causal, bias=bias)).hex()
print(*digests)
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
    assert len(expected.stdout.split()) == 24
    for kernel, flag in (("avx2", "avx2"), ("avx512", "avx512vl"), ("amx", "amx_bf16")):
        found = run_with(kernel, seed)
        if flag in flags:
            assert found.stdout == expected.stdout, kernel
        else:
            assert f"on this processor, got {kernel}" in found.stderr


def test_an_unknown_instruction_set_is_refused(seed: int) -> None:
    found = run_with("avx3", seed)
    assert found.returncode == 1
    assert "HEATSINK_CPU: expected one of" in found.stderr
    assert "portable on this processor, got avx3" in found.stderr


def test_the_op_refuses_what_it_cannot_read() -> None:
    op = torch.ops.heatsink.attention
    x = torch.ones(1, 2, 1, 4)
    with pytest.raises(RuntimeError, match="q: dtype not supported"):
        op(x.double(), x.double(), x.double(), 0.5, False, None)
    with pytest.raises(RuntimeError, match="k: expected"):
        op(x, torch.ones(1, 2, 2, 4), x, 0.5, False, None)
    with pytest.raises(RuntimeError, match="v: expected"):
        op(x, x, torch.ones(1, 3, 1, 4), 0.5, False, None)
    with pytest.raises(RuntimeError, match="bias: expected a shape"):
        op(x, x, x, 0.5, False, torch.ones(3))
    with pytest.raises(RuntimeError, match="bias: expected at most"):
        op(x, x, x, 0.5, False, torch.ones(2, dtype=torch.float16))


def test_nothing_to_attend_to() -> None:
    op = torch.ops.heatsink.attention
    x, none = torch.ones(2, 3, 1, 4), torch.ones(2, 0, 1, 4)
    assert torch.equal(op(x, none, none, 0.5, False, None), torch.zeros(2, 3, 1, 4))
    assert op(none, x, x, 0.5, False, None).shape == (2, 0, 1, 4)
