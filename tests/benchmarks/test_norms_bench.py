"""The normalisations on the CPU against PyTorch eager, as ratios.

OMP_NUM_THREADS=1 python -m pytest tests/benchmarks/test_norms_bench.py -q
"""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from heatsink.kernels import _native
from heatsink.kernels.group_norm_silu import group_norm_silu
from heatsink.kernels.layer_norm import layer_norm

pytestmark = pytest.mark.skipif(
    not _native.available(), reason=f"needs the C++ extension: {_native.load()}"
)

# (channels, pixels a side, groups): the bundled model's UNet and the ends of its VAE's decoder.
IMAGES = {
    "unet-64x8": (64, 8, 16),
    "unet-128x4": (128, 4, 16),
    "unet-192x2": (192, 2, 16),
    "vae-96x8": (96, 8, 8),
    "vae-32x64": (32, 64, 8),
}
# (tokens, channels) in its UNet.
TOKENS = {"64x64": (64, 64), "16x128": (16, 128), "4x192": (4, 192)}
ROWS = (1, 8, 24)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
TOLERANCES = {"fp32": 1e-4, "bf16": 0.05}


def random(shape: tuple[int, ...], dtype: str, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DTYPES[dtype])


def eager_group_norm_silu(x: Tensor, groups: int, weight: Tensor, bias: Tensor) -> Tensor:
    return F.silu(F.group_norm(x, groups, weight, bias, 1e-5))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("image", IMAGES)
def test_group_norm_silu(image: str, rows: int, dtype: str, race: Any, seed: int) -> None:
    channels, side, groups = IMAGES[image]
    planes = random((rows, channels, side, side), dtype, seed)
    x = planes.contiguous(memory_format=torch.channels_last)
    weight, bias = random((channels,), dtype, seed + 1), random((channels,), dtype, seed + 2)
    # Eager may have whichever layout suits it.
    others = {
        "eager channels_last": partial(eager_group_norm_silu, x, groups, weight, bias),
        "eager contiguous": partial(eager_group_norm_silu, planes, groups, weight, bias),
    }
    out = group_norm_silu(x, groups, weight, bias)
    tolerance = TOLERANCES[dtype]
    for other in others.values():
        torch.testing.assert_close(out, other(), rtol=tolerance, atol=tolerance, check_stride=False)
    op = torch.ops.heatsink.group_norm_silu
    ours = partial(op, x, groups, weight, bias, 1e-5, None, None, True)
    race(f"group_norm_silu-{image}-rows{rows}-{dtype}", ours, others)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("layer", TOKENS)
def test_layer_norm(layer: str, rows: int, dtype: str, race: Any, seed: int) -> None:
    tokens, channels = TOKENS[layer]
    x = random((rows, tokens, channels), dtype, seed)
    weight, bias = random((channels,), dtype, seed + 1), random((channels,), dtype, seed + 2)
    eager = partial(F.layer_norm, x, (channels,), weight, bias, 1e-5)
    tolerance = TOLERANCES[dtype]
    torch.testing.assert_close(layer_norm(x, weight, bias), eager(), rtol=tolerance, atol=tolerance)
    ours = partial(torch.ops.heatsink.layer_norm, x, weight, bias, 1e-5, None, None)
    race(f"layer_norm-{layer}-rows{rows}-{dtype}", ours, {"eager": eager})
