"""Measures an engine against diffusers' eager pipeline in one run.

Both get the same model, prompts, noise, steps and batch.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from heatsink.runtime.errors import HeatsinkError

if TYPE_CHECKING:
    import numpy as np

    from heatsink.runtime.engine import Engine

# The pictures of both must agree to this before a time counts: they start from the same noise.
MIN_PSNR = 50.0
_SETTLE = 0.02
_LAYOUT_ROUNDS = 3


@dataclass(frozen=True)
class Row:
    """Device-seconds per image of one system at one batch: the median and the range."""

    system: str
    images: int
    median: float
    fastest: float
    slowest: float


@dataclass(frozen=True)
class Comparison:
    """All rows of one run, with what they were measured on."""

    rows: list[Row]
    psnr: float
    steps: int
    guidance: float
    rounds: int
    device: str
    threads: int
    libraries: dict[str, str]
    layout: str
    size: str

    def speedup(self, images: int) -> float:
        """How many times fewer device-seconds an image costs than with diffusers, at this batch."""
        one, other = (
            next(r.median for r in self.rows if r.images == images and r.system.startswith(name))
            for name in ("diffusers", "heatsink")
        )
        return one / other

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)


def diffusers_pipeline(model: Path) -> Any:
    """The eager baseline in float32: SDPA attention, DPM-Solver++(2M), no progress bar."""
    import torch
    from diffusers import DPMSolverMultistepScheduler, StableDiffusionPipeline

    pipe = StableDiffusionPipeline.from_pretrained(
        model, torch_dtype=torch.float32, local_files_only=True, safety_checker=None
    )
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _set_layout(pipe: Any, layout: str) -> None:
    import torch

    memory = torch.channels_last if layout == "channels_last" else torch.contiguous_format
    pipe.unet.to(memory_format=memory)
    pipe.vae.to(memory_format=memory)


def _run_diffusers(
    pipe: Any, prompts: Sequence[str], steps: int, guidance: float, shape: tuple[int, int, int]
) -> np.ndarray[Any, Any]:
    import torch

    from heatsink.runtime import noise

    # The engine's own noise for seeds 0, 1, ...: drawing it is part of the work of both.
    latents = noise.normal_rows(range(len(prompts)), noise.INITIAL, 0, shape)
    with torch.inference_mode():
        out = pipe(
            list(prompts),
            num_inference_steps=steps,
            guidance_scale=guidance,
            latents=latents,
            output_type="np",
        )
    images: np.ndarray[Any, Any] = out.images
    return images


def _timed(run: Callable[[], Any]) -> float:
    # Threads of the one before spin for a while, and would share the cores with this one.
    time.sleep(_SETTLE)
    begun = time.perf_counter()
    run()
    return time.perf_counter() - begun


def compare(
    engine: Engine,
    model: Path,
    prompts: Sequence[str],
    *,
    steps: int = 20,
    guidance: float = 4.0,
    batches: Sequence[int] = (1, 12),
    rounds: int = 5,
    progress: Callable[[str, int, int], None] | None = None,
) -> Comparison:
    """Measure both, interleaved, after a check that they draw the same pictures.

    Args:
        engine: opened, of `model`.
        model: the diffusers folder.
        prompts: at least as many as the largest of `batches`.
        steps: of DPM-Solver++(2M).
        guidance: scale of classifier-free guidance.
        batches: how many images are made at once.
        rounds: timed runs of each; one more of each comes first, untimed.
        progress: called with (what, done, total).

    Raises:
        HeatsinkError: the pictures differ.
    """
    import torch

    from heatsink.export import environment

    report = progress or (lambda what, done, total: None)
    pipe = diffusers_pipeline(model)
    spec = engine.spec
    factor = spec.vae_factor
    shape = (spec.latent_channels, spec.default_size[0] // factor, spec.default_size[1] // factor)
    total, done = len(batches) * (rounds + 1) * 2 + 2 * _LAYOUT_ROUNDS, 0

    def tick() -> None:
        nonlocal done
        done += 1
        report("measuring", done, total)

    def ours(count: int) -> Any:
        # Nothing that was kept of the round before: every prompt is a new one.
        engine.forget()
        return engine.generate(prompts[:count], seed=0, steps=steps, guidance=guidance)

    def theirs(count: int) -> np.ndarray[Any, Any]:
        return _run_diffusers(pipe, prompts[:count], steps, guidance, shape)

    layout = _best_layout(pipe, lambda: theirs(min(4, len(prompts))), tick)
    psnr = _agreement(ours(max(batches)).images, theirs(max(batches)))
    if psnr < MIN_PSNR:
        raise HeatsinkError(
            f"the engine's pictures differ from diffusers' ({psnr:.1f} dB, at least {MIN_PSNR} are "
            "expected from equal noise): nothing was measured"
        )
    rows = []
    for count in batches:
        seconds: dict[str, list[float]] = {"diffusers eager": [], f"heatsink ({spec.backend})": []}
        for _ in range(rounds + 1):
            for system, run in zip(seconds, (theirs, ours), strict=True):
                seconds[system].append(_timed(partial(run, count)) / count)
                tick()
        for system, values in seconds.items():
            kept = values[1:]
            rows.append(Row(system, count, statistics.median(kept), min(kept), max(kept)))
    return Comparison(
        rows,
        psnr,
        steps,
        guidance,
        rounds,
        environment.processor(),
        torch.get_num_threads(),
        environment.libraries(),
        layout,
        f"{spec.default_size[0]}x{spec.default_size[1]}",
    )


def _best_layout(pipe: Any, run: Callable[[], Any], tick: Callable[[], None]) -> str:
    """The faster memory layout of the baseline on this machine, left in place.

    They take turns, so that what else the machine does for a while decides nothing.
    """
    seconds = dict.fromkeys(("contiguous", "channels_last"), math.inf)
    for _ in range(_LAYOUT_ROUNDS):
        for layout, before in seconds.items():
            _set_layout(pipe, layout)
            # Untimed: the weights were just moved.
            run()
            seconds[layout] = min(before, _timed(run))
            tick()
    best = min(seconds, key=lambda layout: seconds[layout])
    _set_layout(pipe, best)
    return best


def _agreement(images: Sequence[Any], reference: np.ndarray[Any, Any]) -> float:
    """The lowest PSNR in dB of the images against `(N, H, W, 3)` in [0, 1]."""
    import numpy as np

    worst = float("inf")
    for image, expected in zip(images, reference, strict=True):
        mse = float(np.square(np.asarray(image, np.float64) / 255 - expected).mean())
        worst = min(worst, -10 * float(np.log10(max(mse, 1e-12))))
    return worst
