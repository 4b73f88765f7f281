"""Tiny pipelines of diffusers and adapters for them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import heatsink
from heatsink.runtime.adapter_delta import AdapterDelta

LATENTS = (4, 8, 8)
# By component: ends of paths that an adapter changes.
ENDS = {
    "unet": (
        "attn1.to_q",
        "attn2.to_v",
        "ff.net.0.proj",
        "resnets.0.conv1",
        "time_emb_proj",
        "proj_in",
    ),
    "text_encoder": ("layers.0.self_attn.q_proj", "layers.1.mlp.fc1"),
    "text_encoder_2": ("layers.1.self_attn.v_proj", "layers.0.mlp.fc2"),
    "controlnet": ("attn1.to_k", "resnets.0.conv2", "controlnet_mid_block"),
}


def load_pipeline(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    from diffusers import DiffusionPipeline

    # Not mapped: the file's own memory would be written.
    pipe = DiffusionPipeline.from_pretrained(folder, dtype=dtype)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def sd1(tiny_sd1: Path) -> Any:
    """The tiny SD1 pipeline, float32."""
    return load_pipeline(tiny_sd1)


@pytest.fixture
def sdxl(tiny_sdxl: Path) -> Any:
    """The tiny SDXL pipeline, float32."""
    return load_pipeline(tiny_sdxl)


def deltas_for(
    pipe: Any,
    rank: int = 3,
    *,
    components: tuple[str, ...] = ("unet", "text_encoder"),
    dora: bool = False,
) -> list[AdapterDelta]:
    """Random deltas on some layers of these components."""
    found = []
    for component in components:
        for path, module in getattr(pipe, component).named_modules():
            if path.endswith(ENDS[component]):
                shape = module.weight.shape
                a, b = torch.randn(rank, *shape[1:]) / 6, torch.randn(shape[0], rank) / 6
                magnitude = torch.rand(shape[0]) + 0.5 if dora else None
                found.append(AdapterDelta(component, path, a, b, 0.75, magnitude))
    assert len(found) >= 2 * len(components)
    return found


def latents_of(pipe: Any, prompts: Any, latents: Tensor, **options: Any) -> Tensor:
    """What the pipeline makes of these starting latents, before decoding."""
    given = {"num_inference_steps": 3, "guidance_scale": 5.0, "output_type": "latent", **options}
    with torch.no_grad():
        result: Tensor = pipe(prompts, latents=latents, **given).images
    return result


@pytest.fixture
def styled(tiny_sd1: Path, seed: int) -> Any:
    """The tiny SD1 pipeline with two adapters."""
    torch.manual_seed(seed)
    pipe = load_pipeline(tiny_sd1)
    adapters = heatsink.adapters(pipe)
    adapters.add("a", deltas_for(pipe, 3))
    # The UNet's alone, and of another rank: some layers have one adapter, some two.
    adapters.add("b", deltas_for(pipe, 5, components=("unet",)))
    return pipe


@pytest.fixture(name="deltas_for")
def _deltas_for() -> Callable[..., list[AdapterDelta]]:
    return deltas_for


@pytest.fixture(name="latents_of")
def _latents_of() -> Callable[..., Tensor]:
    return latents_of


@pytest.fixture(name="load_pipeline")
def _load_pipeline() -> Callable[..., Any]:
    return load_pipeline
