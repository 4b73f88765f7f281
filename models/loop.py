"""A resumable training loop: progress, checkpoints, an exponential average of the weights."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn


class Average:
    """Exponential moving average of a module's trained parameters (bias-corrected warm-up)."""

    def __init__(self, parameters: dict[str, nn.Parameter], decay: float) -> None:
        self.decay = decay
        self.values = {name: p.detach().clone() for name, p in parameters.items()}

    @torch.no_grad()
    def update(self, parameters: dict[str, nn.Parameter], step: int) -> None:
        """Take in the weights after `step`."""
        decay = min(self.decay, (1 + step) / (10 + step))
        live: list[Tensor] = [parameters[name] for name in self.values]
        torch._foreach_lerp_(list(self.values.values()), live, 1 - decay)

    @torch.no_grad()
    def copy_to(self, parameters: dict[str, nn.Parameter]) -> None:
        """Put the averaged weights in place of the live ones."""
        for name, value in self.values.items():
            parameters[name].copy_(value)


def train(
    name: str,
    folder: Path,
    parameters: dict[str, nn.Parameter],
    loss_of_step: Callable[[torch.Generator], Tensor],
    *,
    steps: int,
    lr: float,
    seconds: float | None = None,
    decay: float = 0.998,
    checkpoint_seconds: float = 120.0,
    seed: int = 0,
    sample: Callable[[str], None] | None = None,
) -> None:
    """Minimise `loss_of_step` over `parameters` and leave the averaged weights in them.

    Writes `folder/name.pt` every `checkpoint_seconds` and resumes from it. The learning rate warms
    up and then falls along a cosine over the share of `steps` (or of `seconds`, whichever is
    further) already spent.

    Args:
        name: names the checkpoint and the progress lines.
        folder: where checkpoints go.
        parameters: what is trained, by name.
        loss_of_step: the scalar loss of one fresh batch drawn with the generator given.
        steps: number of optimiser steps at most.
        lr: peak learning rate of AdamW.
        seconds: a limit of wall-clock time, so that a run fits the machine at hand.
        decay: of the exponential average.
        checkpoint_seconds: time between checkpoints (and samples).
        seed: of the batches.
        sample: called with a tag after every checkpoint, with averaged weights in place.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.pt"
    optimiser = torch.optim.AdamW(
        parameters.values(), lr=lr, weight_decay=1e-4, betas=(0.9, 0.99), foreach=True
    )
    average = Average(parameters, decay)
    start, spent = 0, 0.0
    if path.exists():
        state = torch.load(path, weights_only=True, map_location="cpu")
        with torch.no_grad():
            for key, value in state["live"].items():
                parameters[key].copy_(value)
        average.values = {k: v.to(parameters[k].device) for k, v in state["average"].items()}
        optimiser.load_state_dict(state["optimiser"])
        start, spent = int(state["step"]), float(state["spent"])
        print(f"{name}: resuming at step {start}", flush=True)
    device = next(iter(parameters.values())).device
    generator = torch.Generator(device=device)
    begun = saved = reported = time.monotonic()
    losses: list[float] = []
    step = start

    def share() -> float:
        by_time = (spent + time.monotonic() - begun) / seconds if seconds else 0.0
        return max(step / steps, by_time)

    def save() -> None:
        temporary = path.with_suffix(".tmp")
        torch.save(
            {
                "live": {k: v.detach() for k, v in parameters.items()},
                "average": average.values,
                "optimiser": optimiser.state_dict(),
                "step": step,
                "spent": spent + time.monotonic() - begun,
            },
            temporary,
        )
        temporary.replace(path)

    while share() < 1:
        done = share()
        for group in optimiser.param_groups:
            group["lr"] = (
                lr * min(1, (step + 1) / 100) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * done)))
            )
        generator.manual_seed(seed * 1_000_003 + step)
        loss = loss_of_step(generator)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters.values(), 1.0)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        average.update(parameters, step)
        losses.append(float(loss.detach()))
        step += 1
        now = time.monotonic()
        if now - reported > 15:
            rate = (step - start) / (now - begun)
            mean = sum(losses) / len(losses)
            print(
                f"{name}: {share():6.1%} step {step} loss {mean:.5f} {rate:.2f} steps/s", flush=True
            )
            losses, reported = [], now
        if now - saved > checkpoint_seconds:
            save()
            if sample is not None:
                live = {k: v.detach().clone() for k, v in parameters.items()}
                average.copy_to(parameters)
                sample(f"{step:06d}")
                with torch.no_grad():
                    for key, value in live.items():
                        parameters[key].copy_(value)
            saved = time.monotonic()
    save()
    average.copy_to(parameters)
    if sample is not None:
        sample("final")
