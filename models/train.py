"""Trains the bundled model from nothing: `python models/train.py all --work DIR`.

Stages in order: data, vae, base, decoder, lora (each brand), controlnet, export. Each
resumes from its checkpoint under `--work` and can be run alone. `--minutes` limits the wall-clock
time of all the training together, shared out over the stages; a GPU is used where there is one.
The data step needs `npm`. `--from models/emoji` takes the networks of a finished model, so that
`lora` or `controlnet` alone can be trained anew on them. `models/evaluate.py` then measures the
model, `models/card.py` writes its card: both belong to the weights, so `export` leaves neither of
an older model behind.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from heatsink.models import (
    autoencoder,
    control,
    data,
    diffusion,
    export_model,
    import_model,
    networks,
    sampling,
)

# Shares of the time budget, and the steps that are enough where time is not the limit.
SHARES = {"vae": 0.16, "base": 0.22, "decoder": 0.11, "lora": 0.20, "controlnet": 0.31}
STEPS = {"vae": 8000, "base": 40000, "decoder": 6000, "lora": 4000, "controlnet": 9000}
SUBJECTS = 400

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


class Run:
    """Where a training run keeps its files, and what it has time for."""

    def __init__(self, work: Path, minutes: float | None, steps: int | None, threads: int) -> None:
        self.work, self.minutes, self.steps = work, minutes, steps
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        if threads:
            torch.set_num_threads(threads)
        self.icons = data.load_or_build(work, SUBJECTS)

    def limits(self, stage: str) -> dict[str, Any]:
        """Keyword arguments `steps` and `seconds` of a stage."""
        kinds = len(data.BRANDS) if stage == "lora" else 1
        seconds = self.minutes * 60 * SHARES[stage] / kinds if self.minutes else None
        return {"steps": self.steps or STEPS[stage], "seconds": seconds}

    def tokenizer(self) -> Path:
        """The tokenizer's folder, trained first where it is missing."""
        folder = self.work / "tokenizer"
        if not (folder / "tokenizer_config.json").exists():
            networks.train_tokenizer(export_model.all_captions(self.icons), folder)
        return folder

    def vae(self) -> Any:
        """The trained autoencoder."""
        from diffusers import AutoencoderKL

        return AutoencoderKL.from_pretrained(self.work / "vae").to(self.device).eval()

    def bundle(self, trained: bool = True) -> diffusion.Bundle:
        """Text encoder and UNet, with trained weights unless told otherwise."""
        bundle = diffusion.Bundle.new(self.tokenizer(), self.device)
        if trained:
            bundle.unet.load_state_dict(torch.load(self.work / "unet.pt", weights_only=True))
            bundle.text_encoder.load_state_dict(
                torch.load(self.work / "text.pt", weights_only=True)
            )
        return bundle

    def sampler(self, name: str, vae: Any, bundle: diffusion.Bundle) -> Any:
        """Writes a contact sheet of the networks as they stand."""

        def sample(tag: str) -> None:
            pictures = sampling.generate(
                sampling.pipeline(vae, bundle), list(sampling.CONTACT_PROMPTS), steps=15
            )
            sampling.save_grid(pictures, 6, self.work / "samples" / f"{name}-{tag}.png", zoom=2)

        return sample


def train_vae(run: Run) -> None:
    """Train the autoencoder."""
    limits = run.limits("vae")
    vae = autoencoder.train_vae(run.icons, run.work, run.device, **limits)
    vae.save_pretrained(run.work / "vae")


def train_base(run: Run) -> None:
    """Train text encoder and UNet."""
    vae, bundle = run.vae(), run.bundle(trained=False)
    sample = run.sampler("base", vae, bundle)
    diffusion.train_base(run.icons, vae, bundle, run.work, sample=sample, **run.limits("base"))
    torch.save(bundle.unet.state_dict(), run.work / "unet.pt")
    torch.save(bundle.text_encoder.state_dict(), run.work / "text.pt")


def train_decoder(run: Run) -> None:
    """Polish the decoder."""
    vae = run.vae()
    autoencoder.train_decoder(vae, run.icons, run.work, run.device, **run.limits("decoder"))
    vae.save_pretrained(run.work / "vae-final")


def train_lora(run: Run, brand: str) -> None:
    """Train a brand's LoRA."""
    vae, bundle = run.vae(), run.bundle()
    sample = run.sampler(brand, vae, bundle)
    diffusion.train_lora(
        brand, run.icons, vae, bundle, run.work, sample=sample, **run.limits("lora")
    )
    export_model.save_lora(bundle.unet, brand, run.work / f"{brand}.safetensors")


def train_controlnet(run: Run) -> None:
    """Train the ControlNet."""
    vae, bundle = run.vae(), run.bundle()
    controlnet = control.train_controlnet(
        run.icons, vae, bundle, run.work, sample=None, **run.limits("controlnet")
    )
    controlnet.save_pretrained(run.work / "controlnet")


@app.command()
def main(
    stage: Annotated[
        str, typer.Argument(help="all, data, vae, base, decoder, lora, controlnet or export")
    ],
    work: Annotated[Path, typer.Option(help="checkpoints, data and samples go here")],
    out: Annotated[Path, typer.Option(help="the model folder to write")] = Path("models/emoji"),
    brand: Annotated[str, typer.Option(help="with stage lora: only this brand")] = "",
    minutes: Annotated[float, typer.Option(help="limit of all training together; 0: none")] = 0,
    steps: Annotated[
        int, typer.Option(help="optimiser steps of every stage instead of the defaults")
    ] = 0,
    threads: Annotated[int, typer.Option(help="CPU threads; 0: PyTorch's choice")] = 0,
    source: Annotated[
        Path | None,
        typer.Option("--from", help="a finished model folder to take the other networks from"),
    ] = None,
) -> None:
    """Run one stage of the training, or all of them."""
    everything = stage == "all"
    known = {"all", "data", "vae", "base", "decoder", "lora", "controlnet", "export"}
    if stage not in known:
        raise typer.BadParameter(f"stage must be one of {sorted(known)}, not {stage!r}")
    if source is not None:
        if stage not in ("lora", "controlnet", "export"):
            raise typer.BadParameter(
                f"--from replaces what stage {stage!r} would train: "
                "it goes with lora, controlnet and export"
            )
        import_model.unpack(source, work)
    run = Run(work, minutes or None, steps or None, threads)
    if everything or stage == "vae":
        train_vae(run)
    if everything or stage == "base":
        train_base(run)
    if everything or stage == "decoder":
        train_decoder(run)
    for name in data.BRANDS:
        if everything or (stage == "lora" and brand in ("", name)):
            train_lora(run, name)
    if everything or stage == "controlnet":
        train_controlnet(run)
    if everything or stage == "export":
        export_model.export(run.work, out)


if __name__ == "__main__":
    app()
