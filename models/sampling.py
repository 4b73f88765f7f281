"""Pictures out of the networks in training, through diffusers' own pipeline."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from heatsink.models import networks
from heatsink.models.diffusion import Bundle

CONTACT_PROMPTS = (
    "a red apple",
    "a penguin",
    "a sunflower",
    "a hamburger",
    "a tiger face",
    "an owl",
    "a sailboat",
    "a rocket",
    "a purple heart",
    "a cactus",
    "an octopus",
    "a guitar",
)


def pipeline(vae: Any, bundle: Bundle, controlnet: Any = None) -> Any:
    """The bundled model as a diffusers pipeline (with a ControlNet where one is given)."""
    from diffusers import DDIMScheduler, StableDiffusionControlNetPipeline, StableDiffusionPipeline

    parts: dict[str, Any] = {
        "vae": vae,
        "text_encoder": bundle.text_encoder,
        "tokenizer": bundle.tokenizer,
        "unet": bundle.unet,
        "scheduler": DDIMScheduler(**networks.SCHEDULE),
        "safety_checker": None,
        "feature_extractor": None,
        "requires_safety_checker": False,
    }
    if controlnet is None:
        pipe = StableDiffusionPipeline(**parts)
    else:
        pipe = StableDiffusionControlNetPipeline(controlnet=controlnet, **parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def generate(
    pipe: Any,
    prompts: list[str],
    *,
    steps: int = 20,
    guidance: float = 4.0,
    seed: int = 0,
    **more: Any,
) -> npt.NDArray[np.uint8]:
    """uint8 pictures `(N, H, W, 3)` of the prompts, 32 at a time."""
    pictures = []
    for start in range(0, len(prompts), 32):
        part = prompts[start : start + 32]
        generators = [torch.Generator().manual_seed(seed + start + i) for i in range(len(part))]
        kwargs = {k: v[start : start + 32] for k, v in more.items()}
        with torch.inference_mode():
            out = pipe(
                part,
                num_inference_steps=steps,
                guidance_scale=guidance,
                generator=generators,
                output_type="np",
                **kwargs,
            )
        pictures.append((out.images * 255).round().astype(np.uint8))
    return np.concatenate(pictures)


def save_grid(pictures: npt.NDArray[np.uint8], columns: int, path: Path, zoom: int = 1) -> None:
    """Write pictures `(N, H, W, 3)` as one PNG of rows of `columns`."""
    from PIL import Image

    n, height, width, _ = pictures.shape
    rows = -(-n // columns)
    sheet = np.full((rows * height, columns * width, 3), 255, np.uint8)
    for i, picture in enumerate(pictures):
        r, c = divmod(i, columns)
        sheet[r * height : (r + 1) * height, c * width : (c + 1) * width] = picture
    image = Image.fromarray(sheet)
    path.parent.mkdir(parents=True, exist_ok=True)
    image.resize((image.width * zoom, image.height * zoom), Image.Resampling.LANCZOS).save(path)
