"""Puts a finished model folder's networks into a work folder, where training stages find them.

So the adapters or the ControlNet can be trained anew on a base that is not trained again.
"""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

import torch

from heatsink.models import data

MARKER = "unpacked.txt"


def _digest(model: Path) -> str:
    """One digest of the networks that nothing trains anew after `unpack`."""
    total = hashlib.sha256()
    for folder in ("text_encoder", "unet", "vae"):
        for path in sorted((model / folder).glob("*.safetensors")):
            total.update(path.read_bytes())
    return total.hexdigest()


def unpack(model: Path, work: Path) -> None:
    """Write the weights of `model` under `work`, in float32, as the stages of a run leave them.

    A second call with the same base leaves everything as it is, so that a command is resumed by
    giving it again, also where it exported its adapters into the model folder in between.

    Raises:
        ValueError: `work` holds networks that did not come from this model.
    """
    from diffusers import AutoencoderKL, ControlNetModel, UNet2DConditionModel
    from transformers import CLIPTextModel

    marker = work / MARKER
    digest = _digest(model)
    if marker.exists() and marker.read_text(encoding="utf-8").strip() == digest:
        return
    present = [name for name in ("vae", "unet.pt", "text.pt", "vae.pt") if (work / name).exists()]
    if marker.exists() or present:
        what = "another model" if marker.exists() else ", ".join(present)
        raise ValueError(
            f"{work} already holds {what}: unpack {model} into a work folder of its own"
        )
    work.mkdir(parents=True, exist_ok=True)
    shutil.copytree(model / "tokenizer", work / "tokenizer", dirs_exist_ok=True)
    vae = AutoencoderKL.from_pretrained(model / "vae", torch_dtype=torch.float32)
    for name in ("vae", "vae-final"):
        vae.save_pretrained(work / name)
    unet = UNet2DConditionModel.from_pretrained(model / "unet", torch_dtype=torch.float32)
    torch.save(unet.state_dict(), work / "unet.pt")
    text = CLIPTextModel.from_pretrained(model / "text_encoder", torch_dtype=torch.float32)
    torch.save(text.state_dict(), work / "text.pt")
    if (model / "controlnet").exists():
        ControlNetModel.from_pretrained(
            model / "controlnet", torch_dtype=torch.float32
        ).save_pretrained(work / "controlnet")
    for brand in data.BRANDS:
        if (model / "adapters" / f"{brand}.safetensors").exists():
            shutil.copyfile(
                model / "adapters" / f"{brand}.safetensors", work / f"{brand}.safetensors"
            )
    marker.write_text(digest + "\n", encoding="utf-8")
