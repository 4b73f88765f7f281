"""What precision costs in pictures: PSNR against float32 on the same noise, and what a judge reads.

    python bench/precision.py
    python bench/precision.py --search fp8 --target 26 --out bench/precision_fp8.json

The pictures are the bundled model's: the prompts of `make demo`, 20 steps, guidance 4. Each row of
the table draws them with components in another precision, or with diffusers eager, and compares
them with this package's in float32. The judge is the classifier in `models/emoji/classifier`. fp8
is simulated: products of rounded values, computed in bf16. fp16 runs in PyTorch's own operations on
a CPU, unfused. `--search` looks for the modules that must stay high (`export/precision_search.py`).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer

from heatsink import console
from heatsink.comparison import diffusers_pipeline
from heatsink.demo import GUIDANCE, PROMPTS, STEPS, find_model
from heatsink.export.painter import Painter, Pictures, Setting, Subjects, psnr, summary
from heatsink.export.precision_search import search
from heatsink.models import classifier
from heatsink.runtime import noise
from heatsink.runtime.model import Model

FP8_LIST = Path(__file__).with_name("precision_fp8.json")
# What the judge should read, in the order of the prompts.
SUBGROUPS = (
    "food-fruit", "animal-bird", "plant-flower", "food-prepared", "animal-mammal", "animal-bird",
    "transport-water", "transport-air", "heart", "plant-other", "animal-marine",
    "musical-instrument",
)  # fmt: skip
PARTS = ("text_encoder", "unet", "vae_decoder")


def settings() -> dict[str, dict[str, Setting]]:
    """What is measured, by the name of its row."""
    found = tuple(json.loads(FP8_LIST.read_text(encoding="utf-8"))["high"])
    return {
        "all bf16": dict.fromkeys(PARTS, Setting("bf16")),
        "UNet bf16": {"unet": Setting("bf16")},
        "UNet bf16, `conv_out` fp32": {"unet": Setting("bf16", ("conv_out",))},
        "UNet bf16, `conv_out` and `time_embedding` fp32": {
            "unet": Setting("bf16", ("conv_out", "time_embedding"))
        },
        "text encoder bf16": {"text_encoder": Setting("bf16")},
        "VAE bf16": {"vae_decoder": Setting("bf16")},
        "VAE bf16, `conv_out` fp32": {"vae_decoder": Setting("bf16", ("decoder.conv_out",))},
        "UNet fp16": {"unet": Setting("fp16")},
        "VAE fp16": {"vae_decoder": Setting("fp16")},
        "UNet fp8": {"unet": Setting("fp8")},
        f"UNet fp8, {len(found)} modules bf16": {"unet": Setting("fp8", found)},
    }


def eager(model: Path, subjects: Subjects, shape: tuple[int, int, int]) -> Pictures:
    """The pictures of diffusers' pipeline in float32, from the noise that engines draw."""
    prompts, seeds = zip(*subjects.pairs, strict=True)
    with console.quiet_libraries(), torch.inference_mode():
        out: Any = diffusers_pipeline(model)(
            list(prompts),
            num_inference_steps=subjects.steps,
            guidance_scale=subjects.guidance,
            latents=noise.normal_rows(seeds, noise.INITIAL, 0, shape),
            output_type="np",
        )
    pictures: Pictures = np.rint(out.images * 255).astype(np.uint8)
    return pictures


class Table:
    """Prints rows of a Markdown table, each when it is measured."""

    def __init__(self, model: Path, subjects: Subjects, reference: Pictures) -> None:
        self._reference = reference
        self._judge, self._names = classifier.load(model / "classifier")
        self._wanted = np.tile(SUBGROUPS, len(subjects.seeds))
        self._read = self._subgroups(reference)
        print("| what | PSNR in dB, worst | mean | judge reads as in fp32 | judge is right |")
        print("|---|---|---|---|---|")

    def _subgroups(self, pictures: Pictures) -> Any:
        groups, _ = classifier.judge(self._judge, pictures, "cpu")
        return np.array([self._names[group] for group in groups])

    def row(self, name: str, pictures: Pictures) -> None:
        """Judge pictures and print what was found."""
        found = summary(psnr(pictures, self._reference))
        read, count = self._subgroups(pictures), len(pictures)
        same, right = ((read == other).sum() for other in (self._read, self._wanted))
        scores = f"{found['worst']:.1f} | {found['mean']:.1f}"
        if pictures is self._reference:
            scores = " | "
        print(f"| {name} | {scores} | {same} of {count} | {right} of {count} |", flush=True)


def main(
    seeds: Annotated[int, typer.Option(help="pictures of each prompt")] = 1,
    precision: Annotated[
        str, typer.Option("--search", help="look for the modules that stay high beside this")
    ] = "",
    component: Annotated[str, typer.Option(help="whose modules are searched")] = "unet",
    target: Annotated[float, typer.Option(help="dB of the worst picture of a search")] = 30.0,
    out: Annotated[Path | None, typer.Option(help="where a search is written")] = None,
) -> None:
    """Measure, or search, and print."""
    folder = find_model()
    subjects = Subjects(PROMPTS, tuple(range(seeds)), STEPS, GUIDANCE)
    if precision:
        with console.bars() as progress:
            found = search(
                folder, precision, subjects, component=component, target=target, progress=progress
            )
        text = json.dumps(found.as_dict(), indent=2) + "\n"
        print(text)
        if out is not None:
            out.write_text(text, encoding="utf-8")
        return
    painter = Painter(Model.open(folder), subjects)
    reference = painter.draw()
    table = Table(folder, subjects, reference)
    table.row("all fp32", reference)
    table.row("diffusers eager, fp32", eager(folder, subjects, painter.latent_shape))
    for name, setting in settings().items():
        table.row(name, painter.draw(setting))


if __name__ == "__main__":
    typer.run(main)
