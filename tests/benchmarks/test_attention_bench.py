"""Attention on the CPU against every way that PyTorch has of computing it, as ratios.

    OMP_NUM_THREADS=1 python -m pytest tests/benchmarks/test_attention_bench.py -q

A ratio above 1 means that PyTorch's best takes longer. PyTorch's backends run on transposed views,
as a model has them, and on contiguous copies, which cost a model more than is counted here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from heatsink.kernels import _native
from heatsink.kernels.attention import attention

pytestmark = pytest.mark.skipif(
    not _native.available(), reason=f"needs the C++ extension: {_native.load()}"
)

# (rows, queries, keys, heads, head dim). The bundled model's UNet: 64 tokens with 4 heads and 16
# with 6, over themselves and over 24 tokens of text; then Stable Diffusion 1.5's at 256 pixels.
CASES = {
    "self-64x2": (1, 64, 64, 2, 32),
    "self-64x4": (1, 64, 64, 4, 32),
    "self-64x4-rows8": (8, 64, 64, 4, 32),
    "self-64x4-rows24": (24, 64, 64, 4, 32),
    "self-16x6": (1, 16, 16, 6, 32),
    "self-16x6-rows8": (8, 16, 16, 6, 32),
    "self-16x6-rows24": (24, 16, 16, 6, 32),
    "cross-64x4": (1, 64, 24, 4, 32),
    "cross-64x4-rows8": (8, 64, 24, 4, 32),
    "cross-16x6-rows8": (8, 16, 24, 6, 32),
    "sd15-self-1024": (2, 1024, 1024, 8, 40),
    "sd15-cross-1024": (2, 1024, 77, 8, 40),
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
BACKENDS = {"flash": SDPBackend.FLASH_ATTENTION, "math": SDPBackend.MATH}


def torch_attention(backend: SDPBackend, q: Tensor, k: Tensor, v: Tensor) -> Callable[[], Tensor]:
    def run() -> Tensor:
        # Choosing it takes a microsecond or so, as much as it would take a model.
        with sdpa_kernel(backend):
            return torch.nn.functional.scaled_dot_product_attention(q, k, v)

    return run


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_attention(case: str, dtype: str, race: Any, seed: int) -> None:
    batch, queries, keys, heads, head_dim = CASES[case]
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (
        torch.randn((batch, tokens, heads, head_dim), generator=generator).to(DTYPES[dtype])
        for tokens in (queries, keys, keys)
    )
    views = [x.transpose(1, 2) for x in (q, k, v)]
    layouts = {"view": views, "contiguous": [x.contiguous() for x in views]}
    others = {
        f"{name} {layout}": torch_attention(backend, *tensors)
        for name, backend in BACKENDS.items()
        for layout, tensors in layouts.items()
        # PyTorch writes all scores out: seconds where the others take milliseconds.
        if not (name == "math" and queries * keys > 2**18)
    }
    # Weights and outputs in the worst dtype have 8 bits.
    tolerance = 0.02 if dtype != "fp32" else 1e-5
    out = attention(q, k, v)
    for name, other in others.items():
        error = (other().transpose(1, 2).float() - out.float()).abs().max().item()
        assert error <= tolerance, f"{name}: {error}"
    race(f"{case}-{dtype}", lambda: attention(q, k, v), others)
