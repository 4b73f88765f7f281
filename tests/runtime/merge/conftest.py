"""A tiny UNet's live weights, and adapters for them."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from heatsink.runtime.adapter_delta import AdapterDelta
from heatsink.runtime.model import Model

BLOCK = "down_blocks.0.attentions.0.transformer_blocks.0"
PATHS = [
    f"{BLOCK}.attn1.to_q",
    f"{BLOCK}.attn2.to_k",
    f"{BLOCK}.ff.net.0.proj",
    "down_blocks.0.attentions.0.proj_in",
    "down_blocks.0.resnets.0.conv1",
    "mid_block.resnets.1.conv2",
]


def unet_of(folder: Path, dtype: torch.dtype = torch.float32) -> nn.Module:
    # A copy: what is mapped from the file must not be written.
    unet = Model.open(folder).load_module("unet")
    return unet.to(dtype) if dtype != torch.float32 else clone(unet)


def clone(module: nn.Module) -> nn.Module:
    for parameter in module.parameters():
        parameter.data = parameter.data.clone()
    return module


def weights_of(module: nn.Module) -> dict[str, Tensor]:
    return {f"unet.{name}": value for name, value in module.named_parameters()}


def adapter(
    live: dict[str, Tensor], paths: list[str], rank: int = 3, dora: bool = False
) -> list[AdapterDelta]:
    found = []
    for path in paths:
        shape = live[f"unet.{path}.weight"].shape
        a, b = torch.randn(rank, *shape[1:]) / 8, torch.randn(shape[0], rank) / 8
        magnitude = torch.rand(shape[0]) + 0.5 if dora else None
        found.append(AdapterDelta("unet", path, a, b, 0.75, magnitude))
    return found


def exact(base: Tensor, deltas: list[tuple[AdapterDelta, float]]) -> Tensor:
    """The definition in float64: W0 (1 + sum (g - 1)) + sum g w s B A."""
    start = base.double()
    total = start.clone()
    for delta, weight in deltas:
        change = weight * delta.scale * (delta.b.double() @ delta.a.double().flatten(1))
        change = change.reshape(base.shape)
        gain = torch.ones(base.shape[0], dtype=torch.float64)
        if delta.magnitude is not None:
            gain = delta.magnitude.double() / (start + change).flatten(1).norm(dim=1)
        gain = gain.reshape(-1, *[1] * (base.dim() - 1))
        total += (gain - 1) * start + gain * change
    return total


@pytest.fixture
def tools() -> SimpleNamespace:
    """What the tests of merges share."""
    return SimpleNamespace(
        paths=PATHS, unet_of=unet_of, weights_of=weights_of, adapter=adapter, exact=exact
    )
