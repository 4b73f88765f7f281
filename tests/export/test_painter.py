"""Parity of final pictures of the bundled model with diffusers, on the same noise."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from heatsink.comparison import diffusers_pipeline
from heatsink.export.painter import Painter, Pictures, Setting, Subjects, psnr
from heatsink.models import classifier
from heatsink.runtime import noise
from heatsink.runtime.errors import InvalidRequest
from heatsink.runtime.model import Model

MODEL = Path(__file__).resolve().parents[2] / "models" / "emoji"
# With fewer steps the judge takes the rocket for fireworks, in float32 too.
SUBJECTS = Subjects(("a red apple", "a penguin", "a rocket", "a cactus"), steps=12)
WANTED = ["food-fruit", "animal-bird", "transport-air", "plant-other"]


@pytest.fixture(scope="module")
def painter() -> Painter:
    return Painter(Model.open(MODEL), SUBJECTS)


@pytest.fixture(scope="module")
def eager(painter: Painter) -> Pictures:
    """What diffusers draws in float32."""
    latents = noise.normal_rows([0] * 4, noise.INITIAL, 0, painter.latent_shape)
    with torch.inference_mode():
        out: Any = diffusers_pipeline(MODEL)(
            list(SUBJECTS.prompts), num_inference_steps=SUBJECTS.steps, latents=latents,
            guidance_scale=SUBJECTS.guidance, output_type="np",
        )  # fmt: skip
    pictures: Pictures = np.rint(out.images * 255).astype(np.uint8)
    return pictures


def _read(pictures: Pictures) -> list[str]:
    judge, names = classifier.load(MODEL / "classifier")
    groups, _ = classifier.judge(judge, pictures, "cpu")
    return [names[group] for group in groups]


def test_float32_draws_what_diffusers_draws(painter: Painter, eager: Pictures) -> None:
    assert min(psnr(painter.draw(), eager)) > 50


def test_bf16_is_near_and_read_as_well(painter: Painter, eager: Pictures) -> None:
    low = painter.draw(dict.fromkeys(("text_encoder", "unet", "vae_decoder"), Setting("bf16")))
    values = psnr(low, eager)
    # Rounding shows, or nothing was low.
    assert 30 < min(values) <= max(values) < 60
    assert _read(low) == _read(eager) == WANTED


def test_a_component_that_draws_nothing_is_refused(painter: Painter) -> None:
    with pytest.raises(InvalidRequest, match=r"component: expected one of .*, got 'vae_encoder'"):
        painter.draw({"vae_encoder": Setting("bf16")})
