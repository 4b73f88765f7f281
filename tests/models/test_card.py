"""The card quotes the figures of `evaluation.json` and nothing else."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from heatsink.models import card


def write_model(folder: Path) -> None:
    for part in ("text_encoder", "unet", "vae", "controlnet"):
        (folder / part).mkdir(parents=True)
        save_file({"w": torch.zeros(40, 50)}, folder / part / "model.safetensors")
    real = {"pictures": 54, "subgroup": 0.5, "style": 0.7}
    style = {"real, never seen by the judge": real}
    drawn = {"pictures": 216, "subgroup": 0.35, "style": 0.6}
    brand = style | {"generated, unseen in training": drawn}
    steering = {"subjects": 31, "overlap without ControlNet": 0.61, "overlap with ControlNet": 0.87}
    evaluation = {
        "autoencoder PSNR in dB on held-out emoji": {
            "emoji": 157, "flat": 27.6, "fluent": 27.4, "noto": 26.0, "twemoji": 27.3, "mean": 27.1,
        },
        "fidelity": {
            "chance": {"subgroup": 0.083, "style": 0.25},
            "subgroups": 42,
            "flat": style,
            "fluent": brand,
            "noto": brand,
            "twemoji": brand,
        },
        "settings": {
            "steps": 20, "guidance": 4.0, "scheduler": "ddim", "subjects": 361,
            "seeds of a combination never seen": 2, "soft scale of an adapter": 0.8,
        },
        "controlnet": {"unknown": steering, "known": steering | {"subjects": 54}},
    }  # fmt: skip
    (folder / "evaluation.json").write_text(json.dumps(evaluation))


def test_the_card_quotes_what_was_measured(tmp_path: Path) -> None:
    write_model(tmp_path)
    text = card.render(tmp_path, " in three core-hours")
    for line in (
        "| `unet/` | UNet2DConditionModel | 2,000 |",
        "| noto | real, never seen by the judge | 54 | 50.0% |  | 70.0% |",
        "| noto | generated, never seen in training | 216 | 35.0% | 70% | 60.0% |",
        "| never taught to the base | 31 | 61% | 87% |",
        "| known to the base | 54 | 61% | 87% |",
    ):
        assert line in text.splitlines()
    assert text.endswith("on two CPU cores in three core-hours.\n")
    assert "{" not in text
