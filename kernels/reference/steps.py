"""A denoising step in float64, its noise as `exact` gives it."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from heatsink.kernels.reference.exact import noise_word, word_to_normal

Array = npt.NDArray[Any]


def guided_step(
    x: Array,
    out: Array,
    x0_prev: Array,
    coef: Array,
    guidance: Array,
    uncond: Array,
    cond: Array,
    seeds: Array,
    steps: Array,
) -> tuple[Array, Array]:
    """`(x_next, x0)` of float64 rows; docs/schedule.md."""
    x_next, x0 = np.empty(x.shape), np.empty(x.shape)
    for row in range(len(x)):
        _, _, p, q, a, b, c, d = coef[row].astype(np.float64)
        low, high = (out[index[row]].astype(np.float64) for index in (uncond, cond))
        chosen = high if uncond[row] == cond[row] else low + float(guidance[row]) * (high - low)
        x0[row] = p * x[row] + q * chosen
        x_next[row] = a * x[row] + b * x0[row]
        if c:
            x_next[row] += c * x0_prev[row]
        if d:
            seed, step = int(seeds[row]) % 2**64, int(steps[row])
            words = (noise_word(seed, 1, step, i) for i in range(x[row].size))
            noise = [float(word_to_normal(word)) for word in words]
            x_next[row] += d * np.array(noise).reshape(x[row].shape)
    return x_next, x0
