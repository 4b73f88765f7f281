"""The noise of a request: the same bits on every device, in every batch, for every split.

A value depends on its seed, its purpose, its step and its logical index in the row (row-major order
of the shape without the batch) and on nothing else; docs/noise.md has the specification and test
vectors. This file speaks of rows and requests; `heatsink.kernels.noise` does the arithmetic.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import SupportsIndex

import torch
from torch import Tensor

from heatsink.kernels.noise import NOISE_VERSION, philox, words_to_normal
from heatsink.kernels.noise import normal as _normal_op
from heatsink.runtime.errors import InvalidRequest

__all__ = [
    "ENCODE",
    "ENCODE_KEPT",
    "INITIAL",
    "NOISE_VERSION",
    "STEP",
    "normal",
    "normal_rows",
    "philox",
    "seed_keys",
    "words_to_normal",
]

# What a draw is for. Numbers are never reused: a new purpose takes the next one.
INITIAL = 0  # the starting latents; for image-to-image, the noise added to the encoded image
STEP = 1  # fresh noise of a scheduler's step; `step` counts the request's steps from 0
ENCODE = 2  # the sample drawn from the VAE encoder's distribution
ENCODE_KEPT = 3  # likewise, of what an inpainting model keeps of the picture


def _checked(name: str, value: SupportsIndex, bits: int) -> int:
    """`value` as an int in [0, 2^bits), or InvalidRequest naming it."""
    try:
        number = operator.index(value)
    except TypeError:
        got = f"{value!r} ({type(value).__name__})"
        raise InvalidRequest(f"{name}: expected an integer, got {got}") from None
    if not 0 <= number < 2**bits:
        raise InvalidRequest(f"{name}: expected an integer in [0, 2^{bits}), got {number}")
    return number


def seed_keys(seeds: Sequence[int], device: torch.device | str = "cpu") -> Tensor:
    """int64 `(rows,)` with the bits of seeds in [0, 2^64), as the kernels take them.

    Raises:
        InvalidRequest: if a seed is out of range.
    """
    checked = [_checked("seed", seed, 64) for seed in seeds]
    keys = [seed - 2**64 if seed >= 2**63 else seed for seed in checked]
    return torch.tensor(keys, dtype=torch.int64, device=device)


def normal_rows(
    seeds: Sequence[int],
    purpose: int,
    steps: int | Sequence[int],
    shape: Sequence[int],
    *,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Standard normal noise for several rows at once.

    Args:
        seeds: a seed for each row, in [0, 2^64).
        purpose: what it is for: `INITIAL`, `STEP`, `ENCODE`.
        steps: the step of each row, or one for all, in [0, 2^32).
        shape: the shape of one row, without a batch.
        device: where the result lies; the bits are the same.

    Returns:
        `(rows, *shape)` float32, contiguous. Row r equals
        `normal(seeds[r], purpose, steps[r], shape)` bit by bit.

    Raises:
        InvalidRequest: if a number is out of range or steps are not as many as seeds.
    """
    keys = seed_keys(seeds, device)
    if isinstance(steps, Sequence):
        row_steps = [_checked("step", step, 32) for step in steps]
    else:
        row_steps = [_checked("step", steps, 32)] * len(keys)
    if len(row_steps) != len(keys):
        raise InvalidRequest(
            f"steps: expected one for each of {len(keys)} seeds, got {len(row_steps)}"
        )
    size = torch.Size([_checked("shape", extent, 31) for extent in shape])
    rows = _normal_op(
        keys,
        torch.tensor(row_steps, dtype=torch.int64, device=device),
        _checked("purpose", purpose, 32),
        size.numel(),
    )
    return rows.view(len(keys), *size)


def normal(
    seed: int,
    purpose: int,
    step: int,
    shape: Sequence[int],
    *,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Standard normal noise for one row.

    Args:
        seed: the request's seed, in [0, 2^64).
        purpose: what it is for: `INITIAL`, `STEP`, `ENCODE`.
        step: the step it is for, in [0, 2^32); 0 where there are no steps.
        shape: the shape of the row, without a batch.
        device: where the result lies; the bits are the same.

    Returns:
        `shape` float32, contiguous.

    Raises:
        InvalidRequest: if a number is out of range.
    """
    return normal_rows([seed], purpose, step, shape, device=device)[0]
