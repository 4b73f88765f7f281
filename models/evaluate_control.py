"""Measures the ControlNet alone: `python models/evaluate_control.py --work DIR`.

How far the silhouette of a picture overlaps (intersection over union) that of the subject whose
line art steers it, with and without the ControlNet, from the same seeds and prompts. Writes the
figures into the model's `evaluation.json`, and examples to `controlnet.png` under `--work`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
import torch
import typer
from rich.progress import track

from heatsink.models import data, sampling
from heatsink.models.train import SUBJECTS

Pictures = npt.NDArray[np.uint8]
STEPS, GUIDANCE, SEED = 20, 4.0, 1000
SHOWN = 8
# Darker than this in a channel: not the background.
WHITE = 235


def prompts_of(icons: data.Icons, subjects: npt.NDArray[np.int64]) -> list[str]:
    """The prompt for each subject: its name with an article."""
    return [("an " if icons.names[i][0] in "aeiou" else "a ") + icons.names[i] for i in subjects]


def groups(icons: data.Icons, count: int) -> dict[str, npt.NDArray[np.int64]]:
    """Subjects whose line art the ControlNet never saw, by whether the base was taught them."""
    held = icons.held_out("controlnet")
    return {
        "unknown": np.flatnonzero(held & ~icons.selected)[:count],
        "known": np.flatnonzero(held & icons.selected)[:count],
    }


def overlap(pictures: Pictures, targets: Pictures) -> float:
    """Mean intersection over union of the silhouettes of two stacks `(N, H, W, 3)`."""
    mask, wanted = pictures.min(-1) < WHITE, targets.min(-1) < WHITE
    both, either = (mask & wanted).sum((1, 2)), (mask | wanted).sum((1, 2))
    return float((both / np.maximum(either, 1)).mean())


def draw(
    pipe: Any, icons: data.Icons, subjects: npt.NDArray[np.int64], scale: float, what: str
) -> Pictures:
    """Pictures of the subjects, steered by their line art at this scale."""
    prompts = prompts_of(icons, subjects)
    lines = icons.pictures[subjects, data.STYLES.index(data.LINE_ART)]
    images = torch.from_numpy(lines).permute(0, 3, 1, 2).float() / 255
    parts = []
    for start in track(range(0, len(prompts), 32), what):
        part = slice(start, start + 32)
        seeds = range(SEED + start, SEED + start + len(prompts[part]))
        with torch.inference_mode():
            got = pipe(
                prompts[part],
                image=images[part],
                num_inference_steps=STEPS,
                guidance_scale=GUIDANCE,
                controlnet_conditioning_scale=scale,
                generator=[torch.Generator().manual_seed(seed) for seed in seeds],
                output_type="np",
            )
        parts.append((got.images * 255).round().astype(np.uint8))
    return np.concatenate(parts)


def control(
    model: Path, icons: data.Icons, device: str, count: int = 96
) -> tuple[dict[str, Any], Pictures]:
    """Overlaps for unknown and known subjects; example rows line art, without, with."""
    from diffusers import ControlNetModel, DDIMScheduler, StableDiffusionControlNetPipeline

    net = ControlNetModel.from_pretrained(model / "controlnet", local_files_only=True)
    pipe = StableDiffusionControlNetPipeline.from_pretrained(
        model, controlnet=net, torch_dtype=torch.float32, local_files_only=True
    ).to(device)
    pipe.controlnet.to(torch.float32)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    out: dict[str, Any] = {}
    shown = []
    for name, subjects in groups(icons, count).items():
        drawn = {
            how: draw(pipe, icons, subjects, scale, f"ControlNet: {name} subjects, {how}")
            for how, scale in (("without", 0.0), ("with", 1.0))
        }
        targets = icons.pictures[subjects, 0]
        out[name] = {"subjects": len(subjects)} | {
            f"overlap {how} ControlNet": round(overlap(pictures, targets), 4)
            for how, pictures in drawn.items()
        }
        # Evenly over all of them, so that nobody chose the examples.
        few = np.linspace(0, len(subjects) - 1, min(SHOWN, len(subjects))).round().astype(int)
        lines = icons.pictures[subjects[few], data.STYLES.index(data.LINE_ART)]
        shown.append(np.stack([lines, drawn["without"][few], drawn["with"][few]]))
    return out, np.concatenate(shown, 1)


def save_examples(rows: Pictures, work: Path) -> None:
    """Write the example rows as `controlnet.png`."""
    sampling.save_grid(
        rows.reshape(-1, *rows.shape[2:]), rows.shape[1], work / "controlnet.png", zoom=1
    )


def main(
    work: Annotated[Path, typer.Option(help="where the data lies, and the examples go")],
    model: Annotated[Path, typer.Option(help="the model folder")] = Path("models/emoji"),
    threads: Annotated[int, typer.Option(help="CPU threads; 0: PyTorch's choice")] = 0,
) -> None:
    """Measure the ControlNet and write what was found beside the other figures."""
    if threads:
        torch.set_num_threads(threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    found, rows = control(model, data.load_or_build(work, SUBJECTS), device)
    save_examples(rows, work)
    path = model / "evaluation.json"
    result = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    path.write_text(json.dumps(result | {"controlnet": found}, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    typer.run(main)
