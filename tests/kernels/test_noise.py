"""The Triton implementation of `normal`; tests/runtime/test_noise.py has what all share."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from heatsink.kernels import noise as module
from heatsink.kernels._launch import run
from heatsink.kernels.jit import noise as jit
from heatsink.kernels.noise import normal, words_to_normal

_transform = jit.words_to_normal


# Triton comes without types.
@triton.jit  # type: ignore[untyped-decorator]
def _transform_kernel(words_ptr: Any, out_ptr: Any, count: Any, BLOCK: tl.constexpr) -> None:
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    words = tl.load(words_ptr + offs, mask=offs < count, other=0).to(tl.uint32, bitcast=True)
    tl.store(out_ptr + offs, _transform(words), mask=offs < count)


def bits(x: Tensor) -> list[int]:
    flat: list[int] = x.cpu().contiguous().view(torch.int32).flatten().tolist()
    return flat


def sample_words(seed: int) -> Tensor:
    """Words over the whole range, both ends, the middle, both sides of the transform's branch."""
    generator = torch.Generator().manual_seed(seed)
    split = round((0.5 - 0.425) * 2**32)
    low = [*range(64), *range(split - 2000, split + 2000), *range(2**31 - 64, 2**31)]
    ends = torch.tensor([*low, *(2**32 - 1 - w for w in low)])
    return torch.cat([ends, torch.randint(0, 2**32, (100_000,), generator=generator)])


def check_transform(device: str, seed: int) -> None:
    words = sample_words(seed)
    signed = (words - (words >> 31 << 32)).to(torch.int32).to(device)
    out = torch.empty(len(words), device=device)
    grid = (triton.cdiv(len(words), 1 << 14),)
    _transform_kernel[grid](signed, out, len(words), BLOCK=1 << 14, enable_fp_fusion=False)
    assert bits(out) == bits(words_to_normal(words))


def test_transform(seed: int) -> None:
    check_transform("cpu", seed)


def test_many_values_of_many_rows(seed: int) -> None:
    keys = torch.tensor([seed, -1, -(2**63), 2**32, 5])
    steps = torch.tensor([0, 2**32 - 1, 2**31, 1, 77])
    out, launches = module.plan({"BLOCK": 1 << 12, "warps": 4}, keys, steps, 2**32 - 1, 40_001)
    run(launches)
    assert bits(out) == bits(module._normal_torch(keys, steps, 2**32 - 1, 40_001))


def test_strides_do_not_matter(seed: int) -> None:
    keys, steps = torch.arange(8) * seed, torch.arange(8)
    expected = normal(keys[::2].contiguous(), steps[1::2].contiguous(), 1, 70)
    assert bits(module._normal_triton(keys[::2], steps[1::2], 1, 70)) == bits(expected)


@pytest.mark.gpu
def test_on_a_gpu_and_in_a_graph(seed: int) -> None:
    check_transform("cuda", seed)
    keys, steps = torch.tensor([seed, -1, -(2**63)]), torch.tensor([0, 2**32 - 1, 19])
    expected = normal(keys, steps, 1, 1_000_003)
    there = (keys.cuda(), steps.cuda(), 1, 1_000_003)
    assert bits(normal(*there)) == bits(expected)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = normal(*there)
    out.zero_()
    graph.replay()
    assert bits(out) == bits(expected)
