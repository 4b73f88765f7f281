"""Measures the bundled model: `python models/evaluate.py --work DIR --model models/emoji`.

Reconstruction of held-out emoji by the autoencoder, and prompt fidelity: a classifier trained on
real emoji of all styles says which subgroup and style a generated picture shows. And how well the
ControlNet steers. Writes `evaluation.json` into the model folder, and `evaluation.png` and
`controlnet.png` under `--work`.
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

from heatsink.models import autoencoder, classifier, data, evaluate_control, sampling
from heatsink.models.evaluate_control import GUIDANCE, SEED, STEPS, prompts_of
from heatsink.models.train import SUBJECTS

Bools = npt.NDArray[np.bool_]
Pictures = npt.NDArray[np.uint8]
# Pictures of each combination that was never seen: the few subjects make a score noisy enough.
UNSEEN_SEEDS = 2
# An adapter at less than its full scale keeps more of what the base knows of a name.
SOFT_SCALE = 0.8
# Of the judge: by steps, so that it is the same judge on a busy machine.
JUDGE_STEPS = 1500


def _draw(pipe: Any, icons: data.Icons, subjects: npt.NDArray[np.int64], what: str) -> Pictures:
    prompts = prompts_of(icons, subjects)
    parts = [
        sampling.generate(
            pipe, prompts[start : start + 32], steps=STEPS, guidance=GUIDANCE, seed=SEED + start
        )
        for start in track(range(0, len(prompts), 32), what)
    ]
    return np.concatenate(parts)


def reconstruction(vae: Any, icons: data.Icons, device: str) -> dict[str, float]:
    """Mean PSNR in dB over held-out emoji, in all and by style."""
    _, held = autoencoder.split(icons)
    out: dict[str, float] = {"emoji": len(held)}
    values = []
    for style in classifier.JUDGED_STYLES:
        x = autoencoder.to_tensor(icons.pictures[held, data.STYLES.index(style)])
        with torch.no_grad():
            y = [
                vae.decode(vae.encode(part.to(device)).latent_dist.mean).sample.cpu()
                for part in x.split(64)
            ]
        psnr = autoencoder.psnr(torch.cat(y), x)
        out[style] = round(float(psnr.mean()), 2)
        values.append(psnr)
    out["mean"] = round(float(torch.cat(values).mean()), 2)
    return out


class Judge:
    """Scores pictures by the classifier."""

    def __init__(self, model: classifier.Classifier, icons: data.Icons, device: str) -> None:
        self.model, self.icons, self.device = model, icons, device
        self.classes = classifier.classes(icons)

    def score(
        self, pictures: Pictures, subjects: npt.NDArray[np.int64], style: str
    ) -> dict[str, float]:
        """Shares of pictures whose subgroup, and whose style, the classifier names right."""
        groups, styles = classifier.judge(self.model, pictures, self.device)
        wanted = np.array([self.classes.index(self.icons.subgroups[i]) for i in subjects])
        return {
            "pictures": len(subjects),
            "subgroup": round(float((groups == wanted).mean()), 4),
            "style": round(float((styles == classifier.JUDGED_STYLES.index(style)).mean()), 4),
        }


def chance(icons: data.Icons) -> dict[str, float]:
    """What guessing the most frequent subgroup, or any style, scores."""
    chosen = [icons.subgroups[i] for i in np.flatnonzero(icons.selected)]
    most = max(chosen.count(name) for name in set(chosen)) / len(chosen)
    return {"subgroup": round(most, 4), "style": 1 / len(classifier.JUDGED_STYLES)}


def _groups(icons: data.Icons, style: str) -> list[tuple[str, npt.NDArray[np.int64], float]]:
    """What is drawn in a style: a name, the subjects, and the adapter's scale."""
    hidden = classifier.hidden(icons, style)
    if style == data.BASE_STYLE:
        # The base is trained on all chosen subjects; the judge alone never saw the hidden ones.
        return [("seen in training", np.flatnonzero(icons.selected), 1.0)]
    seen = np.random.default_rng(0).permutation(np.flatnonzero(icons.selected & ~hidden))[:96]
    unseen = np.tile(np.flatnonzero(icons.selected & hidden), UNSEEN_SEEDS)
    return [
        ("seen in training", np.sort(seen), 1.0),
        ("unseen in training", unseen, 1.0),
        (f"unseen in training, at scale {SOFT_SCALE}", unseen, SOFT_SCALE),
    ]


def fidelity(
    model: Path, icons: data.Icons, judge: Judge, device: str
) -> tuple[dict[str, Any], list[Pictures]]:
    """Scores of real and generated pictures for every style; examples, real above generated."""
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    pipe = StableDiffusionPipeline.from_pretrained(
        model, torch_dtype=torch.float32, local_files_only=True
    )
    pipe = pipe.to(device)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    result: dict[str, Any] = {"chance": chance(icons), "subgroups": len(judge.classes)}
    shown: list[Pictures] = []
    for style in classifier.JUDGED_STYLES:
        branded, column = style != data.BASE_STYLE, data.STYLES.index(style)
        if branded:
            pipe.load_lora_weights(
                str(model / "adapters"), weight_name=f"{style}.safetensors", adapter_name=style
            )
        real = np.flatnonzero(icons.selected & classifier.hidden(icons, style))
        entry = {
            "real, never seen by the judge": judge.score(icons.pictures[real, column], real, style)
        }
        for name, subjects, scale in _groups(icons, style):
            if branded:
                pipe.set_adapters([style], [scale])
            pictures = _draw(pipe, icons, subjects, f"{style}, {name}")
            entry[f"generated, {name}"] = judge.score(pictures, subjects, style)
            shown += [icons.pictures[subjects[:20], column], pictures[:20]]
        result[style] = entry
        if branded:
            pipe.unload_lora_weights()
    return result, shown


def main(
    work: Annotated[Path, typer.Option(help="data and the classifier's checkpoint go here")],
    model: Annotated[Path, typer.Option(help="the model folder")] = Path("models/emoji"),
    threads: Annotated[int, typer.Option(help="CPU threads; 0: PyTorch's choice")] = 0,
    only_classifier: Annotated[bool, typer.Option(help="train the classifier and stop")] = False,
) -> None:
    """Measure the model and write what was found."""
    from diffusers import AutoencoderKL

    if threads:
        torch.set_num_threads(threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    icons = data.load_or_build(work, SUBJECTS)
    folder = work / "vae" if only_classifier else model / "vae"
    vae = AutoencoderKL.from_pretrained(folder, torch_dtype=torch.float32).to(device).eval()
    judge_model = classifier.train_classifier(icons, vae, work, JUDGE_STEPS, None, device)
    if only_classifier:
        return
    judge = Judge(judge_model, icons, device)
    classifier.save(judge_model, judge.classes, model / "classifier")
    scores, shown = fidelity(model, icons, judge, device)
    result: dict[str, Any] = {
        "autoencoder PSNR in dB on held-out emoji": reconstruction(vae, icons, device),
        "fidelity": scores,
        "settings": {
            "steps": STEPS,
            "guidance": GUIDANCE,
            "scheduler": "ddim",
            "subjects": int(icons.selected.sum()),
            "seeds of a combination never seen": UNSEEN_SEEDS,
            "soft scale of an adapter": SOFT_SCALE,
        },
    }
    if (model / "controlnet").exists():
        result["controlnet"], rows = evaluate_control.control(model, icons, device)
        evaluate_control.save_examples(rows, work)
    (model / "evaluation.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    sampling.save_grid(np.concatenate(shown), 20, work / "evaluation.png")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    typer.run(main)
