"""Writes the trained networks, adapters and ControlNet as a diffusers folder."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from heatsink.models import data, diffusion, sampling


def all_captions(icons: data.Icons) -> list[str]:
    """Captions for the tokenizer: every chosen subject often, every other name once."""
    rng = np.random.default_rng(0)
    captions = [
        data.caption(icons, int(i), rng) for i in np.flatnonzero(icons.selected) for _ in range(8)
    ]
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


def to_kohya(state: dict[str, Tensor], rank: int) -> dict[str, Tensor]:
    """A diffusers UNet adapter's tensors under kohya's names, with `alpha` equal to the rank."""
    out: dict[str, Tensor] = {}
    for key, value in state.items():
        module, part = key.removeprefix("unet.").rsplit(".lora_", 1)
        name = "lora_unet_" + module.replace(".", "_")
        half = {"A.weight": "lora_down.weight", "B.weight": "lora_up.weight"}[part]
        out[f"{name}.{half}"] = value
        out[f"{name}.alpha"] = torch.tensor(float(rank))
    return out


def export(work: Path, out: Path) -> None:
    """Assemble `out` from the checkpoints under `work`, everything in fp16 safetensors.

    The folder is written under a temporary name and renamed when it is whole.
    """
    from diffusers import AutoencoderKL, ControlNetModel

    bundle = diffusion.Bundle.new(work / "tokenizer", "cpu")
    bundle.unet.load_state_dict(torch.load(work / "unet.pt", weights_only=True))
    bundle.text_encoder.load_state_dict(torch.load(work / "text.pt", weights_only=True))
    vae = AutoencoderKL.from_pretrained(work / "vae-final")
    temporary = out.with_name(out.name + ".partial")
    shutil.rmtree(temporary, ignore_errors=True)
    pipe = sampling.pipeline(vae, bundle)
    pipe.to(torch.float16).save_pretrained(temporary, safe_serialization=True)
    # Versions of transformers differ in which of a tokenizer's files they read.
    for name in ("vocab.json", "merges.txt"):
        shutil.copyfile(work / "tokenizer" / name, temporary / "tokenizer" / name)
    if (work / "controlnet").exists():
        ControlNetModel.from_pretrained(work / "controlnet").half().save_pretrained(
            temporary / "controlnet"
        )
    adapters = temporary / "adapters"
    adapters.mkdir()
    for brand in data.BRANDS:
        if (work / f"{brand}.safetensors").exists():
            shutil.copyfile(work / f"{brand}.safetensors", adapters / f"{brand}.safetensors")
    if (adapters / "noto.safetensors").exists():
        state = load_file(adapters / "noto.safetensors")
        save_file(to_kohya(state, diffusion.RANK), adapters / "noto-kohya.safetensors")
    for path in temporary.glob("*/config.json"):
        # Where the checkpoints lay on the machine that trained them is nobody's business.
        config = json.loads(path.read_text(encoding="utf-8"))
        config.pop("_name_or_path", None)
        path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    old = out.with_name(out.name + ".replaced")
    shutil.rmtree(old, ignore_errors=True)
    if out.exists():
        out.rename(old)
    temporary.rename(out)
    shutil.rmtree(old, ignore_errors=True)
