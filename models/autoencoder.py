"""Trains the AutoencoderKL of the bundled model on the icons of the four styles it draws.

The line art is left out: the ControlNet reads it as pixels, it never becomes a latent.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from heatsink.models import data, loop, networks


def to_tensor(pictures: np.ndarray[Any, np.dtype[np.uint8]]) -> Tensor:
    """uint8 `(..., H, W, 3)` -> float32 `(N, 3, H, W)` in [-1, 1]."""
    flat = torch.from_numpy(pictures.reshape(-1, *pictures.shape[-3:]))
    return flat.permute(0, 3, 1, 2).float().div_(127.5).sub_(1)


def psnr(a: Tensor, b: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB of each picture of two batches in [-1, 1]."""
    mse = ((a.clamp(-1, 1) - b) / 2).square().flatten(1).mean(1)
    return -10 * mse.clamp_min(1e-10).log10()


def split(icons: data.Icons) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Subjects of the training set, and of the held-out set (never among the chosen)."""
    held = icons.held_out("vae") & ~icons.selected
    return np.flatnonzero(~held), np.flatnonzero(held)


def pictures_of(
    icons: data.Icons, subjects: np.ndarray[Any, Any]
) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """The pictures of these subjects in every style but line art, uint8 `(N, SIZE, SIZE, 3)`."""
    styles = [i for i, style in enumerate(data.STYLES) if style != data.LINE_ART]
    chosen: np.ndarray[Any, np.dtype[np.uint8]] = icons.pictures[subjects][:, styles]
    return chosen.reshape(-1, data.SIZE, data.SIZE, 3)


def gradient_loss(a: Tensor, b: Tensor) -> Tensor:
    """Mean absolute difference of the two pictures' horizontal and vertical gradients."""
    dx = (a[..., 1:] - a[..., :-1]) - (b[..., 1:] - b[..., :-1])
    dy = (a[..., 1:, :] - a[..., :-1, :]) - (b[..., 1:, :] - b[..., :-1, :])
    return dx.abs().mean() + dy.abs().mean()


def train_vae(
    icons: data.Icons, folder: Path, device: str, steps: int, seconds: float | None
) -> Any:
    """Train to reconstruct the icons; returns the averaged network, its scaling factor set."""
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    vae = AutoencoderKL(**networks.VAE).to(device)
    vae.train()
    train_subjects, held = split(icons)
    pictures = torch.from_numpy(pictures_of(icons, train_subjects))
    held_pictures = to_tensor(pictures_of(icons, held))[::5].to(device)
    parameters = dict(vae.named_parameters())

    def loss_of_step(generator: torch.Generator) -> Tensor:
        index = torch.randint(len(pictures), (16,), generator=generator, device=device).cpu()
        x = to_tensor(pictures[index].numpy()).to(device)
        if torch.rand((), generator=generator, device=device) < 0.5:
            x = x.flip(-1)
        with torch.autocast(torch.device(device).type, torch.bfloat16):
            posterior = vae.encode(x).latent_dist
            mean, logvar = posterior.mean.float(), posterior.logvar.float()
            noise = torch.randn(mean.shape, generator=generator, device=device)
            y = vae.decode(mean + noise * torch.exp(0.5 * logvar)).sample.float()
        kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
        total: Tensor = F.l1_loss(y, x) + 4 * F.mse_loss(y, x)
        loss: Tensor = total + 0.3 * gradient_loss(y, x) + 2e-5 * kl
        return loss

    @torch.no_grad()
    def sample(tag: str) -> None:
        vae.eval()
        y = torch.cat(
            [vae.decode(vae.encode(x).latent_dist.mean).sample for x in held_pictures.split(32)]
        )
        print(f"vae {tag}: held-out PSNR {psnr(y, held_pictures).mean():.2f} dB", flush=True)
        vae.train()

    loop.train(
        "vae",
        folder,
        parameters,
        loss_of_step,
        steps=steps,
        seconds=seconds,
        lr=2e-3,
        sample=sample,
    )
    vae.eval()
    with torch.no_grad():
        chosen = to_tensor(pictures_of(icons, np.flatnonzero(icons.selected)))
        means = [vae.encode(x.to(device)).latent_dist.mean for x in chosen.split(64)]
    vae.register_to_config(scaling_factor=round(float(1 / torch.cat(means).std()), 4))
    return vae


def train_decoder(
    vae: Any, icons: data.Icons, folder: Path, device: str, steps: int, seconds: float | None
) -> None:
    """Polish the decoder alone, for squared error.

    The latents, and what was trained on them, stay as they are.
    """
    train_subjects, held = split(icons)
    pictures = torch.from_numpy(pictures_of(icons, train_subjects))
    held_pictures = to_tensor(pictures_of(icons, held))[::5].to(device)
    vae.requires_grad_(False)
    parts = {"decoder": vae.decoder, "post_quant_conv": vae.post_quant_conv}
    parameters = {
        f"{part}.{n}": p.requires_grad_(True)
        for part, m in parts.items()
        for n, p in m.named_parameters()
    }

    def loss_of_step(generator: torch.Generator) -> Tensor:
        index = torch.randint(len(pictures), (16,), generator=generator, device=device).cpu()
        x = to_tensor(pictures[index.numpy()].numpy()).to(device)
        with torch.autocast(torch.device(device).type, torch.bfloat16):
            with torch.no_grad():
                z = vae.encode(x).latent_dist.mean
            y = vae.decode(z).sample.float()
        return 4 * F.mse_loss(y, x) + 0.3 * F.l1_loss(y, x)

    @torch.no_grad()
    def sample(tag: str) -> None:
        y = torch.cat(
            [vae.decode(vae.encode(x).latent_dist.mean).sample for x in held_pictures.split(32)]
        )
        print(f"decoder {tag}: held-out PSNR {psnr(y, held_pictures).mean():.2f} dB", flush=True)

    loop.train(
        "decoder", folder, parameters, loss_of_step,
        steps=steps, seconds=seconds, lr=1e-3, sample=sample, seed=5,
    )  # fmt: skip
