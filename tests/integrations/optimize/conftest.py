"""Tiny pipelines, plain and optimised, that share no module; captured graphs last the session."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import heatsink


def load(kind: str, folder: Path) -> Any:
    """A pipeline of diffusers', quiet."""
    import diffusers

    pipe = getattr(diffusers, kind).from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def quiet(pipe: Any) -> Any:
    """A pipeline without its progress bar."""
    pipe.set_progress_bar_config(disable=True)
    return pipe


def smaller(pipe: Any) -> Any:
    """The pipeline with a UNet of half as many layers, which is captured in half the time."""
    from diffusers import UNet2DConditionModel

    torch.manual_seed(11)
    pipe.unet = UNet2DConditionModel(
        sample_size=8, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        attention_head_dim=4, cross_attention_dim=32,
    ).eval()  # fmt: skip
    return pipe


@pytest.fixture(scope="session")
def make_sd1(tiny_sd1: Path) -> Callable[[], Any]:
    """Makes a fresh plain SD1 pipeline, always with the same weights."""
    return lambda: smaller(load("StableDiffusionPipeline", tiny_sd1))


@pytest.fixture(scope="session")
def sd1(tiny_sd1: Path) -> tuple[Any, Any]:
    """The SD1 pipeline plain, and optimised. Don't change them."""
    plain, fast = (load("StableDiffusionPipeline", tiny_sd1) for _ in range(2))
    heatsink.optimize(fast)
    return plain, fast


@pytest.fixture(scope="session")
def sdxl(tiny_sdxl: Path) -> tuple[Any, Any]:
    """The SDXL pipeline plain, and optimised. Don't change them."""
    plain, fast = (load("StableDiffusionXLPipeline", tiny_sdxl) for _ in range(2))
    heatsink.optimize(fast)
    return plain, fast


def psnr(found: Tensor, wanted: Tensor) -> float:
    """Decibels, for images in [0, 1]; infinite if they are equal."""
    error = float(torch.mean((found.double() - wanted.double()) ** 2))
    return float("inf") if error == 0 else -10 * float(torch.log10(torch.tensor(error)))


def same_images(pair: tuple[Any, Any], *, least: float = 50, **request: Any) -> Tensor:
    """The optimised pipeline's images, within `least` dB of the plain one's on the same noise."""
    given: dict[str, Any] = {"num_inference_steps": 3, "height": 64, "width": 64}
    given = {name: value for name, value in {**given, **request}.items() if value is not None}
    wanted, found = (
        pipe(**given, generator=torch.Generator().manual_seed(5), output_type="pt").images
        for pipe in pair
    )
    # Images of noise, not of one colour, which any network would give.
    assert wanted.std() > 0.05
    assert psnr(found, wanted) > least
    return torch.as_tensor(found)


@pytest.fixture(name="same_images")
def _same_images() -> Callable[..., Tensor]:
    return same_images


@pytest.fixture(name="quiet")
def _quiet() -> Callable[[Any], Any]:
    return quiet
