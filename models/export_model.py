"""Writes the trained networks as a model folder in diffusers layout, with adapters and ControlNet."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from heatsink.models import data


def all_captions(icons: data.Icons) -> list[str]:
    """Captions for the tokenizer: every chosen subject often, every other name once."""
    rng = np.random.default_rng(0)
    captions = [data.caption(icons, int(i), rng) for i in np.flatnonzero(icons.selected) for _ in range(8)]
    return captions + icons.names


def save_lora(unet: Any, brand: str, path: Path) -> None:
    """Write the adapter `brand` of a UNet as a diffusers/PEFT safetensors file in fp16."""
    from diffusers import StableDiffusionPipeline
    from peft import get_peft_model_state_dict

    layers = get_peft_model_state_dict(unet, adapter_name=brand)
    half = {key: value.half().contiguous() for key, value in layers.items()}
    StableDiffusionPipeline.save_lora_weights(
        path.parent, unet_lora_layers=half, weight_name=path.name, safe_serialization=True
    )


def export(work: Path, icons: data.Icons, out: Path) -> None:
    """Assemble `out` from the checkpoints under `work`, everything in fp16 safetensors."""
    raise NotImplementedError(out, work, icons, nn)
