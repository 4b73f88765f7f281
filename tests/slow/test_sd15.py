"""The configuration of Stable Diffusion 1.5 with random weights, through the command line.

Run by `make test-slow`; it wants 12 GB of disk, 20 GB of memory and minutes on two cores. What it
prints of time and memory is what `docs/stable_diffusion_15.md` quotes.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from heatsink.runtime import model as model_module

CONFIGS = Path(model_module.__file__).resolve().parent / "configs" / "sd1.json"
FOLDERS = {
    "unet": ("unet", "diffusion_pytorch_model.safetensors"),
    "vae": ("vae", "diffusion_pytorch_model.safetensors"),
    "text_encoder": ("text_encoder", "model.safetensors"),
}


def _random_weights(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Half-precision weights that keep activations finite: scaled by fan-in, norms at one."""
    generator = torch.Generator().manual_seed(15)
    out = {}
    for name, value in module.state_dict().items():
        if value.ndim > 1:
            fan_in = value[0].numel()
            random = torch.randn(value.shape, generator=generator) * fan_in**-0.5
            out[name] = random.half()
        else:
            fill = 1.0 if name.endswith("weight") else 0.0
            out[name] = torch.full(value.shape, fill, dtype=torch.float16)
    return out


def _write_model(folder: Path, tiny: Path) -> None:
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    configs: dict[str, Any] = json.loads(CONFIGS.read_text(encoding="utf-8"))
    with torch.device("meta"):
        modules = {
            "unet": UNet2DConditionModel.from_config(configs["unet"]),
            "vae": AutoencoderKL.from_config(configs["vae"]),
            "text_encoder": CLIPTextModel(CLIPTextConfig(**configs["text_encoder"])),
        }
    for part, module in modules.items():
        name, file = FOLDERS[part]
        (folder / name).mkdir(parents=True)
        (folder / name / "config.json").write_text(json.dumps(configs[part]))
        save_file(_random_weights(module), folder / name / file)
    (folder / "scheduler").mkdir()
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(configs["scheduler"]))
    # Its ids lie below the real vocabulary's size; a real one is not needed for random weights.
    (tiny / "tokenizer").rename(folder / "tokenizer")
    settings = folder / "tokenizer" / "tokenizer_config.json"
    config = json.loads(settings.read_text(encoding="utf-8"))
    settings.write_text(json.dumps({**config, "model_max_length": 77}), encoding="utf-8")
    (folder / "model_index.json").write_bytes((tiny / "model_index.json").read_bytes())


def _measured(errors: Path, *command: str) -> tuple[float, float, float]:
    """Run the command line; its seconds, processor seconds and peak memory in GB."""
    begun = time.perf_counter()
    with errors.open("w+") as file:
        child = subprocess.Popen(
            [sys.executable, "-P", "-m", "heatsink.cli", *command],
            stdout=subprocess.DEVNULL,
            stderr=file,
        )
        # What this child used: getrusage would give the highest peak of all children so far. It is
        # never less than this process's own peak, which a child starts from.
        _, status, used = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
        file.seek(0)
        assert child.returncode == 0, file.read()
    return time.perf_counter() - begun, used.ru_utime + used.ru_stime, used.ru_maxrss * 1024 / 1e9


@pytest.mark.slow
def test_sd15_builds_and_runs_a_step(
    tmp_path: Path, tiny_sd1: Path, copy_model: Callable[[Path], Path], capsys: Any
) -> None:
    model, engine, out = tmp_path / "sd15", tmp_path / "engine", tmp_path / "out"
    _write_model(model, copy_model(tiny_sd1))
    report = []
    for name, command in (
        ("build", ("build", str(model), "-o", str(engine), "--batch", "1:1:2", "-q")),
        (
            "generate",
            ("generate", "thing", "--engine", str(engine), "--steps", "1", "-o", str(out), "-q"),
        ),
    ):
        seconds, busy, peak = _measured(tmp_path / "errors.txt", *command)
        report.append(f"{name}: {seconds:.0f} s, {busy:.0f} processor-s, {peak:.1f} GB at peak")
    size = sum(path.stat().st_size for path in engine.rglob("*") if path.is_file()) / 1e9
    with capsys.disabled():
        print("\n" + "\n".join(report) + f"\nengine: {size:.2f} GB")
    with Image.open(out / "image-0.png") as image:
        assert image.size == (512, 512)
        # Random weights draw noise, not one colour.
        assert len(set(image.convert("L").tobytes())) > 16
    manifest = json.loads((engine / "manifest.json").read_text())
    assert manifest["components"]["unet"]["parameters"] == 859_520_964
    for part in manifest["components"].values():
        assert part["parity"]["max_abs"] <= part["parity"]["allowed"]
