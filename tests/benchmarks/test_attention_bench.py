"""Attention on the CPU against every way that PyTorch has of computing it, as ratios.

    OMP_NUM_THREADS=1 python -m pytest tests/benchmarks/test_attention_bench.py -q

A ratio above 1 means that PyTorch's best takes longer. Raced is the op as a captured graph calls
it; the public function's checks come on top, some microseconds a call. PyTorch's backends run on
transposed views, as a model has them, and on contiguous copies, which would cost a model more than
is counted here.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch

from heatsink.kernels import _native
from heatsink.kernels.attention import attention

pytestmark = pytest.mark.skipif(
    not _native.available(), reason=f"needs the C++ extension: {_native.load()}"
)

# Queries, keys, heads, head dim in the bundled model's UNet: 64, 16 and 4 tokens, over themselves
# and over 24 tokens of text.
LAYERS = {
    "self-64": (64, 64, 2, 32),
    "self-16": (16, 16, 4, 32),
    "self-4": (4, 4, 6, 32),
    "cross-64": (64, 24, 2, 32),
    "cross-16": (16, 24, 4, 32),
    "cross-4": (4, 24, 6, 32),
}
# With the rows before; and Stable Diffusion 1.5's at 256 pixels.
CASES = {
    f"{name}-rows{rows}": (rows, *layer) for name, layer in LAYERS.items() for rows in (1, 8, 24)
} | {
    "sd15-self-1024": (2, 1024, 1024, 8, 40),
    "sd15-cross-1024": (2, 1024, 77, 8, 40),
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# The ops beneath, called without PyTorch's own choosing: the least that it can cost.
BACKENDS = {
    "sdpa": torch.nn.functional.scaled_dot_product_attention,
    "flash": lambda q, k, v: torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)[0],
    "math": lambda q, k, v: torch.ops.aten._scaled_dot_product_attention_math(q, k, v)[0],
}


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
        f"{name} {layout}": partial(backend, *tensors)
        for name, backend in BACKENDS.items()
        for layout, tensors in layouts.items()
        # PyTorch writes all scores out: seconds where the others take milliseconds.
        if not (name == "math" and queries * keys > 2**18)
    }
    # The coarsest dtype has 8 bits.
    tolerance = 0.02 if dtype != "fp32" else 1e-5
    out = attention(q, k, v)
    for name, other in others.items():
        error = (other().transpose(1, 2).float() - out.float()).abs().max().item()
        assert error <= tolerance, f"{name}: {error}"
    ours = partial(torch.ops.heatsink.attention, q, k, v, head_dim**-0.5, False, None)
    assert torch.equal(ours(), out)
    race(f"{case}-{dtype}", ours, others)
