"""Trains text encoder and UNet on the base style, then the LoRAs.

They and the ControlNet minimise the squared error of the velocity
`v = sqrt(a) noise - sqrt(1-a) x0` (Salimans & Ho, https://arxiv.org/abs/2202.00512): unlike the
noise it stays informative at the noisiest timesteps, where a picture is still decided by its
caption alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from heatsink.models import data, loop, networks
from heatsink.models.autoencoder import to_tensor

BATCH = 32
RANK = 16
CAPTION_DROP = 0.1
LORA_TARGETS = [
    "to_q",
    "to_k",
    "to_v",
    "to_out.0",
    "proj_in",
    "proj_out",
    "ff.net.0.proj",
    "ff.net.2",
    "conv1",
    "conv2",
    "conv_shortcut",
]


@dataclass
class Bundle:
    """The networks and the tokenizer, on one device."""

    tokenizer: Any
    text_encoder: Any
    unet: Any
    device: str

    @classmethod
    def new(cls, tokenizer_folder: Path, device: str) -> Bundle:
        """Untrained networks, from a fixed seed."""
        from diffusers import UNet2DConditionModel
        from transformers import CLIPTextConfig, CLIPTextModel

        torch.manual_seed(0)
        tokenizer = networks.load_tokenizer(tokenizer_folder)
        config = CLIPTextConfig(
            **networks.TEXT,
            vocab_size=len(tokenizer),
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        text_encoder = CLIPTextModel(config).to(device)
        unet = UNet2DConditionModel(**networks.UNET).to(device)
        return cls(tokenizer, text_encoder, unet, device)

    def encode(self, captions: list[str]) -> Tensor:
        """Captions -> hidden states `(B, TEXT_LENGTH, TEXT_WIDTH)`."""
        ids = self.tokenizer(
            captions,
            padding="max_length",
            truncation=True,
            max_length=networks.TEXT_LENGTH,
            return_tensors="pt",
        ).input_ids
        hidden: Tensor = self.text_encoder(ids.to(self.device)).last_hidden_state
        return hidden


def alphas(device: str) -> Tensor:
    """Cumulative signal shares of the training schedule, float32 `(1000,)`."""
    s = networks.SCHEDULE
    root = torch.linspace(s["beta_start"] ** 0.5, s["beta_end"] ** 0.5, 1000, dtype=torch.float64)
    return (1 - root.square()).cumprod(0).float().to(device)


@torch.no_grad()
def latents_of(vae: Any, pictures: np.ndarray[Any, np.dtype[np.uint8]], device: str) -> Tensor:
    """uint8 pictures `(N, H, W, 3)` -> scaled latent means `(N, C, h, w)`."""
    means = [vae.encode(x.to(device)).latent_dist.mean for x in to_tensor(pictures).split(64)]
    return torch.cat(means) * float(vae.config.scaling_factor)


def velocity_loss(
    bundle: Bundle,
    x0: Tensor,
    captions: list[str],
    generator: torch.Generator,
    extra: Callable[[Tensor, Tensor, Tensor], dict[str, Any]] | None = None,
) -> Tensor:
    """The squared velocity error of one batch; `extra` adds arguments to the UNet's call."""
    device = x0.device
    cumulative = alphas(bundle.device)
    t = torch.randint(0, 1000, (len(x0),), generator=generator, device=device)
    a = cumulative[t].view(-1, 1, 1, 1)
    noise = torch.randn(x0.shape, generator=generator, device=device)
    noisy = a.sqrt() * x0 + (1 - a).sqrt() * noise
    target = a.sqrt() * noise - (1 - a).sqrt() * x0
    hidden = bundle.encode(captions)
    more = extra(noisy, t, hidden) if extra else {}
    out: Tensor = bundle.unet(noisy, t, hidden, **more).sample
    return (out.float() - target).square().mean()


def captions_for(
    icons: data.Icons, subjects: list[int], drop: float, generator: torch.Generator
) -> list[str]:
    """A random caption of each subject, left empty with probability `drop` (for guidance)."""
    seed = int(torch.randint(2**31, (), generator=generator, device=generator.device))
    rng = np.random.default_rng(seed)
    return ["" if rng.random() < drop else data.caption(icons, i, rng) for i in subjects]


def train_base(
    icons: data.Icons,
    vae: Any,
    bundle: Bundle,
    folder: Path,
    steps: int,
    seconds: float | None,
    sample: Callable[[str], None] | None,
) -> None:
    """Train text encoder and UNet together on the chosen subjects in the base style."""
    subjects = np.flatnonzero(icons.selected)
    latents = latents_of(vae, icons.pictures[subjects, 0], bundle.device)
    parameters = {f"unet.{n}": p for n, p in bundle.unet.named_parameters()}
    parameters |= {f"text.{n}": p for n, p in bundle.text_encoder.named_parameters()}

    def loss_of_step(generator: torch.Generator) -> Tensor:
        index = torch.randint(len(subjects), (BATCH,), generator=generator, device=bundle.device)
        chosen = [int(subjects[i]) for i in index.tolist()]
        captions = captions_for(icons, chosen, CAPTION_DROP, generator)
        return velocity_loss(bundle, latents[index], captions, generator)

    loop.train(
        "base",
        folder,
        parameters,
        loss_of_step,
        steps=steps,
        seconds=seconds,
        lr=8e-4,
        sample=sample,
    )


def train_lora(
    brand: str,
    icons: data.Icons,
    vae: Any,
    bundle: Bundle,
    folder: Path,
    steps: int,
    seconds: float | None,
    sample: Callable[[str], None] | None,
    rank: int = RANK,
) -> None:
    """Train a LoRA of the UNet on the brand's pictures, but for those held out of it."""
    from peft import LoraConfig

    bundle.text_encoder.requires_grad_(False)
    bundle.unet.requires_grad_(False)
    torch.manual_seed(1)
    bundle.unet.add_adapter(
        LoraConfig(r=rank, lora_alpha=rank, target_modules=LORA_TARGETS), adapter_name=brand
    )
    subjects = np.flatnonzero(icons.selected & ~icons.held_out(brand))
    latents = latents_of(vae, icons.pictures[subjects, data.STYLES.index(brand)], bundle.device)
    parameters = {n: p for n, p in bundle.unet.named_parameters() if p.requires_grad}

    def loss_of_step(generator: torch.Generator) -> Tensor:
        index = torch.randint(len(subjects), (BATCH,), generator=generator, device=bundle.device)
        chosen = [int(subjects[i]) for i in index.tolist()]
        captions = captions_for(icons, chosen, CAPTION_DROP, generator)
        return velocity_loss(bundle, latents[index], captions, generator)

    loop.train(
        f"lora-{brand}",
        folder,
        parameters,
        loss_of_step,
        steps=steps,
        seconds=seconds,
        lr=2e-3,
        sample=sample,
        seed=2,
    )
