"""Trains the ControlNet on pairs of line art and base-style picture, of all subjects.

The base knows the names of the chosen subjects only. For those a picture is half decided by its
caption and the ControlNet has to do no harm; for the others the line art alone tells the shape. So
that it learns to follow lines rather than to recognise a thousand icons, the pairs are mirrored,
turned, moved and scaled.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional as F

from heatsink.models import data, diffusion, loop
from heatsink.models.autoencoder import to_tensor

# Each pair as it is, mirrored, and moved at random: latents are computed once for all of them.
VARIANTS = 8
CAPTION_DROP = 0.15
CAPTION_SWAP = 0.5
# The chosen subjects are a quarter of all, but what the model is asked for.
KNOWN_SHARE = 0.4
BATCH = 32
# Checkpoint, whether the pairs are moved, peak learning rate, share of the budget: at last the
# pairs as they are, for which the base knows already what to draw.
PHASES = (("controlnet", True, 1e-3, 0.8), ("controlnet-exact", False, 5e-4, 0.2))

Pictures = npt.NDArray[np.uint8]


def _moved(x: Tensor, theta: Tensor) -> Tensor:
    grid = F.affine_grid(theta, list(x.shape), align_corners=False)
    # The background is white, 1: shift it to zero so that what comes in from outside is white too.
    return F.grid_sample(x - 1, grid, align_corners=False) + 1


def variant(pairs: Tensor, number: int) -> Tensor:
    """The `number`-th version of every pair: 0 as it is, 1 mirrored, others moved at random.

    Args:
        pairs: `(N, C, H, W)` in [-1, 1], picture and line art along the channels.
        number: also seeds the random maps.
    """
    if number < 2:
        return pairs.flip(-1) if number else pairs
    generator = torch.Generator().manual_seed(number)
    n = len(pairs)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(n, *shape, generator=generator)

    flip = torch.where(uniform(0, 1) < 0.5, -1.0, 1.0)
    angle, scale = uniform(-0.2, 0.2), uniform(0.9, 1.3)
    theta = torch.zeros(n, 2, 3)
    theta[:, 0, 0], theta[:, 0, 1] = scale * angle.cos() * flip, -scale * angle.sin()
    theta[:, 1, 0], theta[:, 1, 1] = scale * angle.sin() * flip, scale * angle.cos()
    theta[:, :, 2] = uniform(-0.15, 0.15, 2)
    return _moved(pairs, theta)


@torch.no_grad()
def prepare(pictures: Pictures, lines: Pictures, vae: Any, device: str) -> tuple[Tensor, Tensor]:
    """Every variant of every pair.

    Args:
        pictures: uint8 `(N, H, W, 3)`.
        lines: uint8 `(N, H, W, 3)`, grey.
        vae: the autoencoder, on `device`.
        device: where the latents are computed and kept.

    Returns:
        Scaled latents `(N, VARIANTS, C, h, w)` and conditions uint8 `(N, VARIANTS, H, W)`.
    """
    latents, conditions = [], []
    for start in range(0, len(pictures), 64):
        part = slice(start, start + 64)
        pairs = torch.cat([to_tensor(pictures[part]), to_tensor(lines[part])[:, :1]], 1)
        moved = torch.stack([variant(pairs, number) for number in range(VARIANTS)], 1)
        flat = moved.flatten(0, 1)
        means = vae.encode(flat[:, :3].to(device)).latent_dist.mean
        latents.append((means * float(vae.config.scaling_factor)).unflatten(0, moved.shape[:2]))
        conditions.append(((moved[:, :, 3] + 1) * 127.5).round().clamp(0, 255).byte())
    return torch.cat(latents), torch.cat(conditions)


def condition_of(lines: Tensor, device: str) -> Tensor:
    """Grey uint8 `(B, H, W)` -> RGB `(B, 3, H, W)` in [0, 1], as diffusers' image processor."""
    return (lines.to(device).float() / 255).unsqueeze(1).expand(-1, 3, -1, -1)


def captioned(
    icons: data.Icons, subjects: list[int], unknown: npt.NDArray[np.int64], rng: np.random.Generator
) -> list[int]:
    """Whose caption each subject gets: its own, or in place of an unknown one another unknown one.

    To the base an unknown name is noise. So that the ControlNet learns to hold against such noise
    rather than a name by heart, the unknown subjects' names are often exchanged.
    """
    swap = ~icons.selected[subjects] & (rng.random(len(subjects)) < CAPTION_SWAP)
    return [
        int(rng.choice(unknown)) if swapped else subject
        for subject, swapped in zip(subjects, swap, strict=True)
    ]


def _loss(
    icons: data.Icons, vae: Any, bundle: diffusion.Bundle, controlnet: Any
) -> Callable[[bool, torch.Generator], Tensor]:
    """The loss of a batch of every subject but those held out; pairs moved, or as they are."""
    subjects = np.flatnonzero(~icons.held_out("controlnet"))
    lines_of = data.STYLES.index(data.LINE_ART)
    latents, lines = prepare(
        icons.pictures[subjects, 0], icons.pictures[subjects, lines_of], vae, bundle.device
    )
    known, unknown = icons.selected[subjects], subjects[~icons.selected[subjects]]
    weights = np.where(known, KNOWN_SHARE / known.sum(), (1 - KNOWN_SHARE) / (~known).sum())
    odds = torch.from_numpy(weights).float().to(bundle.device)

    def loss_of_step(moved: bool, generator: torch.Generator) -> Tensor:
        index = torch.multinomial(odds, BATCH, replacement=True, generator=generator)
        drawn = VARIANTS if moved else 1
        version = torch.randint(drawn, (BATCH,), generator=generator, device=bundle.device)
        rng = np.random.default_rng(index.tolist())
        chosen = captioned(icons, [int(subjects[i]) for i in index.tolist()], unknown, rng)
        captions = diffusion.captions_for(icons, chosen, CAPTION_DROP, generator)
        condition = condition_of(lines[index.cpu(), version.cpu()], bundle.device)

        def residuals(noisy: Tensor, t: Tensor, hidden: Tensor) -> dict[str, Any]:
            down, mid = controlnet(noisy, t, hidden, controlnet_cond=condition, return_dict=False)
            return {"down_block_additional_residuals": down, "mid_block_additional_residual": mid}

        x0 = latents[index, version]
        return diffusion.velocity_loss(bundle, x0, captions, generator, residuals)

    return loss_of_step


def train_controlnet(
    icons: data.Icons,
    vae: Any,
    bundle: diffusion.Bundle,
    folder: Path,
    steps: int,
    seconds: float | None,
    sample: Callable[[str], None] | None,
) -> Any:
    """Train a ControlNet on every subject but those held out of it."""
    from diffusers import ControlNetModel

    bundle.text_encoder.requires_grad_(False)
    bundle.unet.requires_grad_(False)
    torch.manual_seed(3)
    controlnet = ControlNetModel.from_unet(bundle.unet, conditioning_channels=3)
    controlnet = controlnet.to(bundle.device).requires_grad_(True)
    loss_of_step = _loss(icons, vae, bundle, controlnet)
    for seed, (name, moved, rate, share) in enumerate(PHASES, start=3):
        loop.train(
            name,
            folder,
            dict(controlnet.named_parameters()),
            functools.partial(loss_of_step, moved),
            steps=max(1, round(steps * share)),
            seconds=seconds * share if seconds else None,
            lr=rate,
            sample=sample,
            seed=seed,
        )
    return controlnet
