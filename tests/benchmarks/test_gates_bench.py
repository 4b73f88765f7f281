"""The gated activations on the CPU against PyTorch eager, as ratios.

OMP_NUM_THREADS=1 python -m pytest tests/benchmarks/test_gates_bench.py -q
"""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from heatsink.kernels import _native
from heatsink.kernels.geglu import geglu
from heatsink.kernels.silu_mul import silu_mul

pytestmark = pytest.mark.skipif(
    not _native.available(), reason=f"needs the C++ extension: {_native.load()}"
)

# (tokens, width of the output) in the bundled model's UNet, for the rows before.
LAYERS = {"64x256": (64, 256), "16x512": (16, 512), "4x768": (4, 768)}
CASES = {
    f"{name}-rows{rows}": (rows, *layer) for name, layer in LAYERS.items() for rows in (1, 8, 24)
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
TOLERANCES = {"fp32": 1e-5, "bf16": 0.02}


def projected(case: str, dtype: str, seed: int) -> Tensor:
    rows, tokens, width = CASES[case]
    generator = torch.Generator().manual_seed(seed)
    return torch.randn((rows, tokens, 2 * width), generator=generator).to(DTYPES[dtype])


def eager_geglu(x: Tensor) -> Tensor:
    hidden, gate = x.chunk(2, dim=-1)
    return hidden * torch.nn.functional.gelu(gate)


def eager_silu_mul(gate: Tensor, up: Tensor) -> Tensor:
    return torch.nn.functional.silu(gate) * up


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_geglu(case: str, dtype: str, race: Any, seed: int) -> None:
    x = projected(case, dtype, seed)
    tolerance = TOLERANCES[dtype]
    torch.testing.assert_close(geglu(x), eager_geglu(x), rtol=tolerance, atol=tolerance)
    ours = partial(torch.ops.heatsink.geglu, x)
    race(f"geglu-{case}-{dtype}", ours, {"eager": partial(eager_geglu, x)})


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_silu_mul(case: str, dtype: str, race: Any, seed: int) -> None:
    gate, up = projected(case, dtype, seed).chunk(2, dim=-1)
    tolerance = TOLERANCES[dtype]
    expected = eager_silu_mul(gate, up)
    torch.testing.assert_close(silu_mul(gate, up), expected, rtol=tolerance, atol=tolerance)
    ours = partial(torch.ops.heatsink.silu_mul, gate, up)
    race(f"silu_mul-{case}-{dtype}", ours, {"eager": partial(eager_silu_mul, gate, up)})
