"""Writes the bundled model's card: `python models/card.py --model models/emoji`.

The figures come from the `evaluation.json` beside it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from heatsink.models import data, networks

TEMPLATE = Path(__file__).with_name("card_template.md")
CONTROL = Path(__file__).with_name("card_controlnet.md")


def _parts(model: Path) -> str:
    from safetensors import safe_open

    rows = []
    for folder, kind in (
        ("text_encoder", "CLIPTextModel, 2 layers of width 128"), ("unet", "UNet2DConditionModel"),
        ("vae", "AutoencoderKL"), ("controlnet", "ControlNetModel"),
        ("classifier", "judge of generated pictures, float16"),
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
            cells = (style, label, entry["pictures"], f"{entry['subgroup']:.1%}", share)
            rows.append(f"| {' | '.join(map(str, cells))} | {entry['style']:.1%} |")
    return "\n".join(rows)


def _control(found: dict[str, Any]) -> str:
    rows = []
    for name, label in (("unknown", "never taught to the base"), ("known", "known to the base")):
        c = found[name]
        without, steered = (c[f"overlap {how} ControlNet"] for how in ("without", "with"))
        rows.append(f"| {label} | {c['subjects']} | {without:.0%} | {steered:.0%} |")
    return CONTROL.read_text(encoding="utf-8").format(rows="\n".join(rows))


def render(model: Path, training: str) -> str:
    """The card's text."""
    found = json.loads((model / "evaluation.json").read_text(encoding="utf-8"))
    psnr = found["autoencoder PSNR in dB on held-out emoji"]
    scores, settings = found["fidelity"], found["settings"]
    styles = ", ".join(f"{name} {psnr[name]}" for name in (data.BASE_STYLE, *data.BRANDS))
    return TEMPLATE.read_text(encoding="utf-8").format(
        subjects=settings["subjects"],
        parts=_parts(model),
        latents=networks.LATENT_CHANNELS,
        length=networks.TEXT_LENGTH,
        steps=settings["steps"],
        guidance=settings["guidance"],
        held=psnr["emoji"],
        psnr=psnr["mean"],
        styles=styles,
        seeds=settings["seeds of a combination never seen"],
        soft=settings["soft scale of an adapter"],
        groups=found["fidelity"]["subgroups"],
        chance_group=f"{scores['chance']['subgroup']:.1%}",
        chance_style=f"{scores['chance']['style']:.0%}",
        fidelity=_fidelity(scores),
        control=_control(found["controlnet"]) if "controlnet" in found else "",
        training=training,
        **data.PACKAGES,
    )


def main(
    model: Annotated[Path, typer.Option(help="the model folder")] = Path("models/emoji"),
    training: Annotated[str, typer.Option(help="appended to the sentence on the training")] = "",
) -> None:
    """Write `README.md` into the model folder."""
    (model / "README.md").write_text(render(model, training), encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
