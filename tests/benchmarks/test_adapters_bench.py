"""Adapters by row on the CPU against PyTorch, as ratios.

    OMP_NUM_THREADS=1 python -m pytest tests/benchmarks/test_adapters_bench.py -q

Against batched products of gathered A and B, and against an adapter at a time.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch

from heatsink.benchmarks import adapters
from heatsink.kernels import _native
from heatsink.kernels.lora_rows import lora_rows

pytestmark = pytest.mark.skipif(
    not _native.available(), reason=f"needs the C++ extension: {_native.load()}"
)

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
TOLERANCES = {"fp32": 1e-4, "bf16": 0.2, "fp16": 0.03}
# (tokens, inputs, outputs, rank): the bundled model's layers, and Stable Diffusion's.
LAYERS = {
    "64x64": (64, 64, 64, 16),
    "16x128": (16, 128, 128, 16),
    "4x192": (4, 192, 192, 16),
    "77x768-320": (77, 768, 320, 16),
    "256x1280": (256, 1280, 1280, 16),
    "256x1280-r64": (256, 1280, 1280, 64),
}
# (side, channels, rank): 3x3 convolutions.
IMAGES = {"8x8x64": (8, 64, 16), "32x32x320": (32, 320, 16)}
ROWS = 8


def given(layer: str, dtype: str, seed: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(DTYPES[dtype])

    slots = torch.arange(ROWS)[:, None]
    shared = {"slots": slots, "scales": torch.full((ROWS, 1), 0.75)}
    if layer in IMAGES:
        side, channels, rank = IMAGES[layer]
        x = normal(ROWS, channels, side, side).contiguous(memory_format=torch.channels_last)
        a = normal(ROWS, rank, channels, 3, 3) / (9 * channels) ** 0.5
        b = normal(ROWS, rank, channels) / rank**0.5
        return {"y": x.clone(), "x": x, "a": a, "b": b, **shared, "padding": 1}
    tokens, inputs, outputs, rank = LAYERS[layer]
    a = normal(ROWS, rank, inputs) / inputs**0.5
    b = normal(ROWS, rank, outputs) / rank**0.5
    y, x = normal(ROWS, tokens, outputs), normal(ROWS, tokens, inputs)
    return {"y": y, "x": x, "a": a, "b": b, **shared}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layer", [*LAYERS, *IMAGES])
def test_lora_rows(layer: str, dtype: str, race: Any, seed: int) -> None:
    inputs = given(layer, dtype, seed)
    others = {"batched": adapters.lora_rows, "in groups": adapters.in_groups}
    tolerance = TOLERANCES[dtype]
    ours = {**inputs, "y": inputs["y"].clone()}
    lora_rows(**ours)
    for other in others.values():
        torch.testing.assert_close(ours["y"], other(**inputs), rtol=tolerance, atol=tolerance)
    run = {name: partial(other, **inputs) for name, other in others.items()}
    race(f"lora_rows-{layer}-{dtype}", partial(lora_rows, **ours), run)
