"""Normalisations on the CPU against PyTorch eager, as ratios.

    OMP_NUM_THREADS=1 python -m pytest tests/benchmarks/test_norms_bench.py -q

A ratio above 1 means that PyTorch takes longer. Every op is called as a graph calls it, through
`torch.ops`; the public function checks its arguments besides, some microseconds.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from heatsink.kernels import _native, catalog

pytestmark = pytest.mark.skipif(
    not _native.available(), reason=f"needs the C++ extension: {_native.load()}"
)

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# (channels, height, groups): the bundled model's UNet, alone and after concatenation, and its VAE.
IMAGES = {
    "unet-64x8": (64, 8, 16),
    "unet-128x8": (128, 8, 16),
    "unet-128x4": (128, 4, 16),
    "unet-192x4": (192, 4, 16),
    "unet-192x2": (192, 2, 16),
    "unet-384x4": (384, 4, 16),
    "unet-320x8": (320, 8, 16),
    "vae-96x8": (96, 8, 8),
    "vae-64x16": (64, 16, 8),
    "vae-48x32": (48, 32, 8),
    "vae-32x64": (32, 64, 8),
}
# (tokens, width): the bundled model's transformer blocks, and Stable Diffusion's.
TOKENS = {"64x128": (64, 128), "16x128": (16, 128), "4x192": (4, 192), "256x1280": (256, 1280)}

catalog.ops()  # the imports that define the ops
ops = torch.ops.heatsink

# A rounding to bfloat16 of values up to 10.
TOLERANCE = {"fp32": 1e-5, "bf16": 0.13, "fp16": 0.02}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [2, 8, 24])
@pytest.mark.parametrize("name", IMAGES)
def test_group_norm_silu(name: str, rows: int, dtype: str, race: Any, seed: int) -> None:
    channels, height, groups = IMAGES[name]
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn((rows, channels, height, height), generator=generator).to(DTYPES[dtype])
    x = x.contiguous(memory_format=torch.channels_last)
    weight, bias = torch.randn((2, channels), generator=generator).to(DTYPES[dtype])

    def ours() -> Any:
        return ops.group_norm_silu(x, groups, weight, bias, 1e-5, None, None, True)

    def eager() -> torch.Tensor:
        return torch.nn.functional.silu(torch.nn.functional.group_norm(x, groups, weight, bias))

    assert (ours() - eager()).abs().max() <= TOLERANCE[dtype]
    race(f"group_norm_silu-{name}-rows{rows}-{dtype}", ours, {"eager": eager})


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [2, 24])
@pytest.mark.parametrize("name", TOKENS)
def test_layer_norm(name: str, rows: int, dtype: str, race: Any, seed: int) -> None:
    tokens, width = TOKENS[name]
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn((rows, tokens, width), generator=generator).to(DTYPES[dtype])
    weight, bias = torch.randn((2, width), generator=generator).to(DTYPES[dtype])

    def ours() -> Any:
        return ops.layer_norm(x, weight, bias, 1e-5, None, None)

    def eager() -> torch.Tensor:
        return torch.nn.functional.layer_norm(x, (width,), weight, bias)

    assert (ours() - eager()).abs().max() <= TOLERANCE[dtype]
    race(f"layer_norm-{name}-rows{rows}-{dtype}", ours, {"eager": eager})


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [2, 24])
@pytest.mark.parametrize("name", TOKENS)
def test_rms_norm(name: str, rows: int, dtype: str, race: Any, seed: int) -> None:
    tokens, width = TOKENS[name]
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn((rows, tokens, width), generator=generator).to(DTYPES[dtype])
    weight = torch.randn(width, generator=generator).to(DTYPES[dtype])

    def ours() -> Any:
        return ops.rms_norm(x, weight, 1e-6)

    def eager() -> torch.Tensor:
        return torch.nn.functional.rms_norm(x, (width,), weight, 1e-6)

    assert (ours() - eager()).abs().max() <= TOLERANCE[dtype]
    race(f"rms_norm-{name}-rows{rows}-{dtype}", ours, {"eager": eager})
