"""A classifier of real emoji, by subgroup and style: the judge of generated pictures."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from heatsink.models import data, loop
from heatsink.models.autoencoder import to_tensor

JUDGED_STYLES = (data.BASE_STYLE, *data.BRANDS)
_WEIGHTS, _CLASSES = "model.safetensors", "classes.json"


class Classifier(nn.Module):
    """Pictures `(B, 3, 64, 64)` in [-1, 1] -> logits of subgroups `(B, G)`, styles `(B, 4)`."""

    def __init__(self, subgroups: int) -> None:
        super().__init__()
        widths = (3, 32, 64, 128, 192)
        layers: list[nn.Module] = []
        for before, after in pairwise(widths):
            layers += [
                nn.Conv2d(before, after, 3, stride=2, padding=1, bias=False),
                nn.BatchNorm2d(after),
                nn.SiLU(),
                nn.Conv2d(after, after, 3, padding=1, bias=False),
                nn.BatchNorm2d(after),
                nn.SiLU(),
            ]
        self.body = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Dropout(0.3))
        self.subgroup = nn.Linear(4 * widths[-1], subgroups)
        self.style = nn.Linear(4 * widths[-1], len(JUDGED_STYLES))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """See the class."""
        features = self.body(x)
        return self.subgroup(features), self.style(features)


def classes(icons: data.Icons) -> list[str]:
    """The subgroups of the chosen subjects, sorted: the classes of the judge."""
    return sorted({icons.subgroups[i] for i in np.flatnonzero(icons.selected)})


def hidden(icons: data.Icons, style: str) -> npt.NDArray[np.bool_]:
    """Subjects whose picture in this style the classifier (and the style's LoRA) never sees."""
    return icons.held_out(style)


def _augment(x: Tensor, generator: torch.Generator) -> Tensor:
    """Random small affine maps, flips, brightness and noise."""
    n = len(x)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(n, *shape, generator=generator, device=x.device)

    theta = torch.zeros(n, 2, 3, device=x.device)
    flip = torch.where(uniform(0, 1) < 0.5, -1.0, 1.0)
    angle, scale = uniform(-0.2, 0.2), uniform(0.85, 1.2)
    theta[:, 0, 0], theta[:, 0, 1] = scale * angle.cos() * flip, -scale * angle.sin()
    theta[:, 1, 0], theta[:, 1, 1] = scale * angle.sin() * flip, scale * angle.cos()
    theta[:, :, 2] = uniform(-0.12, 0.12, 2)
    grid = F.affine_grid(theta, list(x.shape), align_corners=False)
    # The background is white: shift it to zero so that what comes in from outside is white too.
    x = F.grid_sample(x - 1, grid, align_corners=False) + 1
    x = x * uniform(0.9, 1.1, 1, 1, 1)
    return x + 0.05 * torch.randn(x.shape, generator=generator, device=x.device)


def train_classifier(
    icons: data.Icons, vae: Any, folder: Path, steps: int, seconds: float | None, device: str
) -> Classifier:
    """Train on real pictures, as they are and through the autoencoder, but for the hidden ones."""
    names = classes(icons)
    pictures, groups, styles = [], [], []
    for style in JUDGED_STYLES:
        column, hide = data.STYLES.index(style), hidden(icons, style)
        for i, subgroup in enumerate(icons.subgroups):
            if subgroup in names and not hide[i]:
                pictures.append(icons.pictures[i, column])
                groups.append(names.index(subgroup))
                styles.append(JUDGED_STYLES.index(style))
    sharp = to_tensor(np.stack(pictures))
    with torch.no_grad():
        blurred = torch.cat(
            [
                vae.decode(vae.encode(x.to(device)).latent_dist.mean).sample.cpu()
                for x in sharp.split(64)
            ]
        )
    both = torch.stack([sharp, blurred.clamp(-1, 1)]).to(device)
    group, style_index = torch.tensor(groups, device=device), torch.tensor(styles, device=device)
    torch.manual_seed(4)
    model = Classifier(len(names)).to(device)
    model.train()

    def loss_of_step(generator: torch.Generator) -> Tensor:
        index = torch.randint(len(sharp), (64,), generator=generator, device=device)
        which = torch.randint(2, (64,), generator=generator, device=device)
        a, b = model(_augment(both[which, index], generator))
        return F.cross_entropy(a, group[index], label_smoothing=0.1) + 0.5 * F.cross_entropy(
            b, style_index[index]
        )

    loop.train(
        "classifier",
        folder,
        dict(model.named_parameters()),
        loss_of_step,
        steps=steps,
        seconds=seconds,
        lr=2e-3,
        seed=6,
    )
    _settle_norms(model, both, device)
    return model.eval()


@torch.no_grad()
def _settle_norms(model: Classifier, both: Tensor, device: str) -> None:
    """Set the batch norms' statistics for the averaged weights."""
    generator = torch.Generator(device=device).manual_seed(7)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.reset_running_stats()
            module.momentum = None
    for start in range(0, both.shape[1] - 64, 64):
        model(_augment(both[start // 64 % 2, start : start + 64], generator))


@torch.no_grad()
def judge(
    model: Classifier, pictures: npt.NDArray[np.uint8], device: str
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Predicted subgroup and style index of uint8 pictures `(N, H, W, 3)`."""
    groups, styles = [], []
    for x in to_tensor(pictures).split(128):
        a, b = model(x.to(device))
        groups.append(a.argmax(1).cpu())
        styles.append(b.argmax(1).cpu())
    return torch.cat(groups).numpy(), torch.cat(styles).numpy()


def save(model: Classifier, names: list[str], folder: Path) -> None:
    """Write the judge into `folder`: its weights in float16, and what its classes are called."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    state = {
        name: (value.half() if value.is_floating_point() else value).contiguous()
        for name, value in model.state_dict().items()
    }
    save_file(state, folder / _WEIGHTS)
    text = json.dumps({"subgroups": names, "styles": JUDGED_STYLES}, indent=2)
    (folder / _CLASSES).write_text(text + "\n", encoding="utf-8")


def load(folder: Path) -> tuple[Classifier, list[str]]:
    """The judge that `save` wrote, in float32, and the names of the subgroups."""
    from safetensors.torch import load_file

    names = json.loads((folder / _CLASSES).read_text(encoding="utf-8"))["subgroups"]
    model = Classifier(len(names))
    model.load_state_dict(load_file(folder / _WEIGHTS))
    return model.eval(), list(names)
