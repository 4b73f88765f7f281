"""Writes the bundled model's card from its `evaluation.json`: `python models/card.py --model models/emoji`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from heatsink.models import data, networks

TEXT = """---
license: other
license_name: mit-apache-2.0-cc-by-4.0
pipeline_tag: text-to-image
library_name: diffusers
tags: [emoji, latent-diffusion, controlnet, lora]
---

# Emoji

A small text-to-image latent diffusion model of emoji, 64x64 pixels, in diffusers layout. It is bundled with
Heatsink so that everything in the repository runs on a real, trained model within minutes on two CPU cores.

**It is a real trained model, but not a general one.** It was trained on {subjects} subjects in one style, so it
has largely memorised them: ask it for what it knows (animals, food, plants, vehicles, sports, faces, ...) by the
names of Unicode's emoji. Anything else gives something emoji-like at best.

## What is here

| folder | network | parameters |
|---|---|---|
{parts}

Adapters (`adapters/`, rank 16, every linear layer of the attention blocks and every convolution of the residual
blocks): `fluent`, `noto`, `twemoji` in diffusers' format, and `noto-kohya` with the same weights under kohya's
names. The ControlNet is conditioned on black line art on white, in RGB.

The networks predict the velocity; {latents} latent channels at an eighth of the resolution. Captions are at most
{length} tokens of a byte-pair vocabulary of their own.

## How good it is

`python models/evaluate.py --work DIR` prints these. Pictures are made with {steps} steps of DDIM at guidance
{guidance:g}.

**Autoencoder**, PSNR in dB over {held} held-out emoji: {psnr}. ({styles}.)

**Prompt fidelity.** A classifier trained on real emoji of all four styles reads a picture: which of {groups}
subgroups of emoji it shows, and in which style. Chance is {chance_group} (the most frequent subgroup) and
{chance_style}. Real pictures are those that the classifier never saw. "Never seen" are combinations of name and
style that the LoRA was not trained on.

| style | pictures | number | subgroup | share of the real pictures' score | style |
|---|---|---|---|---|---|
{fidelity}

{control}
## Where it comes from

| what | package | licence | used for |
|---|---|---|---|
| Fluent Emoji, flat | `{flat}` | MIT, Microsoft Corporation | base style |
| Fluent Emoji, 3D look | `{fluent}` | MIT, Microsoft Corporation | LoRA `fluent` |
| Noto Emoji | `{noto}` | Apache-2.0, Google Inc. | LoRA `noto` |
| Twemoji | `{twemoji}` | CC BY 4.0, Twitter, Inc. and other contributors | LoRA `twemoji` |
| Fluent Emoji, high contrast | `{lineart}` | MIT, Microsoft Corporation | line art of the ControlNet |
| names, tags and subgroups | `{names}` | MIT, Miles Johnson | captions |

The pictures of Twemoji are by Twitter, Inc. and other contributors, licensed under CC BY 4.0
(https://creativecommons.org/licenses/by/4.0/); they were rendered at 64x64 pixels and used for training. What the
`twemoji` adapter draws is derived from them: keep this attribution with it. The weights of the other parts may be
used under Apache-2.0; the notices above stay with them.

## How it was trained

`python models/train.py all --work DIR --out models/emoji` does all of it again from nothing: it fetches the
packages from npm, renders the icons, trains the autoencoder, the text encoder and UNet, the adapters and the
ControlNet, and assembles this folder. It resumes from its checkpoints and uses a GPU where there is one; the
weights here were trained on two CPU cores{training}.
"""


def _parts(model: Path) -> str:
    from safetensors import safe_open

    rows = []
    for folder, kind in (
        ("text_encoder", "CLIPTextModel, 2 layers of width 128"), ("unet", "UNet2DConditionModel"),
        ("vae", "AutoencoderKL"), ("controlnet", "ControlNetModel"),
    ):  # fmt: skip
        count = 0
        for path in sorted((model / folder).glob("*.safetensors")):
            with safe_open(path, "pt") as file:
                for key in file.keys():  # noqa: SIM118 - a handle, not a dict
                    size = 1
                    for extent in file.get_slice(key).get_shape():
                        size *= extent
                    count += size
        rows.append(f"| `{folder}/` | {kind} | {count:,} |")
    return "\n".join(rows)


def _fidelity(scores: dict[str, Any]) -> str:
    rows = []
    for style in (data.BASE_STYLE, *data.BRANDS):
        real = scores[style]["real, never seen by the judge"]
        for name, entry in scores[style].items():
            share = "" if entry is real else f"{entry['subgroup'] / real['subgroup']:.0%}"
            label = name.replace("unseen in training", "never seen in training")
            rows.append(
                f"| {style} | {label} | {entry['pictures']} | {entry['subgroup']:.1%} | {share} | {entry['style']:.1%} |"
            )
    return "\n".join(rows)


def render(model: Path, training: str) -> str:
    """The card's text."""
    found = json.loads((model / "evaluation.json").read_text(encoding="utf-8"))
    psnr = found["autoencoder PSNR in dB on held-out emoji"]
    scores, settings = found["fidelity"], found["settings"]
    control = ""
    if "controlnet" in found:
        c = found["controlnet"]
        control = (
            f"**ControlNet.** On {c['subjects']:.0f} subjects whose line art it never saw, the silhouette of the "
            f"picture overlaps that of the subject by {c['overlap with ControlNet']:.0%} with it and "
            f"{c['overlap without ControlNet']:.0%} without it (intersection over union, same seeds and prompts).\n"
        )
    styles = ", ".join(f"{name} {psnr[name]}" for name in (data.BASE_STYLE, *data.BRANDS))
    return TEXT.format(
        subjects=settings["subjects"], parts=_parts(model), latents=networks.LATENT_CHANNELS,
        length=networks.TEXT_LENGTH, steps=settings["steps"], guidance=settings["guidance"],
        held=psnr["emoji"], psnr=psnr["mean"], styles=styles, groups=found["fidelity"]["subgroups"],
        chance_group=f"{scores['chance']['subgroup']:.1%}", chance_style=f"{scores['chance']['style']:.0%}",
        fidelity=_fidelity(scores), control=control, training=training, **data.PACKAGES,
    )  # fmt: skip


def main(
    model: Annotated[Path, typer.Option(help="the model folder")] = Path("models/emoji"),
    training: Annotated[str, typer.Option(help="appended to the sentence on the training")] = "",
) -> None:
    """Write `README.md` into the model folder."""
    (model / "README.md").write_text(render(model, training), encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
